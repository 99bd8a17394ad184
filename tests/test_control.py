from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from kvpoll_fsm import Address, AddressError, Endpoint, FailureCode, UnsupportedVersion
from kvpoll_fsm import control as control_module
from kvpoll_fsm.connection import Origin, introduction
from kvpoll_fsm.control import Control
from kvpoll_fsm.messages import (
    MAX_PACKET_NBYTES,
    PROTOCOL,
    Frame,
    Hello,
    Packet,
    Stranger,
    Welcome,
    decode,
    encode,
)
from kvpoll_fsm.security import generate_keys
from tests.helpers import LAYOUT, SOON_S, deadlines, endpoint, failed, pair, parked, transfer, until

HERE = Address.parse("tcp://127.0.0.1:0")
ME = b"m" * 16
HELLO = Hello(**introduction(ME, LAYOUT, ()))
FUTURE = (7, 9)
Socket = Any


@contextmanager
def controls(*listen: Address) -> Iterator[list[tuple[Control, Address]]]:
    """Started control planes and their addresses."""
    made = [Control(address) for address in listen]
    try:
        yield [(control, control.start()) for control in made]
    finally:
        for control in made:
            control.close()


@contextmanager
def raw(kind: int) -> Iterator[Socket]:
    """A socket of our own, which may say what it likes."""
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVTIMEO, int(SOON_S * 1000))
    socket.setsockopt(zmq.SNDTIMEO, int(SOON_S * 1000))
    try:
        yield socket
    finally:
        socket.close()
        context.term()


@contextmanager
def attacker(victim: Endpoint) -> Iterator[Socket]:
    """A DEALER at an endpoint's control port."""
    with raw(zmq.DEALER) as dealer:
        dealer.connect(victim.address.place)
        yield dealer


def next_packet(control: Control) -> tuple[Origin, bytes, Packet | UnsupportedVersion]:
    found: list[tuple[Origin, bytes, Packet | UnsupportedVersion]] = []

    def arrived() -> bool:
        control.wait(0.01)
        found.extend(control.read())
        return bool(found)

    until(arrived, "a packet")
    assert len(found) == 1
    return found[0]


def counts(victim: Endpoint) -> dict[str, int]:
    """What an attacker must not be able to change."""
    core = victim.driver.core
    names = {"sessions": len(core.sessions), "connections": len(core.connections), "parked": parked(victim)}
    return {**names, "free": victim.load().free}


# The sockets


@pytest.mark.parametrize("listen", ["tcp://127.0.0.1:0", "tcp://[::1]:0"])
def test_there_and_back(listen: str) -> None:
    with controls(Address.parse(listen), HERE) as [(server, address), (caller, _)]:
        assert address.port
        assert address.host == Address.parse(listen).host
        caller.connect(1, address)
        caller.connect(1, address)  # it is open already
        assert caller.send(1, HELLO)
        origin, identity, packet = next_packet(server)
        assert (origin, packet) == (Origin(host=Address.parse(listen).host), HELLO)
        welcome = Welcome(answers=ME, **introduction(b"s" * 16, LAYOUT, ()))
        server.route(8, identity)
        assert server.send(8, welcome)
        assert next_packet(caller) == (Origin(1), b"", welcome)
        server.hang_up(8)
        assert not server.send(8, welcome)
        assert server.reply(identity, welcome)
        assert next_packet(caller) == (Origin(1), b"", welcome)
        caller.hang_up(1)
        assert not caller.send(1, HELLO)
        caller.hang_up(1)


def test_what_cannot_be_sent_is_lost_not_raised() -> None:
    with controls(HERE) as [(control, _)]:
        assert not control.send(1, HELLO)
        assert not control.reply(b"nobody", HELLO)


def test_pain_23_a_peer_that_takes_nothing_never_blocks() -> None:
    """Beyond the bound of its queue packets are lost here; the channel sends them again."""
    with raw(zmq.DEALER) as silent, controls(HERE) as [(control, _)]:
        port = silent.bind_to_random_port("tcp://127.0.0.1")
        control.connect(1, Address("127.0.0.1", port))
        frame = Frame(ME, ME, True)
        assert any(not control.send(1, frame) for _ in range(100_000))


def test_a_port_in_use_is_an_error_that_names_it() -> None:
    with controls(HERE) as [(_, address)]:
        control = Control(address)
        with pytest.raises(AddressError, match=f"{address.port}.*cannot listen there: Address already in use"):
            control.start()
        control.close()


def test_an_address_that_is_not_ours_is_an_error() -> None:
    with pytest.raises(AddressError, match="cannot listen there"):
        Control(Address.parse("tcp://192.0.2.1:0")).start()


def test_waiting_ends_with_what_is_watched() -> None:
    event = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        with controls(HERE) as [(control, _)]:
            control.watch(event)
            assert control.wait(0.001) == set()
            os.eventfd_write(event, 1)
            assert control.wait(None) == {event}
    finally:
        os.close(event)


def test_closing_twice_and_unstarted() -> None:
    Control(HERE).close()
    with controls(HERE) as [(control, _)]:
        control.close()
        assert list(control.read()) == []
        assert not control.reply(b"x", HELLO)


# What an attacker may send


def malformed() -> list[list[bytes]]:
    hello = encode(HELLO)
    wild = msgspec.msgpack.encode
    return [
        [b""],
        [b"\x00"],
        [b"\xc1"],
        [os.urandom(300)],
        [b"\x93" * 5000],  # nested beyond any recursion
        [hello[:-1]],
        [hello[: len(hello) // 2]],
        [hello + b"\x00"],
        [hello, hello],
        [hello, b""],
        [b"", hello],
        [b""] * 30,
        [wild({"kind": "Helloo", "incarnation": ME})],
        [wild({"kind": 5})],
        [wild({"kind": "Hello"})],
        [wild({"kind": "Hello", "incarnation": b"short", "min_version": 1, "max_version": 1})],
        [wild({"kind": "Frame", "source": ME, "target": ME, "outgoing": True, "first_seq": -1})],
        [wild({"kind": "Frame", "source": ME, "target": ME, "outgoing": True, "messages": [{"kind": "Own"}]})],
        [wild([1, 2, 3])],
        [wild(None)],
        [b"\x80\x04\x95\x1e\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."],  # a pickle
    ]


def test_garbage_changes_nothing_and_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    with pair() as (tx, rx), attacker(tx) as dealer:
        before = counts(tx)
        packets = malformed()
        for number, parts in enumerate(packets, 1):
            dealer.send_multipart(parts)
            until(lambda number=number: tx.driver._control.malformed == number, f"packet {number} is counted")  # type: ignore[misc]
        assert counts(tx) == before
        for _ in range(1000):
            dealer.send(b"flood")
        until(lambda: tx.driver._control.malformed == len(packets) + 1000)
        lines = [record for record in caplog.records if "control packet dropped" in record.getMessage()]
        assert len(lines) <= 11, "a flood must not fill the log"
        transfer(tx, rx, 1)


def test_a_packet_beyond_all_bounds_is_never_read() -> None:
    """ZeroMQ ends the connection it comes by before we hold it; the next one is served."""
    with pair() as (tx, rx), attacker(tx) as dealer:
        before = counts(tx)
        dealer.send(bytes(MAX_PACKET_NBYTES + 1))
        dealer.send(b"small")
        until(lambda: tx.driver._control.malformed, "the attacker has connected again")
        assert tx.driver._control.malformed == 1
        assert counts(tx) == before
        transfer(tx, rx, 1)


def test_packets_meant_for_others_change_nothing() -> None:
    with pair() as (tx, rx), attacker(tx) as dealer:
        transfer(tx, rx, 1)
        [peer] = [c.peer for c in tx.driver.core.connections.values()]
        before = counts(tx)
        us = tx.driver.core.options.incarnation
        dealer.send(encode(Frame(ME, us, True)))  # from nobody we know
        assert decode(dealer.recv()) == Stranger(us, us)
        dealer.send(encode(Frame(ME, b"t" * 16, True)))  # to somebody else
        assert decode(dealer.recv()) == Stranger(us, b"t" * 16)
        dealer.send(encode(Welcome(answers=us, **introduction(ME, LAYOUT, ()))))  # nobody asked
        dealer.send(encode(Stranger(ME, us)))
        dealer.send(encode(Frame(us, us, False)))  # our own voice, played back
        dealer.send(encode(Frame(peer or ME, us, False)))
        dealer.send(encode(Frame(ME, us, True)))
        assert decode(dealer.recv()) == Stranger(us, us), "the first that is answered again"
        assert counts(tx) == before
        assert [c.peer for c in tx.driver.core.connections.values()] == [peer]
        transfer(tx, rx, 2)


def test_pain_14_who_only_says_hello_is_forgotten() -> None:
    with pair(deadlines=deadlines(peer_lost_s=0.5)) as (tx, rx), attacker(tx) as dealer:
        for number in range(50):
            dealer.send(encode(Hello(**introduction(bytes([number]) * 16, LAYOUT, ()))))
        until(lambda: len(tx.driver.core.connections) == 50)
        until(lambda: not tx.driver.core.connections and not tx.driver._control._routes, "silent peers are lost")
        transfer(tx, rx, 1)


# Versions


def of_the_future(packet: Hello | Welcome) -> bytes:
    return encode(msgspec.structs.replace(packet, min_version=FUTURE[0], max_version=FUTURE[1]))


def test_a_version_we_do_not_speak_is_refused_and_told(caplog: pytest.LogCaptureFixture) -> None:
    with pair() as (tx, rx), attacker(tx) as dealer:
        before = counts(tx)
        for _ in range(100):
            dealer.send(of_the_future(HELLO))
            told = decode(dealer.recv())
            assert isinstance(told, Welcome)
            assert (told.min_version, told.max_version) == PROTOCOL
            assert told.answers != ME, "it is not taken for a real welcome"
        assert counts(tx) == before
        assert tx.driver._control.malformed == 100
        warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(warnings) <= 7, "a flood must not fill the log"
        assert "7-9" in warnings[0].getMessage()
        transfer(tx, rx, 1)


def test_pain_27_a_peer_of_another_version_fails_the_room_and_says_which() -> None:
    with raw(zmq.ROUTER) as future, endpoint() as rx:
        port = future.bind_to_random_port("tcp://127.0.0.1")
        receiver = rx.receiver(1, peer=f"tcp://127.0.0.1:{port}")
        identity, hello = future.recv_multipart()
        assert isinstance(decode(hello), Hello)
        welcome = Welcome(answers=rx.driver.core.options.incarnation, **introduction(ME, LAYOUT, ()))
        future.send_multipart([identity, of_the_future(welcome)])
        failure = failed(receiver)
        assert failure.code is FailureCode.UnsupportedVersion
        assert not failure.retryable
        assert "we speak protocol versions 1-1, the peer 7-9" in failure.detail
        assert receiver.wait_quiescent(SOON_S)
        receiver.clear()
        until(lambda: not rx.driver.core.sessions)


def test_a_peer_that_never_answers_is_asked_again_until_the_deadline() -> None:
    with raw(zmq.ROUTER) as mute, endpoint(deadlines=deadlines(bootstrap_s=0.6)) as rx:
        port = mute.bind_to_random_port("tcp://127.0.0.1")
        receiver = rx.receiver(1, peer=f"tcp://127.0.0.1:{port}")
        assert [isinstance(decode(mute.recv_multipart()[1]), Hello) for _ in range(2)] == [True, True]
        assert failed(receiver).code is FailureCode.DeadlinePassed


# Keys


def keys(folder: Path, *names: str) -> dict[str, dict[str, Any]]:
    """Endpoint settings by name; all trust each other."""
    return {name: {"keys": generate_keys(folder, name)[1], "authorized": folder} for name in names}


def test_pain_24_with_keys_only_who_is_trusted_is_heard(tmp_path: Path) -> None:
    trusted = keys(tmp_path / "trusted", "tx", "rx")
    stranger = keys(tmp_path / "stranger", "eve")["eve"]
    (tmp_path / "stranger" / "tx.key").write_bytes((tmp_path / "trusted" / "tx.key").read_bytes())
    with pair(tx=trusted["tx"], rx=trusted["rx"]) as (tx, rx):
        transfer(tx, rx, 1)
        before = counts(tx)
        quick = deadlines(bootstrap_s=0.5)
        with attacker(tx) as dealer, endpoint(deadlines=quick, **stranger) as eve, endpoint() as plain:
            with suppress(zmq.Again):  # a connection that is refused may be gone already
                dealer.send(encode(HELLO), zmq.NOBLOCK)
            receiver = eve.receiver(2, peer=str(tx.address))
            with pytest.raises(AddressError, match="wants keys"):
                plain.receiver(2, peer=str(tx.address))
            with pytest.raises(AddressError, match="public key is missing"):
                rx.receiver(2, peer=tx.address.place)
            with pytest.raises(AddressError, match="not in the folder of authorized keys"):
                rx.receiver(2, peer=str(eve.address))
            until(lambda: tx.driver._control.refused, "eve is refused")
            assert failed(receiver).code is FailureCode.DeadlinePassed
            assert counts(tx) == before
        transfer(tx, rx, 3)


# What is asked


def test_only_sockets_with_something_to_read_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A try in vain costs more than the packet that has come."""
    read: list[object] = []
    arrived = control_module._arrived

    def noted(socket: Socket, most: int = 256) -> Iterator[list[zmq.Frame]]:
        read.append(socket)
        return arrived(socket, most)

    monkeypatch.setattr(control_module, "_arrived", noted)
    with raw(zmq.DEALER) as peer, controls(HERE) as [(control, address)]:
        assert list(control.read()) == []
        assert read == []
        peer.connect(address.place)
        peer.send(encode(HELLO))
        until(lambda: control.wait(0.01) == set() and control._ready)
        assert len(list(control.read())) == 1
        assert set(read) == {control._router}


# Floods


def test_one_turn_takes_no_longer_than_it_may_and_the_sockets_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood at one socket keeps neither the timers waiting nor what comes to another."""
    with raw(zmq.DEALER) as flood, raw(zmq.ROUTER) as server, controls(HERE) as [(control, address)]:
        port = server.bind_to_random_port("tcp://127.0.0.1")
        control.connect(7, Address("127.0.0.1", port))
        assert control.send(7, HELLO)
        identity, _ = server.recv_multipart()
        flood.connect(address.place)
        for _ in range(100):
            flood.send(encode(HELLO))
            server.send_multipart([identity, encode(HELLO)])
        until(lambda: control.wait(0.01) == set() and len(control._ready) == 2, "packets at both")
        now = iter(range(1_000_000))
        monkeypatch.setattr("kvpoll_fsm.control.time.monotonic", lambda: next(now) * 0.002)
        seen = [origin.conn for origin, _, _ in control.read()]
        monkeypatch.undo()
        assert 4 <= len(seen) <= 10
        assert set(zip(seen[::2], seen[1::2], strict=False)) <= {(None, 7), (7, None)}
        while len(seen) < 200:
            control.wait(0.01)
            seen += [origin.conn for origin, _, _ in control.read()]
        assert (seen.count(None), seen.count(7)) == (100, 100)
