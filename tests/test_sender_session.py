"""The sender's session, fed by hand: who is let in, what starts a part, how it is decided, how it ends."""

from __future__ import annotations

from typing import Any

import pytest

from kvpoll_fsm import inputs, messages
from kvpoll_fsm.commands import CancelPart, CancelTimer, Command, Grant, Preflight, Release, Send, SetTimer, StartPart
from kvpoll_fsm.deadlines import Deadlines, Gate
from kvpoll_fsm.errors import Failure, FailureCode
from kvpoll_fsm.messages import (
    Abort,
    BlockGrant,
    FencePart,
    Opened,
    PartAck,
    PartOutcome,
    PartReport,
    Quiesced,
    Reserve,
    Resume,
    Withdraw,
    Withdrawn,
)
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.selection import Policy
from kvpoll_fsm.sender_session import SenderOptions, SenderSession
from kvpoll_fsm.session import RoomKey

KEY = RoomKey("sender", 7, 0, 3)
DEADLINES = Deadlines(bootstrap_s=1, input_s=2, stall_s=3, resume_s=4, room_timeout_s=5)
B, W, T, S, F = KVPoll.Bootstrapping, KVPoll.WaitingForInput, KVPoll.Transferring, KVPoll.Success, KVPoll.Failed


def grant(part: int = 0, tokens: int = 8, transports: tuple[str, ...] = ("memory",)) -> BlockGrant:
    return BlockGrant(part, tokens, (4, 2), tuple((name, name.encode()) for name in transports))


class Tx:
    """A sender's session and the ranks that speak to it, rank r through connection 10 + r."""

    def __init__(self, ranks: int = 1, required: int | None = None, transports: tuple[str, ...] = ("memory",)) -> None:
        self.ranks = ranks
        options = SenderOptions(required, Policy("prefer", transports), transports, block_tokens=4, max_part_tokens=16)
        self.session = SenderSession(KEY, DEADLINES, options)
        self.feed(inputs.Start())

    def feed(self, event: inputs.Input) -> list[Command]:
        return self.session.feed(event)

    def say(
        self, kind: type[Any], rank: int = 0, *, conn: int | None = None, generation: int = 9, **fields: Any
    ) -> Any:
        """Rank `rank` sends a message; returns the commands."""
        ids = {"room": 7, "rank": rank, "sender_generation": 0, "receiver_generation": generation}
        message = kind(**(ids | fields))
        return self.feed(inputs.MessageReceived(10 + rank if conn is None else conn, message))

    def reserve(self, rank: int = 0, *, granted: BlockGrant | None = None, dummy: bool = False, **more: Any) -> Any:
        fields = {"ranks": self.ranks, "dummy": dummy, "grant": granted if granted or dummy else grant()} | more
        return self.say(Reserve, rank, **fields)

    def preflight(self, rank: int = 0, transport: str = "memory", *, ok: bool = True) -> list[Command]:
        return self.feed(inputs.Preflighted(rank, 10 + rank, transport, ok, "" if ok else "refused"))

    def opened(self, total: int | None = 20) -> Tx:
        """All ranks are here; if a total is given, part 0 is being written."""
        for rank in range(self.ranks):
            self.reserve(rank)
        for rank in range(self.ranks):
            self.preflight(rank)
        if total is not None:
            self.supply(total)
            self.feed(inputs.Granted(0, (1, 0), 8))
        return self

    def supply(self, total: int, ready: int | None = None) -> list[Command]:
        return self.feed(inputs.Supplied(total, total if ready is None else ready, staged=True))

    def written(self, rank: int = 0, *, ok: bool = True, **more: Any) -> list[Command]:
        part = more.pop("part", self.session.part)
        return self.feed(inputs.PartWritten(rank, part, more.pop("transport", "memory"), ok, **more))

    def ack(self, rank: int = 0, failure: Failure | None = None, **more: Any) -> Any:
        return self.say(PartAck, rank, part=more.pop("part", self.session.part), failure=failure, **more)

    def part_done(self) -> Any:
        for rank in range(self.ranks):
            self.written(rank)
        return [command for rank in range(self.ranks) for command in self.ack(rank)]


def sent(commands: list[Command], kind: type[Any]) -> dict[int, Any]:
    """The messages of a kind among commands, by rank."""
    found = [command.message for command in commands if isinstance(command, Send)]
    return {message.rank: message for message in found if isinstance(message, kind)}


def first(commands: list[Command], kind: type[Any]) -> Any:
    return next(command for command in commands if isinstance(command, kind))


def kinds(commands: list[Command]) -> list[str]:
    return [type(c.message if isinstance(c, Send) else c).__name__ for c in commands]


def bad(detail: str = "wrong bytes", rank: int = 0) -> Failure:
    return Failure.of(FailureCode.ChecksumMismatch, detail, state=T, rank=rank)


# Ranks come


def test_a_part_starts_when_every_rank_has_granted_and_data_is_there() -> None:
    tx = Tx(ranks=2)
    assert kinds(tx.reserve(0)) == ["Preflight"]
    assert first(tx.reserve(1), Preflight) == Preflight(1, 11, "memory")
    assert tx.preflight(0) == []
    opened = tx.preflight(1)
    assert {rank: message.required for rank, message in sent(opened, Opened).items()} == {0: 2, 1: 2}
    assert sent(opened, Opened)[1].total_tokens is None
    assert tx.session.gate is Gate.queued
    assert first(tx.supply(20), Grant) == Grant(0, 2)
    assert tx.session.gate is Gate.waiting_blocks
    start = first(tx.feed(inputs.Granted(0, (1, 0), 8)), StartPart)
    assert (start.part, start.offset, start.tokens, start.blocks, start.attempt) == (0, 0, 8, (1, 0), 0)
    assert [(t.rank, t.conn, t.transport) for t in start.targets] == [(0, 10, "memory"), (1, 11, "memory")]
    assert tx.session.gate is Gate.moving


def test_data_may_be_there_before_the_ranks() -> None:
    tx = Tx()
    assert tx.supply(20) == []
    tx.reserve()
    commands = tx.preflight()
    assert sent(commands, Opened)[0].total_tokens == 20
    assert first(commands, Grant) == Grant(0, 2)


def test_the_engines_own_blocks_need_no_lease() -> None:
    tx = Tx().opened(None)
    start = first(tx.feed(inputs.Supplied(20, 20, staged=False)), StartPart)
    assert (start.blocks, start.tokens) == ((), 8)


def test_the_source_pool_bounds_a_part() -> None:
    tx = Tx()
    tx.reserve(granted=grant(tokens=100))
    tx.preflight()
    assert first(tx.supply(50), Grant).blocks == 4  # max_part_tokens=16, 4 tokens a block


def test_nothing_starts_before_there_is_a_token() -> None:
    tx = Tx().opened(None)
    assert tx.supply(20, 0) == []
    assert tx.session.gate is Gate.queued
    assert first(tx.supply(20, 3), Grant) == Grant(0, 1)


def test_a_dummy_counts_grants_nothing_and_hears_everything() -> None:
    tx = Tx(ranks=2)
    tx.reserve(0)
    assert tx.reserve(1, dummy=True) == []
    assert set(sent(tx.preflight(0), Opened)) == {0, 1}
    tx.supply(8)
    start = first(tx.feed(inputs.Granted(0, (0, 1), 8)), StartPart)
    assert [target.rank for target in start.targets] == [0]
    assert set(sent(tx.written(0), PartReport)) == {0}
    outcome = sent(tx.ack(0), PartOutcome)
    assert {rank: (message.state, message.is_last) for rank, message in outcome.items()} == {0: (S, True), 1: (S, True)}


def test_dummies_alone_are_nobody_to_send_to() -> None:
    tx = Tx(ranks=2)
    tx.reserve(0, dummy=True)
    tx.reserve(1, dummy=True)
    assert tx.session.failure is not None
    assert "every rank is a dummy" in tx.session.failure.detail


@pytest.mark.parametrize(
    ("required", "reservation"),
    [(1, {"ranks": 2}), (None, {"ranks": 1, "rank": 1}), (2, {"ranks": 2, "rank": 2}), (2, {"ranks": 1})],
)
def test_a_rank_that_has_no_place_is_told_and_the_room_waits_on(
    required: int | None, reservation: dict[str, int]
) -> None:
    tx = Tx(required=required)
    reservation = dict(reservation)
    rank = reservation.pop("rank", 0)
    commands = tx.reserve(rank, **reservation)
    assert kinds(commands) == ["Abort"]
    abort = sent(commands, Abort)[rank]
    assert abort.quiescent
    assert abort.receiver_generation == 9
    assert abort.failure.code is FailureCode.ProtocolError
    assert "ranks are required" in abort.failure.detail
    assert (tx.session.state, tx.session.failure, tx.session.required) == (B, None, required)
    assert abort.failure.detail in tx.session.awaited()


def test_a_later_life_takes_the_place_of_a_rank_and_the_earlier_is_told() -> None:
    tx = Tx()
    tx.reserve()
    commands = tx.say(Reserve, conn=77, generation=1, ranks=1, grant=grant())
    told = first(commands, Send)
    assert (told.conn, told.message.receiver_generation) == (10, 9)
    assert "another life of rank 0" in told.message.failure.detail
    assert first(commands, Preflight).conn == 77
    assert tx.preflight() == []  # the answer for the earlier life
    assert tx.feed(inputs.Preflighted(0, 77, "memory", True)) != []
    assert tx.session.state is W


def test_a_rank_that_is_gone_before_the_start_may_come_back() -> None:
    tx = Tx(ranks=2)
    tx.reserve(0)
    tx.reserve(1)
    tx.feed(inputs.PeerGone(11, "gone"))
    assert tx.session.state is B
    assert tx.preflight(0) == []
    tx.say(Reserve, 1, conn=50, ranks=2, grant=grant())
    tx.feed(inputs.Preflighted(1, 50, "memory", True))
    assert tx.session.state is W


# Transports


def test_the_first_transport_that_answers_carries_the_part() -> None:
    tx = Tx(transports=("a", "b"))
    assert first(tx.reserve(granted=grant(transports=("b", "a", "c"))), Preflight).transport == "a"
    assert first(tx.preflight(transport="a", ok=False), Preflight).transport == "b"
    tx.preflight(transport="b")
    tx.supply(8)
    start = first(tx.feed(inputs.Granted(0, (0, 1), 8)), StartPart)
    assert start.targets[0].transport == "b"


def test_no_transport_in_common() -> None:
    tx = Tx()
    aborts = sent(tx.reserve(granted=grant(transports=("rdma",))), Abort)
    assert aborts[0].failure.code is FailureCode.TransportUnavailable
    assert "here: memory; offered by rank 0: rdma" in aborts[0].failure.detail


def test_no_transport_answers() -> None:
    tx = Tx()
    tx.reserve()
    failure = sent(tx.preflight(ok=False), Abort)[0].failure
    assert failure.code is FailureCode.TransportUnavailable
    assert "memory to rank 0: refused" in failure.detail


def test_a_write_that_failed_is_tried_on_the_next_transport_same_range_same_part() -> None:
    tx = Tx(transports=("a", "b"))
    tx.reserve(granted=grant(transports=("a", "b")))
    tx.preflight(transport="a")
    tx.supply(20)
    tx.feed(inputs.Granted(0, (0, 1), 8))
    assert first(tx.written(ok=False, transport="a", detail="reset"), Preflight).transport == "b"
    start = first(tx.preflight(transport="b"), StartPart)
    assert (start.part, start.offset, start.tokens, start.attempt) == (0, 0, 8, 1)
    assert start.targets[0].transport == "b"
    assert tx.written(ok=True, transport="a", attempt=0) == []  # an answer of the first attempt
    assert sent(tx.written(transport="b", attempt=1), PartReport)[0].transport == "b"
    tx.ack()
    assert tx.session.parts[0].transport == "b"
    assert tx.session.state is T


def test_the_next_transport_waits_for_quiescence() -> None:
    tx = Tx(transports=("a", "b"))
    tx.reserve(granted=grant(transports=("a", "b")))
    tx.preflight(transport="a")
    tx.supply(20)
    tx.feed(inputs.Granted(0, (0, 1), 8))
    assert sent(tx.written(ok=False, transport="a", quiescent=False, source_free=False), FencePart)
    assert tx.session.gate is Gate.moving
    assert kinds(tx.feed(inputs.RankQuiesced(0, 0))) == ["Preflight"]
    assert tx.feed(inputs.RankQuiesced(0, 0)) == []


def failed_on_a(**more: Any) -> Tx:
    """A part whose write failed on the first of two transports."""
    tx = Tx(transports=("a", "b"))
    tx.reserve(granted=grant(transports=("a", "b")))
    tx.preflight(transport="a")
    tx.supply(20)
    tx.feed(inputs.Granted(0, (0, 1), 8))
    tx.written(ok=False, transport="a", detail="reset", **more)
    return tx


def test_a_rank_that_cannot_be_reached_on_the_next_transport_is_asked_why() -> None:
    tx = failed_on_a()
    report = sent(tx.preflight(transport="b", ok=False), PartReport)[0]
    assert report.failure.code is FailureCode.TransportFailed
    assert report.failure.detail == "a to rank 0: reset; b to rank 0: refused"
    assert tx.session.state is W
    tx.ack(failure=bad("its own reason"))
    assert tx.session.state is F
    assert tx.session.failure.detail == "its own reason"  # type: ignore[union-attr]


def test_quiescence_after_the_last_transport_failed_changes_nothing() -> None:
    tx = failed_on_a()
    tx.preflight(transport="b")
    assert sent(tx.written(ok=False, transport="b", attempt=1, quiescent=False), PartReport)
    assert tx.feed(inputs.RankQuiesced(0, 0)) == []
    assert tx.session.state is W


def test_a_part_s_record_says_why_other_transports_were_passed_over() -> None:
    tx = Tx(transports=("a", "b", "c", "d"))
    tx.reserve(granted=grant(transports=("b", "c", "d")))
    tx.preflight(transport="b", ok=False)
    tx.preflight(transport="c")
    tx.supply(20)
    tx.feed(inputs.Granted(0, (0, 1), 8))
    tx.written(ok=False, transport="c", detail="reset")
    tx.preflight(transport="d")
    tx.written(transport="d", attempt=1)
    tx.ack()
    (part,) = tx.session.parts
    assert part.transport == "d"
    assert part.passed_over == "a: the receiver does not have it; b to rank 0: refused; c to rank 0: reset"
    tx.say(Resume, sent_tokens=8, grant=grant(1, transports=("b", "c", "d")))
    tx.feed(inputs.Granted(1, (0, 1), 8))
    tx.written(transport="d")
    tx.ack()
    assert tx.session.parts[1].passed_over == part.passed_over


def test_a_transport_the_next_grant_does_not_offer_is_not_used() -> None:
    tx = Tx(transports=("a", "b"))
    tx.reserve(granted=grant(transports=("a", "b")))
    tx.preflight(transport="a")
    tx.supply(20)
    tx.feed(inputs.Granted(0, (0, 1), 8))
    tx.written(transport="a")
    tx.ack()
    tx.say(Resume, sent_tokens=8, grant=grant(1, transports=("a",)))
    tx.feed(inputs.Granted(1, (0, 1), 8))
    report = sent(tx.written(ok=False, transport="a", detail="reset"), PartReport)[0]
    assert (report.part, report.transport, report.failure.code) == (1, "a", FailureCode.TransportFailed)


def failed_write(**more: Any) -> tuple[Tx, PartReport]:
    """A write to the second of two ranks has failed, and there is no other transport."""
    tx = Tx(ranks=2).opened(20)
    tx.written(0)
    report = sent(tx.written(1, ok=False, detail="reset", **more), PartReport)[1]
    assert tx.session.state is W
    assert tx.session.gate is Gate.waiting_outcome
    return tx, report


def test_a_failed_write_is_reported_and_the_ranks_answer_ends_the_room() -> None:
    tx, report = failed_write()
    assert (report.offset, report.tokens, report.checksum) == (0, 8, None)
    assert report.failure == Failure.of(FailureCode.TransportFailed, "memory to rank 1: reset", state=W, rank=1)
    outcomes = sent(tx.ack(1, report.failure), PartOutcome)
    assert {message.state for message in outcomes.values()} == {F}
    assert outcomes[0].failure == outcomes[1].failure == tx.session.failure == report.failure


def test_a_part_reported_as_failed_cannot_be_acknowledged() -> None:
    """The other rank's acknowledgement is there: believed, this one would complete the part."""
    tx, _ = failed_write()
    tx.ack(0)
    tx.ack(1)
    assert tx.session.failure is not None
    assert tx.session.failure.code is FailureCode.ProtocolError
    assert not tx.session.parts


def test_a_rank_that_gave_up_has_the_first_word_on_a_failed_write() -> None:
    tx, _ = failed_write()
    tx.say(Abort, 1, failure=bad("out of memory", rank=1))
    assert tx.session.failure is not None
    assert tx.session.failure.detail == "out of memory"


def test_a_rank_that_is_gone_is_no_failure_of_the_transport() -> None:
    tx, _ = failed_write(quiescent=False)
    tx.feed(inputs.PeerGone(11, "silent"))
    assert tx.session.failure is not None
    assert (tx.session.failure.code, tx.session.failure.rank) == (FailureCode.PeerLost, 1)


def test_a_failed_write_that_may_land_still_is_told_as_such() -> None:
    tx, report = failed_write(quiescent=False)
    outcomes = sent(tx.ack(1, report.failure), PartOutcome)
    assert {rank: message.quiescent for rank, message in outcomes.items()} == {0: True, 1: False}
    assert kinds(tx.feed(inputs.RankQuiesced(1, 0))) == ["Quiesced"]


def test_all_bytes_in_place_means_that_nothing_is_in_flight() -> None:
    """Whatever else the transport says of it: what has arrived neither lands again nor is read again."""
    tx = Tx().opened(8)
    tx.written(ok=True, quiescent=False, source_free=False)
    assert kinds(tx.ack()) == ["PartOutcome", "Release", "CancelTimer", "CancelTimer"]
    assert tx.session.quiescent


# Parts


@pytest.mark.parametrize(("total", "lengths"), [(1, [1]), (8, [8]), (9, [8, 1]), (16, [8, 8]), (20, [8, 8, 4])])
def test_parts_until_the_total(total: int, lengths: list[int]) -> None:
    tx = Tx(ranks=2).opened(total)
    for part, length in enumerate(lengths):
        is_last = part == len(lengths) - 1
        reports = {**sent(tx.written(0), PartReport), **sent(tx.written(1), PartReport)}
        for rank in (0, 1):
            told = reports[rank]
            assert (told.part, told.offset, told.tokens) == (part, sum(lengths[:part]), length)
            assert (told.total_tokens, told.is_last) == (total, is_last)
        assert tx.ack(1) == []
        outcomes = sent(tx.ack(0), PartOutcome)
        assert {message.is_last for message in outcomes.values()} == {is_last}
        assert {message.state for message in outcomes.values()} == {S if is_last else T}
        if not is_last:
            assert tx.session.gate is Gate.waiting_resume
            for rank in (0, 1):
                tx.say(Resume, rank, sent_tokens=sum(lengths[: part + 1]), grant=grant(part + 1))
            tx.feed(inputs.Granted(part + 1, (0, 1), 8))
    assert tx.session.state is S
    assert tx.session.history == (B, W, *([T] if len(lengths) > 1 else []), S)
    assert [part.is_last for part in tx.session.parts] == [False] * (len(lengths) - 1) + [True]


def test_the_slowest_rank_decides_when_a_part_is_over() -> None:
    tx = Tx(ranks=3).opened()
    for rank in range(3):
        assert tx.session.gate is Gate.moving
        tx.written(rank)
    assert tx.session.gate is Gate.waiting_outcome
    assert tx.ack(2) == tx.ack(0) == []
    assert set(sent(tx.ack(1), PartOutcome)) == {0, 1, 2}


def test_a_rank_that_says_no_fails_all_at_once_and_is_named() -> None:
    tx = Tx(ranks=4).opened(8)
    for rank in range(4):
        tx.written(rank)
    tx.ack(0)
    outcomes = sent(tx.ack(2, bad(rank=99)), PartOutcome)  # the connection says which rank it is
    said = {rank: (one.state, one.failure.rank, one.failure.detail) for rank, one in outcomes.items()}
    assert said == dict.fromkeys(range(4), (F, 2, "wrong bytes"))
    assert all(outcome.is_last and outcome.quiescent for outcome in outcomes.values())
    assert tx.ack(1) == tx.ack(3) == []
    assert tx.session.history == (B, W, F)


def test_no_outcome_says_quiescent_while_a_write_is_in_flight() -> None:
    tx = Tx(ranks=2).opened(8)
    tx.written(0)
    commands = tx.ack(0, bad())
    outcomes = sent(commands, PartOutcome)
    assert {rank: outcome.quiescent for rank, outcome in outcomes.items()} == {0: True, 1: False}
    assert CancelPart(0) in commands
    assert not tx.session.quiescent
    assert tx.written(1, ok=False, quiescent=False, source_free=False) == []
    done = tx.feed(inputs.RankQuiesced(1, 0))
    assert set(sent(done, Quiesced)) == {1}
    assert Release(0) in done
    assert tx.session.quiescent


@pytest.mark.parametrize("after", [False, True])
def test_a_rank_that_has_fenced_is_not_waited_for(after: bool) -> None:
    """Nothing lands there, whatever becomes of the writer, and nobody there needs to be told."""
    tx = Tx(ranks=2).opened(8)
    tx.written(0)
    tx.say(Abort, 1, failure=bad(rank=1))
    if after:
        tx.written(1, ok=False, quiescent=False)
        assert not tx.session.quiescent
    tx.say(Quiesced, 1)
    if not after:
        tx.written(1, ok=False, quiescent=False)
    assert tx.session.quiescent


@pytest.mark.parametrize("after", [False, True])
def test_a_rank_whose_endpoint_is_gone_is_not_waited_for(after: bool) -> None:
    tx = Tx(ranks=1).opened(8)
    if after:
        tx.written(ok=False, quiescent=False)
    tx.feed(inputs.PeerGone(10, "gone"))
    if not after:
        tx.written(ok=False, quiescent=False)
    assert tx.session.quiescent


def test_source_blocks_go_back_with_the_last_reader() -> None:
    tx = Tx(ranks=2).opened(8)
    tx.feed(inputs.AbortRoom("enough"))
    assert Release(0) not in tx.written(0)
    assert Release(0) in tx.written(1)
    assert not tx.session.finished
    tx.feed(inputs.ClearRoom())
    assert tx.session.finished


def test_a_source_block_that_never_comes() -> None:
    tx = Tx().opened(None)
    tx.supply(8)
    commands = tx.feed(inputs.GrantRefused(0))
    assert sent(commands, Abort)[0].failure.code is FailureCode.PoolExhausted
    assert Release(0) in commands
    assert tx.feed(inputs.Granted(0, (0, 1), 8)) == []


def test_a_refusal_with_a_cause() -> None:
    tx = Tx().opened(None)
    tx.supply(8)
    failure = Failure.of(FailureCode.RequestTooLarge, "never", state=W)
    tx.feed(inputs.GrantRefused(0, failure))
    assert tx.session.failure is failure
    assert tx.feed(inputs.GrantRefused(0)) == []


# Withdrawals


def test_a_grant_is_given_back_before_the_start() -> None:
    tx = Tx(ranks=2)
    tx.reserve(0)
    tx.preflight(0)
    assert sent(tx.say(Withdraw, part=0), Withdrawn)[0].ok
    assert not sent(tx.say(Withdraw, part=0), Withdrawn)[0].ok  # there is none any more
    tx.reserve(1)
    tx.preflight(1)
    assert tx.session.state is B
    assert sent(tx.reserve(0), Opened)


def test_a_grant_that_will_be_used_is_not_given_back() -> None:
    tx = Tx().opened(None)
    assert not sent(tx.say(Withdraw, part=0), Withdrawn)[0].ok
    tx.supply(20)
    tx.feed(inputs.Granted(0, (0, 1), 8))
    assert not sent(tx.say(Withdraw, part=0), Withdrawn)[0].ok
    assert sent(tx.written(), PartReport)


def test_a_grant_for_the_next_part_is_given_back_until_all_ranks_have_granted() -> None:
    tx = Tx(ranks=2).opened()
    tx.part_done()
    tx.say(Resume, 0, sent_tokens=8, grant=grant(1))
    assert sent(tx.say(Withdraw, 0, part=1), Withdrawn)[0].ok
    tx.say(Resume, 0, sent_tokens=8, grant=grant(1))
    assert not sent(tx.say(Withdraw, 0, part=0), Withdrawn)[0].ok  # of an earlier part
    tx.say(Resume, 1, sent_tokens=8, grant=grant(1))
    assert not sent(tx.say(Withdraw, 0, part=1), Withdrawn)[0].ok


# Grants for the next part that come early


def granted_early(tx: Tx, *ranks: int) -> Tx:
    """All ranks know that part 0 has landed; these have granted part 1 as well."""
    for rank in range(tx.ranks):
        tx.written(rank)
    for rank in ranks:
        assert tx.say(Resume, rank, sent_tokens=0, grant=grant(1)) == []
    return tx


def test_the_next_part_begins_with_the_outcome_if_it_was_granted_before() -> None:
    tx = granted_early(Tx().opened(), 0)
    assert kinds(tx.ack()) == ["PartOutcome", "Release", "Grant", "SetTimer"]
    assert tx.session.history == (B, W, T)
    assert first(tx.feed(inputs.Granted(1, (3,), 8)), StartPart).offset == 8


def test_a_rank_that_grants_early_waits_for_one_that_does_not() -> None:
    tx = granted_early(Tx(ranks=2).opened(), 0)
    tx.ack(0)
    assert not [c for c in tx.ack(1) if isinstance(c, Grant)]
    assert tx.session.gate is Gate.waiting_resume
    assert [c for c in tx.say(Resume, 1, sent_tokens=8, grant=grant(1)) if isinstance(c, Grant)] == [Grant(1, 2)]


def test_an_early_grant_may_be_taken_back_while_its_turn_has_not_come() -> None:
    tx = granted_early(Tx().opened(), 0)
    assert sent(tx.say(Withdraw, part=1), Withdrawn)[0].ok
    assert not sent(tx.say(Withdraw, part=1), Withdrawn)[0].ok
    tx.ack()
    assert tx.session.gate is Gate.waiting_resume
    assert [c for c in tx.say(Resume, sent_tokens=8, grant=grant(1)) if isinstance(c, Grant)]


def test_an_early_grant_changes_nothing_for_the_part_under_way() -> None:
    """It offers another transport: that is reached before the next part, and the record names the one that was used."""
    tx = Tx(transports=("a", "b"))
    tx.reserve(granted=grant(transports=("a",)))
    tx.preflight(transport="a")
    tx.supply(20)
    tx.feed(inputs.Granted(0, (1, 0), 8))
    tx.written(transport="a")
    assert tx.say(Resume, sent_tokens=0, grant=grant(1, transports=("b",))) == []
    assert Preflight(0, 10, "b") in tx.ack()
    assert tx.session.parts[0].transport == "a"
    assert tx.session.gate is Gate.waiting_resume
    assert [c for c in tx.preflight(transport="b") if isinstance(c, Grant)] == [Grant(1, 2)]


def test_an_early_grant_without_a_transport_fails_the_room_at_its_turn() -> None:
    tx = Tx()
    tx.opened().written()
    tx.say(Resume, sent_tokens=0, grant=grant(1, transports=("b",)))
    tx.ack()
    assert tx.session.failure is not None
    assert tx.session.failure.code is FailureCode.TransportUnavailable


def test_an_early_grant_means_nothing_in_flight_at_the_end() -> None:
    tx = granted_early(Tx().opened(), 0)
    aborts = sent(tx.feed(inputs.AbortRoom("enough")), Abort)
    assert aborts[0].quiescent
    assert tx.session.quiescent


# What a peer must not do


def waiting(tx: Tx) -> Tx:
    return tx.opened(None)


def moving(tx: Tx) -> Tx:
    return tx.opened()


def reported(tx: Tx) -> Tx:
    moving(tx).written(0)
    return tx


def resuming(tx: Tx) -> Tx:
    moving(tx).part_done()
    return tx


def early(tx: Tx) -> Tx:
    return granted_early(tx.opened(), 0)


def last(tx: Tx) -> Tx:
    tx.opened(8).written()
    return tx


def resumed(tx: Tx) -> Tx:
    resuming(tx).say(Resume, sent_tokens=8, grant=grant(1))
    return tx


IMPOSSIBLE: dict[str, tuple[Any, type[Any], dict[str, Any]]] = {
    "an ack nobody asked for": (moving, PartAck, {"part": 0}),
    "an ack of nothing": (waiting, PartAck, {"part": 0}),
    "an ack of another part": (reported, PartAck, {"part": 1}),
    "an ack after the outcome": (resuming, PartAck, {"part": 0}),
    "a resume before the outcome": (reported, Resume, {"sent_tokens": 8, "grant": grant(1)}),
    "an early grant before its part's report": (moving, Resume, {"sent_tokens": 0, "grant": grant(1)}),
    "an early grant for the part under way": (reported, Resume, {"sent_tokens": 0, "grant": grant(0)}),
    "an early grant for the part after the next": (reported, Resume, {"sent_tokens": 0, "grant": grant(2)}),
    "an early grant after the last part": (last, Resume, {"sent_tokens": 0, "grant": grant(1)}),
    "two early grants": (early, Resume, {"sent_tokens": 0, "grant": grant(1)}),
    "a third grant": (early, Resume, {"sent_tokens": 0, "grant": grant(2)}),
    "a resume before the start": (waiting, Resume, {"sent_tokens": 0, "grant": grant(0)}),
    "a resume for another part": (resuming, Resume, {"sent_tokens": 8, "grant": grant(2)}),
    "a resume at another token": (resuming, Resume, {"sent_tokens": 7, "grant": grant(1)}),
    "a resume twice": (resumed, Resume, {"sent_tokens": 8, "grant": grant(1)}),
    "a reservation after the start": (moving, Reserve, {"ranks": 1, "grant": grant(0)}),
    "a reservation of another kind": (waiting, Reserve, {"ranks": 1, "dummy": True}),
    "a reservation with another number of ranks": (moving, Reserve, {"ranks": 3}),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_what_a_receiver_must_not_do_fails_the_room(what: str) -> None:
    reach, kind, fields = IMPOSSIBLE[what]
    tx = reach(Tx())
    commands = tx.say(kind, **fields)
    assert tx.session.state is F
    assert tx.session.failure is not None
    assert (tx.session.failure.code, tx.session.failure.rank) == (FailureCode.ProtocolError, 0)
    assert sent(commands, Abort)[0].failure == tx.session.failure


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Reserve, {"ranks": 1, "grant": grant(1)}),
        (Reserve, {"ranks": 1, "dummy": True}),
    ],
)
def test_what_a_receiver_must_not_do_before_the_start(kind: type[Any], fields: dict[str, Any]) -> None:
    tx = Tx()
    tx.say(Reserve, ranks=1)
    tx.say(kind, **fields)
    assert tx.session.failure is not None
    assert tx.session.failure.code is FailureCode.ProtocolError


def test_two_grants_for_one_part() -> None:
    tx = Tx(ranks=2)
    tx.reserve(0)
    tx.reserve(0)
    assert tx.session.failure is not None
    assert tx.session.failure.code is FailureCode.ProtocolError


def test_a_dummy_must_neither_grant_nor_ack_nor_resume() -> None:
    for kind, fields in (
        (PartAck, {"part": 0}),
        (Resume, {"sent_tokens": 8, "grant": grant(1)}),
        (Reserve, {"ranks": 2, "dummy": True, "grant": grant()}),
    ):
        tx = Tx(ranks=2)
        tx.reserve(0)
        tx.reserve(1, dummy=True)
        if kind is not Reserve:
            tx.preflight(0)
            tx.supply(20)
            tx.feed(inputs.Granted(0, (0, 1), 8))
            tx.written(0)
        if kind is Resume:
            tx.ack(0)
        tx.say(kind, 1, **fields)
        assert tx.session.failure is not None
        assert (tx.session.failure.code, tx.session.failure.rank) == (FailureCode.ProtocolError, 1)


def test_words_of_others_are_not_heard() -> None:
    """Of an unbound life, through another connection, of an unknown rank, of a kind receivers do not use."""
    tx = reported(Tx(ranks=1))
    before = tx.session.key()
    assert tx.ack(generation=8) == tx.ack(conn=99) == tx.say(PartAck, 5, part=0) == []
    assert tx.say(Opened, required=1) == tx.say(Withdrawn, part=0, ok=True) == []
    assert tx.feed(inputs.MessageReceived(10, messages.Bye())) == []
    assert tx.feed(inputs.PeerGone(99, "gone")) == []
    assert tx.feed(inputs.BeatReceived(5, Gate.waiting_blocks, 0, True)) == []
    assert tx.session.key() == before


# Ends


@pytest.mark.parametrize("reach", [waiting, moving, reported, resuming, resumed])
def test_a_receivers_abort_fails_all_and_only_says_quiesced_to_itself(reach: Any) -> None:
    tx = reach(Tx(ranks=2))
    commands = tx.say(Abort, 1, failure=Failure.of(FailureCode.Aborted, "enough", state=W, rank=1))
    assert tx.session.failure is not None
    assert (tx.session.failure.rank, tx.session.failure.detail) == (1, "enough")
    assert set(sent(commands, Abort)) == {0}
    for rank in (0, 1):
        commands += tx.written(rank, ok=False) if tx.session.slots[rank].writing else []
    assert 1 in sent(commands, Quiesced)
    assert tx.session.quiescent


@pytest.mark.parametrize("reach", [waiting, moving, reported, resuming, resumed])
def test_a_receiver_that_is_gone_fails_the_others(reach: Any) -> None:
    tx = reach(Tx(ranks=2))
    commands = tx.feed(inputs.PeerGone(10, "silent"))
    assert tx.session.failure is not None
    assert (tx.session.failure.code, tx.session.failure.rank) == (FailureCode.PeerLost, 0)
    assert sent(commands, Abort)[1].failure == tx.session.failure


def test_the_first_failure_stays() -> None:
    tx = Tx(ranks=2).opened()
    tx.feed(inputs.AbortRoom("first"))
    for event in (
        inputs.AbortRoom("second"),
        inputs.PeerGone(10, "third"),
        inputs.Crashed("fourth"),
        inputs.ClearRoom(),
        inputs.TimerFired("room", 1),
        inputs.Supplied(20, 20, True),
        inputs.Preflighted(0, 10, "memory", True),
    ):
        tx.feed(event)
    tx.ack(0, bad())
    assert tx.session.failure is not None
    assert tx.session.failure.detail == "first"
    assert tx.session.history == (B, W, F)
    assert tx.session.late_events == 3  # the abort, the lost peer, the crash


def test_nothing_happens_after_success() -> None:
    tx = Tx(ranks=2).opened(8)
    tx.part_done()
    assert tx.session.state is S
    assert tx.feed(inputs.PeerGone(10, "late")) == []
    before = tx.session.key()
    assert tx.feed(inputs.AbortRoom("late")) == []
    assert tx.say(Abort, failure=bad()) == []
    assert tx.say(Withdraw, part=0) == []
    assert tx.session.failure is None
    assert tx.session.late_events == 2
    assert tx.session.key() == before
    tx.feed(inputs.ClearRoom())
    assert tx.session.finished
    assert tx.session.state is S


def test_clear_of_a_live_room_aborts_it() -> None:
    tx = Tx().opened()
    aborts = sent(tx.feed(inputs.ClearRoom()), Abort)
    assert "the handle was cleared" in aborts[0].failure.detail
    assert not tx.session.finished
    tx.written(ok=False)
    assert tx.session.finished


# Time


def armed(commands: list[Command]) -> dict[str, float]:
    return {c.name: c.after_s for c in commands if isinstance(c, SetTimer)}


def test_every_gate_has_its_clock() -> None:
    session = SenderSession(KEY, DEADLINES, SenderOptions(1, Policy("prefer", ("memory",)), ("memory",), 4, 16))
    assert armed(session.feed(inputs.Start())) == {"room": 5, "gate": 1}
    tx = Tx()
    assert armed(tx.reserve()) == {}
    assert armed(tx.preflight()) == {"gate": 2}  # queued
    assert armed(tx.supply(20)) == {"gate": 2}  # waiting_blocks
    assert armed(tx.feed(inputs.Granted(0, (0, 1), 8))) == {"gate": 3}  # moving
    assert armed(tx.written()) == {"gate": 3}  # waiting_outcome
    assert armed(tx.ack()) == {"gate": 4}  # waiting_resume
    commands = tx.say(Resume, sent_tokens=8, grant=grant(1))
    assert armed(commands) == {"gate": 2}
    tx.feed(inputs.Granted(1, (0, 1), 8))
    ended = tx.feed(inputs.AbortRoom("enough"))
    assert [c.name for c in ended if isinstance(c, CancelTimer)] == ["gate", "room"]


def fire(tx: Tx, *, host_alive: bool = False) -> list[Command]:
    return tx.feed(inputs.TimerFired("gate", tx.session._clocks.gate, host_alive))


@pytest.mark.parametrize(
    ("reach", "gate", "code", "text"),
    [
        (lambda tx: tx, Gate.waiting_ranks, "DeadlinePassed", "ranks not here: unknown; without a usable grant: []"),
        (waiting, Gate.queued, "DeadlinePassed", "the host has 0 tokens ready of None"),
        (lambda tx: waiting(tx).supply(8) and tx, Gate.waiting_blocks, "PoolExhausted", "no free source blocks"),
        (moving, Gate.moving, "DeadlinePassed", "no bytes landed; part 0 to ranks [0]"),
        (reported, Gate.waiting_outcome, "DeadlinePassed", "no answer for part 0 from ranks [0]"),
        (resuming, Gate.waiting_resume, "DeadlinePassed", "no grant for part 1 from ranks [0]"),
    ],
)
def test_every_gate_ends_with_a_reason(reach: Any, gate: Gate, code: str, text: str) -> None:
    tx = reach(Tx())
    assert tx.session.gate is gate
    assert tx.session.timed
    fire(tx)
    failure = tx.session.failure
    assert failure is not None
    assert (failure.code.value, failure.rank) == (code, None)
    assert text in failure.detail
    assert not tx.session.timed


def test_a_missing_rank_is_named() -> None:
    tx = Tx(ranks=3, required=3)
    tx.reserve(1)
    fire(tx)
    assert tx.session.failure is not None
    assert "ranks not here: [0, 2]; without a usable grant: [1]" in tx.session.failure.detail


def test_a_queued_room_lives_as_long_as_its_host() -> None:
    tx = Tx().opened(None)
    assert armed(fire(tx, host_alive=True)) == {"gate": 2}
    assert tx.session.state is W
    fire(tx, host_alive=False)
    assert tx.session.state is F


@pytest.mark.parametrize("reach", [moving, reported, resuming])
def test_no_other_gate_is_renewed_by_a_living_host(reach: Any) -> None:
    tx = reach(Tx())
    fire(tx, host_alive=True)
    assert tx.session.state is F


def test_a_stale_timer_does_nothing() -> None:
    tx = Tx().opened(None)
    epoch = tx.session._clocks.gate
    fire(tx, host_alive=True)
    assert tx.feed(inputs.TimerFired("gate", epoch)) == []
    assert tx.feed(inputs.TimerFired("unknown", 1)) == []
    assert tx.session.state is W


def test_growth_alone_renews_a_moving_part() -> None:
    tx = moving(Tx())
    assert armed(tx.feed(inputs.Progress(0, 100))) == {"gate": 3}
    assert armed(tx.feed(inputs.Progress(0, 100))) == {}
    assert armed(tx.feed(inputs.Progress(0, 99))) == {}
    assert armed(tx.feed(inputs.Progress(0, 101))) == {"gate": 3}
    assert tx.session.bytes_done == 101
    tx.written()
    assert armed(tx.feed(inputs.Progress(0, 200))) == {}  # all has landed
    assert tx.session.bytes_done == 200


def test_receivers_that_wait_for_blocks_keep_the_room_and_each_other_waiting() -> None:
    tx = Tx(ranks=2)
    tx.reserve(0)
    tx.preflight(0)
    tx.say(Reserve, 1, ranks=2)
    assert tx.session.told_gate is Gate.waiting_ranks
    beat = inputs.BeatReceived(1, Gate.waiting_blocks, 0, host_alive=True)
    assert armed(tx.feed(beat)) == {"gate": 1}
    assert tx.session.told_gate is Gate.waiting_blocks
    for _ in range(3):  # what it said last holds
        assert "gate" in armed(fire(tx))
    silent = inputs.BeatReceived(1, Gate.waiting_blocks, 0, host_alive=False)
    assert "gate" in armed(tx.feed(silent))  # the clock begins where the good news ends
    assert armed(tx.feed(silent)) == {}
    assert tx.session.told_gate is Gate.waiting_ranks
    tx.feed(beat)
    tx.reserve(1)
    assert tx.session.told_gate is Gate.waiting_ranks  # it waits for blocks no more
    assert armed(tx.feed(inputs.BeatReceived(0, Gate.waiting_ranks, 0, host_alive=True))) == {}


def test_work_that_moves_on_is_no_standstill() -> None:
    """Staging here, checking and copying at a rank; the host's silence and absent ranks are not excused by it."""
    working = inputs.BeatReceived(0, Gate.waiting_outcome, 0, host_alive=True, working=True)
    tx = Tx(ranks=1).opened(None)
    assert armed(tx.feed(inputs.Worked())) == armed(tx.feed(working)) == {}
    tx.supply(20)
    tx.feed(inputs.Granted(0, (1, 0), 8))
    assert armed(tx.feed(inputs.Worked())) == {"gate": 3}
    tx.written()
    assert tx.session.gate is Gate.waiting_outcome
    assert armed(tx.feed(working)) == {"gate": 3}
    assert armed(tx.feed(inputs.BeatReceived(0, Gate.waiting_outcome, 0, host_alive=True))) == {}
    tx.feed(inputs.AbortRoom("enough"))
    assert tx.feed(inputs.Worked()) == tx.feed(working) == []


def test_beats_tell_each_rank_through_its_own_connection() -> None:
    tx = Tx(ranks=2).opened()
    (beat,) = tx.session.beats(11, True, False)
    assert [told.working for working in (False, True) for told in tx.session.beats(10, True, working)] == [False, True]
    assert (beat.to_sender, beat.room, beat.rank, beat.gate, beat.host_alive) == (False, 7, 1, "moving", True)
    assert (beat.sender_generation, beat.receiver_generation) == (3, 9)
    assert list(tx.session.beats(99, True, False)) == []


# Copies


def test_a_copy_shares_nothing() -> None:
    tx = moving(Tx(ranks=2))
    copy, before = tx.session.clone(), tx.session.key()
    assert copy.key() == before
    tx.part_done()
    assert copy.key() == before != tx.session.key()
    assert copy.feed(inputs.PartWritten(0, 0, "memory", True)) != []
    assert hash(copy.key()) != hash(before)


def test_admission_is_for_this_life() -> None:
    tx = Tx()
    reserve = Reserve(room=7, rank=0, ranks=1, receiver_generation=9)
    assert tx.session.admits(10, reserve)
    assert not tx.session.admits(10, Reserve(room=7, rank=0, ranks=1, receiver_generation=9, sender_generation=2))
    tx.opened()
    assert tx.session.admits(10, reserve)  # to be told that it is wrong
    assert not tx.session.admits(10, Reserve(room=7, rank=0, ranks=1, receiver_generation=10))
    tx.feed(inputs.AbortRoom("enough"))
    assert not tx.session.admits(10, reserve)
