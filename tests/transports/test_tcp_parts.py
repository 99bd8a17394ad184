"""The parts of the tcp transport that need no socket."""

from __future__ import annotations

import select
import struct
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpoll_common.grants import LIED, Grant, Grants
from kvpoll_common.outbox import Outbox
from kvpoll_fsm.errors import MalformedMessage
from kvpoll_fsm.spi import Completion, Done, Failed, Fenced, Progress, Range, Write
from kvpoll_tcp import wire
from kvpoll_tcp.backlog import Backlog, Frame, Job, Piece, cut
from kvpoll_tcp.crew import Crew
from kvpoll_tcp.mailbox import Mailbox
from kvpoll_tcp.sockets import advance
from kvpoll_tcp.wire import FRAME_NBYTES, MAX_ENTRIES, Ack, Head, Verdict

TOKEN = b"t" * 16

# Wire format


def test_heads_read_back() -> None:
    entries = [(1, 5, 10), (65535, 7, 1 << 62)]
    head = Head(1 << 63, 9, True, 12, 2, TOKEN)
    packed = head.pack(entries)
    assert Head.unpack(packed) == head
    assert head.unpack_entries(packed[wire.HEAD_NBYTES :]) == entries
    assert len(packed) == wire.HEAD_NBYTES + 2 * wire.ENTRY_NBYTES


def test_the_wire_format_does_not_change_by_accident() -> None:
    assert Head(2, 1, True, 5, 1, TOKEN).pack([(3, 5, 4)]).hex() == (
        "4b5601010100000002000000000000000500000001000000" + TOKEN.hex() + "03000000050000000400000000000000"
    )
    assert Ack(2, 1, Verdict.revoked).pack().hex() == "4b560203010000000200000000000000"


@given(st.binary(min_size=wire.HEAD_NBYTES, max_size=wire.HEAD_NBYTES), st.binary(max_size=80))
def test_any_bytes_are_a_frame_or_malformed(data: bytes, entries: bytes) -> None:
    try:
        head = Head.unpack(data)
        head.unpack_entries(entries[: len(entries) // 16 * 16])
    except MalformedMessage:
        return
    assert head.nbytes <= FRAME_NBYTES


@given(st.integers(0, 1 << 16), st.integers(0, 1 << 32), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9))))
def test_heads_with_odd_sizes_are_malformed(count: int, nbytes: int, sizes: list[tuple[int, int]]) -> None:
    entries = [(region, size, 0) for region, size in sizes]
    try:
        data = Head(0, 0, False, nbytes, count, TOKEN).pack(entries)
    except struct.error:
        return
    try:
        read = Head.unpack(data).unpack_entries(data[wire.HEAD_NBYTES :])
    except MalformedMessage:
        return
    assert read == entries
    assert sum(size for _, size, _ in read) == nbytes


def test_answers_read_back() -> None:
    acks = [Ack(n, n, Verdict(n)) for n in range(4)]
    assert Ack.unpack_all(b"".join(ack.pack() for ack in acks)) == acks
    assert all(verdict.reason for verdict in Verdict)


# Frames

WRITES = st.lists(
    st.builds(Write, st.integers(0, 2), st.integers(0, 9), st.integers(0, 9), st.integers(1, 2 * FRAME_NBYTES)),
    min_size=1,
    max_size=6,
)


def pieces_of(writes: list[Write]) -> list[Piece]:
    return [(write.region, write.src_offset, write.dst_offset, write.nbytes) for write in writes]


@given(WRITES)
def test_a_job_is_cut_as_its_writes_are(writes: list[Write]) -> None:
    job = Job(3, writes, sum(write.nbytes for write in writes), TOKEN)
    frames = []
    while job.has_more:
        frames.append(job.take_frame()[0])
    assert [(each.nbytes, list(each.pieces)) for each in frames] == list(cut(pieces_of(writes)))
    assert [each.index for each in frames] == list(range(len(frames)))
    assert [each.last for each in frames] == [False] * (len(frames) - 1) + [True]


@given(WRITES)
def test_frames_carry_each_byte_once_and_in_order(writes: list[Write]) -> None:
    pieces = iter([piece for _, frame in cut(pieces_of(writes)) for piece in frame])
    for write in writes:
        done = 0
        while done < write.nbytes:
            region, src, dst, nbytes = next(pieces)
            assert (region, src, dst) == (write.region, write.src_offset + done, write.dst_offset + done)
            done += nbytes
        assert done == write.nbytes
    assert next(pieces, None) is None


@given(WRITES)
def test_frames_keep_to_the_limits(writes: list[Write]) -> None:
    frames = list(cut(pieces_of(writes)))
    assert all(nbytes == sum(size for *_, size in pieces) <= FRAME_NBYTES for nbytes, pieces in frames)
    assert all(nbytes == FRAME_NBYTES for nbytes, _ in frames[:-1])


def test_frames_keep_to_the_number_of_entries() -> None:
    frames = list(cut([(0, n, n, 1) for n in range(MAX_ENTRIES + 1)]))
    assert [len(pieces) for _, pieces in frames] == [MAX_ENTRIES, 1]


# Backlog


def backlog_of(*nbytes: int) -> Backlog:
    backlog = Backlog()
    for ticket, size in enumerate(nbytes):
        backlog.add(Job(ticket, [Write(0, 0, 0, size)], size, TOKEN))
    return backlog


def sent(backlog: Backlog) -> Frame:
    """The next frame, every byte of which has left."""
    frame, _ = backlog.take_frame()
    backlog.frame_left()
    return frame


def answer(backlog: Backlog, ticket: int, index: int = 0, verdict: Verdict = Verdict.landed) -> list[Completion]:
    return backlog.answered(Ack(ticket, index, verdict), now=5.0)


def test_a_ticket_is_done_with_its_last_answer() -> None:
    backlog = backlog_of(2 * FRAME_NBYTES)
    assert sent(backlog).last is False
    assert sent(backlog).last is True
    assert not backlog.has_frames
    assert answer(backlog, 0) == [Progress(0, FRAME_NBYTES)]
    assert answer(backlog, 0, 1) == [Done(0)]
    assert backlog.ended_nbytes == 2 * FRAME_NBYTES
    assert backlog.abandon("late") == []


def test_a_cancel_stops_what_has_not_left() -> None:
    backlog = backlog_of(3 * FRAME_NBYTES, 10)
    sent(backlog)
    assert backlog.cancel(0, 3.0) == []
    assert backlog.stopping_since == 3.0
    assert backlog.cancel(0, 4.0) == []
    assert backlog.cancel(1, 4.0) == [Failed(1, "cancelled", quiescent=True)]
    assert backlog.cancel(1, 4.0) == []
    assert not backlog.has_frames
    assert answer(backlog, 0) == [Failed(0, "cancelled", quiescent=True)]
    assert backlog.stopping_since is None


def test_a_cancel_of_what_has_all_left_may_still_be_done() -> None:
    backlog = backlog_of(10)
    sent(backlog)
    assert backlog.cancel(0, 3.0) == []
    assert answer(backlog, 0) == [Done(0)]


def test_a_refusal_stops_the_ticket_and_no_other() -> None:
    backlog = backlog_of(3 * FRAME_NBYTES, 10)
    sent(backlog)
    sent(backlog)
    assert answer(backlog, 0, 0, Verdict.revoked) == []
    assert answer(backlog, 0, 1) == [Failed(0, Verdict.revoked.reason, quiescent=True)]
    assert sent(backlog).nbytes == 10
    assert answer(backlog, 1) == [Done(1)]


def test_a_break_leaves_only_unanswered_tickets_in_doubt() -> None:
    backlog = backlog_of(10, 2 * FRAME_NBYTES, 10)
    sent(backlog)
    sent(backlog)
    answer(backlog, 0)
    assert backlog.abandon("gone") == [
        Failed(1, "gone", quiescent=False, source_free=True),
        Failed(2, "gone", quiescent=True),
    ]
    assert not backlog.has_frames


def test_answers_come_in_turn() -> None:
    backlog = backlog_of(10, 10)
    with pytest.raises(MalformedMessage):
        answer(backlog, 0)
    sent(backlog)
    with pytest.raises(MalformedMessage):
        answer(backlog, 1)


def test_an_answer_to_a_frame_that_has_not_left_is_a_lie() -> None:
    """Believed, it would free a source whose bytes are still being sent."""
    backlog = backlog_of(10, 10)
    sent(backlog)
    backlog.take_frame()
    assert answer(backlog, 0) == [Done(0)]
    with pytest.raises(MalformedMessage, match="before it was sent"):
        answer(backlog, 1)
    assert backlog.abandon("gone") == [Failed(1, "gone", quiescent=False)]
    backlog.add(Job(2, [Write(0, 0, 0, 5)], 5, TOKEN))
    sent(backlog)
    assert answer(backlog, 2) == [Done(2)]


# Grants


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 60), st.integers(1, 20)), max_size=6),
    st.tuples(st.integers(0, 1), st.integers(0, 90), st.integers(1, 30)),
)
def test_a_grant_admits_exactly_its_bytes(granted: list[tuple[int, int, int]], asked: tuple[int, int, int]) -> None:
    grant = Grant(TOKEN, [Range(*each) for each in granted])
    admitted = {(region, at) for region, offset, nbytes in granted for at in range(offset, offset + nbytes)}
    region, offset, nbytes = asked
    assert grant.admits([asked]) == all((region, at) in admitted for at in range(offset, offset + nbytes))


def test_a_fence_waits_for_everybody_inside() -> None:
    outbox = Outbox()
    grants = Grants(outbox, "tcp")
    token = grants.add([Range(0, 0, 1)])
    inside = [grants.enter(token), grants.enter(token)]
    first = grants.fence(token)
    assert grants.enter(token) is None
    second = grants.fence(token)
    for grant in inside:
        assert outbox.take() == []
        assert grant is not None
        assert grant.revoked
        grants.leave(grant)
    assert outbox.take() == [Fenced(first), Fenced(second)]
    third = grants.fence(token)
    assert outbox.take() == [Fenced(third)]


def test_a_revoked_token_is_forgotten_once_nobody_is_inside() -> None:
    grants = Grants(Outbox(), "tcp")
    token = grants.add([Range(0, 0, 1)])
    grant = grants.enter(token)
    assert grant is not None
    grants.revoke(token)
    assert grants._grants
    grants.leave(grant)
    assert not grants._grants


def test_whoever_is_inside_when_a_token_ends_is_cut_and_waited_for() -> None:
    grants, cuts, go_on = Grants(Outbox(), "tcp"), list[str](), threading.Event()
    token = grants.add([Range(0, 0, 1)])
    grants.end(b"unknown")
    grant = grants.enter(token, b"w", go_on.set)
    assert grant is not None
    assert grants.enter(token, b"w", go_on.set) is grant

    def write() -> None:
        go_on.wait()
        for number in range(2):
            cuts.append(f"write {number}")
            grants.leave(grant)

    writing = threading.Thread(target=write)
    writing.start()
    grants.end(token)
    cuts.append("ended")
    writing.join()
    assert cuts == ["write 0", "write 1", "ended"]
    assert grants.refusals.counts() == {LIED: 1}
    assert not grants._grants


def test_blocks_of_a_writer_that_does_not_go_are_not_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpoll_common.grants.LEAVE_S", 0.01)
    grants = Grants(Outbox(), "tcp")
    token = grants.add([Range(0, 0, 1)])
    assert grants.enter(token) is not None
    with pytest.raises(TimeoutError, match="still written under"):
        grants.end(token)


# Threads


def readable(fd: int | None, within_s: float = 0) -> bool:
    assert fd is not None
    return bool(select.select([fd], [], [], within_s)[0])


def test_the_outbox_is_readable_while_something_waits() -> None:
    outbox = Outbox()
    outbox.put(Done(0))
    outbox.open()
    assert outbox.take() == [Done(0)]
    outbox.put()
    assert not readable(outbox.fileno())
    for ticket in range(3):
        outbox.put(Done(ticket))
        outbox.put(Done(ticket))
        assert readable(outbox.fileno())
        assert outbox.take() == [Done(ticket)] * 2
        assert not readable(outbox.fileno())
    outbox.close()
    outbox.close()
    assert outbox.fileno() is None


def test_no_completion_is_left_behind_by_any_interleaving_of_threads() -> None:
    outbox = Outbox()
    outbox.open()

    def put() -> None:
        for ticket in range(2000):
            outbox.put(Done(ticket))

    threads = [threading.Thread(target=put) for _ in range(3)]
    for thread in threads:
        thread.start()
    taken = 0
    while taken < 6000:
        assert readable(outbox.fileno(), within_s=20)
        taken += len(outbox.take())
    for thread in threads:
        thread.join()
    outbox.close()


def test_a_mailbox_wakes_its_reader_and_keeps_the_order() -> None:
    mailbox: Mailbox[int] = Mailbox()
    assert mailbox.post(0) is False
    mailbox.open()
    taken: list[int] = []

    def read() -> None:
        while not taken or taken[-1] < 2999:
            mailbox.wait(None, 20)
            taken.extend(mailbox.take())

    reader = threading.Thread(target=read)
    reader.start()
    assert all(mailbox.post(n) for n in range(3000))
    reader.join()
    assert taken == list(range(3000))
    assert mailbox.post(1)
    assert mailbox.close() == [1]
    assert mailbox.close() == []


def test_a_mailbox_does_not_wait_for_ever_if_told() -> None:
    mailbox: Mailbox[int] = Mailbox()
    mailbox.open()
    assert mailbox.wait(None, 0.001) is False
    mailbox.close()


def test_a_crew_forgets_who_has_ended() -> None:
    crew = Crew()
    ended = threading.Event()
    for _ in range(50):
        ended.clear()
        crew.start("worker", ended.set)
        assert ended.wait(20)
    crew.join()
    assert not crew._threads
    assert not any("worker" in thread.name for thread in threading.enumerate())


@given(st.lists(st.binary(min_size=1, max_size=5), min_size=1), st.integers(0, 30))
def test_advance_drops_the_first_bytes(pieces: list[bytes], nbytes: int) -> None:
    views = [memoryview(piece) for piece in pieces]
    whole = b"".join(pieces)
    nbytes = min(nbytes, len(whole))
    advance(views, nbytes)
    assert b"".join(views) == whole[nbytes:]
    assert all(len(view) for view in views)
