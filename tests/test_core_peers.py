"""The endpoint core and its peers: hello, silence, bye, restarts, overflow."""

from __future__ import annotations

import itertools

import pytest

from kvpoll_fsm import messages
from kvpoll_fsm.channel import Channel
from kvpoll_fsm.core import CoreOptions, EndpointCore, Hangup, Transmit
from kvpoll_fsm.errors import FailureCode, KVPoll
from kvpoll_fsm.layout import Field, Layout
from kvpoll_fsm.messages import Bye, Frame, Reserve, Withdraw
from kvpoll_fsm.receiver_session import ReceiverOptions
from kvpoll_fsm.selection import Policy
from kvpoll_fsm.sender_session import SenderOptions
from kvpoll_fsm.testing.hosts import Host
from kvpoll_fsm.testing.invariants import check_nothing_left
from kvpoll_fsm.testing.world import SENDER, World
from tests.worlds import BLOCK, Transfer, beat, end, rest, say, transfer, world

B, W, T, S, F = KVPoll.Bootstrapping, KVPoll.WaitingForInput, KVPoll.Transferring, KVPoll.Success, KVPoll.Failed


# Peers


def test_one_connection_to_each_address() -> None:
    one = world()
    core = one.hosts["r0"].core
    assert core.connect("a") == core.connect("a") != core.connect("b")


def test_hello_is_repeated_until_somebody_answers() -> None:
    one = World()
    one.add_host("r0", 8, BLOCK)
    key = one.open_receiver("r0", 7)
    for _ in range(7):
        one.tick("r0")
    assert [type(delivery.packet) for delivery in one.network] == [messages.Hello] * 4, "at once, then after 1, 3, 7"
    beats = 10
    for _ in range(beats):  # nobody is missed who was never there: the room's own deadline ends it
        one.tick("r0", heartbeat=True)
    assert one.session("r0", key).state is B
    one.add_host(SENDER, 8, BLOCK)
    one.run()
    assert len(one.hosts[SENDER].core.connections) == 1
    assert len(one.hosts[SENDER].core.parking) == 1


def test_layouts_that_differ_end_both_sides_with_the_difference() -> None:
    one = transfer(500)
    other = CoreOptions(b"other" + bytes(11), Layout(BLOCK, [Field("x", "int32"), Field("y", "int8")]), (), 8)
    one.world.hosts["r0"] = Host("r0", EndpointCore(other))
    one.open()
    one.world.run()
    one.assert_failed("LayoutMismatch", "x: ")
    assert one.tx.failure is not None
    assert "y: " in one.tx.failure.detail
    assert not one.tx.failure.retryable


def test_a_peer_that_is_silent_is_lost_and_one_that_beats_is_not() -> None:
    one = transfer(500).open(supply=False)
    one.world.run()
    for _ in range(20):
        beat(one.world)
    assert one.states() == [W, W]
    for _ in range(5):
        one.world.tick("r0", heartbeat=True)
        one.world.network.clear()
    assert one.rx().state is W
    one.world.tick("r0", heartbeat=True)
    failure = one.rx().failure
    assert failure is not None
    assert (failure.code, failure.detail) == (FailureCode.PeerLost, "the peer was not heard for 5 s")


def test_an_idle_connection_says_bye_and_comes_back_when_needed() -> None:
    one = transfer(500).open()
    one.world.run()
    end(one.world, one)
    for _ in range(40):
        beat(one.world)
    assert not one.world.hosts["r0"].core.connections
    assert not one.world.hosts[SENDER].core.connections
    again = Transfer(one.world, 500).open()
    one.world.run()
    again.assert_success()
    end(one.world, again)


@pytest.mark.parametrize("lost", ["bye", "silence"])
def test_a_connection_that_only_one_end_has_forgotten(lost: str) -> None:
    """The receiver comes back before the sender has missed it: its words must not be taken for old ones."""
    one = transfer(500).open()
    one.world.run()
    old = Transfer(one.world, 500, room=8)
    if lost == "silence":
        old.open(supply=False)
    one.world.run()
    one.clear()
    one.world.run()
    core = one.world.hosts["r0"].core
    for _ in range(40 if lost == "bye" else 6):
        one.world.tick("r0", heartbeat=True)
        one.world.network.clear()
    assert not core.connections
    assert len(one.world.hosts[SENDER].core.connections) == 1
    again = Transfer(one.world, 500).open()
    rest(one.world)
    again.assert_success()
    beat(one.world, 7)
    assert len(one.world.hosts[SENDER].core.connections) == 1
    if lost == "silence":
        assert old.tx.failure is not None
        assert old.tx.failure.code is FailureCode.PeerLost
        old.clear()
    end(one.world, again)


def test_frames_of_a_connection_that_has_ended_go_nowhere() -> None:
    one = transfer(500).open(supply=False)
    one.world.run()
    one.world.hosts["r0"].core.end(1, "gone")
    one.world.settle(one.world.hosts["r0"])
    last_words, one.world.network = one.world.network, []
    one.world.run()
    before = one.rx().key()
    one.world.tick(SENDER, heartbeat=True)
    assert one.world.network
    one.world.run()
    assert one.rx().key() == before
    one.world.network = last_words
    one.world.run()
    one.assert_failed("PeerLost", "gone")  # the last words of the connection told the sender


def test_bye_ends_the_rooms_of_that_peer() -> None:
    one = transfer(500).open(supply=False)
    one.world.run()
    one.world.hosts[SENDER].core.say_bye()
    one.world.settle(one.world.hosts[SENDER])
    one.world.run()
    failure = one.rx().failure
    assert failure is not None
    assert (failure.code, failure.detail) == (FailureCode.PeerLost, "the peer said bye")


def test_who_ends_a_connection_says_so_in_case_it_is_heard() -> None:
    """A peer taken for lost learns at once what became of its rooms, and that it must come anew."""
    one = transfer(500).open(supply=False)
    one.world.run()
    for _ in range(6):
        one.world.tick(SENDER, heartbeat=True)
    assert one.tx.state is F
    one.world.run()
    one.assert_failed("PeerLost", "the peer was not heard for 5 s", rank=0)
    assert not one.world.hosts["r0"].core.connections
    end(one.world, one)


def test_nothing_after_a_bye_is_heard() -> None:
    """A connection that ended in the middle of a frame takes the rest of it along."""
    one = transfer(500)
    one.open_receiver()
    one.world.run()
    core = one.world.hosts[SENDER].core
    reserve = Reserve(room=50, rank=0, ranks=1, receiver_generation=9)
    withdraw_it = Withdraw(room=51, rank=0, part=0, receiver_generation=9)
    say(one.world, "r0", Bye(), reserve, withdraw_it)
    assert not core.connections
    assert len(core.parking) == 0
    assert not core.owes_ack


def test_frames_from_nowhere() -> None:
    core = world().hosts["r0"].core
    stray = Frame(bytes(16), core.options.incarnation, outgoing=True)
    assert core.frame(stray) is None
    core.stranger(99, messages.Stranger(bytes(16), bytes(16)))
    core.welcome(99, messages.Welcome(incarnation=bytes(16), min_version=1, max_version=1, answers=bytes(16)))
    core.end(99, "never there")
    assert core.drain() == []


def test_a_welcome_for_somebody_else_is_not_ours() -> None:
    one = world()
    core = one.hosts["r0"].core
    conn = core.connect("there")
    hello = next(effect.packet for effect in core.drain() if isinstance(effect, Transmit))
    assert isinstance(hello, messages.Hello)
    fields = {"min_version": 1, "max_version": 1, "fields": hello.fields}
    core.welcome(conn, messages.Welcome(incarnation=b"p" * 16, answers=bytes(16), **fields))
    assert core.connections[conn].peer is None
    core.welcome(conn, messages.Welcome(incarnation=b"p" * 16, answers=hello.incarnation, **fields))
    assert core.connections[conn].peer == b"p" * 16
    core.welcome(conn, messages.Welcome(incarnation=b"q" * 16, answers=hello.incarnation, **fields))
    assert conn not in core.connections
    assert Hangup(conn) in core.drain()


def overflowing(monkeypatch: pytest.MonkeyPatch, limit: int) -> World:
    def small(self: Channel, source: bytes, target: bytes | None, outgoing: bool, limit: int = limit) -> None:
        original(self, source, target, outgoing, limit)

    original = Channel.__init__
    monkeypatch.setattr(Channel, "__init__", small)
    return world()


def test_a_peer_that_takes_nothing_overflows_and_its_rooms_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    one = overflowing(monkeypatch, 6)
    keys = [one.open_receiver("r0", room, blocks=1) for room in range(6)]
    assert {one.session("r0", key).state for key in keys} == {B}
    last = one.open_receiver("r0", 99, blocks=1)
    assert last in one.hosts["r0"].core.sessions
    for key in (*keys, last):
        failure = one.session("r0", key).failure
        assert failure is not None
        assert failure.code is FailureCode.PeerLost
        assert "6 messages are waiting" in failure.detail
        one.clear("r0", key)
    rest(one)
    check_nothing_left(one)


def test_a_bye_that_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    one = overflowing(monkeypatch, 1)
    key = one.open_receiver("r0", 1, blocks=1)
    host = one.hosts["r0"]
    host.core.say_bye()
    assert not host.core.connections
    assert host.core.sessions[key].state is F


def test_heartbeats_of_many_rooms_are_cut_into_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpoll_fsm.peers.MAX_BEATS_PER_FRAME", 3)
    one = world()
    for room in range(8):
        one.open_receiver("r0", room, blocks=1)
    one.run()
    one.tick("r0", heartbeat=True)
    frames = [d.packet for d in one.network if isinstance(d.packet, Frame) and d.packet.beats]
    assert [len(frame.beats) for frame in frames] == [3, 3, 2]
    beats = list(itertools.chain.from_iterable(frame.beats for frame in frames))
    assert {(beat.to_sender, beat.gate, beat.host_alive) for beat in beats} == {(True, "waiting_ranks", True)}


def test_a_heartbeat_that_ends_one_connection_goes_on_with_the_others() -> None:
    """One host, two senders it waits for; both are silent."""
    one = world()
    core = one.hosts["r0"].core
    for address in ("a", "b"):
        conn = core.connect(address)
        core.connections[conn].channel.target = address.encode() * 16
    for _ in range(7):
        core.heartbeat_tick(host_alive=True)
    assert not core.connections


def test_two_endpoints_that_send_to_each_other() -> None:
    """Each has a connection of its own to the other."""
    a, b = (EndpointCore(CoreOptions(name * 16, Layout(4, [Field("x", "int8")]), (), 4)) for name in (b"a", b"b"))
    cores = {"a": a, "b": b}
    for core, peer in ((a, "b"), (b, "a")):
        conn = core.connect(peer)
        core.open_receiver(1, 0, ReceiverOptions(conn, 1, 0, 4, "drain"))
        core.open_sender(1, SenderOptions(1, Policy.parse("memory"), ("memory",), 4))
    for _ in range(5):
        for name, core in cores.items():
            other = cores["b" if name == "a" else "a"]
            core.flush(ack_now=True)
            for effect in core.drain():
                packet = effect.packet if isinstance(effect, Transmit) else None
                if isinstance(packet, messages.Hello):
                    other.hello(packet)
                elif isinstance(packet, messages.Welcome):
                    other.welcome(1, packet)
                elif isinstance(packet, Frame):
                    assert other.frame(packet) is not None
    for core in cores.values():
        assert len(core.connections) == 2
        states = {key.side: session.failure and session.failure.detail for key, session in core.sessions.items()}
        assert states["sender"] == "every rank is a dummy: there is nobody to send to"
        assert states["receiver"] == states["sender"]
