"""Reservations of receivers whose room is not open here yet, or belongs to an earlier life still."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from msgspec.structs import replace

from kvpoll_fsm.errors import Failure, FailureCode
from kvpoll_fsm.messages import Abort, Message, Quiesced, Reserve, Withdraw, Withdrawn
from kvpoll_fsm.poll import KVPoll

__all__ = ["MAX_PARKED", "Parked", "Parking"]

MAX_PARKED = 1 << 16
"""Rooms that are kept at most; the one that has waited longest makes place for a new one."""


class Parked(NamedTuple):
    """A reservation, and the connection it came by."""

    conn: int
    reserve: Reserve

    def is_of(self, conn: int, generation: int) -> bool:
        """Whether it was made by this life of the receiver."""
        return (self.conn, self.reserve.receiver_generation) == (conn, generation)


class Parking:
    """At most one reservation for each rank of a room; nothing is kept of a room without any."""

    __slots__ = ("_rooms",)

    def __init__(self) -> None:
        self._rooms: dict[int, dict[int, Parked]] = {}

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
        if before is None or before.is_of(conn, reserve.receiver_generation):
            return None
        return before.conn, displaced(before.reserve)

    def adopt(self, room: int) -> tuple[Parked, ...]:
        """Take out all reservations of a room, in the order in which the ranks came."""
        return tuple(self._rooms.pop(room, {}).values())

    def answer(self, conn: int, message: Message) -> Message | None:
        """Take word of a receiver whose room is not open here, so that nothing of it is in flight.

        Returns:
            The answer it waits for, if any.
        """
        if isinstance(message, Abort):
            self._forget(conn, message)
            return Quiesced(**_address(message))
        if isinstance(message, Withdraw):
            self._drop_grant(conn, message)
            return Withdrawn(part=message.part, ok=True, **_address(message))
        return None

    def hang_up(self, conn: int) -> None:
        """A connection has ended, and with it every reservation that came by it."""
        gone = [(room, rank) for room, rank, parked in self._all() if parked.conn == conn]
        for room, rank in gone:
            self._delete(room, rank)

    def __len__(self) -> int:
        return sum(map(len, self._rooms.values()))

    def clone(self) -> Parking:
        """A copy that shares nothing mutable."""
        copy = Parking()
        copy._rooms = {room: dict(ranks) for room, ranks in self._rooms.items()}
        return copy

    def key(self) -> tuple[Any, ...]:
        """Canonical plain value of the state."""
        return tuple(self._all())

    def _all(self) -> Iterator[tuple[int, int, Parked]]:
        for room, ranks in self._rooms.items():
            for rank, parked in ranks.items():
                yield room, rank, parked

    def _find(self, conn: int, message: Abort | Withdraw) -> Parked | None:
        parked = self._rooms.get(message.room, {}).get(message.rank)
        return parked if parked is not None and parked.is_of(conn, message.receiver_generation) else None

    def _forget(self, conn: int, message: Abort) -> None:
        if self._find(conn, message) is not None:
            self._delete(message.room, message.rank)

    def _drop_grant(self, conn: int, message: Withdraw) -> None:
        """The rank stays, its blocks go."""
        parked = self._find(conn, message)
        if parked is not None:
            self._rooms[message.room][message.rank] = Parked(conn, replace(parked.reserve, grant=None))

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
