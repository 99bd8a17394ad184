"""What the endpoint core does for rooms of which there is nothing new: nothing. Calls are counted, not time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from kvpoll_fsm.commands import Expose, Preflight
from kvpoll_fsm.core import CoreOptions, EndpointCore
from kvpoll_fsm.deadlines import Gate
from kvpoll_fsm.effects import Do, Transmit
from kvpoll_fsm.inputs import Granted, Preflighted
from kvpoll_fsm.layout import Field, Layout
from kvpoll_fsm.messages import Beat, Frame, Hello, Packet, TransportOffer, Welcome
from kvpoll_fsm.receiver_session import ReceiverOptions
from kvpoll_fsm.selection import Policy
from kvpoll_fsm.sender_session import SenderOptions, SenderSession
from kvpoll_fsm.session import RoomKey

TOOLS = ("memory",)


class Two:
    """A sending and a receiving core whose packets arrive at once, unless they are lost."""

    def __init__(self, blocks: int = 4) -> None:
        layout, offers = Layout(1, [Field("x", "int8")]), (TransportOffer("memory", b"there"),)
        self.tx, self.rx = (EndpointCore(CoreOptions(name * 16, layout, offers, blocks)) for name in (b"s", b"r"))
        self.conn = self.rx.connect("tx")
        self.said: list[Packet] = []
        self.settle()

    def open(self, rooms: range) -> None:
        """Open both sides of rooms; as many as there are blocks begin to wait for data, the others for blocks."""
        for room in rooms:
            self.tx.open_sender(room, SenderOptions(1, Policy.parse("memory"), TOOLS, 1))
            self.rx.open_receiver(room, 0, ReceiverOptions(self.conn, 1, 1, 1, "drain"))
            self.settle()

    def settle(self, *, lose: bool = False) -> None:
        """Carry out all effects; packets of the receiving core may be lost."""
        busy = True
        while busy:
            busy = self._turn(self.tx, self.rx, lose=False)
            busy = self._turn(self.rx, self.tx, lose=lose) or busy

    def tick(self, *, host_alive: bool = True, lose: bool = False) -> list[Beat]:
        """A heartbeat of the receiving core; returns what it said of rooms."""
        self.said.clear()
        self.rx.heartbeat_tick(host_alive)
        self.settle(lose=lose)
        return [beat for packet in self.said if isinstance(packet, Frame) for beat in packet.beats if beat.to_sender]

    def quiet(self) -> None:
        """Heartbeats, until neither side has anything new to say."""
        for _ in range(3):
            for core in (self.tx, self.rx):
                core.heartbeat_tick(host_alive=True)
                self.settle()

    def _turn(self, core: EndpointCore, other: EndpointCore, *, lose: bool) -> bool:
        core.flush(ack_now=True)
        effects = core.drain()
        for effect in effects:
            if isinstance(effect, Transmit) and not lose:
                self.said.append(effect.packet)
                arrive(other, effect.packet)
            elif isinstance(effect, Do) and effect.key is not None:
                answer(core, effect.key, effect.command)
        return bool(effects)


def arrive(core: EndpointCore, packet: Packet) -> None:
    if isinstance(packet, Hello):
        core.hello(packet)
    elif isinstance(packet, Welcome):
        core.welcome(1, packet)
    elif isinstance(packet, Frame):
        core.frame(packet)


def answer(core: EndpointCore, key: RoomKey, command: Any) -> None:
    if isinstance(command, Expose):
        core.feed(key, Granted(command.part, command.blocks, len(command.blocks), (("memory", b"token"),)))
    elif isinstance(command, Preflight):
        core.feed(key, Preflighted(command.rank, command.conn, command.transport, ok=True))


def calls_of(action: Callable[[], object]) -> int:
    """How many Python functions an action calls."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(before)
    return calls


def ticks(two: Two) -> None:
    for core in (two.tx, two.rx):
        core.heartbeat_tick(host_alive=True)
        core.resend_tick()
        two.settle()


def test_a_tick_costs_the_same_however_many_rooms_wait() -> None:
    counts = {}
    two = Two()
    for rooms in (100, 2_000):
        two.open(range(len(two.tx.sessions), rooms))
        two.quiet()
        gates = [session.gate for session in two.rx.sessions.values()]
        assert (gates.count(Gate.queued), gates.count(Gate.waiting_blocks)) == (4, rooms - 4)
        counts[rooms] = calls_of(lambda: ticks(two))
    assert counts[100] == counts[2_000]


def test_the_end_of_a_room_costs_the_same_however_many_peers_there_are() -> None:
    counts = []
    for peers in (1, 50):
        two = Two()
        for number in range(peers):
            two.rx.connect(f"other {number}")
        two.open(range(1))
        (key,) = two.rx.sessions
        counts.append(calls_of(lambda two=two, key=key: two.rx.clear(key)))  # type: ignore[misc]
        two.settle()
        assert not two.rx.sessions
    assert counts[0] == counts[1]


def test_what_was_said_is_not_said_again_once_it_was_heard() -> None:
    two = Two(blocks=1)
    two.open(range(3))
    assert [(beat.room, beat.gate) for beat in two.tick()] == [
        (0, "queued"),
        (1, "waiting_blocks"),
        (2, "waiting_blocks"),
    ]
    two.quiet()
    assert two.tick() == []


@pytest.mark.parametrize("times", [1, 3])
def test_what_was_lost_is_said_again_as_it_stands_by_then(times: int) -> None:
    two = Two(blocks=1)
    two.open(range(2))
    two.quiet()
    two.open(range(2, 4))
    for _ in range(times):
        two.tick(lose=True)
    two.rx.clear(next(key for key in two.rx.sessions if key.room == 3))
    two.settle()
    assert [(beat.room, beat.gate) for beat in two.tick()] == [(2, "waiting_blocks")]
    two.quiet()
    assert two.tick() == []


def test_a_peer_that_confirms_nothing_is_told_again_and_again() -> None:
    two = Two(blocks=1)
    two.open(range(2))
    for _ in range(3):
        two.rx.heartbeat_tick(host_alive=True)
        frames = [e.packet for e in two.rx.drain() if isinstance(e, Transmit) and isinstance(e.packet, Frame)]
        assert [beat.room for frame in frames for beat in frame.beats] == [0, 1]
        arrive(two.tx, msgspec.structs.replace(frames[-1], beat_serial=0))
        two.settle()


def test_a_host_that_falls_silent_is_told_of_for_all_rooms_once() -> None:
    two = Two(blocks=1)
    two.open(range(3))
    two.quiet()
    assert [beat.host_alive for beat in two.tick(host_alive=False)] == [False] * 3
    assert two.tick(host_alive=False) == []
    assert [beat.host_alive for beat in two.tick()] == [True] * 3


def test_a_sender_that_opens_late_learns_that_its_receiver_waits_for_blocks() -> None:
    """When the receiver said so first, there was no room it could be said of."""
    two = Two(blocks=1)
    two.rx.open_receiver(0, 0, ReceiverOptions(two.conn, 1, 1, 1, "drain"))
    two.rx.open_receiver(1, 0, ReceiverOptions(two.conn, 1, 1, 1, "drain"))
    two.settle()
    two.quiet()
    key = two.tx.open_sender(1, SenderOptions(1, Policy.parse("memory"), TOOLS, 1))
    two.settle()
    two.quiet()
    session = two.tx.sessions[key]
    assert isinstance(session, SenderSession)
    assert session.slots[0].waits_for_blocks
    assert session.told_gate is Gate.waiting_blocks


def test_beats_that_arrive_late_replace_nothing() -> None:
    two = Two(blocks=1)
    two.open(range(2))
    two.rx.heartbeat_tick(host_alive=True)
    old = [
        e.packet for e in two.rx.drain() if isinstance(e, Transmit) and isinstance(e.packet, Frame) and e.packet.beats
    ]
    two.quiet()
    slot = next(s for k, s in two.tx.sessions.items() if k.room == 1).slots[0]  # type: ignore[attr-defined]
    assert slot.waits_for_blocks
    two.tick(host_alive=False)
    assert not slot.waits_for_blocks
    arrive(two.tx, old[0])
    assert not slot.waits_for_blocks


def test_a_beat_follows_what_was_said_before_it_in_the_same_turn() -> None:
    """A beat holds until it is replaced: one that came before Opened would be forgotten with it, for good."""
    two = Two()
    two.rx.open_receiver(0, 0, ReceiverOptions(two.conn, 1, 1, 1, "drain"))
    two.settle()
    two.tx.open_sender(0, SenderOptions(1, Policy.parse("memory"), TOOLS, 1))
    while (effects := two.tx.drain()) and not any(isinstance(e, Transmit) for e in effects):
        for effect in effects:
            if isinstance(effect, Do) and effect.key is not None:
                answer(two.tx, effect.key, effect.command)
    two.tx.heartbeat_tick(host_alive=True)
    sent = [e.packet for e in two.tx.drain() if isinstance(e, Transmit) and isinstance(e.packet, Frame)]
    assert [bool(packet.messages) for packet in sent] == [True, False]
    assert sent[1].beats
