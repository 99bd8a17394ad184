"""Blocks for rooms: granted, queued, refused, given on, asked back."""

from __future__ import annotations

import pytest

from kvpoll_fsm import inputs
from kvpoll_fsm.blocks import BlockAccounts
from kvpoll_fsm.commands import Expose, Grant, Regrant, Release, SetTimer
from kvpoll_fsm.effects import Do, Effect, Outbox
from kvpoll_fsm.errors import FailureCode, ForeignBlock
from kvpoll_fsm.lessor import WITHDRAW_TIMER, Lessor, lease_of
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.session import RoomKey

TX, RX = RoomKey("sender", 1, 0, 1), RoomKey("receiver", 1, 0, 1)
EARLY, LATE = RoomKey("receiver", 0, 0, 2), RoomKey("receiver", 9, 0, 3)


@pytest.fixture
def lessor() -> Lessor:
    return Lessor(BlockAccounts(4), 128, 0.5, Outbox())


def grant(lessor: Lessor, key: RoomKey, blocks: int = 1, part: int = 0, **more: object) -> list[object]:
    lessor.grant(key, KVPoll.Bootstrapping, Grant(part, blocks, **more))  # type: ignore[arg-type]
    return taken(lessor)


def taken(lessor: Lessor) -> list[object]:
    """The inputs and effects since the last look."""
    out = lessor._out
    found: list[object] = [*out.inputs]
    out.inputs.clear()
    while effects := out.drain():
        found += effects
    return found


def timer(epoch: int, after_s: float = 0.5) -> Effect:
    return Do(None, SetTimer(WITHDRAW_TIMER, after_s, epoch))


def test_a_sender_has_its_blocks_at_once_and_a_receiver_when_they_are_exposed(lessor: Lessor) -> None:
    assert grant(lessor, TX, 2) == [(TX, inputs.Granted(0, (0, 1), 256))]
    assert grant(lessor, RX, 2) == [Do(RX, Expose(0, (2, 3)))]
    assert lessor.holds(RX, 0)
    assert not lessor.holds(RX, 1)


def test_blocks_that_were_taken_before_are_granted_again(lessor: Lessor) -> None:
    lessor.take_exact(RX, (3, 1))
    assert grant(lessor, RX, 2, exact=(3, 1)) == [Do(RX, Expose(0, (3, 1)))]
    with pytest.raises(ForeignBlock):
        lessor.take_exact(EARLY, (1,))


def test_a_queued_room_is_served_when_blocks_come_free(lessor: Lessor) -> None:
    grant(lessor, LATE, 4)
    assert grant(lessor, RX, 1) == [(RX, inputs.GrantQueued(0)), timer(1)]
    assert grant(lessor, EARLY, 4) == [(EARLY, inputs.GrantQueued(0))]
    lessor.release(LATE, Release(0))
    assert taken(lessor) == [Do(LATE, Release(0)), Do(EARLY, Expose(0, (0, 1, 2, 3)))]
    lessor.release(EARLY, Release(0))
    assert taken(lessor) == [Do(EARLY, Release(0)), Do(RX, Expose(0, (0,)))]


def test_a_room_that_gives_up_waiting_lets_the_next_pass(lessor: Lessor) -> None:
    grant(lessor, LATE, 1)
    grant(lessor, EARLY, 4)
    grant(lessor, RX, 1)
    lessor.release(EARLY, Release(0))
    assert taken(lessor) == [Do(RX, Expose(0, (1,)))]


def test_refusals(lessor: Lessor) -> None:
    grant(lessor, LATE, 4)
    assert grant(lessor, RX, 1, or_refuse=True) == [(RX, inputs.GrantRefused(0))]
    assert lessor.accounts.load().queued == 0
    for command, code in ((5, FailureCode.RequestTooLarge), (1, FailureCode.ProtocolError)):
        exact = (2,) if command == 1 else ()
        ((key, refused),) = grant(lessor, RX, command, exact=exact)  # type: ignore[misc]
        assert key == RX
        assert refused.failure.code is code


def test_a_part_gives_its_blocks_to_the_next(lessor: Lessor) -> None:
    grant(lessor, RX, 4)
    grant(lessor, LATE, 1)
    lessor.regrant(RX, Regrant(0, 1, 3))
    assert taken(lessor) == [Do(RX, Release(0)), Do(RX, Expose(1, (0, 1, 2))), Do(LATE, Expose(0, (3,)))]
    assert lessor.accounts.blocks_of(lease_of(RX, 1)) == (0, 1, 2)


def test_quarantined_blocks_are_nobodys(lessor: Lessor) -> None:
    grant(lessor, LATE, 4)
    lessor.quarantine(LATE, 0)
    grant(lessor, RX, 1)
    assert lessor.accounts.load().quarantined == 4
    lessor.release(LATE, Release(0))
    assert Do(RX, Expose(0, (0,))) in taken(lessor)


def test_later_rooms_are_asked_while_an_earlier_one_waits(lessor: Lessor) -> None:
    grant(lessor, LATE, 3)
    grant(lessor, RX, 2)
    lessor.timer_fired(0)
    lessor.timer_fired(2)
    assert taken(lessor) == []
    lessor.timer_fired(1)
    assert taken(lessor) == [(LATE, inputs.RevokeGrant()), timer(2, 1.0)]
    lessor.timer_fired(1)
    assert taken(lessor) == []
    lessor.release(LATE, Release(0))
    taken(lessor)
    lessor.timer_fired(2)
    assert taken(lessor) == []  # nobody waits
    grant(lessor, LATE, 3)
    assert taken(lessor) == []
    assert timer(3) in grant(lessor, EARLY, 4) or lessor._armed


def test_an_earlier_room_is_not_asked(lessor: Lessor) -> None:
    grant(lessor, EARLY, 3)
    grant(lessor, RX, 2)
    lessor.timer_fired(1)
    assert taken(lessor) == [timer(2, 1.0)]


def test_asking_in_vain_is_repeated_less_and_less_often_until_somebody_is_served(lessor: Lessor) -> None:
    grant(lessor, EARLY, 4)
    grant(lessor, RX, 2)
    for epoch, after_s in enumerate((1.0, 2.0, 4.0, 8.0, 16.0, 16.0), 2):
        lessor.timer_fired(epoch - 1)
        assert taken(lessor) == [timer(epoch, after_s)]
    lessor.release(EARLY, Release(0))
    taken(lessor)
    assert lessor.holds(RX, 0)
    lessor.timer_fired(7)
    lessor.release(RX, Release(0))
    grant(lessor, EARLY, 4)
    assert timer(8) in grant(lessor, RX, 2)


def test_a_copy_shares_nothing(lessor: Lessor) -> None:
    grant(lessor, LATE, 4)
    grant(lessor, RX, 1)
    other = Outbox()
    copy, before = lessor.clone(other), lessor.key()
    assert copy.key() == before
    lessor.timer_fired(1)
    lessor.release(LATE, Release(0))
    assert copy.key() == before != lessor.key()
    assert not other.effects
    copy.timer_fired(1)
    copy.release(LATE, Release(0))
    assert copy.key() == lessor.key()
    assert hash(copy.key()) == hash(lessor.key())
    assert (other.inputs, other.effects) == (lessor._out.inputs, lessor._out.effects)
