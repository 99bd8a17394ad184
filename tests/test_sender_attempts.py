"""What follows when a part does not get through: what is tried next, and what is waited for before."""

from __future__ import annotations

from typing import Any

import pytest

from kvpoll_fsm import inputs
from kvpoll_fsm.commands import CancelWrites, Command, Grant, Preflight, Release, SetTimer, StartPart
from kvpoll_fsm.deadlines import Gate
from kvpoll_fsm.errors import FailureCode
from kvpoll_fsm.messages import FencePart, PartFenced, PartReport, Quiesced, Resume
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.sender_attempts import MAX_COLLATERALS
from tests.test_sender_session import Tx, bad, first, grant, kinds, sent

LOOSE = {"ok": False, "quiescent": False}


def writing(*transports: str) -> Tx:
    """Part 0 of 8 tokens is being written through the first of these."""
    tx = Tx(transports=transports)
    tx.reserve(granted=grant(transports=transports))
    tx.preflight(transport=transports[0])
    tx.supply(20)
    tx.feed(inputs.Granted(0, (0, 1), 8))
    return tx


def fenced(tx: Tx, transport: str, attempt: int = 0, *, part: int = 0, token: bytes | None = b"new") -> list[Command]:
    told: list[Command] = tx.say(PartFenced, part=part, transport=transport, attempt=attempt, token=token)
    return told


def again(commands: list[Command]) -> tuple[int, int, int, int, str, bytes]:
    """What the only StartPart asks for."""
    (start,) = (command for command in commands if isinstance(command, StartPart))
    (target,) = start.targets
    token = target.grant.token(target.transport)
    return start.part, start.offset, start.tokens, start.attempt, target.transport, token


def test_a_rank_that_has_fenced_the_attempt_gets_the_next() -> None:
    tx = writing("a", "b")
    asked = sent(tx.written(**LOOSE, transport="a"), FencePart)[0]
    assert (asked.part, asked.transport, asked.attempt) == (0, "a", 0)
    assert tx.session.gate is Gate.moving
    assert kinds(fenced(tx, "a")) == ["Preflight"]
    assert again(tx.preflight(transport="b")) == (0, 0, 8, 1, "b", b"b")
    assert sent(tx.written(transport="b", attempt=1), PartReport)[0].transport == "b"


@pytest.mark.parametrize(
    "wrong",
    [{"transport": "b"}, {"part": 1}, {"attempt": 1}, {"rank": 1}, {"generation": 8}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_only_the_answer_to_the_question_counts(wrong: dict[str, Any]) -> None:
    tx = writing("a", "b", "c")
    tx.written(**LOOSE, transport="a")
    said: dict[str, Any] = {"part": 0, "transport": "a", "attempt": 0, "token": b"new"} | wrong
    assert tx.say(PartFenced, **said) == []
    assert tx.session.slots[0].landing


def test_an_answer_that_comes_late_says_nothing_of_the_next_attempt() -> None:
    tx = writing("a", "b", "c")
    tx.written(**LOOSE, transport="a")
    assert first(tx.feed(inputs.RankQuiesced(0, 0)), Preflight).transport == "b"
    assert fenced(tx, "a") == []
    tx.preflight(transport="b")
    assert fenced(tx, "a") == []
    assert sent(tx.written(**LOOSE, transport="b", attempt=1), FencePart)[0].attempt == 1
    assert fenced(tx, "a") == []
    assert tx.feed(inputs.RankQuiesced(0, 0)) == []  # of the first attempt
    assert tx.session.slots[0].landing
    assert first(fenced(tx, "b", 1), Preflight).transport == "c"


def test_a_source_that_may_be_read_is_waited_for_behind_a_fence() -> None:
    tx = writing("a", "b")
    tx.written(**LOOSE, source_free=False, transport="a")
    assert fenced(tx, "a") == []
    assert kinds(tx.feed(inputs.RankQuiesced(0, 0))) == ["Preflight"]


def test_nothing_is_asked_where_no_transport_is_left() -> None:
    tx = writing("a")
    failed = tx.written(**LOOSE, transport="a")
    assert sent(failed, PartReport)[0].failure.code is FailureCode.TransportFailed
    assert not sent(failed, FencePart)


def test_a_fence_after_the_end_is_word_that_nothing_is_in_flight() -> None:
    tx = writing("a", "b")
    tx.written(**LOOSE, transport="a")
    ended = tx.feed(inputs.AbortRoom("enough"))
    assert not sent(ended, Quiesced)
    assert set(sent(fenced(tx, "a"), Quiesced)) == {0}
    assert tx.session.quiescent
    assert Release(0) in ended  # nothing reads it


def test_a_peer_that_is_gone_is_not_waited_for() -> None:
    tx = writing("a", "b")
    tx.written(**LOOSE, transport="a")
    tx.feed(inputs.PeerGone(10, "silent"))
    assert state(tx) is KVPoll.Failed
    assert tx.session.quiescent
    assert fenced(tx, "a") == []


# Through no fault of the transport


def test_collateral_is_tried_again_on_the_same_transport() -> None:
    tx = writing("a", "b")
    for attempt in range(MAX_COLLATERALS):
        failed = tx.written(ok=False, collateral=True, transport="a", attempt=attempt, detail="killed")
        assert first(failed, Preflight).transport == "a"
        assert again(tx.preflight(transport="a"))[3:] == (attempt + 1, "a", b"a")
    last = tx.written(ok=False, collateral=True, transport="a", attempt=MAX_COLLATERALS, detail="killed")
    assert first(last, Preflight).transport == "b"
    assert tx.session.slots[0].passed_over == ("a to rank 0: killed",)


def test_collateral_that_may_land_waits_for_the_new_token() -> None:
    tx = writing("a")
    failed = tx.written(**LOOSE, collateral=True, transport="a")
    assert sent(failed, FencePart)[0].transport == "a"
    assert tx.feed(inputs.RankQuiesced(0, 0)) == []  # the fence that is asked for would end the next attempt
    assert kinds(fenced(tx, "a")) == ["Preflight"]
    assert again(tx.preflight(transport="a"))[3:] == (1, "a", b"new")


def test_a_transport_that_the_receiver_has_given_up_is_not_tried_again() -> None:
    tx = writing("a", "b")
    tx.written(**LOOSE, collateral=True, transport="a")
    assert first(fenced(tx, "a", token=None), Preflight).transport == "b"
    alone = writing("a")
    alone.written(**LOOSE, collateral=True, transport="a")
    report = sent(fenced(alone, "a", token=None), PartReport)[0]
    assert report.failure.code is FailureCode.TransportFailed
    assert report.failure.detail == "a to rank 0: the receiver has given it up"


def test_every_part_is_counted_anew() -> None:
    tx = writing("a")
    for _ in range(MAX_COLLATERALS):
        tx.written(ok=False, collateral=True, transport="a", attempt=tx.session.slots[0].attempt)
        tx.preflight(transport="a")
    tx.written(transport="a", attempt=MAX_COLLATERALS)
    tx.ack()
    tx.say(Resume, sent_tokens=8, grant=grant(1, transports=("a",)))
    tx.feed(inputs.Granted(1, (0, 1), 8))
    assert first(tx.written(ok=False, collateral=True, transport="a"), Preflight).transport == "a"


def test_an_end_during_the_wait_is_no_attempt() -> None:
    tx = writing("a", "b")
    tx.written(**LOOSE, transport="a")
    tx.feed(inputs.AbortRoom("enough"))
    assert kinds(tx.ack(failure=bad())) == []
    assert kinds(tx.preflight(transport="b")) == []


# A transport that hangs


def state(tx: Tx) -> KVPoll:
    return tx.session.state


def fire(tx: Tx) -> list[Command]:
    """The gate's time is over."""
    return tx.feed(inputs.TimerFired("gate", tx.session._clocks.gate))


def armed(commands: list[Command]) -> list[float]:
    return [command.after_s for command in commands if isinstance(command, SetTimer) and command.name == "gate"]


def test_an_attempt_without_progress_is_given_up_while_another_transport_is_left() -> None:
    tx = writing("a", "b")
    assert tx.session._clocks.patience_s == 1.5  # half of stall_s, which is below fallback_s
    hurried = fire(tx)
    assert first(hurried, CancelWrites) == CancelWrites(0, 0, 0, "no bytes landed for 1.5 s")
    assert armed(hurried)[-1] == 3  # the cancel has all the time there is
    assert state(tx) is KVPoll.WaitingForInput
    assert first(tx.written(ok=False, transport="a", detail="cancelled"), Preflight).transport == "b"
    start = tx.preflight(transport="b")
    assert again(start)[3:5] == (1, "b")
    assert armed(start)[-1] == 3  # nothing is left after this one
    assert fire(tx)
    assert state(tx) is KVPoll.Failed
    assert tx.session.failure is not None
    assert tx.session.failure.code is FailureCode.DeadlinePassed


def test_what_lands_all_the_same_counts() -> None:
    tx = writing("a", "b")
    fire(tx)
    assert sent(tx.written(transport="a"), PartReport)[0].transport == "a"


def test_an_attempt_that_does_not_end_although_it_was_asked_to_ends_the_room() -> None:
    tx = writing("a", "b")
    fire(tx)
    fire(tx)
    assert state(tx) is KVPoll.Failed


def test_progress_puts_it_off() -> None:
    tx = writing("a", "b")
    epoch = tx.session._clocks.gate
    assert armed(tx.feed(inputs.Progress(0, 100))) == [1.5]
    assert tx.feed(inputs.TimerFired("gate", epoch)) == []


def test_ranks_without_another_transport_are_let_alone() -> None:
    tx = Tx(ranks=2, transports=("a", "b"))
    for rank, transports in enumerate((("a", "b"), ("a",))):
        tx.reserve(rank, granted=grant(transports=transports))
        tx.preflight(rank, "a")
    tx.supply(20)
    tx.feed(inputs.Granted(0, (0, 1), 8))
    assert [command.rank for command in fire(tx) if isinstance(command, CancelWrites)] == [0]


def test_a_port_that_does_not_answer_in_the_middle_of_a_part_is_not_waited_for() -> None:
    tx = writing("a", "b", "c")
    tx.written(ok=False, transport="a", detail="reset")
    assert tx.session._clocks.patience_s == 1.5
    assert [c for c in fire(tx) if isinstance(c, Preflight)] == [Preflight(0, 10, "c")]
    assert tx.preflight(transport="b") == []  # too late
    assert again(tx.preflight(transport="c"))[3:5] == (1, "c")
    assert tx.session.slots[0].passed_over[1] == "b to rank 0: its port was not reached for 1.5 s"
    alone = writing("a", "b")
    alone.written(ok=False, transport="a", detail="reset")
    assert alone.session._clocks.patience_s is None
    fire(alone)
    assert state(alone) is KVPoll.Failed


def test_the_receivers_are_told_that_something_else_is_tried() -> None:
    tx = writing("a", "b")
    told = [next(tx.session.beats(10, host_alive=True, working=False)).tries]
    fire(tx)
    told.append(next(tx.session.beats(10, host_alive=True, working=False)).tries)
    assert tx.session.news
    tx.written(ok=False, transport="a")
    tx.preflight(transport="b")
    told.append(next(tx.session.beats(10, host_alive=True, working=False)).tries)
    assert told == [0, 1, 2]


def test_a_probe_has_less_time() -> None:
    tx = writing("a", "b")
    assert tx.feed(inputs.Probing(0, 0, 7)) == []
    assert armed(tx.feed(inputs.Probing(0, 0, 0))) == [1]
    assert first(fire(tx), CancelWrites).why == "no bytes landed for 1 s"
    alone = writing("a")
    assert alone.feed(inputs.Probing(0, 0, 0)) == []  # with nothing else left it is no experiment


# Breakers


def test_a_transport_whose_breaker_is_open_is_the_last_resort() -> None:
    tx = Tx(transports=("a", "b"))
    tx.reserve(granted=grant(transports=("a", "b")))
    shut = inputs.Preflighted(0, 10, "a", ok=False, detail="failed lately", shut=True)
    assert first(tx.feed(shut), Preflight) == Preflight(0, 10, "b")
    last = first(tx.preflight(transport="b", ok=False), Preflight)
    assert last == Preflight(0, 10, "a", insist=True)
    tx.preflight(transport="a")
    assert state(tx) is KVPoll.WaitingForInput
    tx.supply(20)
    (target,) = first(tx.feed(inputs.Granted(0, (0, 1), 8)), StartPart).targets
    assert (target.transport, target.insist) == ("a", True)


def test_the_only_transport_is_insisted_on() -> None:
    tx = Tx(transports=("a",))
    tx.reserve(granted=grant(transports=("a",)))
    shut = inputs.Preflighted(0, 10, "a", ok=False, detail="failed lately", shut=True)
    assert first(tx.feed(shut), Preflight) == Preflight(0, 10, "a", insist=True)
    assert state(tx) is KVPoll.Bootstrapping


def test_a_breaker_that_opened_meanwhile_is_met_at_the_start() -> None:
    tx = writing("a", "b")
    shut = tx.written(ok=False, shut=True, transport="a", detail="failed lately")
    assert first(shut, Preflight) == Preflight(0, 10, "b")
    assert again(tx.preflight(transport="b"))[3:5] == (1, "b")
    last = tx.written(ok=False, transport="b", attempt=1, detail="reset")
    assert first(last, Preflight) == Preflight(0, 10, "a", insist=True)
    tx.preflight(transport="a")
    end = tx.written(ok=False, transport="a", attempt=2, detail="reset", shut=True)  # cannot be; must end all the same
    assert sent(end, PartReport)[0].failure.code is FailureCode.TransportFailed


def test_a_last_resort_is_nothing_to_fall_back_on() -> None:
    """A room whose transport stands still for a moment is not moved to one that is known to fail."""
    tx = writing("a", "b")
    tx.written(ok=False, shut=True, transport="a")
    assert armed(tx.preflight(transport="b"))[-1] == 3


@pytest.mark.parametrize("stale", [True, False])
def test_the_next_part_may_go_back_to_a_better_transport(stale: bool) -> None:
    tx = writing("a", "b")
    tx.written(ok=False, transport="a")
    tx.preflight(transport="b")
    tx.written(transport="b", attempt=1)
    assert tx.feed(inputs.Reconsider(10 if stale else 11)) == []
    tx.ack()
    resumed = tx.say(Resume, sent_tokens=8, grant=grant(1, transports=("a", "b")))
    if not stale:
        assert first(resumed, Grant) == Grant(1, 2)
        return
    assert first(resumed, Preflight) == Preflight(0, 10, "a")
    assert first(tx.preflight(transport="a"), Grant) == Grant(1, 2)
    assert tx.session.slots[0].passed_over == ()
