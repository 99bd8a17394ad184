"""Peers of the shm transport that may not, cannot or will not keep to the rules."""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpoll_fsm.errors import MalformedMessage
from kvpoll_fsm.spi import Write
from kvpoll_fsm.testing.conformance.sides import (
    MIB,
    SIZES,
    Pair,
    Side,
    footprint,
    same,
    sealed_memfd,
    until,
    untouched,
)
from kvpoll_shm import ShmTransport, hosts
from kvpoll_shm.wire import MAX_ORDERS
from tests.transports import raw as by_hand
from tests.transports import shm_raw as raw


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair(Side(ShmTransport(), filled=True), Side(ShmTransport()))
    yield pair
    pair.close()


@pytest.fixture
def fd() -> Iterator[int]:
    fd = sealed_memfd(4096)
    yield fd
    os.close(fd)


# Who may


def test_a_wrong_secret_is_refused_and_counted(pair: Pair) -> None:
    assert raw.down(pair, raw.changed(pair.rx.transport, secret=b"s" * 32))
    refused = pair.rx.transport.refused  # type: ignore[attr-defined]
    until(lambda: refused() == {"does not know our secret": 1}, "the count")


def test_another_user_is_refused_on_both_sides(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    link = pair.tx.connect(pair.rx)
    pair.up(link)
    monkeypatch.setattr(hosts, "peer_uid", lambda sock: os.geteuid() + 1)
    caller = raw.Caller(pair.rx.transport)
    assert caller.is_cut()
    caller.close()
    assert pair.rx.transport.refused() == {"another user": 1}  # type: ignore[attr-defined]
    assert "another user" in raw.down(pair, pair.rx.transport.descriptor())
    pair.done(link.submit([Write(0, 0, 0, 10)], pair.rx.grant()))


def test_another_user_is_let_in_by_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "peer_uid", lambda sock: os.geteuid() + 1)
    pair = Pair(Side(ShmTransport(any_uid=True), filled=True), Side(ShmTransport(any_uid=True)))
    pair.done(pair.tx.connect(pair.rx).submit([Write(0, 0, 0, 10)], pair.rx.grant()))
    pair.close()


def hello(incarnation: bytes, version: int = 1) -> raw.wire.Opening:
    said = by_hand.hello(incarnation, b"n" * 32, raw.wire.KIND.magic, version, bytes(16))
    return raw.wire.Opening(said)


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_receiver_that_does_not_know_the_secret_is_given_nothing(pair: Pair, mirrored: bool) -> None:
    listening, name = raw.Impostor.listen()
    tx = pair.tx.transport
    tx.connect(raw.changed(pair.rx.transport, socket=name), [])
    impostor = raw.Impostor.accept(listening, pair.pump)
    impostor.hear()
    impostor.say(hello(raw.read_descriptor(pair.rx.transport.descriptor()).incarnation))
    said = raw.handshake.said_in(impostor.hear())
    impostor.say(raw.wire.Opening(said if mirrored else b"p" * 32))
    assert impostor.receive() == (b"", [])
    pair.until(lambda: pair.tx.seen, "the news")
    assert "does not know the peer's secret" in pair.tx.seen[-1].reason  # type: ignore[union-attr]
    impostor.close()
    listening.close()


def test_every_connection_of_a_link_says_hello_anew(pair: Pair) -> None:
    listening, name = raw.Impostor.listen()
    link = pair.tx.transport.connect(raw.changed(pair.rx.transport, socket=name), [])
    said = []
    for number in range(1, 4):
        impostor = raw.Impostor.accept(listening, pair.pump)
        said.append(raw.handshake.said_in(impostor.hear()))
        impostor.close()
        pair.until(lambda number=number: pair.tx.links.get(link.number) == [False] * number, "the news")  # type: ignore[misc]
        link.submit([Write(0, 0, 0, 10)], b"t" * 16)  # which makes the next connection
    assert len(set(said)) == 3
    listening.close()


@pytest.mark.parametrize(
    ("version", "words"), [(2, "speaks version 2"), (1, "another transport answers"), (0, "speaks version 0")]
)
def test_a_receiver_that_is_another_one(pair: Pair, version: int, words: str) -> None:
    listening, name = raw.Impostor.listen()
    pair.tx.transport.connect(raw.changed(pair.rx.transport, socket=name), [])
    impostor = raw.Impostor.accept(listening, pair.pump)
    impostor.hear()
    impostor.say(hello(b"i" * 16, version))
    pair.until(lambda: pair.tx.seen, "the news")
    assert words in pair.tx.seen[-1].reason  # type: ignore[union-attr]
    impostor.close()
    listening.close()


def play_receiver(pair: Pair, listening: socket.socket, name: str) -> tuple[raw.Impostor, Any]:
    """Be a receiver that knows the secret, up to where orders come."""
    descriptor = raw.changed(pair.rx.transport, socket=name)
    identity = raw.read_descriptor(descriptor)
    link = pair.tx.transport.connect(descriptor, [])
    peer = raw.Impostor.accept(listening, pair.pump)
    called = raw.handshake.Called(raw.wire.KIND, identity)
    called.hear(raw.handshake.said_in(peer.hear()), lambda ours: peer.say(raw.wire.Opening(ours)))
    peer.say(raw.wire.Opening(called.check(raw.handshake.said_in(peer.hear()))))
    _, fds = peer.receive()
    for fd in fds:
        with pytest.raises(PermissionError):
            mmap.mmap(fd, 4096)
        os.close(fd)
    assert len(fds) == len(SIZES)
    return peer, link


@pytest.mark.parametrize("answer", [b"", b"garbage", raw.wire.encode(raw.wire.End(99, raw.wire.Verdict.landed))])
def test_a_receiver_that_talks_nonsense_takes_the_link_down(pair: Pair, answer: bytes) -> None:
    listening, name = raw.Impostor.listen()
    peer, link = play_receiver(pair, listening, name)
    peer.say(raw.wire.Ready())
    ticket = link.submit([Write(0, 0, 0, 10)], b"t" * 16)
    assert isinstance(peer.hear(), raw.wire.Order)
    peer.say(answer) if answer else peer.close()
    end = pair.failed(ticket)
    assert end.quiescent is (answer == b"")  # its end is its word that it has stopped, nonsense is not
    assert end.source_free
    peer.close()
    listening.close()


def test_the_receiver_is_given_the_arenas_for_reading_only(pair: Pair) -> None:
    listening, name = raw.Impostor.listen()
    peer, _ = play_receiver(pair, listening, name)  # holds that they cannot be mapped for writing
    peer.close()
    listening.close()


# Peers that break the rules


Script = Callable[[raw.Caller, int], None]
ENTRY = raw.wire.pack_entries([Write(0, 0, 0, 8)])


def _after(step: str, message: raw.wire.Message | bytes, fds: bool = False) -> Script:
    def script(caller: raw.Caller, fd: int) -> None:
        if step == "proved":
            caller.prove()
        elif step == "ready":
            caller.be_ready(fd, 4096)
        elif step == "greeted":
            caller.greet()
        caller.say(message, [fd] if fds else [])

    return script


PLACE = raw.wire.Place(0, 0, 4096)
RULES: dict[str, Script] = {
    "garbage": _after("", b"garbage"),
    "too long": _after("", b"x" * 60_000),
    "proof first": _after("", raw.wire.Opening(bytes(32))),
    "order first": _after("", raw.wire.Order(1, b"t" * 16, ENTRY)),
    "another version": _after("", hello(bytes(16), version=9)),
    "file first": _after("", b"\x94", fds=True),
    "wrong proof": _after("greeted", raw.wire.Opening(bytes(32))),
    "ones own words played back": lambda caller, fd: caller.say(raw.wire.Opening(caller.greet())),
    "no proof": _after("greeted", raw.wire.Ready()),
    "fewer files than regions": _after("proved", raw.wire.Regions((PLACE, raw.wire.Place(1, 0, 9))), fds=True),
    "no regions": _after("proved", raw.wire.Cancel(1)),
    "a region longer than its file": _after("proved", raw.wire.Regions((raw.wire.Place(0, 1, 4096),)), fds=True),
    "a region twice": lambda caller, fd: (
        caller.prove(),
        caller.say(raw.wire.Regions((PLACE, PLACE)), [fd, fd]),
    )[0],
    "regions again": _after("ready", raw.wire.Regions((PLACE,)), fds=True),
    "an order with a file": _after("ready", raw.wire.Order(1, b"t" * 16, ENTRY), fds=True),
    "a cut order": _after("ready", raw.wire.Order(1, b"t" * 16, ENTRY + b"x" * 8)),
    "an empty entry": _after("ready", raw.wire.Order(1, b"t" * 16, bytes(24))),
    "too many bytes": _after("ready", raw.wire.Order(1, b"t" * 16, raw.wire.pack_entries([Write(0, 0, 0, 17 * MIB)]))),
    "answers": _after("ready", raw.wire.End(1, raw.wire.Verdict.landed)),
}


@pytest.mark.parametrize("rule", RULES)
def test_whoever_breaks_the_rules_is_cut_off_and_nobody_else(pair: Pair, rule: str) -> None:
    link = pair.tx.connect(pair.rx)
    pair.done(link.submit([Write(0, 0, 0, 10)], pair.rx.grant()))
    before = footprint()
    fd = sealed_memfd(4096)
    caller = raw.Caller(pair.rx.transport)
    RULES[rule](caller, fd)
    assert caller.is_cut()
    caller.close()
    os.close(fd)
    until(lambda: footprint() == before, "what it left")
    same([Write(0, 0, 0, 10)], pair.tx, pair.rx)
    pair.done(link.submit([Write(0, 0, 0, 10)], pair.rx.grant()))


def test_too_many_orders_at_once_end_the_connection(pair: Pair) -> None:
    link = pair.tx.connect(pair.rx)
    pair.up(link)
    caller, fd, token = raw.Caller(pair.rx.transport), sealed_memfd(4 * MIB), pair.rx.grant()
    caller.be_ready(fd, 4 * MIB)
    os.close(fd)
    caller.socket.setblocking(False)
    long = raw.wire.Order(1, token, raw.wire.pack_entries([Write(0, 0, 0, 4 * MIB)] * 4))
    short = raw.wire.Order(2, b"t" * 16, ENTRY)

    def is_cut() -> bool:
        try:
            caller.say(raw.wire.Orders((long,) * 8))
            for _ in range(4):
                caller.say(raw.wire.Orders((short,) * (MAX_ORDERS // 4)))
        except (BrokenPipeError, ConnectionResetError):
            return True
        except BlockingIOError:
            pass
        return False

    until(is_cut, "the end of the connection")
    caller.close()
    pair.done(link.submit([Write(0, 0, 0, 10)], pair.rx.grant()))


def test_a_file_that_could_be_cut_is_refused(pair: Pair) -> None:
    fd = os.memfd_create("mine", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    caller = raw.Caller(pair.rx.transport)
    caller.prove()
    caller.hand_over(fd, 4096)
    assert caller.is_cut()
    caller.close()
    os.close(fd)


def test_a_file_that_is_none_of_memory_is_refused(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4096))
    with (tmp_path / "file").open("r+b") as file:
        caller = raw.Caller(pair.rx.transport)
        caller.prove()
        caller.hand_over(file.fileno(), 4096)
        assert caller.is_cut()
        caller.close()


def test_a_source_outside_the_regions_is_refused(pair: Pair, fd: int) -> None:
    caller = raw.Caller(pair.rx.transport)
    caller.be_ready(fd, 4096)
    for number, write in enumerate((Write(0, 4090, 0, 7), Write(1, 0, 0, 1), Write(0, 1 << 60, 0, 8))):
        caller.say(raw.wire.Order(number, pair.rx.grant(), raw.wire.pack_entries([write])))
        assert caller.hear() == raw.wire.End(number, raw.wire.Verdict.no_source)
    untouched(pair.rx)
    caller.close()


def test_a_token_is_good_for_its_first_writer_only(pair: Pair) -> None:
    other = Pair(Side(ShmTransport(), filled=True), pair.rx)
    link, second = pair.tx.connect(pair.rx), other.tx.connect(pair.rx)
    token = pair.rx.grant()
    pair.done(link.submit([Write(0, 0, 0, 10)], token))
    assert other.failed(second.submit([Write(0, 0, 50, 10)], token)).quiescent
    same([Write(0, 0, 0, 10)], pair.tx, pair.rx)
    other.tx.close()


def test_strangers_make_room_for_others_and_have_little_time() -> None:
    pair = Pair(Side(ShmTransport(), filled=True), Side(ShmTransport(max_strangers=2, handshake_s=0.3)))
    strangers = [raw.Caller(pair.rx.transport) for _ in range(4)]
    assert strangers[0].is_cut()
    assert strangers[1].is_cut()
    pair.up(pair.tx.connect(pair.rx))
    for stranger in strangers:
        assert stranger.is_cut()
        stranger.close()
    assert sum(pair.rx.transport.refused().values()) == 4  # type: ignore[attr-defined]
    pair.close()


def test_connections_are_limited() -> None:
    pair = Pair(Side(ShmTransport(), filled=True), Side(ShmTransport(max_connections=1)))
    link = pair.tx.connect(pair.rx)
    pair.up(link)
    assert raw.down(pair, pair.rx.transport.descriptor())
    refused = pair.rx.transport.refused  # type: ignore[attr-defined]
    until(lambda: refused() == {"too many connections": 1}, "the count")
    pair.done(link.submit([Write(0, 0, 0, 10)], pair.rx.grant()))
    pair.close()


def test_a_receiver_that_does_not_answer_is_given_up(pair: Pair) -> None:
    tx = Side(ShmTransport(handshake_s=0.1), filled=True)
    listening, name = raw.Impostor.listen()
    link = tx.transport.connect(raw.changed(pair.rx.transport, socket=name), [])
    tx.until(lambda: tx.links.get(link.number) == [False], "the news")
    assert "did not answer in time" in str(tx.seen[-1])
    listening.close()
    tx.close()


# Decoding


@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_malformed(packet: bytes) -> None:
    try:
        message = raw.wire.decode(packet)
        if isinstance(message, raw.wire.Order):
            assert all(nbytes > 0 for _, nbytes, _, _ in message.unpack())
    except MalformedMessage:
        pass


@given(st.data())
def test_mutated_messages_are_messages_or_malformed(data: st.DataObject) -> None:
    packet = bytearray(raw.wire.encode(raw.wire.Order(7, b"t" * 16, ENTRY * 3)))
    for _ in range(data.draw(st.integers(1, 4))):
        packet[data.draw(st.integers(0, len(packet) - 1))] = data.draw(st.integers(0, 255))
    try:
        message = raw.wire.decode(bytes(packet))
        assert not isinstance(message, raw.wire.Order) or len(message.unpack()) <= 3
    except MalformedMessage:
        pass
