"""A receiver with a window of two, fed by hand: when it takes a second grant, what it does without, how it ends.

What a window of one does is in test_receiver_session.py.
"""

from __future__ import annotations

import pytest

from kvpoll_fsm import inputs
from kvpoll_fsm.commands import Command, CopyOut, Fence, Grant, HeldPart, Regrant, Release, Verify
from kvpoll_fsm.deadlines import Gate
from kvpoll_fsm.errors import Failure, FailureCode
from kvpoll_fsm.messages import Abort, PartAck, Quiesced, Resume, Withdraw, Withdrawn
from kvpoll_fsm.poll import KVPoll
from tests.test_receiver_session import CHECKSUM, Rx, bad, kinds, sent

W, T, S, F = KVPoll.WaitingForInput, KVPoll.Transferring, KVPoll.Success, KVPoll.Failed
FIRST, SECOND = (4, 2), (6, 3)
NO = (FailureCode.ChecksumMismatch, "the bytes differ")


class Wide(Rx):
    """Window 2; blocks 4 and 2 for even parts, 6 and 3 for odd ones."""

    def __init__(self) -> None:
        super().__init__(window=2)
        self.opened()

    def second(self) -> list[Command]:
        """The pool has blocks for the next part."""
        return self.granted((SECOND, FIRST)[self.session.part % 2], self.session.part + 1)

    def landed(self, **more: object) -> Wide:
        """The part has landed, and the next one has its grant."""
        self.report(**more)  # type: ignore[arg-type]
        self.second()
        return self

    def copied_part(self, part: int, failure: tuple[FailureCode, str] | None = None) -> list[Command]:
        return self.feed(inputs.CopiedOut(part, failure))


def test_a_second_grant_is_asked_for_when_a_part_that_is_not_the_last_has_landed() -> None:
    rx = Wide()
    assert rx.report(total=20)[0] == Grant(1, 2, (), True)
    assert rx.session.gate is Gate.waiting_outcome
    resume_then_ack = rx.second()
    assert kinds(resume_then_ack) == ["Resume", "PartAck", "CopyOut"]
    resume = sent(resume_then_ack, Resume)
    assert (resume.sent_tokens, resume.grant.part, resume.grant.blocks) == (0, 1, SECOND)
    assert resume_then_ack[-1] == CopyOut((HeldPart(0, 0, 8, FIRST),), 20, None)
    assert rx.session.state is W


def test_no_more_blocks_are_asked_for_than_the_rest_needs() -> None:
    assert Grant(1, 1, (), True) in Wide().report(total=10)


def test_the_last_part_needs_no_second_grant_and_is_copied_out_before_it_is_acknowledged() -> None:
    rx = Wide()
    assert kinds(rx.report(total=8)) == ["CopyOut"]
    assert kinds(rx.copied()) == ["PartAck"]
    assert kinds(rx.outcome()) == ["Release"]
    assert rx.session.state is S


def test_without_free_blocks_it_goes_on_as_with_a_window_of_one() -> None:
    rx, one = Wide(), Rx().opened()
    rx.report(checksum=CHECKSUM)
    asked = rx.feed(inputs.GrantRefused(1))
    assert asked[0] == Release(1)
    assert asked[1:] == [c for c in one.report(checksum=CHECKSUM) if isinstance(c, CopyOut)]
    assert kinds(rx.copied()) == kinds(one.copied()) == ["PartAck"]
    assert kinds(rx.outcome()) == kinds(one.outcome()) == ["Regrant"]


def test_blocks_that_cannot_be_exposed_fail_the_room_as_those_of_the_first_grant_do() -> None:
    rx = Wide()
    rx.report()
    why = Failure.of(FailureCode.InternalError, "grant: no", state=W, rank=1)
    assert kinds(rx.feed(inputs.GrantRefused(1, why)))[:2] == ["Release", "Abort"]
    assert rx.session.failure is not None
    assert rx.session.quiescent


def test_the_checksum_is_compared_before_the_ack_and_copied_after_it() -> None:
    rx = Wide()
    rx.report(checksum=CHECKSUM)
    assert kinds(rx.second()) == ["Resume", "Verify"]
    assert kinds(rx.feed(inputs.Verified(0))) == ["PartAck", "CopyOut"]


def test_a_part_with_wrong_bytes_is_refused_and_never_copied() -> None:
    rx = Wide().landed(checksum=CHECKSUM)
    refused = rx.feed(inputs.Verified(0, NO))
    assert kinds(refused) == ["PartAck"]
    assert sent(refused, PartAck).failure.code is FailureCode.ChecksumMismatch
    ended = rx.outcome(state=F, failure=sent(refused, PartAck).failure, quiescent=True)
    assert [c for c in ended if isinstance(c, Release)] == [Release(0), Release(1)]
    assert rx.session.quiescent


@pytest.mark.parametrize("copied_first", [False, True])
def test_the_outcome_and_the_end_of_the_copy_may_come_in_any_order(copied_first: bool) -> None:
    """The blocks of a part go back when both are there; meanwhile the room is in the next part."""
    rx = Wide().landed()
    if copied_first:
        assert kinds(rx.copied_part(0)) == []
        assert kinds(rx.outcome()) == ["Release"]
    else:
        assert kinds(rx.outcome()) == []
        assert rx.session.held_parts == (HeldPart(0, 0, 8, FIRST),)
        assert kinds(rx.copied_part(0)) == ["Release"]
    assert (rx.session.state, rx.session.part, rx.session.gate) == (T, 1, Gate.queued)
    assert rx.session.history == (KVPoll.Bootstrapping, W, T)
    assert rx.session.held_parts == ()


def test_a_part_that_lands_while_the_one_before_is_copied_waits_for_the_worker() -> None:
    rx = Wide().landed()
    rx.outcome()
    assert kinds(rx.report()) == []
    assert rx.session.gate is Gate.waiting_outcome
    assert kinds(rx.copied_part(0)) == ["Release", "Grant"]
    assert kinds(rx.second()) == ["Resume", "PartAck", "CopyOut"]


def test_the_last_part_waits_for_the_copy_of_the_one_before_too() -> None:
    rx = Wide().landed(total=12)
    rx.outcome()
    assert kinds(rx.report(total=12)) == []
    assert kinds(rx.copied_part(0)) == ["Release", "CopyOut"]
    assert kinds(rx.copied_part(1)) == ["PartAck"]
    assert kinds(rx.outcome()) == ["Release"]
    assert rx.session.state is S
    assert rx.session.quiescent


@pytest.mark.parametrize("told", [False, True])
def test_a_copy_that_fails_after_the_ack_fails_the_room(told: bool) -> None:
    rx = Wide().landed()
    if told:
        rx.outcome()
    ended = rx.copied_part(0, (FailureCode.RequestTooLarge, "no memory"))
    assert sent(ended, Abort).failure.code is FailureCode.RequestTooLarge
    assert [c for c in ended if isinstance(c, Fence)] == [Fence(1, force=False)]
    assert [c for c in ended if isinstance(c, Release)] == [Release(0)]
    assert not rx.session.quiescent
    assert kinds(rx.feed(inputs.Fenced(1))) == ["Quiesced", "Release"]
    assert rx.session.quiescent


# Asked back


def test_a_second_grant_is_asked_back_before_the_first() -> None:
    rx = Wide().landed(checksum=CHECKSUM)
    assert sent(rx.feed(inputs.RevokeGrant()), Withdraw).part == 1
    assert rx.feed(inputs.RevokeGrant()) == []
    assert kinds(rx.say(Withdrawn, part=1, ok=True)) == ["Release"]
    assert kinds(rx.feed(inputs.Verified(0))) == ["PartAck", "CopyOut"]


def test_a_room_whose_second_grant_was_withdrawn_grants_the_copied_blocks_again() -> None:
    rx = Wide().landed()
    rx.feed(inputs.RevokeGrant())
    rx.say(Withdrawn, part=1, ok=True)
    assert kinds(rx.outcome()) == []
    assert rx.session.gate is Gate.waiting_blocks
    assert "is being copied out" in rx.session.awaited()
    assert rx.copied_part(0)[0] == Regrant(0, 1, 2)
    resumed = rx.granted(FIRST)
    assert sent(resumed, Resume).sent_tokens == 8
    assert rx.session.state is T


def test_a_second_grant_the_sender_uses_by_now_is_kept() -> None:
    rx = Wide().landed()
    rx.feed(inputs.RevokeGrant())
    rx.outcome()
    assert kinds(rx.say(Withdrawn, part=1, ok=False)) == []
    assert rx.feed(inputs.RevokeGrant()) == []
    rx.copied_part(0)
    assert kinds(rx.report()) == ["Grant"]


def test_a_grant_whose_turn_came_while_it_was_asked_back_is_withdrawn_all_the_same() -> None:
    rx = Wide().landed()
    rx.feed(inputs.RevokeGrant())
    rx.outcome()
    rx.copied_part(0)
    assert kinds(rx.say(Withdrawn, part=1, ok=True)) == ["Release", "Grant"]
    assert rx.session.gate is Gate.waiting_blocks


def test_a_refusal_leaves_the_second_grant_as_it_was() -> None:
    rx = Wide().landed()
    rx.feed(inputs.RevokeGrant())
    assert rx.say(Withdrawn, part=1, ok=False) == []
    assert sent(rx.feed(inputs.RevokeGrant()), Withdraw).part == 1


# The end


def test_an_abort_quarantines_the_second_grant_until_the_sender_says_that_nothing_is_in_flight() -> None:
    rx = Wide().landed()
    ended = rx.feed(inputs.AbortRoom("enough"))
    assert [c for c in ended if isinstance(c, Fence)] == [Fence(1, force=False)]
    assert not [c for c in ended if isinstance(c, Release)]  # the first part is being copied out
    assert kinds(rx.copied_part(0)) == ["Release"]
    assert not rx.session.quiescent
    assert [c for c in rx.say(Quiesced) if isinstance(c, Release)] == [Release(1)]
    assert rx.session.quiescent


def test_an_abort_in_the_next_part_frees_what_is_copied_and_quarantines_what_may_be_written() -> None:
    rx = Wide().landed()
    rx.outcome()
    ended = rx.feed(inputs.AbortRoom("enough"))
    assert [c for c in ended if isinstance(c, Fence)] == [Fence(1, force=False)]
    assert kinds(rx.feed(inputs.Fenced(1))) == ["Quiesced"]
    assert kinds(rx.copied_part(0)) == ["Release", "Release"]
    assert rx.session.quiescent


def test_an_abort_while_the_pool_is_asked_wants_no_blocks_any_more() -> None:
    rx = Wide()
    rx.report()
    assert Release(1) in rx.feed(inputs.AbortRoom("enough"))
    assert rx.granted(SECOND, 1) == []
    assert rx.session.quiescent


def test_the_senders_word_frees_both() -> None:
    rx = Wide().landed()
    rx.copied_part(0)
    ended = rx.say(Abort, failure=bad(), quiescent=True)
    assert [c for c in ended if isinstance(c, Release)] == [Release(0), Release(1)]
    assert rx.session.quiescent


def test_a_copy_of_the_session_is_like_it() -> None:
    rx = Wide().landed()
    rx.outcome()
    copy = rx.session.clone()
    assert copy.key() == rx.session.key()
    rx.copied_part(0)
    assert copy.key() != rx.session.key()
    assert copy.held_parts


def test_verify_is_asked_of_the_part_that_landed() -> None:
    rx = Wide()
    rx.report(checksum=CHECKSUM)
    assert Verify(HeldPart(0, 0, 8, FIRST), CHECKSUM) in rx.second()
