"""Reservations of receivers whose room is not open here yet, or belongs to an earlier life still.

A receiver that was dismissed (told of the end of a room it was never let into) may have reserved again before it
heard of that. Such a reservation is void, its blocks are given back: it is neither parked nor let in. The
receiver's Abort, which it answers with, comes after all it ever said of that life, and ends the memory of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from msgspec.structs import replace

from kvpoll_fsm.errors import Failure, FailureCode
from kvpoll_fsm.messages import Abort, Message, Quiesced, Reserve, Withdraw, Withdrawn
from kvpoll_fsm.poll import KVPoll

__all__ = ["MAX_PARKED", "Life", "Parked", "Parking"]

MAX_PARKED = 1 << 16
"""Rooms that are kept at most; the one that has waited longest makes place for a new one."""


class Life(NamedTuple):
    """One life of a receiver rank, as its sender's endpoint knows it."""

    conn: int
    room: int
    rank: int
    generation: int

    @property
    def place(self) -> tuple[int, int, int]:
        """What all lives of the rank have in common."""
        return self.conn, self.room, self.rank

    @classmethod
    def of(cls, conn: int, message: Reserve | Abort | Withdraw) -> Life:
        """The receiver that a message is from, or to."""
        return cls(conn, message.room, message.rank, message.receiver_generation)


class Parked(NamedTuple):
    """A reservation, and the connection it came by."""

    conn: int
    reserve: Reserve

    @property
    def life(self) -> Life:
        """Who made it."""
        return Life.of(self.conn, self.reserve)


class Parking:
    """At most one reservation for each rank of a room; nothing is kept of a room without any."""

    __slots__ = ("_dismissed", "_rooms")

    def __init__(self) -> None:
        self._rooms: dict[int, dict[int, Parked]] = {}
        self._dismissed: dict[tuple[int, int, int], int] = {}

    def park(self, conn: int, reserve: Reserve) -> tuple[int, Abort] | None:
        """Keep a reservation.

        Returns:
            What to tell, and through which connection, another life whose reservation it displaces, if any.
        """
        room = self._rooms.setdefault(reserve.room, {})
        before = room.get(reserve.rank)
        room[reserve.rank] = Parked(conn, reserve)
        if len(self._rooms) > MAX_PARKED:
            del self._rooms[next(iter(self._rooms))]
        if before is None or before.life == Life.of(conn, reserve):
            return None
        return before.conn, displaced(before.reserve)

    def dismiss(self, conn: int, abort: Abort) -> None:
        """A receiver that was not let in is told of the end: what it reserved meanwhile is void.

        So is what earlier lives of it reserved: the newest alone is kept, however often a peer comes again.
        """
        life = Life.of(conn, abort)
        self._dismissed[life.place] = max(life.generation, self._dismissed.pop(life.place, 0))
        if len(self._dismissed) > MAX_PARKED:
            del self._dismissed[next(iter(self._dismissed))]

    def is_dismissed(self, conn: int, reserve: Reserve) -> bool:
        """Whether this reservation is void."""
        life = Life.of(conn, reserve)
        return life.generation <= self._dismissed.get(life.place, -1)

    def gave_up(self, conn: int, abort: Abort) -> None:
        """A receiver has ended its life of a room, and says no more of it."""
        life = Life.of(conn, abort)
        if life.generation >= self._dismissed.get(life.place, 0):
            self._dismissed.pop(life.place, None)
        if self._find(life) is not None:
            self._delete(life.room, life.rank)

    def adopt(self, room: int) -> tuple[Parked, ...]:
        """Take out all reservations of a room, in the order in which the ranks came."""
        return tuple(self._rooms.pop(room, {}).values())

    def answer(self, conn: int, message: Message) -> Message | None:
        """Take word of a receiver whose room is not open here, so that nothing of it is in flight.

        Returns:
            The answer it waits for, if any.
        """
        if isinstance(message, Abort):
            return Quiesced(**_address(message))
        if isinstance(message, Withdraw):
            parked = self._find(Life.of(conn, message))
            if parked is not None:  # the rank stays, its blocks go
                self._rooms[message.room][message.rank] = Parked(conn, replace(parked.reserve, grant=None))
            return Withdrawn(part=message.part, ok=True, **_address(message))
        return None

    def hang_up(self, conn: int) -> None:
        """A connection has ended, and with it every life that was known by it."""
        gone = [parked.life for parked in self._all() if parked.conn == conn]
        for life in gone:
            self._delete(life.room, life.rank)
        for place in [place for place in self._dismissed if place[0] == conn]:
            del self._dismissed[place]

    def __len__(self) -> int:
        return sum(map(len, self._rooms.values()))

    def clone(self) -> Parking:
        """A copy that shares nothing mutable."""
        copy = Parking()
        copy._rooms = {room: dict(ranks) for room, ranks in self._rooms.items()}
        copy._dismissed = dict(self._dismissed)
        return copy

    def key(self) -> tuple[Any, ...]:
        """Canonical plain value of the state."""
        return (tuple(self._all()), tuple(self._dismissed.items()))

    def _all(self) -> Iterator[Parked]:
        for ranks in self._rooms.values():
            yield from ranks.values()

    def _find(self, life: Life) -> Parked | None:
        parked = self._rooms.get(life.room, {}).get(life.rank)
        return parked if parked is not None and parked.life == life else None

    def _delete(self, room: int, rank: int) -> None:
        ranks = self._rooms[room]
        del ranks[rank]
        if not ranks:
            del self._rooms[room]


def displaced(reserve: Reserve) -> Abort:
    """What a receiver is told whose place another life of its rank has taken; nothing was sent to it."""
    detail = f"another life of rank {reserve.rank} reserved the room after this one"
    failure = Failure.of(FailureCode.ProtocolError, detail, state=KVPoll.Bootstrapping, rank=reserve.rank)
    return Abort(failure=failure, quiescent=True, **_address(reserve))


def _address(message: Reserve | Abort | Withdraw) -> dict[str, Any]:
    """The fields that address one life of a room, for an answer."""
    names = ("room", "rank", "sender_generation", "receiver_generation")
    return {name: getattr(message, name) for name in names}
