"""The control plane: who is not trusted, or speaks in another's name, changes no room, no byte and no table. Pain 24.

While each attack runs, an honest part is on its way and an honest reservation waits; both end well.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from kvpoll_fsm import Endpoint, Failure, FailureCode, KVPoll
from kvpoll_fsm.connection import introduction, name_of
from kvpoll_fsm.control import Control
from kvpoll_fsm.messages import (
    Abort,
    Beat,
    BlockGrant,
    Bye,
    Frame,
    Message,
    Packet,
    PartAck,
    Quiesced,
    Reserve,
    Resume,
    Stranger,
    Welcome,
    Withdraw,
    encode,
)
from kvpoll_fsm.zap import OTHER_PROTOCOL, UNFINISHED, UNTRUSTED, WRONG_MECHANISM, WRONG_SERVER_KEY
from tests.helpers import BRISK, LAYOUT, SOON_S, endpoint, failed, on_driver, transfer, until
from tests.security.scene import MOVING, ByHand, Scene, hello, key_settings, reserve, scene, settle

FAILURE = Failure.of(FailureCode.Aborted, "forged", state=KVPoll.Transferring)
OTHER_KEY, OTHER_NAME = "an incarnation that belongs to another key", "a frame in another peer's name"
MALFORMED = "malformed packet"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "trusted"


@pytest.fixture
def trusted(folder: Path) -> dict[str, dict[str, Any]]:
    """eve's key is trusted too: she is a peer that misbehaves."""
    return key_settings(folder, "tx", "rx", "eve")


@pytest.fixture
def locked(trusted: dict[str, dict[str, Any]]) -> Iterator[Scene]:
    with scene(trusted["tx"], trusted["rx"]) as made:
        yield made


def refused(made: Scene, *reasons: str, least: int = 1) -> None:
    """The attack has been noticed, and was counted."""
    until(lambda: sum(made.refused().get(reason, 0) for reason in reasons) >= least, f"{reasons}, {least} times")


def peer_of(end: Any) -> Any:
    """The one connection of an honest end."""
    (connection,) = end.driver.core.connections.values()
    return connection


# Strangers


Strangers = tuple[ByHand, tuple[str, ...]]


def without_keys(made: Scene) -> Strangers:
    eve = ByHand(made.tx)
    eve.say(hello(eve.name))
    return eve, (WRONG_MECHANISM, UNFINISHED)  # either side may be the first to see it and hang up


def with_an_untrusted_key(made: Scene) -> Strangers:
    eve = ByHand(made.tx)
    eve.socket.disconnect(made.tx.address.place)
    eve.curve(*zmq.curve_keypair(), made.tx.address.key or b"")
    eve.socket.connect(made.tx.address.place)
    eve.say(hello(eve.name))
    return eve, (UNTRUSTED,)


def with_the_key_of_another_server(made: Scene) -> Strangers:
    eve = ByHand(made.tx)
    eve.socket.disconnect(made.tx.address.place)
    eve.curve(*zmq.curve_keypair(), zmq.curve_keypair()[0])
    eve.socket.connect(made.tx.address.place)
    eve.say(hello(eve.name))
    return eve, (WRONG_SERVER_KEY,)


@pytest.mark.parametrize("attack", [without_keys, with_an_untrusted_key, with_the_key_of_another_server])
def test_pain_24_a_stranger_is_not_heard(locked: Scene, attack: Callable[[Scene], Strangers]) -> None:
    before = locked.settled()
    eve, reasons = attack(locked)
    with eve:
        refused(locked, *reasons)
        assert locked.state() == before
        assert len(locked.tx.driver.core.connections) == 1
    locked.finish()


def test_whoever_does_not_speak_zeromq_is_counted(locked: Scene) -> None:
    before = locked.settled()
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE".ljust(55, b"\0")
    for said, reason in ((greeting[:20], UNFINISHED), (greeting + b"\x04\x10" + b"\xee" * 16, OTHER_PROTOCOL)):
        with socket.create_connection((locked.tx.address.host, locked.tx.address.port)) as sock:
            sock.sendall(said)
            sock.shutdown(socket.SHUT_WR)
            refused(locked, reason)
    assert locked.state() == before
    locked.finish()


def test_a_flood_of_strangers_fills_no_log(locked: Scene, caplog: pytest.LogCaptureFixture) -> None:
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(52, b"\0")
    for _ in range(200):
        with socket.create_connection((locked.tx.address.host, locked.tx.address.port)) as sock:
            sock.sendall(greeting)
    refused(locked, WRONG_MECHANISM, UNFINISHED, least=200)
    total = sum(locked.refused().values())
    lines = [record for record in caplog.records if "refused plane=control" in record.getMessage()]
    assert {record.levelno for record in lines} <= {logging.WARNING, logging.INFO}
    assert 1 <= len(lines) <= 2 * total.bit_length()
    locked.finish()


# A trusted peer in another's name


def test_an_incarnation_is_bound_to_the_key_that_brought_it(locked: Scene, trusted: dict[str, dict[str, Any]]) -> None:
    """Else whoever knows a peer's incarnation would get what is said to it, and could offer memory in its name."""
    before = locked.settled()
    name = peer_of(locked.tx).peer
    with ByHand(locked.tx, trusted["eve"]) as eve:
        eve.say(hello(name))
        refused(locked, OTHER_KEY)
        assert locked.state() == before
        eve.hello()  # she is heard in her own name, and only there
    locked.finish()


@pytest.mark.parametrize(
    "message",
    [
        Abort(room=MOVING, rank=0, failure=FAILURE, sender_generation=1, receiver_generation=1, quiescent=True),
        reserve(99),
        Bye(),
    ],
)
def test_a_frame_in_another_peers_name_is_dropped(
    locked: Scene, trusted: dict[str, dict[str, Any]], message: Any
) -> None:
    before = locked.settled()
    honest = peer_of(locked.tx)
    with ByHand(locked.tx, trusted["eve"]) as eve:
        eve.hello()
        for source, outgoing in ((honest.peer, True), (honest.peer, False), (honest.channel.source, True)):
            seq = honest.channel.received + 1
            eve.say(Frame(source, honest.channel.source, outgoing, seq, honest.channel.sent, (message,)))
        eve.say(Frame(honest.peer, honest.channel.source, True))  # not even a sign of life
        refused(locked, OTHER_NAME, least=2)
        assert state_without_eve(locked) == without_eve(before)
    locked.finish()


def test_frames_that_were_heard_cannot_be_played_back(
    trusted: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every packet of the honest receiver, from its Hello on, whole and cut; over another connection."""
    heard: list[bytes] = []
    send = Control.send

    def overheard(self: Control, conn: int, packet: Packet) -> bool:
        heard.append(encode(packet))
        return send(self, conn, packet)

    monkeypatch.setattr(Control, "send", overheard)
    with scene(trusted["tx"], trusted["rx"]) as made, ByHand(made.tx, trusted["eve"]) as eve:
        before = made.settled()
        eve.hello()
        assert len(heard) >= 5
        packets = list(heard)
        for packet in packets:
            for piece in (packet, packet[:-1], packet[: len(packet) // 2], packet):
                eve.say(piece)
        refused(made, MALFORMED, least=2 * len(packets) - 2)
        assert made.refused()[OTHER_KEY] >= 2
        assert made.refused()[OTHER_NAME] >= 2
        assert state_without_eve(made) == without_eve(before)
        made.finish()


def test_old_packets_of_an_earlier_connection_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even without keys, and by the peer itself: what was said in an earlier life is void in the next."""
    heard: list[bytes] = []
    send = Control.send

    def overheard(self: Control, conn: int, packet: Packet) -> bool:
        heard.append(encode(packet))
        return send(self, conn, packet)

    monkeypatch.setattr(Control, "send", overheard)
    with endpoint() as tx:
        with endpoint() as rx:
            transfer(tx, rx, MOVING)
        until(lambda: not tx.driver.core.connections, "the goodbye")
        old = [packet for packet in heard if b"Frame" in packet]
        assert len(old) >= 4
        with endpoint() as rx, ByHand(tx) as eve:
            transfer(tx, rx, MOVING)
            settle(tx, rx)
            before = (on_driver(tx, tx.driver.core.key), tx.load())
            for packet in old:
                eve.say(packet)
            eve.say(Frame(eve.name, eve.name, True))
            until(lambda: eve.hear(Stranger).target == eve.name, "the last of them to be answered")
            assert (on_driver(tx, tx.driver.core.key), tx.load()) == before
            transfer(tx, rx, MOVING)


def gates(end: Endpoint) -> set[tuple[int, str]]:
    return {(entry["room"], entry["gate"]) for entry in end.dump()}


@pytest.mark.parametrize("keys", [True, False])
def test_a_server_cannot_speak_for_another(keys: bool, trusted: dict[str, dict[str, Any]]) -> None:
    """A receiver is connected to two senders, of which one knows the other's incarnation and works out its name."""
    own = {name: trusted[name] if keys else {} for name in trusted}
    with scene(own["tx"], own["rx"], deadlines=BRISK) as made, endpoint(**own["eve"]) as eve:
        made.rx.receiver(7, peer=str(eve.address))
        until(lambda: eve.driver.core.connections, "the second connection")
        until(lambda: (MOVING, "moving") in gates(made.rx), "a heartbeat that tells how far the sender is")
        before = state_of_rooms(made)
        receiver = made.rx.driver.core
        honest = next(c for c in receiver.connections.values() if c.address == str(made.tx.address))
        abort = Abort(room=MOVING, rank=0, failure=FAILURE, receiver_generation=1, quiescent=True)
        for message in (abort, Bye()):
            seq = honest.channel.received + 1
            assert honest.channel.source == name_of(receiver.options.incarnation, honest.number)
            forged = Frame(honest.peer or b"", honest.channel.source, False, seq, 0, (message,))
            say_to_all(eve, forged)
        until(lambda: made.rx.refused()["control"].get(OTHER_NAME, 0) == 2, "the forged frames")
        assert state_of_rooms(made) == before
        made.finish()


def say_to_all(end: Endpoint, packet: Packet) -> None:
    driver = end.driver
    on_driver(end, lambda: [driver._control.send(conn, packet) for conn in driver.core.connections])


def state_of_rooms(made: Scene) -> dict[str, Any]:
    return {end: (found["rooms"][:2], found["bytes"]) for end, found in made.state().items()}


def without_eve(state: dict[str, Any]) -> dict[str, Any]:
    """The state, of the peers the honest ones alone."""
    tx = dict(state["tx"])
    tx["peers"] = [peer for peer in tx["peers"] if peer[1]]
    return {**state, "tx": tx}


def state_without_eve(made: Scene) -> dict[str, Any]:
    return without_eve(made.state())


# Malformed, and of no room


def test_a_trusted_peer_that_talks_nonsense_harms_itself_alone(
    locked: Scene, trusted: dict[str, dict[str, Any]]
) -> None:
    before = locked.settled()
    with ByHand(locked.tx, trusted["eve"]) as eve:
        us = eve.hello()
        whole = encode(Frame(eve.name, us, True, 1, 0, (reserve(5),)))
        for cut in range(1, len(whole), 7):
            eve.say(whole[:cut])
        refused(locked, MALFORMED, least=len(range(1, len(whole), 7)))
        eve.say(Welcome(answers=us, **introduction(eve.name, LAYOUT, ())))
        eve.say(Stranger(eve.name, us))
        eve.say(Frame(us, us, False, 1, 0, (Bye(),)))
        eve.say(Frame(eve.name, us, True, 77, 1 << 40, (Bye(),)))  # far ahead, and acknowledges what was never said
        eve.say(Frame(b"x" * 16, us, True))
        eve.hear(Stranger)
        assert state_without_eve(locked) == without_eve(before)
    locked.finish()


# What plain mode does not do


def test_without_keys_whoever_knows_both_names_is_believed() -> None:
    """Why plain mode is for one machine: names are 128 random bits, but they are no proof."""
    with scene() as made, ByHand(made.tx) as eve:
        honest = peer_of(made.tx)
        seq = honest.channel.received + 1
        eve.say(Frame(honest.peer, honest.channel.source, True, seq, 0, (Bye(),)))
        assert failed(made.sender).code is FailureCode.PeerLost
        assert made.receiver.wait(SOON_S) is KVPoll.Failed
        made.faults.release()


def words_for_a_room() -> list[Message]:
    """Everything a receiver says of a room that it is part of, as right as it can be made."""
    ids = {"room": MOVING, "rank": 0, "sender_generation": 1, "receiver_generation": 1}
    unnamed = {**ids, "sender_generation": 0}
    grant = BlockGrant(1, 64, (0, 1, 2, 3), (("memory", b"t" * 16),))
    return [
        *(Abort(**each, failure=FAILURE, quiescent=True) for each in (ids, unnamed)),
        PartAck(**ids, part=0),
        PartAck(**ids, part=0, failure=FAILURE),
        Resume(**ids, sent_tokens=64, grant=grant),
        Withdraw(**ids, part=0),
        Withdraw(**unnamed, part=0),
        Quiesced(**ids),
        Reserve(**ids, ranks=1, grant=BlockGrant(0, 64, (0, 1, 2, 3), (("memory", b"t" * 16),))),
    ]


@pytest.mark.parametrize("message", words_for_a_room(), ids=lambda message: type(message).__name__)
def test_a_trusted_peer_cannot_act_for_a_rank_of_another(
    locked: Scene, trusted: dict[str, dict[str, Any]], message: Any
) -> None:
    before = locked.settled()
    with ByHand(locked.tx, trusted["eve"]) as eve:
        us = eve.hello()
        eve.frame(message)
        beat = Beat(True, MOVING, 0, 1, 1, "moving", 1 << 40, True)
        eve.say(Frame(eve.name, us, True, beats=(beat,)))
        eve.frame(Abort(room=77, rank=0, failure=FAILURE))
        until(lambda: eve.told(Quiesced).room == 77, "all of it to be taken")
        after = state_without_eve(locked)
        parked = [each for each in after["tx"]["parked"][0] if each.reserve.room != MOVING]
        assert (tuple(parked), *after["tx"]["parked"][1:]) == before["tx"]["parked"]
        for part in ("rooms", "blocks", "peers", "routes", "bytes"):
            assert after["tx"][part] == without_eve(before)["tx"][part], part
        assert after["rx"] == before["rx"]
    locked.finish()
