"""The receiver's session, fed by hand: what it grants, what it takes for a part, how it makes room, how it ends."""

from __future__ import annotations

from typing import Any

import pytest

from kvpoll_fsm import inputs, messages
from kvpoll_fsm.commands import (
    CancelTimer,
    Command,
    CopyOut,
    Fence,
    Grant,
    HeldPart,
    Regrant,
    Release,
    Send,
    SetTimer,
    Verify,
)
from kvpoll_fsm.deadlines import Deadlines, Gate
from kvpoll_fsm.errors import Failure, FailureCode
from kvpoll_fsm.messages import (
    Abort,
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
from kvpoll_fsm.receiver_session import ReceiverOptions, ReceiverSession
from kvpoll_fsm.session import RoomKey

KEY = RoomKey("receiver", 7, 1, 9)
DEADLINES = Deadlines(bootstrap_s=1, input_s=2, stall_s=3, resume_s=4, room_timeout_s=5, quarantine_max_s=6)
B, W, T, S, F = KVPoll.Bootstrapping, KVPoll.WaitingForInput, KVPoll.Transferring, KVPoll.Success, KVPoll.Failed
TOKENS = (("memory", b"token"),)
CHECKSUM = b"c" * 16


class Rx:
    """The session of rank 1 of 2, which gets 2 blocks of 4 tokens a part: 4 and 2 for part 0, 6 and 3 for part 1."""

    def __init__(self, resume: str = "drain", *, blocks: int = 2, exact: tuple[int, ...] = (), window: int = 1) -> None:
        options = ReceiverOptions(5, 2, blocks, 4, resume, exact, window)
        self.session = ReceiverSession(KEY, DEADLINES, options)
        self.started = self.feed(inputs.Start())

    def feed(self, event: inputs.Input) -> list[Command]:
        return self.session.feed(event)

    def say(self, kind: type[Any], *, conn: int = 5, **fields: Any) -> list[Command]:
        """The sender says something."""
        ids = {"room": 7, "rank": 1, "sender_generation": 3, "receiver_generation": 9}
        return self.feed(inputs.MessageReceived(conn, kind(**(ids | fields))))

    def granted(self, blocks: tuple[int, ...] = (4, 2), part: int | None = None) -> list[Command]:
        at = self.session.part if part is None else part
        return self.feed(inputs.Granted(at, blocks, len(blocks) * 4, TOKENS))

    def opened(self, total: int | None = None) -> Rx:
        if self.session.options.blocks:
            self.granted()
        self.say(Opened, required=2, total_tokens=total)
        return self

    def report(self, total: int = 20, **fields: Any) -> list[Command]:
        done = self.session.ledger.covered_tokens
        tokens = fields.get("tokens", min(8, total - done))
        told = {"part": self.session.part, "offset": done, "tokens": tokens, "total_tokens": total}
        told |= {"is_last": done + tokens == total, "transport": "memory"}
        return self.say(PartReport, **(told | fields))

    def copied(self, failure: tuple[FailureCode, str] | None = None) -> list[Command]:
        return self.feed(inputs.CopiedOut(self.session.part, failure))

    def outcome(self, **fields: Any) -> list[Command]:
        is_last = fields.get("is_last", self.session._report is not None and self.session._report.is_last)
        told = {"part": self.session.part, "is_last": is_last, "state": S if is_last else T}
        return self.say(PartOutcome, **(told | fields))

    def part_done(self, total: int = 20) -> list[Command]:
        if any(isinstance(command, CopyOut) for command in self.report(total)):
            self.copied()
        return self.outcome()

    def abort(self, **fields: Any) -> list[Command]:
        return self.say(Abort, **({"failure": bad(), "quiescent": True} | fields))


def sent(commands: list[Command], kind: type[Any]) -> Any:
    """The one message of a kind among commands, or None."""
    found = [c.message for c in commands if isinstance(c, Send) and isinstance(c.message, kind)]
    assert len(found) < 2
    return found[0] if found else None


def kinds(commands: list[Command]) -> list[str]:
    """What is asked for, timers apart."""
    said = [c.message if isinstance(c, Send) else c for c in commands]
    return [type(one).__name__ for one in said if not isinstance(one, (SetTimer, CancelTimer))]


def armed(commands: list[Command]) -> dict[str, float]:
    return {c.name: c.after_s for c in commands if isinstance(c, SetTimer)}


def bad(detail: str = "no", code: FailureCode = FailureCode.Aborted, rank: int | None = None) -> Failure:
    return Failure.of(code, detail, state=W, rank=rank)


# Reserving


def test_blocks_first_then_the_reservation() -> None:
    rx = Rx()
    assert [c for c in rx.started if isinstance(c, Grant)] == [Grant(0, 2)]
    assert rx.session.gate is Gate.waiting_blocks
    reserve = sent(rx.granted(), Reserve)
    assert (reserve.ranks, reserve.rank, reserve.dummy, reserve.receiver_generation) == (2, 1, False, 9)
    assert (reserve.grant.part, reserve.grant.tokens, reserve.grant.blocks) == (0, 8, (4, 2))
    assert rx.session.gate is Gate.waiting_ranks


def test_a_pool_without_free_blocks_is_told_and_waited_for() -> None:
    rx = Rx()
    assert sent(rx.feed(inputs.GrantQueued(0)), Reserve).grant is None
    assert rx.feed(inputs.GrantQueued(0)) == []
    assert rx.session.gate is Gate.waiting_blocks
    assert sent(rx.granted(), Reserve).grant.blocks == (4, 2)


def test_a_dummy_reserves_without_blocks_and_follows_the_outcomes() -> None:
    rx = Rx(blocks=0)
    assert sent(rx.started, Reserve).dummy
    rx.opened(20)
    assert rx.session.gate is Gate.queued
    rx.outcome(is_last=False)
    assert rx.session.state is T
    rx.outcome(is_last=True, part=1)
    assert rx.session.state is S
    assert [(part.part, part.tokens, part.is_last) for part in rx.session.parts] == [(0, 0, False), (1, 0, True)]
    rx.feed(inputs.ClearRoom())
    assert rx.session.finished


def test_blocks_that_cannot_be_had() -> None:
    for failure in (None, bad("never", FailureCode.RequestTooLarge)):
        rx = Rx()
        commands = rx.feed(inputs.GrantRefused(0, failure))
        assert rx.session.failure is not None
        assert rx.session.failure.code is (failure.code if failure else FailureCode.PoolExhausted)
        assert kinds(commands) == ["Release", "Reserve", "Abort"]
        assert rx.session.quiescent
        assert rx.feed(inputs.GrantRefused(0)) == []


def test_blocks_that_were_waited_for_and_cannot_be_exposed_go_back() -> None:
    rx = Rx()
    rx.feed(inputs.GrantQueued(0))
    assert Release(0) in rx.feed(inputs.GrantRefused(0, bad("grant: no", FailureCode.InternalError)))
    assert rx.session.state is F


@pytest.mark.parametrize("queued", [False, True])
def test_a_room_that_fails_while_it_asks_gives_up_asking(queued: bool) -> None:
    rx = Rx()
    if queued:
        rx.feed(inputs.GrantQueued(0))
    commands = rx.feed(inputs.AbortRoom("enough"))
    assert Release(0) in commands
    assert rx.session.quiescent
    assert rx.granted() == []


# Withdrawals


def test_an_unused_grant_is_asked_back() -> None:
    rx = Rx()
    rx.granted()
    assert sent(rx.feed(inputs.RevokeGrant()), Withdraw).part == 0
    assert rx.feed(inputs.RevokeGrant()) == []
    assert rx.session.gate is Gate.waiting_ranks
    assert kinds(rx.say(Withdrawn, part=0, ok=True)) == ["Release", "Grant"]
    assert rx.session.gate is Gate.waiting_blocks
    assert sent(rx.granted((1, 0)), Reserve).grant.blocks == (1, 0)


def test_the_sender_keeps_the_grant() -> None:
    rx = Rx()
    rx.granted()
    rx.feed(inputs.RevokeGrant())
    assert rx.say(Withdrawn, part=0, ok=False) == []
    assert sent(rx.feed(inputs.RevokeGrant()), Withdraw)  # it may be asked again


def test_opened_and_a_report_cross_with_withdraw() -> None:
    rx = Rx()
    rx.granted()
    rx.feed(inputs.RevokeGrant())
    rx.say(Opened, required=2)
    assert rx.session.state is W
    assert rx.say(Withdrawn, part=0, ok=False) == []
    rx.report()
    rx.copied()
    rx.outcome()
    rx.granted()
    rx.feed(inputs.RevokeGrant())
    assert kinds(rx.report()) == ["CopyOut"]
    assert rx.say(Withdrawn, part=1, ok=False) == []
    assert kinds(rx.copied()) == ["PartAck"]


@pytest.mark.parametrize(
    ("gate", "asked"),
    [
        ("waiting_resume", True),
        ("waiting_blocks", True),  # of a sibling: then above all
        ("waiting_ranks", True),  # not heard yet
        ("queued", False),
        ("moving", False),
        ("waiting_outcome", False),
    ],
)
def test_a_grant_for_the_next_part_is_asked_back_while_others_are_waited_for(gate: str, asked: bool) -> None:
    rx = Rx().opened()
    rx.part_done()
    rx.granted()
    rx.feed(inputs.BeatReceived(1, Gate(gate), 0, True))
    assert (sent(rx.feed(inputs.RevokeGrant()), Withdraw) is not None) is asked


def test_no_grant_is_asked_back_that_the_engine_chose_or_that_is_in_use() -> None:
    assert Rx(exact=(1, 2)).feed(inputs.RevokeGrant()) == []
    chosen = Rx(exact=(1, 2))
    chosen.granted((1, 2))
    assert chosen.feed(inputs.RevokeGrant()) == []
    used = Rx().opened()
    assert used.feed(inputs.RevokeGrant()) == []
    used.feed(inputs.AbortRoom("enough"))
    assert used.feed(inputs.RevokeGrant()) == []


def test_blocks_are_not_held_while_waiting_for_those_given_back() -> None:
    rx = Rx("extend").opened()
    rx.part_done()
    rx.granted((6, 3))
    rx.feed(inputs.BeatReceived(1, Gate.waiting_resume, 0, True))
    rx.feed(inputs.RevokeGrant())
    commands = rx.say(Withdrawn, part=1, ok=True)
    assert commands[:2] == [Release(1), Grant(1, 2, or_refuse=True)]
    commands = rx.feed(inputs.GrantRefused(1))
    assert CopyOut((HeldPart(0, 0, 8, (4, 2)),), 20, None) in commands
    assert rx.session.gate is Gate.waiting_blocks
    assert kinds(rx.feed(inputs.CopiedOut(0))) == ["Release", "Grant"]


def test_stale_answers_of_a_withdrawal() -> None:
    rx = Rx()
    rx.granted()
    assert rx.say(Withdrawn, part=0, ok=True) == []  # not asked
    rx.feed(inputs.RevokeGrant())
    assert rx.say(Withdrawn, part=1, ok=True) == []


# Parts


@pytest.mark.parametrize("resume", ["drain", "extend"])
@pytest.mark.parametrize("total", [1, 8, 9, 16, 20])
def test_parts_until_the_last(total: int, resume: str) -> None:
    rx, parts = Rx(resume).opened(), -(-total // 8)
    for part in range(parts):
        assert rx.session.state is (T if part else W)
        commands = rx.report(total)
        if resume == "drain" or part == parts - 1:
            assert rx.session.gate is Gate.waiting_outcome
            assert sent(commands, PartAck) is None
            commands = rx.copied()
        assert sent(commands, PartAck).failure is None
        rx.outcome()
        if part < parts - 1:
            assert rx.session.state is T
            resumed = sent(rx.granted(), Resume)
            assert (resumed.sent_tokens, resumed.grant.part) == ((part + 1) * 8, part + 1)
            assert rx.session.gate is Gate.queued
    assert rx.session.history == (B, W, *([T] if parts > 1 else []), S)
    assert sum(part.tokens for part in rx.session.parts) == total
    rx.feed(inputs.ClearRoom())
    assert rx.session.finished


def test_drain_grants_the_same_blocks_again_as_many_as_the_rest_needs() -> None:
    rx = Rx().opened()
    assert Regrant(0, 1, 2) in rx.part_done(total=18)
    rx.granted()
    assert Regrant(1, 2, 1) in rx.part_done(total=18)
    rx.granted((4,))
    assert kinds(rx.part_done(total=18)) == ["Release"]


def test_extend_copies_everything_out_at_the_end() -> None:
    rx = Rx("extend").opened()
    assert Grant(1, 2, or_refuse=True) in rx.part_done(total=16)
    rx.granted((6, 3))
    held = (HeldPart(0, 0, 8, (4, 2)), HeldPart(1, 8, 8, (6, 3)))
    assert CopyOut(held, 16, CHECKSUM) in rx.report(16, checksum=CHECKSUM)
    rx.copied()
    commands = rx.outcome()
    assert [c for c in commands if isinstance(c, Release)] == [Release(0), Release(1)]


def test_extend_verifies_each_part_on_arrival() -> None:
    rx = Rx("extend").opened()
    assert Verify(HeldPart(0, 0, 8, (4, 2)), CHECKSUM) in rx.report(checksum=CHECKSUM)
    assert sent(rx.feed(inputs.Verified(0)), PartAck).failure is None


def test_a_draining_that_fails() -> None:
    rx = Rx("extend").opened()
    rx.part_done()
    rx.feed(inputs.GrantRefused(1))
    commands = rx.feed(inputs.CopiedOut(0, (FailureCode.InternalError, "no memory")))
    assert kinds(commands) == ["Abort", "Release"]
    assert rx.session.failure is not None
    assert rx.session.failure.detail == "no memory"
    assert rx.session.quiescent


def test_a_draining_that_ends_after_the_room_did() -> None:
    rx = Rx("extend").opened()
    rx.part_done()
    rx.feed(inputs.GrantRefused(1))
    assert Release(0) not in rx.feed(inputs.AbortRoom("enough"))
    assert not rx.session.quiescent
    assert Release(0) in rx.feed(inputs.CopiedOut(0))
    assert rx.session.quiescent


def test_manual_waits_for_the_engine() -> None:
    rx = Rx("manual", exact=(4, 2)).opened()
    assert sent(rx.report(), PartAck).failure is None
    assert armed(rx.outcome()) == {"gate": 4}
    assert rx.session.gate is Gate.waiting_resume
    assert [c for c in rx.feed(inputs.ResumeWith((7,))) if isinstance(c, Grant)] == [Grant(1, 1, (7,))]
    assert rx.feed(inputs.ResumeWith((8,))) == []
    assert sent(rx.granted((7,)), Resume).grant.blocks == (7,)
    assert rx.session.held_parts == (HeldPart(0, 0, 8, (4, 2)),)
    assert rx.feed(inputs.ReleasePart(0)) == [Release(0)]
    assert rx.feed(inputs.ReleasePart(0)) == []
    rx.report(12)
    assert rx.session.failure is None or rx.session.state is F


def test_manual_keeps_its_blocks_until_cleared() -> None:
    rx = Rx("manual", exact=(4, 2)).opened()
    rx.part_done(total=8)
    assert rx.session.state is S
    assert not rx.session.finished
    assert rx.feed(inputs.ClearRoom()) == [Release(0)]
    assert rx.session.finished


def test_manual_keeps_committed_parts_after_a_failure_too() -> None:
    rx = Rx("manual", exact=(4, 2)).opened()
    rx.part_done()
    assert kinds(rx.feed(inputs.AbortRoom("enough"))) == ["Abort"]
    assert rx.session.held_parts
    assert rx.feed(inputs.ClearRoom()) == [Release(0)]
    assert rx.session.finished


# What a sender must not do


def waiting(rx: Rx) -> Rx:
    return rx.opened()


def checking(rx: Rx) -> Rx:
    waiting(rx).report()
    return rx


def acked(rx: Rx) -> Rx:
    checking(rx).copied()
    return rx


def rejected(rx: Rx) -> Rx:
    checking(rx).copied((FailureCode.ChecksumMismatch, "wrong"))
    return rx


def resuming(rx: Rx) -> Rx:
    acked(rx).outcome()
    return rx


def resumed(rx: Rx) -> Rx:
    resuming(rx).granted()
    return rx


def last_acked(rx: Rx) -> Rx:
    waiting(rx).report(8)
    rx.copied()
    return rx


REPORT = {"part": 0, "offset": 0, "tokens": 8, "total_tokens": 20, "is_last": False, "transport": "memory"}
OUTCOME = {"part": 0, "is_last": False, "state": T}
IMPOSSIBLE: dict[str, tuple[Any, type[Any], dict[str, Any]]] = {
    "opened twice": (waiting, Opened, {"required": 2}),
    "opened for other ranks": (lambda rx: rx.granted() and rx, Opened, {"required": 3}),
    "opened without a grant": (lambda rx: rx, Opened, {"required": 2}),
    "a report before opened": (lambda rx: rx.granted() and rx, PartReport, REPORT),
    "a report of another part": (waiting, PartReport, REPORT | {"part": 1}),
    "a report at another offset": (waiting, PartReport, REPORT | {"offset": 1}),
    "a report of more than was granted": (waiting, PartReport, REPORT | {"tokens": 9}),
    "a report of more than the total": (waiting, PartReport, REPORT | {"total_tokens": 7, "is_last": True}),
    "a last part that is not": (waiting, PartReport, REPORT | {"is_last": True}),
    "a part that is the last and says no": (waiting, PartReport, REPORT | {"total_tokens": 8}),
    "a report twice": (checking, PartReport, REPORT),
    "a report without a grant": (resuming, PartReport, REPORT | {"part": 1, "offset": 8}),
    "a report with another total": (resumed, PartReport, REPORT | {"part": 1, "offset": 8, "total_tokens": 21}),
    "a report of the part before": (resumed, PartReport, REPORT),
    "an outcome before the ack": (checking, PartOutcome, OUTCOME),
    "an outcome before the report": (waiting, PartOutcome, OUTCOME),
    "an outcome of another part": (acked, PartOutcome, OUTCOME | {"part": 1}),
    "an outcome that contradicts the report": (acked, PartOutcome, OUTCOME | {"is_last": True, "state": S}),
    "an outcome whose state contradicts it": (acked, PartOutcome, OUTCOME | {"state": S}),
    "an outcome twice": (resuming, PartOutcome, OUTCOME),
    "success of a part that was rejected": (rejected, PartOutcome, OUTCOME),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_what_a_sender_must_not_do_fails_the_room(what: str) -> None:
    reach, kind, fields = IMPOSSIBLE[what]
    rx = reach(Rx())
    before = list(rx.session.history)
    commands = rx.say(kind, **fields)
    assert rx.session.history == (*before, F)
    failure = rx.session.failure
    assert failure is not None
    assert (failure.code, failure.rank, failure.retryable) == (FailureCode.ProtocolError, 1, False)
    assert sent(commands, Abort).failure == failure


@pytest.mark.parametrize(
    ("kind", "fields"), [(PartReport, REPORT), (Opened, {"required": 2}), (PartOutcome, OUTCOME | {"part": 5})]
)
def test_what_a_sender_must_not_say_to_a_dummy(kind: type[Any], fields: dict[str, Any]) -> None:
    rx = Rx(blocks=0).opened()
    rx.say(kind, **fields)
    assert rx.session.failure is not None
    assert rx.session.failure.code is FailureCode.ProtocolError


def test_words_of_others_are_not_heard() -> None:
    """Of another life of either side, through another connection, of a kind senders do not use."""
    rx = acked(Rx())
    before = rx.session.key()
    assert rx.outcome(sender_generation=4) == []
    assert rx.outcome(receiver_generation=8) == []
    assert rx.outcome(conn=6) == []
    assert rx.say(PartAck, part=0) == []
    assert rx.say(Quiesced) == []
    assert rx.feed(inputs.MessageReceived(5, messages.Bye())) == []
    assert rx.feed(inputs.Fenced(0)) == []
    assert rx.feed(inputs.GrantRefused(0)) == []
    assert rx.granted() == []
    assert rx.session.key() == before


# Ends


@pytest.mark.parametrize("reach", [checking, acked, rejected])
def test_blocks_whose_part_was_reported_go_back_at_the_end(reach: Any) -> None:
    """The report says that no write of the part is in flight; only the copy must be over."""
    rx = reach(Rx())
    commands = rx.feed(inputs.AbortRoom("enough"))
    if reach is checking:
        assert Release(0) not in commands
        commands = rx.copied()
    assert Release(0) in commands
    assert "Fence" not in kinds(commands)
    assert rx.session.quiescent


@pytest.mark.parametrize("word", ["fenced", "quiesced", "abort", "outcome"])
def test_blocks_that_may_be_written_are_quarantined_until_somebody_says_so(word: str) -> None:
    rx = waiting(Rx())
    commands = rx.feed(inputs.AbortRoom("enough"))
    assert kinds(commands) == ["Abort", "Fence"]
    assert armed(commands) == {"quarantine": 6}
    assert not rx.session.quiescent
    if word == "fenced":
        assert rx.feed(inputs.Fenced(1)) == []
        told, *commands = rx.feed(inputs.Fenced(0))
        assert kinds([told]) == ["Quiesced"]  # the sender need not wait for its writer either
    elif word == "quiesced":
        commands = rx.say(Quiesced)
    elif word == "abort":
        assert rx.abort(quiescent=False) == []
        commands = rx.abort()
    else:
        assert rx.outcome(state=F, failure=bad(), quiescent=False) == []
        commands = rx.outcome(state=F, failure=bad())
    assert commands == [CancelTimer("quarantine"), Release(0)]
    assert rx.session.quiescent
    assert rx.session.failure is not None
    assert rx.session.failure.detail == "enough"


def test_a_quarantine_ends_by_force() -> None:
    rx = waiting(Rx())
    rx.feed(inputs.AbortRoom("enough"))
    epoch = rx.session._clocks.quarantine
    assert rx.feed(inputs.TimerFired("quarantine", epoch + 1)) == []
    assert Fence(0, force=True) in rx.feed(inputs.TimerFired("quarantine", epoch))
    assert Release(0) in rx.feed(inputs.Fenced(0))


def test_the_senders_word_that_nothing_is_in_flight_spares_the_quarantine() -> None:
    rx = waiting(Rx())
    assert kinds(rx.abort(quiescent=True)) == ["Fence", "Release"]
    assert rx.session.quiescent
    assert not rx.session._clocks.running


def test_before_opened_the_end_is_answered_and_afterwards_not() -> None:
    """The sender must know where the reservations of this life end."""
    early, late = Rx(), waiting(Rx())
    early.granted()
    assert sent(early.abort(sender_generation=3), Abort).failure == bad()
    assert sent(late.abort(), Abort) is None


def test_a_room_that_fails_before_it_reserved_says_who_it_is_first() -> None:
    rx = Rx()
    assert kinds(rx.feed(inputs.AbortRoom("enough"))) == ["Reserve", "Abort", "Release"]


@pytest.mark.parametrize(
    ("reach", "code"),
    [
        (waiting, FailureCode.PeerLost),
        (checking, FailureCode.PeerLost),
        (acked, FailureCode.PeerLost),
        (last_acked, FailureCode.OutcomeUnknown),
    ],
)
def test_a_sender_that_is_gone(reach: Any, code: FailureCode) -> None:
    rx = reach(Rx())
    rx.feed(inputs.PeerGone(5, "silent"))
    failure = rx.session.failure
    assert failure is not None
    assert (failure.code, failure.rank, failure.retryable, failure.detail) == (code, 1, True, "silent")


def test_other_causes_of_an_ending_keep_their_name_even_after_the_last_ack() -> None:
    rx = last_acked(Rx())
    rx.feed(inputs.PeerGone(5, "differ", FailureCode.LayoutMismatch))
    assert rx.session.failure is not None
    assert rx.session.failure.code is FailureCode.LayoutMismatch


def test_a_failed_outcome_carries_the_first_cause() -> None:
    rx = acked(Rx())
    failure = bad("rank 0 has wrong bytes", FailureCode.ChecksumMismatch, 0)
    rx.outcome(state=F, failure=failure)
    assert rx.session.failure is failure
    assert rx.session.history == (B, W, F)
    assert rx.session.quiescent


def test_the_first_failure_stays() -> None:
    rx = waiting(Rx())
    for event in (inputs.AbortRoom("first"), inputs.Crashed("second"), inputs.PeerGone(5, "third")):
        rx.feed(event)
    rx.abort()
    rx.outcome(state=F, failure=bad())
    assert rx.session.failure is not None
    assert rx.session.failure.detail == "first"
    assert rx.session.late_events == 4
    assert rx.report() == []


def test_nothing_happens_after_success() -> None:
    rx = last_acked(Rx())
    rx.outcome()
    before = rx.session.key()
    assert rx.feed(inputs.AbortRoom("late")) == rx.feed(inputs.PeerGone(5, "late")) == []
    assert rx.abort() == rx.outcome(part=0, is_last=True) == rx.report() == []
    assert rx.say(Opened, required=2) == []
    assert rx.session.key() == before
    assert rx.session.state is S
    assert rx.session.failure is None


def test_an_outcome_after_the_end_changes_nothing() -> None:
    rx = last_acked(Rx())
    rx.feed(inputs.AbortRoom("enough"))
    rx.say(PartOutcome, part=0, is_last=True, state=S)
    assert rx.session.state is F


# Time


def test_every_gate_has_its_clock() -> None:
    rx = Rx()
    assert armed(rx.started) == {"room": 5, "gate": 2}  # waiting_blocks
    assert armed(rx.granted()) == {"gate": 1}  # waiting_ranks
    assert armed(rx.say(Opened, required=2)) == {"gate": 2}  # queued
    assert armed(rx.feed(inputs.BeatReceived(1, Gate.moving, 0, True))) == {"gate": 3}
    assert armed(rx.report()) == {"gate": 3}  # waiting_outcome
    assert armed(rx.copied()) == {}
    assert armed(rx.outcome()) == {"gate": 2}  # waiting_blocks
    assert armed(rx.granted()) == {"gate": 2}  # queued
    ended = rx.feed(inputs.AbortRoom("enough"))
    assert [c.name for c in ended if isinstance(c, CancelTimer)] == ["gate", "room"]


def fire(rx: Rx, timer: str = "gate") -> list[Command]:
    return rx.feed(inputs.TimerFired(timer, getattr(rx.session._clocks, timer), host_alive=True))


@pytest.mark.parametrize(
    ("reach", "gate", "code", "text"),
    [
        (lambda rx: rx, Gate.waiting_blocks, "PoolExhausted", "2 blocks did not come free"),
        (lambda rx: rx.granted() and rx, Gate.waiting_ranks, "DeadlinePassed", "has not opened the room"),
        (waiting, Gate.queued, "DeadlinePassed", "the sender has not sent part 0"),
        (acked, Gate.waiting_outcome, "DeadlinePassed", "part 0 is acknowledged"),
        (resuming, Gate.waiting_blocks, "PoolExhausted", "2 blocks did not come free"),
    ],
)
def test_every_gate_ends_with_a_reason(reach: Any, gate: Gate, code: str, text: str) -> None:
    rx = reach(Rx())
    assert rx.session.gate is gate
    assert rx.session.timed
    fire(rx)
    failure = rx.session.failure
    assert failure is not None
    assert (failure.code.value, failure.rank) == (code, 1)
    assert failure.detail.startswith(f"{gate} for ")
    assert text in failure.detail
    assert not rx.session.timed


def test_a_moving_part_that_stalls_and_a_resume_that_does_not_come() -> None:
    rx = waiting(Rx())
    rx.feed(inputs.BeatReceived(1, Gate.moving, 0, True))
    fire(rx)
    assert rx.session.failure is not None
    assert rx.session.failure.detail == "moving for 3 s: part 0 makes no progress"
    manual = waiting(Rx("manual", exact=(4, 2)))
    manual.part_done()
    fire(manual)
    assert manual.session.failure is not None
    assert manual.session.failure.detail == "waiting_resume for 4 s: resume() was not called for part 1"


def test_the_room_has_a_deadline_of_its_own() -> None:
    rx = waiting(Rx())
    fire(rx, "room")
    assert rx.session.failure is not None
    assert rx.session.failure.detail == "the room outlived 5 s"


def test_what_renews_which_gate() -> None:
    def beat(rx: Rx, gate: Gate, nbytes: int = 0, *, alive: bool = True) -> bool:
        return "gate" in armed(rx.feed(inputs.BeatReceived(1, gate, nbytes, alive)))

    rx = Rx()
    assert not beat(rx, Gate.waiting_blocks)  # its own pool's clock is its own
    rx.granted()
    assert beat(rx, Gate.waiting_blocks)  # a sibling waits for blocks
    assert beat(rx, Gate.waiting_blocks, alive=False)  # the clock begins where the good news ends
    assert not beat(rx, Gate.waiting_blocks, alive=False)
    assert not beat(rx, Gate.waiting_ranks)
    rx.say(Opened, required=2)
    assert beat(rx, Gate.queued)
    assert beat(rx, Gate.queued, alive=False)
    assert not beat(rx, Gate.queued, alive=False)
    assert beat(rx, Gate.moving, 10)
    assert not beat(rx, Gate.moving, 10)
    assert not beat(rx, Gate.moving, 9)
    assert beat(rx, Gate.moving, 11)
    rx.report()
    assert not beat(rx, Gate.moving, 11)
    assert beat(rx, Gate.moving, 12)  # the other ranks' bytes
    assert rx.session.bytes_done == 12
    rx.feed(inputs.AbortRoom("enough"))
    assert not beat(rx, Gate.moving, 99)


@pytest.mark.parametrize("opened", [False, True])
def test_what_the_sender_said_last_holds_until_it_says_otherwise(opened: bool) -> None:
    """It says nothing again while nothing is new: a sibling waits for blocks, or the sender's host has no data yet."""
    rx = Rx()
    rx.granted()
    if opened:
        rx.say(Opened, required=2)
    gate = Gate.queued if opened else Gate.waiting_blocks
    rx.feed(inputs.BeatReceived(1, gate, 0, host_alive=True))
    for _ in range(3):
        assert "gate" in armed(fire(rx, "gate"))
        assert not rx.session.state.is_terminal
    rx.feed(inputs.BeatReceived(1, gate, 0, host_alive=False))
    fire(rx, "gate")
    assert rx.session.state is KVPoll.Failed


def test_a_beat_that_comes_before_opened_holds() -> None:
    rx = Rx()
    rx.granted()
    rx.feed(inputs.BeatReceived(1, Gate.moving, 0, host_alive=True))
    rx.say(Opened, required=2)
    assert rx.session.gate is Gate.moving


def test_work_that_moves_on_is_no_standstill() -> None:
    """The sender stages; then it is checked and copied here."""

    def renewed(rx: Rx, event: inputs.Input) -> bool:
        return "gate" in armed(rx.feed(event))

    working = inputs.BeatReceived(1, Gate.moving, 0, True, working=True)
    rx = waiting(Rx())
    assert not renewed(rx, inputs.Worked())  # queued has a clock that knows of the host alone
    rx.feed(inputs.BeatReceived(1, Gate.moving, 0, True))
    assert renewed(rx, working)
    assert not renewed(rx, inputs.BeatReceived(1, Gate.moving, 0, True))
    rx.report()
    assert renewed(rx, inputs.Worked())
    assert renewed(rx, working)  # for another rank
    rx.feed(inputs.AbortRoom("enough"))
    assert not renewed(rx, inputs.Worked())
    assert not renewed(rx, working)


def test_beats_say_where_it_stands() -> None:
    rx = waiting(Rx())
    (beat,) = rx.session.beats(5, True, False)
    assert [told.working for working in (False, True) for told in rx.session.beats(5, True, working)] == [False, True]
    assert (beat.to_sender, beat.room, beat.rank, beat.gate, beat.host_alive) == (True, 7, 1, "queued", True)
    assert (beat.sender_generation, beat.receiver_generation) == (3, 9)


# Copies


@pytest.mark.parametrize("resume", ["drain", "extend", "manual"])
@pytest.mark.parametrize("reach", [lambda rx: rx, waiting, checking, acked, resuming, resumed])
def test_a_copy_shares_nothing_and_goes_the_same_way(reach: Any, resume: str) -> None:
    rx = Rx(resume)
    reach(rx)
    copy, before = rx.session.clone(), rx.session.key()
    assert copy.key() == before
    events: list[inputs.Input] = [
        inputs.GrantQueued(0),
        inputs.Granted(0, (4, 2), 8, TOKENS),
        inputs.CopiedOut(0),
        inputs.RevokeGrant(),
        inputs.BeatReceived(1, Gate.waiting_blocks, 4, True),
        inputs.AbortRoom("enough"),
        inputs.Fenced(0),
        inputs.ClearRoom(),
    ]
    done = [rx.feed(event) for event in events]
    assert copy.key() == before
    assert [copy.feed(event) for event in events] == done
    assert copy.key() == rx.session.key() != before
    assert hash(copy.key()) == hash(rx.session.key())


def test_a_failed_write_is_acknowledged_as_such_and_its_blocks_wait_for_the_senders_word() -> None:
    rx = Rx().opened(20)
    failure = bad("memory to rank 1: reset", FailureCode.TransportFailed, 1)
    ack = sent(rx.report(failure=failure), PartAck)
    assert (ack.part, ack.failure) == (0, failure)
    assert rx.session.state is W
    told = rx.outcome(is_last=False, state=F, failure=failure, quiescent=False)
    assert kinds(told) == ["Fence"]
    assert rx.session.failure == failure
    assert kinds(rx.say(Quiesced)) == ["Release"]
