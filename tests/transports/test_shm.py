"""What the shm transport does beyond what every transport does."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from kvpoll_common.loop import Loop
from kvpoll_fsm.errors import InvalidInput, KvpollError, TransportUnavailable
from kvpoll_fsm.spi import Done, Failed, Quiesced, Range, Region, Write
from kvpoll_fsm.testing.conformance import TransportSuite
from kvpoll_fsm.testing.conformance.sides import (
    CANARY,
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
)
from kvpoll_shm import ShmTransport, copying, hosts
from kvpoll_shm.copying import SLICE_NBYTES, Copying
from kvpoll_shm.wire import MAX_ORDERS
from tests.transports import shm_raw as raw


class TestShm(TransportSuite):
    needs_fd = True
    refuses_whole = True
    is_patient = False

    def make(self) -> ShmTransport:
        return ShmTransport()


class TestShmThatIsNeverFlushed(TestShm):
    """Whoever never calls `flush` has each order sent at once."""

    def side(self, *, filled: bool = False, shared: bool = True) -> Side:
        side = super().side(filled=filled, shared=shared)
        side.never_flush()
        return side

    def spec(self) -> None:
        """The tests with other processes are run as the driver does it, above."""


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair(Side(ShmTransport(), filled=True), Side(ShmTransport()))
    yield pair
    pair.close()


def cut_all(side: Side) -> None:
    """End all connections of a receiver, as it would itself."""
    listener = side.transport._listener  # type: ignore[attr-defined]
    side.transport._loop.post(lambda: [visitor.close() for visitor in list(listener.door.known)])


# Where it works and where not


def test_a_peer_on_another_host_is_told_apart(pair: Pair) -> None:
    assert "another host" in raw.down(pair, raw.changed(pair.rx.transport, host="00000000-0000-0000-0000-000000000000"))


def test_a_socket_nobody_listens_on(pair: Pair) -> None:
    assert "refused" in raw.down(pair, raw.changed(pair.rx.transport, socket="kvpoll-" + "0" * 32))


def test_an_older_start_of_the_peer_is_told_apart(pair: Pair) -> None:
    assert "another transport answers" in raw.down(pair, raw.changed(pair.rx.transport, incarnation=b"i" * 16))
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
    pair = Pair(Side(ShmTransport(cancel_patience_s=0.1), filled=True), Side(ShmTransport()))
    gate = raw.Gate(monkeypatch)
    link = pair.tx.connect(pair.rx)
    token = pair.rx.grant()
    ticket = link.submit(HUGE, token)
    pair.until(gate.reached.is_set, "the copying")
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
    gate = raw.Gate(monkeypatch, at=1)
    link = pair.tx.connect(pair.rx)
    token = pair.rx.grant()
    ticket = link.submit([Write(0, 0, 0, SLICE_NBYTES + 1)], token)
    pair.until(gate.reached.is_set, "the copying")
    fence = pair.rx.transport.fence(token)
    pair.rx.pump()
    assert pair.rx.fenced == []  # the copier may still write, as far as anybody knows
    gate.opened.set()
    pair.until(lambda: pair.rx.fenced == [fence], "the fence")
    assert pair.failed(ticket) == Failed(ticket, "the receiver revoked the token in the middle of the copy", True)
    same([Write(0, 0, 0, SLICE_NBYTES)], pair.tx, pair.rx)


def test_cancels_take_effect_before_and_within_a_ticket(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = raw.Gate(monkeypatch, at=1)
    link = pair.tx.connect(pair.rx)
    token = pair.rx.grant()
    first, second = (link.submit(HUGE, token) for _ in range(2))
    pair.until(gate.reached.is_set, "the copying")
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
    gate = raw.Gate(monkeypatch)
    link = pair.tx.connect(pair.rx)
    ticket = link.submit(HUGE, pair.rx.grant())
    pair.until(gate.reached.is_set, "the copying")
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
    gate = raw.Gate(monkeypatch)
    link = pair.tx.connect(pair.rx)
    ticket = link.submit(HUGE, pair.rx.grant())
    pair.until(gate.reached.is_set, "the copying")
    link.close()
    assert not pair.failed(ticket).quiescent
    assert Quiesced(ticket) not in pair.tx.seen
    gate.opened.set()
    pair.until(lambda: ticket in pair.tx.quiesced, "the receiver's end")
    assert link.lane.is_over  # type: ignore[attr-defined]


def test_close_waits_for_a_copy_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    before = footprint()
    pair = Pair(Side(ShmTransport(cancel_patience_s=20), filled=True), Side(ShmTransport()))
    gate = raw.Gate(monkeypatch)
    link = pair.tx.connect(pair.rx)
    ticket = link.submit(HUGE, pair.rx.grant())
    pair.until(gate.reached.is_set, "the copying")
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
    gate = raw.Gate(monkeypatch)
    link = pair.tx.connect(pair.rx)
    ticket = link.submit(HUGE, pair.rx.grant())
    pair.until(gate.reached.is_set, "the copying")
    pair.tx.close()
    assert ticket not in pair.tx.quiesced
    gate.opened.set()
    pair.rx.close()


def test_the_driver_is_woken_for_what_takes_too_long(pair: Pair) -> None:
    tx = Side(ShmTransport(handshake_s=0.2), filled=True)
    listening, name = raw.Impostor.listen()
    link = tx.transport.connect(raw.changed(pair.rx.transport, socket=name), [])
    poller = select.poll()
    poller.register(tx.transport.fileno() or 0, select.POLLIN)
    while not tx.seen:
        assert poller.poll(20_000), "nobody woke the driver"
        tx.pump()
    assert tx.links[link.number] == [False]
    listening.close()
    tx.close()


def test_closed_links_are_forgotten(pair: Pair) -> None:
    for _ in range(5):
        link = pair.tx.connect(pair.rx)
        pair.up(link)
        link.close()
        assert link.lane.is_over  # type: ignore[attr-defined]
    pair.tx.connect(pair.rx)
    assert len(pair.tx.transport._links) == 1  # type: ignore[attr-defined]


def test_a_re_leased_block_keeps_its_canary(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = raw.Gate(monkeypatch, at=1)
    link = pair.tx.connect(pair.rx)
    token = pair.rx.grant()
    tickets = [link.submit(HUGE, token) for _ in range(3)]
    pair.until(gate.reached.is_set, "the copying")
    fence = pair.rx.transport.fence(token)
    gate.opened.set()
    pair.until(lambda: fence in pair.rx.fenced, "the fence")
    pair.rx.arenas[0][:] = CANARY * SIZES[0]
    pair.ended(*tickets)
    assert pair.rx.arenas[0][:] == CANARY * SIZES[0]
