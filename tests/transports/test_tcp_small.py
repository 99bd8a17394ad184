"""Small writes over tcp: sent and answered with few system calls, and without waking a thread that is not needed."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpoll_fsm.spi import Done, Write
from kvpoll_fsm.testing.conformance.sides import Pair, Side, same, until
from kvpoll_tcp import TcpTransport, wire
from kvpoll_tcp.inbox import INBOX_NBYTES, Inbox
from kvpoll_tcp.mailbox import Mailbox
from kvpoll_tcp.receiver import Reader
from kvpoll_tcp.sockets import Broken, Plug
from kvpoll_tcp.stream import Stream
from kvpoll_tcp.wire import Ack, Verdict
from tests.transports import raw
from tests.transports.raw import entry, frame

STREAM = bytes(range(251)) * 4_200


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair(Side(TcpTransport(), filled=True), Side(TcpTransport()))
    yield pair
    pair.close()


def lent(pair: Pair) -> Any:
    """A link whose connection is in the driver's hands."""
    link: Any = pair.tx.connect(pair.rx)
    pair.up(link)
    until(lambda: link._lanes[0]._mailbox.is_lent, "the lane's thread to have nothing to do")
    return link


def test_a_small_ticket_wakes_no_thread_of_the_sender(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    link, token, posted = lent(pair), pair.rx.grant(), []
    monkeypatch.setattr(Mailbox, "post", lambda self, order: posted.append(order))
    for n in range(20):
        pair.done(link.submit([Write(0, n * 100, n * 100, 100)], token))
    assert posted == []
    assert pair.rx.arenas[0][:2000] == pair.tx.arenas[0][:2000]


def test_what_the_kernel_does_not_take_at_once_is_left_to_the_thread(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, send, at_once = lent(pair), Stream.send, []

    def takes_little(self: Stream, views: list[memoryview], flags: int = 0) -> int:
        if not flags:
            return send(self, views)
        at_once.append(threading.current_thread().name)
        return send(self, [views[0][:7]], flags) if len(at_once) < 3 else 0

    monkeypatch.setattr(Stream, "send", takes_little)
    writes = [Write(0, 5, 11, 300_000), Write(1, 0, 1, 999)]
    pair.done(link.submit(writes, pair.rx.grant()))
    same(writes, pair.tx, pair.rx)
    assert at_once == ["MainThread"] * 3


def test_a_job_that_comes_while_a_connection_breaks_gets_the_next_one(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, pull = lent(pair), Plug.pull
    reached, opened = threading.Event(), threading.Event()

    def held(self: Plug) -> None:
        if "link" in threading.current_thread().name:
            reached.set()
            assert opened.wait(20)
        pull(self)

    monkeypatch.setattr(Plug, "pull", held)
    listener: Any = pair.rx.transport._listener  # type: ignore[attr-defined]
    next(iter(listener._known)).cut()
    pair.until(reached.is_set, "the break")
    ticket = link.submit([Write(0, 0, 0, 100)], pair.rx.grant())
    opened.set()
    assert pair.ended(ticket) == [Done(ticket)]
    assert pair.tx.links[link.number] == [True, False, True]


def test_answers_that_came_before_the_end_count() -> None:
    ours, theirs = socket.socketpair()
    acks = [Ack(number, 0, Verdict.landed) for number in range(1024)]
    theirs.sendall(b"".join(ack.pack() for ack in acks))
    theirs.close()
    ours.setblocking(True)
    stream = Stream(ours)
    assert stream.answers() == acks
    with pytest.raises(Broken, match="closed the connection"):
        stream.answers()
    ours.close()


def answers_sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many answers go together, each time some do."""
    together: list[int] = []
    answer = Reader._answer

    def counted(self: Reader) -> None:
        if self._answers:
            together.append(len(self._answers) // wire.ACK_NBYTES)
        answer(self)

    monkeypatch.setattr(Reader, "_answer", counted)
    return together


def test_small_frames_that_come_together_are_answered_together(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    together, token = answers_sent(monkeypatch), pair.rx.grant()
    with raw.Raw(pair.rx.transport.descriptor()) as visitor:
        visitor.send(b"".join(frame(token, [entry(0, 4, at)], b"four") for at in range(0, 400, 4)))
        assert [visitor.verdict() for _ in range(100)] == [Verdict.landed] * 100
    assert sum(together) == 100
    assert len(together) < 20
    assert pair.rx.arenas[0][:400] == b"four" * 100


def test_what_comes_before_nonsense_has_landed_and_is_answered(pair: Pair) -> None:
    with raw.Raw(pair.rx.transport.descriptor()) as visitor:
        visitor.send(frame(pair.rx.grant(), [entry(0, 4, 0)], b"four") + b"\xee" * 200)
        assert visitor.verdict() == Verdict.landed
        assert visitor.is_dropped()
    assert pair.rx.arenas[0][:5] == b"four\0"


@given(st.lists(st.tuples(st.integers(1, 40_000), st.integers(1, INBOX_NBYTES)), min_size=1, max_size=12))
def test_an_inbox_gives_back_what_came_in(steps: list[tuple[int, int]]) -> None:
    inbox, came, left = Inbox(), bytearray(), bytearray()
    for offered, wanted in steps:
        while not inbox.has(wanted):
            room = inbox.room(wanted)
            nbytes = min(offered, len(room))
            assert nbytes, "no room for what is wanted"
            room[:nbytes] = STREAM[len(came) : len(came) + nbytes]
            came += STREAM[len(came) : len(came) + nbytes]
            inbox.add(nbytes)
        places = [bytearray(wanted // 2 + 1), bytearray(INBOX_NBYTES)]
        views = [memoryview(place) for place in places]
        poured = inbox.pour(views)
        left += (places[0] + places[1])[:poured]
        assert sum(map(len, views)) == sum(map(len, places)) - poured
        left += inbox.take(min(3, inbox.nbytes))
    assert left == came[: len(left)]
    assert inbox.nbytes == len(came) - len(left)
