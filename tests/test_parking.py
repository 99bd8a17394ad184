"""Reservations without a room: kept, replaced, withdrawn, dismissed, forgotten."""

from __future__ import annotations

from kvpoll_fsm.errors import Failure, FailureCode
from kvpoll_fsm.limits import Limits
from kvpoll_fsm.messages import Abort, BlockGrant, PartAck, Quiesced, Reserve, Withdraw, Withdrawn
from kvpoll_fsm.parking import Parked, Parking
from kvpoll_fsm.poll import KVPoll

GRANT = BlockGrant(0, 8, (1,), (("tcp", b"t"),))
FAILURE = Failure.of(FailureCode.Aborted, "enough", state=KVPoll.Bootstrapping, rank=0)


def reserve(rank: int = 0, generation: int = 1, grant: BlockGrant | None = GRANT, room: int = 7) -> Reserve:
    return Reserve(room=room, rank=rank, ranks=2, grant=grant, receiver_generation=generation)


def abort(rank: int = 0, generation: int = 1, room: int = 7) -> Abort:
    return Abort(room=room, rank=rank, receiver_generation=generation, failure=FAILURE)


def test_reservations_are_adopted_once_in_the_order_they_came() -> None:
    parking = Parking()
    for rank in (1, 0):
        assert parking.park(5, reserve(rank)) == []
    parking.park(5, reserve(room=8))
    assert len(parking) == 3
    assert parking.adopt(7) == (Parked(5, reserve(1)), Parked(5, reserve(0)))
    assert parking.adopt(7) == ()
    assert len(parking) == 1


def test_a_newer_word_of_the_same_life_replaces_the_older() -> None:
    parking = Parking()
    parking.park(5, reserve(grant=None))
    assert parking.park(5, reserve()) == []
    assert parking.adopt(7) == (Parked(5, reserve()),)


def test_another_life_displaces_and_the_first_is_to_be_told() -> None:
    parking = Parking()
    parking.park(5, reserve())
    for conn, generation in ((6, 1), (6, 2)):
        ((to, message),) = parking.park(conn, reserve(generation=generation))
        assert (to, message.receiver_generation, message.quiescent) == (
            (5, 1, True) if generation == 1 else (6, 1, True)
        )
        assert message.failure.code is FailureCode.Displaced
        assert message.failure.retryable
    assert parking.adopt(7) == (Parked(6, reserve(generation=2)),)


def test_a_withdrawn_grant_leaves_the_rank() -> None:
    parking = Parking()
    parking.park(5, reserve())
    ask = Withdraw(room=7, rank=0, part=0, receiver_generation=1)
    ids = {"room": 7, "rank": 0, "receiver_generation": 1}
    assert parking.answer(5, ask) == Withdrawn(part=0, ok=True, **ids)
    assert parking.adopt(7) == (Parked(5, reserve(grant=None)),)
    assert parking.answer(5, ask) == Withdrawn(part=0, ok=True, **ids)  # nobody knows of it, so nobody uses it


def test_a_receiver_that_gives_up_is_forgotten_and_answered() -> None:
    parking = Parking()
    parking.park(5, reserve(0))
    parking.park(5, reserve(1))
    for conn, message in ((6, abort()), (5, abort(generation=2)), (5, abort(rank=9)), (5, abort(room=1))):
        parking.gave_up(conn, message)
    assert len(parking) == 2
    parking.gave_up(5, abort(0))
    assert parking.adopt(7) == (Parked(5, reserve(1)),)
    assert parking.answer(5, abort(0)) == Quiesced(room=7, rank=0, receiver_generation=1)
    assert parking.answer(5, PartAck(room=7, rank=0, part=0)) is None


def test_what_a_dismissed_life_reserves_is_void_until_it_has_said_its_last() -> None:
    parking = Parking()
    parking.dismiss(5, abort())
    assert parking.is_dismissed(5, reserve())
    assert not parking.is_dismissed(6, reserve())
    assert not parking.is_dismissed(5, reserve(generation=2))
    parking.gave_up(5, abort())
    assert not parking.is_dismissed(5, reserve())
    assert parking.key() == ((), ())


def test_a_connection_takes_all_its_lives_along() -> None:
    parking = Parking()
    parking.park(5, reserve(0))
    parking.park(6, reserve(1))
    parking.park(5, reserve(room=8))
    parking.dismiss(5, abort(3))
    parking.dismiss(6, abort(3))
    parking.hang_up(5)
    assert parking.key() == ((Parked(6, reserve(1)),), (((6, 7, 3), 1),))
    parking.hang_up(6)
    assert parking.key() == ((), ())
    assert not parking._rooms


def test_a_copy_shares_nothing() -> None:
    parking = Parking()
    parking.park(5, reserve())
    parking.dismiss(5, abort(1))
    copy, before = parking.clone(), parking.key()
    assert copy.key() == before
    assert hash(before) == hash(copy.key())
    parking.park(5, reserve(1))
    parking.gave_up(5, abort(1))
    assert copy.key() == before != parking.key()


def test_lives_dismissed_one_after_another_leave_the_newest() -> None:
    parking = Parking()
    for generation in range(1, 1000):
        assert len(parking.park(5, reserve(generation=generation))) == (generation > 1)
        parking.dismiss(5, abort(generation=generation))
    assert len(parking.key()[1]) == 1
    assert parking.is_dismissed(5, reserve(generation=998))
    parking.gave_up(5, abort(generation=998))
    assert parking.is_dismissed(5, reserve(generation=999))
    parking.gave_up(5, abort(generation=999))
    assert not parking.is_dismissed(5, reserve(generation=999))


def test_what_is_kept_of_dismissed_lives_is_bounded() -> None:
    parking = Parking(Limits(orphans_per_peer=3))
    for room in range(9):
        parking.dismiss(5, abort(room=room))
    assert [parking.is_dismissed(5, reserve(room=room)) for room in range(9)] == [False] * 6 + [True] * 3


def test_many_connections_are_remembered_no_longer_than_one() -> None:
    """The one that has most loses its oldest; the others keep what they have."""
    parking = Parking(Limits(orphans=6, orphans_per_peer=4))
    parking.dismiss(9, abort(room=0))
    for conn in (5, 6):
        for room in range(4):
            parking.dismiss(conn, abort(room=room))
    assert len(parking.key()[1]) == 6
    assert parking.is_dismissed(9, reserve(room=0))
    assert parking.is_dismissed(6, reserve(room=3))


# Limits


def rooms_of(parking: Parking, conn: int) -> list[int]:
    return [parked.reserve.room for parked in parking.key()[0] if parked.conn == conn]


def test_one_account_keeps_no_more_than_it_may_and_the_refused_are_told() -> None:
    parking = Parking(Limits(orphans_per_peer=3))
    for room in range(3):
        assert parking.park(5, reserve(room=room), "eve") == []
    for conn in (5, 6):  # another connection of the same account
        ((to, message),) = parking.park(conn, reserve(room=8), "eve")
        assert (to, message.room, message.receiver_generation, message.quiescent) == (conn, 8, 1, True)
        assert message.failure.code is FailureCode.LimitReached
        assert "orphans_per_peer=3" in message.failure.detail
    assert parking.park(7, reserve(room=8), "bob") == []
    assert parking.park(5, reserve(room=1, grant=None), "eve") == []  # a newer word of what is kept
    assert (rooms_of(parking, 5), rooms_of(parking, 7)) == ([0, 1, 2], [8])
    parking.adopt(0)
    assert parking.park(5, reserve(room=9), "eve") == []


def test_who_has_most_makes_place_for_the_others() -> None:
    parking = Parking(Limits(orphans=10))
    for room in range(10):
        parking.park(5, reserve(room=room), "eve")
    for room in range(20, 24):
        ((to, message),) = parking.park(6, reserve(room=room), "bob")
        assert (to, message.room) == (5, room - 20), "the oldest of the one that has most"
        assert "orphans=10" in message.failure.detail
    ((to, message),) = parking.park(5, reserve(room=99), "eve")
    assert (to, message.room) == (5, 99), "who has most is refused"
    assert (len(rooms_of(parking, 5)), len(rooms_of(parking, 6))) == (6, 4)
    assert parking.park(6, reserve(room=24), "bob")[0][0] == 5
    assert parking.park(6, reserve(room=25), "bob")[0][0] == 6, "now both have five"


def test_a_displaced_life_of_another_account_counts_no_more() -> None:
    parking = Parking(Limits(orphans=2))
    parking.park(5, reserve(), "eve")
    parking.park(6, reserve(generation=2), "bob")
    assert (rooms_of(parking, 5), rooms_of(parking, 6), len(parking)) == ([], [7], 1)
    parking.park(5, reserve(room=8), "eve")
    parking.hang_up(6)
    assert parking.park(5, reserve(room=9), "eve") == []
    parking.hang_up(5)
    assert (len(parking), parking._held, parking.key()) == (0, {}, ((), ()))


def test_what_nobody_opens_expires_and_its_receiver_is_told() -> None:
    parking = Parking()
    parking.park(5, reserve(room=1), "a")
    assert parking.expire(3) == []
    parking.park(6, reserve(room=2), "b")
    parking.park(5, reserve(room=3, grant=None), "a")
    assert parking.expire(3) == []
    parking.park(5, reserve(room=3), "a")  # a newer word: its time begins anew
    assert [(to, message.room) for to, message in parking.expire(3)] == [(5, 1)]
    ((to, message),) = parking.expire(3)
    assert (to, message.room, message.failure.code) == (6, 2, FailureCode.LimitReached)
    assert "no sender opened the room" in message.failure.detail
    assert message.failure.retryable
    assert len(parking) == 1
    assert [message.room for _, message in parking.expire(3)] == [3]
    assert parking.expire(3) == []
    assert parking.key() == ((), ())


def test_100_000_orphans_of_one_peer_leave_the_others_theirs() -> None:
    """Pain 14: what a peer leaves behind is bounded, and crowds out nobody."""
    parking = Parking()
    for room in range(1000):
        parking.park(6, reserve(room=room), "bob")
    for number in range(100_000):
        account = f"eve-{number % 8}"  # one that has many keys
        for to, message in parking.park(5, reserve(room=1_000_000 + number), account):
            parking.dismiss(to, message)
    assert len(parking) == Limits().orphans
    assert len(parking._dismissed[5]) <= Limits().orphans_per_peer
    assert rooms_of(parking, 6) == list(range(1000))
    assert len(parking) == sum(map(len, parking._held.values())) == len(parking.key()[0])
    parking.hang_up(5)
    assert len(parking) == 1000
