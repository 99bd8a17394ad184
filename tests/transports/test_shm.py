"""What the shm transport does beyond what every transport does."""

from __future__ import annotations

import errno
import mmap
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvpoll_fsm.errors import InvalidInput, KvpollError, TransportUnavailable
from kvpoll_fsm.spi import Done, Failed, LinkDown, Quiesced, Range, Region, Write
from kvpoll_shm import ShmTransport, copying, hosts
from kvpoll_shm.copying import SLICE_NBYTES, Copying
from kvpoll_shm.loop import Loop
from kvpoll_shm.wire import MAX_ORDERS
from tests.transports import shm_raw as raw
from tests.transports.harness import (
    HUGE,
    MIB,
    SIZES,
    Pair,
    Side,
    footprint,
    lease,
    same,
    sealed_memfd,
    until,
    untouched,
)
from tests.transports.suite import CANARY, TransportSuite


class TestShm(TransportSuite):
    def make(self) -> ShmTransport:
        return ShmTransport()


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


def down(pair: Pair, descriptor: bytes) -> str:
    """Why a link to this descriptor does not work."""
    link = pair.tx.transport.connect(descriptor, [])
    pair.until(lambda: pair.tx.links.get(link.number), "the news")
    (news,) = [seen for seen in pair.tx.seen if isinstance(seen, LinkDown) and seen.link == link.number]
    return news.reason


def cut_all(side: Side) -> None:
    """End all connections of a receiver, as it would itself."""
    listener = side.transport._listener  # type: ignore[attr-defined]
    side.transport._loop.post(lambda: [visitor.close() for visitor in list(listener._known)])


class Gate:
    """Holds the copying before each slice from `at` on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int = 0) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()
        self.slices = 0
        copy = Copying._copy

        def held(copying: Copying) -> Any:
            if self.slices >= at:
                self.reached.set()
                assert self.opened.wait(20)
            self.slices += 1
            return copy(copying)

        monkeypatch.setattr(Copying, "_copy", held)


# Where it works and where not


def test_a_peer_on_another_host_is_told_apart(pair: Pair) -> None:
    assert "another host" in down(pair, raw.changed(pair.rx.transport, host="00000000-0000-0000-0000-000000000000"))


def test_a_socket_nobody_listens_on(pair: Pair) -> None:
    assert "refused" in down(pair, raw.changed(pair.rx.transport, socket="kvpoll-" + "0" * 32))


def test_an_older_start_of_the_peer_is_told_apart(pair: Pair) -> None:
    assert "another transport answers" in down(pair, raw.changed(pair.rx.transport, incarnation=b"i" * 16))
    refused = pair.rx.transport.refused  # type: ignore[attr-defined]
    until(lambda: sum(refused().values()) == 1, "the count")


def test_memory_that_is_not_shared_cannot_be_sent_from_but_received_into() -> None:
    own = [bytearray(b"\x11" * MIB)]
    pair = Pair(Side(ShmTransport(), filled=True), Side(ShmTransport()))
    adopted = ShmTransport()
    adopted.start()
    region = adopted.register(Region(0, memoryview(own[0])))
    out = adopted.connect(pair.rx.transport.descriptor(), pair.rx.regions)
    seen: list[Any] = []
    until(lambda: seen.extend(adopted.completions()) or seen, "the news")
    assert seen[0].link == out.number
    assert "region 0 is not in shared memory" in seen[0].reason
    into = pair.tx.transport.connect(adopted.descriptor(), [region])
    token = adopted.grant(lease(), [Range(0, 0, MIB)])
    pair.done(into.submit([Write(0, 5, 7, 1000)], token))
    assert own[0][7:1007] == pair.tx.arenas[0][5:1005]
    adopted.close()
    pair.close()


def test_a_region_may_lie_anywhere_in_its_file() -> None:
    rx, tx = Side(ShmTransport()), ShmTransport()
    fd = sealed_memfd(1 << 14)
    os.pwrite(fd, bytes(range(256)) * 64, 0)
    tx.start()
    tx.register(Region(0, memoryview(bytearray(1000)), fd, 4097))
    link = tx.connect(rx.transport.descriptor(), rx.regions)
    ticket = link.submit([Write(0, 10, 0, 100)], rx.grant())
    seen: list[Any] = []
    until(lambda: seen.extend(tx.completions()) or Done(ticket) in seen, "the end")
    assert rx.arenas[0][:100] == bytes((4097 + 10 + n) % 256 for n in range(100))
    tx.close()
    rx.close()
    os.close(fd)


def test_without_eventfd_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "eventfd")
    with pytest.raises(TransportUnavailable, match="Linux"):
        ShmTransport().start()


@pytest.mark.parametrize("missing", ["sockets", "threads", "boot id"])
def test_a_shortage_makes_it_unavailable_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    def short(*_: object) -> None:
        raise RuntimeError("can't start new thread") if missing == "threads" else OSError("none left")

    before = footprint()
    place, name = {
        "sockets": (hosts, "seqpacket"),
        "threads": (threading.Thread, "start"),
        "boot id": (hosts, "boot_id"),
    }[missing]
    monkeypatch.setattr(place, name, short)
    with pytest.raises(TransportUnavailable, match="cannot start"):
        ShmTransport().start()
    monkeypatch.undo()
    assert footprint() == before


@pytest.mark.parametrize(
    "settings",
    [
        {"any_uid": 1},
        {"max_connections": 0},
        {"max_strangers": True},
        {"handshake_s": 0},
        {"cancel_patience_s": float("inf")},
        {"handshake_s": "5"},
    ],
)
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(settings))):
        ShmTransport(**settings)


def test_too_many_regions_are_an_error() -> None:
    with pytest.raises(InvalidInput, match="within 0 to 127"):
        ShmTransport().register(Region(128, memoryview(bytearray(8))))


def test_a_descriptor_needs_a_start_and_does_not_show_its_secret(pair: Pair) -> None:
    with pytest.raises(InvalidInput):
        ShmTransport().descriptor()
    identity = raw.read_descriptor(pair.rx.transport.descriptor())
    assert repr(identity) == f"Descriptor({identity.socket})"


@pytest.mark.parametrize("wrong", [{"version": 2}, {"host": ""}, {"socket": ""}, {"secret": b"short"}, {"socket": 7}])
def test_other_descriptors_are_refused(pair: Pair, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        pair.tx.transport.connect(raw.changed(pair.rx.transport, **wrong), [])


# Who may


def test_a_wrong_secret_is_refused_and_counted(pair: Pair) -> None:
    assert down(pair, raw.changed(pair.rx.transport, secret=b"s" * 32))
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
    assert "another user" in down(pair, pair.rx.transport.descriptor())
    pair.done(link.submit([Write(0, 0, 0, 10)], pair.rx.grant()))


def test_another_user_is_let_in_by_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "peer_uid", lambda sock: os.geteuid() + 1)
    pair = Pair(Side(ShmTransport(any_uid=True), filled=True), Side(ShmTransport(any_uid=True)))
    pair.done(pair.tx.connect(pair.rx).submit([Write(0, 0, 0, 10)], pair.rx.grant()))
    pair.close()


def test_a_receiver_that_does_not_know_the_secret_is_given_nothing(pair: Pair) -> None:
    listening, name = raw.Impostor.listen()
    tx = pair.tx.transport
    tx.connect(raw.changed(pair.rx.transport, socket=name), [])
    impostor = raw.Impostor.accept(listening)
    hello = impostor.hear()
    impostor.say(raw.wire.Hello(1, hello.incarnation, b"n" * 32))  # type: ignore[union-attr]
    assert isinstance(impostor.hear(), raw.wire.Proof)
    impostor.say(raw.wire.Proof(b"p" * 32))
    assert impostor.socket.recv(1000) == b""
    pair.until(lambda: pair.tx.seen, "the news")
    assert "does not know the peer's secret" in pair.tx.seen[-1].reason  # type: ignore[union-attr]
    impostor.close()
    listening.close()


@pytest.mark.parametrize(
    ("version", "words"), [(2, "speaks version 2"), (1, "another transport answers"), (0, "speaks version 0")]
)
def test_a_receiver_that_is_another_one(pair: Pair, version: int, words: str) -> None:
    listening, name = raw.Impostor.listen()
    pair.tx.transport.connect(raw.changed(pair.rx.transport, socket=name), [])
    impostor = raw.Impostor.accept(listening)
    impostor.hear()
    impostor.say(raw.wire.Hello(version, b"i" * 16, b"n" * 32))
    pair.until(lambda: pair.tx.seen, "the news")
    assert words in pair.tx.seen[-1].reason  # type: ignore[union-attr]
    impostor.close()
    listening.close()


def play_receiver(pair: Pair, listening: socket.socket, name: str) -> tuple[raw.Impostor, Any]:
    """Be a receiver that knows the secret, up to where orders come."""
    descriptor = raw.changed(pair.rx.transport, socket=name)
    identity = raw.read_descriptor(descriptor)
    link = pair.tx.transport.connect(descriptor, [])
    peer = raw.Impostor.accept(listening)
    theirs = peer.hear()
    assert isinstance(theirs, raw.wire.Hello)
    ours = raw.handshake.hello(identity.incarnation)
    peer.say(ours)
    assert isinstance(peer.hear(), raw.wire.Proof)
    peer.say(raw.handshake.prove(identity.secret, raw.handshake.RECEIVER, theirs, ours))
    _, fds, _, _ = socket.recv_fds(peer.socket, 1 << 16, 10)
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
    "proof first": _after("", raw.wire.Proof(bytes(32))),
    "order first": _after("", raw.wire.Order(1, b"t" * 16, ENTRY)),
    "another version": _after("", raw.wire.Hello(9, bytes(16), bytes(32))),
    "file first": _after("", b"\x94", fds=True),
    "wrong proof": _after("greeted", raw.wire.Proof(bytes(32))),
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


def test_too_many_orders_at_once_end_the_connection(pair: Pair, fd: int) -> None:
    link = pair.tx.connect(pair.rx)
    pair.up(link)
    caller = raw.Caller(pair.rx.transport)
    caller.be_ready(fd, 4096)
    caller.socket.setblocking(False)

    def is_cut() -> bool:
        try:
            for number in range(MAX_ORDERS):
                caller.say(raw.wire.Order(number, b"t" * 16, ENTRY * 1000))
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
    assert down(pair, pair.rx.transport.descriptor())
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


# Shortages and mistakes


def test_the_socket_outlives_a_shortage_of_descriptors(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    accept, shortages = socket.socket.accept, iter([errno.EMFILE, errno.ECONNABORTED, errno.EAGAIN])

    def short(self: socket.socket) -> Any:
        number = next(shortages, None)
        if number is not None:
            raise OSError(number, os.strerror(number))
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", short)
    pair.up(pair.tx.connect(pair.rx))
    assert pair.rx.transport.refused() == {"a connection cannot be accepted": 1}  # type: ignore[attr-defined]


def test_a_shortage_of_descriptors_takes_the_link_down(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    before = footprint()
    real, calls = hosts.read_only, iter([True])

    def short(fd: int) -> int:
        if next(calls, None):
            return real(fd)
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(hosts, "read_only", short)
    link = pair.tx.connect(pair.rx)
    pair.until(lambda: pair.tx.links.get(link.number), "the news")
    assert pair.tx.links[link.number] == [False]
    assert "Too many open files" in str(pair.tx.seen[-1])
    until(lambda: footprint() == before, "what it left")


def test_a_mistake_fails_the_ticket_at_hand_and_not_the_next(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    link = pair.tx.connect(pair.rx)
    pair.up(link)
    token = pair.rx.grant()
    with monkeypatch.context() as patch:
        patch.setattr(Copying, "_copy", lambda self: 1 // 0)
        pair.failed(link.submit([Write(0, 0, 0, 10)], token))
    pair.fence(token)
    pair.done(link.submit([Write(0, 0, 0, 10)], pair.rx.grant()))
    assert pair.tx.links[link.number] == [True, False, True]
    assert "ZeroDivisionError" in caplog.text


def test_a_mistake_in_reading_ends_one_connection(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    link = pair.tx.connect(pair.rx)
    pair.up(link)
    with monkeypatch.context() as patch:
        patch.setattr(copying, "SLICE_NBYTES", SLICE_NBYTES)
        patch.setattr("kvpoll_shm.receiver.Copying", lambda *_: 1 // 0)
        pair.failed(link.submit([Write(0, 0, 0, 10)], pair.rx.grant()))
    pair.done(link.submit([Write(0, 0, 0, 10)], pair.rx.grant()))
    assert "ZeroDivisionError" in caplog.text


def test_a_thread_that_fails_is_told_and_closing_still_cleans_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = footprint()
    pair = Pair(Side(ShmTransport(), filled=True), Side(ShmTransport()))
    gate = Gate(monkeypatch)
    link = pair.tx.connect(pair.rx)
    token = pair.rx.grant()
    ticket = link.submit(HUGE, token)
    assert gate.reached.wait(20)
    loop: Loop = pair.rx.transport._loop  # type: ignore[attr-defined]
    loop.post(lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    fence = pair.rx.transport.fence(token)
    gate.opened.set()
    until(lambda: loop.failure, "the thread's end")
    with pytest.raises(KvpollError, match="ZeroDivisionError"):
        pair.rx.transport.completions()
    with pytest.raises(KvpollError):
        pair.rx.pump()
    loop.failure = None
    pair.close()
    assert fence in pair.rx.fenced
    assert isinstance(pair.tx.ends[ticket], Failed)
    assert footprint() == before


# Tickets, cancels and fences


def test_a_broken_link_recovers(pair: Pair) -> None:
    link = pair.tx.connect(pair.rx)
    pair.up(link)
    for _ in range(3):
        cut_all(pair.rx)
        pair.until(lambda: not pair.tx.links[link.number][-1], "the news")
        pair.done(link.submit([Write(0, 0, 0, MIB)], pair.rx.grant()))
    assert pair.tx.links[link.number] == [True, False, True, False, True, False, True]


def test_more_tickets_than_a_connection_may_have_open(pair: Pair) -> None:
    link = pair.tx.connect(pair.rx)
    token = pair.rx.grant()
    tickets = [link.submit([Write(0, n, n, 1)], token) for n in range(MAX_ORDERS + 500)]
    pair.done(*tickets)
    same([Write(0, 0, 0, MAX_ORDERS + 500)], pair.tx, pair.rx)


def test_a_fence_ends_a_copy_at_the_end_of_its_slice(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, at=1)
    link = pair.tx.connect(pair.rx)
    token = pair.rx.grant()
    ticket = link.submit([Write(0, 0, 0, SLICE_NBYTES + 1)], token)
    assert gate.reached.wait(20)
    fence = pair.rx.transport.fence(token)
    pair.rx.pump()
    assert pair.rx.fenced == []  # the copier may still write, as far as anybody knows
    gate.opened.set()
    pair.until(lambda: pair.rx.fenced == [fence], "the fence")
    assert pair.failed(ticket) == Failed(ticket, "the receiver revoked the token in the middle of the copy", True)
    same([Write(0, 0, 0, SLICE_NBYTES)], pair.tx, pair.rx)


def test_cancels_take_effect_before_and_within_a_ticket(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, at=1)
    link = pair.tx.connect(pair.rx)
    token = pair.rx.grant()
    first, second = (link.submit(HUGE, token) for _ in range(2))
    assert gate.reached.wait(20)
    link.cancel(first)
    link.cancel(second)
    # Each cancel that was sent leaves a timer, as does the handshake.
    until(lambda: len(link.lane._reactor._clock) >= 3, "the cancels to be sent")  # type: ignore[attr-defined]
    gate.opened.set()
    assert pair.ended(first, second) == [Failed(ticket, "cancelled", True) for ticket in (first, second)]


def test_a_cancel_nobody_answers_ends_the_ticket_and_the_answer_makes_it_quiescent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = Pair(Side(ShmTransport(cancel_patience_s=0.05), filled=True), Side(ShmTransport()))
    gate = Gate(monkeypatch)
    link = pair.tx.connect(pair.rx)
    ticket = link.submit(HUGE, pair.rx.grant())
    assert gate.reached.wait(20)
    link.cancel(ticket)
    end = pair.failed(ticket)
    assert (end.quiescent, end.source_free) == (False, True)
    gate.opened.set()
    pair.until(lambda: ticket in pair.tx.quiesced, "the answer")
    pair.close()


def test_a_cancel_before_anything_was_sent(pair: Pair) -> None:
    listening, name = raw.Impostor.listen()
    link = pair.tx.transport.connect(raw.changed(pair.rx.transport, socket=name), [])
    ticket, other = (link.submit([Write(0, 0, 0, 1)], b"t" * 16) for _ in range(2))
    link.cancel(ticket)
    assert pair.failed(ticket) == Failed(ticket, "cancelled", quiescent=True)
    assert other not in pair.tx.ends
    listening.close()


def test_a_closed_link_says_when_the_receiver_has_stopped(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    link = pair.tx.connect(pair.rx)
    ticket = link.submit(HUGE, pair.rx.grant())
    assert gate.reached.wait(20)
    link.close()
    assert not pair.failed(ticket).quiescent
    assert Quiesced(ticket) not in pair.tx.seen
    gate.opened.set()
    pair.until(lambda: ticket in pair.tx.quiesced, "the receiver's end")
    assert link.lane.is_over  # type: ignore[attr-defined]


def test_close_waits_for_a_copy_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    before = footprint()
    pair = Pair(Side(ShmTransport(cancel_patience_s=20), filled=True), Side(ShmTransport()))
    gate = Gate(monkeypatch)
    link = pair.tx.connect(pair.rx)
    ticket = link.submit(HUGE, pair.rx.grant())
    assert gate.reached.wait(20)
    closing = threading.Thread(target=pair.tx.transport.close)
    closing.start()
    until(lambda: link.lane._closed, "the close")  # type: ignore[attr-defined]
    assert not link.lane.is_over  # type: ignore[attr-defined]
    gate.opened.set()
    closing.join(20)
    pair.close()
    assert ticket in pair.tx.quiesced
    assert footprint() == before


def test_close_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(Side(ShmTransport(cancel_patience_s=0.05), filled=True), Side(ShmTransport()))
    gate = Gate(monkeypatch)
    link = pair.tx.connect(pair.rx)
    ticket = link.submit(HUGE, pair.rx.grant())
    assert gate.reached.wait(20)
    pair.tx.close()
    assert ticket not in pair.tx.quiesced
    gate.opened.set()
    pair.rx.close()


def test_closed_links_are_forgotten(pair: Pair) -> None:
    for _ in range(5):
        link = pair.tx.connect(pair.rx)
        pair.up(link)
        link.close()
        assert link.lane.is_over  # type: ignore[attr-defined]
    pair.tx.connect(pair.rx)
    assert len(pair.tx.transport._links) == 1  # type: ignore[attr-defined]


def test_a_re_leased_block_keeps_its_canary(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, at=1)
    link = pair.tx.connect(pair.rx)
    token = pair.rx.grant()
    tickets = [link.submit(HUGE, token) for _ in range(3)]
    assert gate.reached.wait(20)
    fence = pair.rx.transport.fence(token)
    gate.opened.set()
    pair.until(lambda: fence in pair.rx.fenced, "the fence")
    pair.rx.arenas[0][:] = CANARY * SIZES[0]
    pair.ended(*tickets)
    assert pair.rx.arenas[0][:] == CANARY * SIZES[0]
