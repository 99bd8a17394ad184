"""Reservations of receivers whose room is not open here yet, or belongs to an earlier life still.

A receiver that was dismissed (told of the end of a room it was never let into) may have reserved again before it
heard of that. Such a reservation is void, its blocks are given back: it is neither parked nor let in. The
receiver's Abort, which it answers with, comes after all it ever said of that life, and ends the memory of it.

What is kept is bounded: for each account (the holder of a key, or a connection), in all, and in time, which is
counted in ticks of the endpoint's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from msgspec.structs import replace

from kvpoll_fsm.errors import Failure, FailureCode
from kvpoll_fsm.limits import DEFAULT, Limits
from kvpoll_fsm.messages import Abort, Message, Quiesced, Reserve, Withdraw, Withdrawn
from kvpoll_fsm.poll import KVPoll

__all__ = ["Life", "Parked", "Parking", "Told", "refusal"]

Told = tuple[int, Abort]
"""What to tell, and through which connection."""


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
    """A reservation, the connection it came by, and the account it counts for."""

    conn: int
    reserve: Reserve
    account: str = ""

    @property
    def life(self) -> Life:
        """Who made it."""
        return Life.of(self.conn, self.reserve)


class Parking:
    """At most one reservation for each rank of a room; nothing is kept of a room without any."""

    __slots__ = ("_count", "_dismissed", "_held", "_limits", "_rooms", "_ticks")

    def __init__(self, limits: Limits = DEFAULT) -> None:
        self._limits = limits
        self._rooms: dict[int, dict[int, Parked]] = {}
        self._held: dict[str, dict[tuple[int, int], int]] = {}  # by account: (room, rank) -> tick, oldest first
        self._dismissed: dict[int, dict[tuple[int, int, int], int]] = {}  # by connection: place -> generation
        self._ticks = 0
        self._count = 0

    def park(self, conn: int, reserve: Reserve, account: str = "") -> list[Told]:
        """Keep a reservation, if there may be one more.

        Returns:
            What to tell those whose reservation is not kept: another life of the rank, which this one displaces;
            whoever makes place for it; or this one.
        """
        parked = Parked(conn, reserve, account)
        before = self._rooms.get(reserve.room, {}).get(reserve.rank)
        if before is not None and before.life == parked.life:
            del self._held[account][reserve.room, reserve.rank]  # its time begins anew
            self._count -= 1
            self._keep(parked)
            return []
        if len(self._held.get(account, ())) >= self._limits.orphans_per_peer:
            return [self._refuse(parked, "orphans_per_peer")]
        told = []
        if before is not None:
            self._delete(reserve.room, reserve.rank)
            told.append((before.conn, displaced(before.reserve)))
        elif len(self) >= self._limits.orphans:
            crowd = self._fullest()
            if len(self._held[crowd]) <= len(self._held.get(account, ())) + 1:
                return [self._refuse(parked, "orphans")]
            told.append(self._give_up(*next(iter(self._held[crowd])), "orphans"))
        self._keep(parked)
        return told

    def expire(self, after_ticks: int) -> list[Told]:
        """A tick has passed; returns what to tell the receivers whom no sender has met for so many."""
        self._ticks += 1
        due = self._ticks - after_ticks
        places = [place for held in self._held.values() for place in _held_since(held, due)]
        return [self._give_up(*place, "orphan_s") for place in places]

    def dismiss(self, conn: int, abort: Abort) -> None:
        """A receiver that was not let in is told of the end: what it reserved meanwhile is void.

        So is what earlier lives of it reserved: the newest alone is kept, however often a peer comes again. Of a
        peer that never says its last, the oldest of these memories go; so do those of the connection that has most,
        if there are too many in all.
        """
        life = Life.of(conn, abort)
        dismissed = self._dismissed.setdefault(conn, {})
        dismissed[life.place] = max(life.generation, dismissed.pop(life.place, 0))
        if len(dismissed) <= self._limits.orphans_per_peer:
            if sum(map(len, self._dismissed.values())) <= self._limits.orphans:
                return
            dismissed = max(self._dismissed.values(), key=len)
        del dismissed[next(iter(dismissed))]

    def is_dismissed(self, conn: int, reserve: Reserve) -> bool:
        """Whether this reservation is void."""
        life = Life.of(conn, reserve)
        return life.generation <= self._dismissed.get(conn, {}).get(life.place, -1)

    def gave_up(self, conn: int, abort: Abort) -> None:
        """A receiver has ended its life of a room, and says no more of it."""
        life = Life.of(conn, abort)
        dismissed = self._dismissed.get(conn, {})
        if life.generation >= dismissed.get(life.place, 0):
            dismissed.pop(life.place, None)
        if not dismissed:
            self._dismissed.pop(conn, None)
        if self._find(life) is not None:
            self._delete(life.room, life.rank)

    def adopt(self, room: int) -> tuple[Parked, ...]:
        """Take out all reservations of a room, in the order in which the ranks came."""
        adopted = tuple(self._rooms.get(room, {}).values())
        for parked in adopted:
            self._delete(room, parked.reserve.rank)
        return adopted

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
                without = parked._replace(reserve=replace(parked.reserve, grant=None))
                self._rooms[message.room][message.rank] = without
            return Withdrawn(part=message.part, ok=True, **_address(message))
        return None

    def hang_up(self, conn: int) -> None:
        """A connection has ended, and with it every life that was known by it."""
        gone = [parked.life for parked in self._all() if parked.conn == conn]
        for life in gone:
            self._delete(life.room, life.rank)
        self._dismissed.pop(conn, None)

    def __len__(self) -> int:
        return self._count

    def clone(self) -> Parking:
        """A copy that shares nothing mutable."""
        copy = Parking(self._limits)
        copy._rooms = {room: dict(ranks) for room, ranks in self._rooms.items()}
        copy._held = {account: dict(places) for account, places in self._held.items()}
        copy._dismissed = {conn: dict(places) for conn, places in self._dismissed.items()}
        copy._ticks, copy._count = self._ticks, self._count
        return copy

    def key(self) -> tuple[Any, ...]:
        """Canonical plain value of the state, ticks apart."""
        return (tuple(self._all()), tuple(item for places in self._dismissed.values() for item in places.items()))

    def _all(self) -> Iterator[Parked]:
        for ranks in self._rooms.values():
            yield from ranks.values()

    def _find(self, life: Life) -> Parked | None:
        parked = self._rooms.get(life.room, {}).get(life.rank)
        return parked if parked is not None and parked.life == life else None

    def _fullest(self) -> str:
        """The account that has most: it loses the oldest, so that nobody is crowded out by another."""
        return max(self._held, key=lambda account: len(self._held[account]))

    def _keep(self, parked: Parked) -> None:
        room, rank = parked.reserve.room, parked.reserve.rank
        self._rooms.setdefault(room, {})[rank] = parked
        self._held.setdefault(parked.account, {})[room, rank] = self._ticks
        self._count += 1

    def _refuse(self, parked: Parked, limit: str) -> Told:
        return parked.conn, refusal(parked.reserve, limit, getattr(self._limits, limit))

    def _give_up(self, room: int, rank: int, limit: str) -> Told:
        parked = self._rooms[room][rank]
        self._delete(room, rank)
        return self._refuse(parked, limit)

    def _delete(self, room: int, rank: int) -> None:
        ranks = self._rooms[room]
        account = ranks.pop(rank).account
        if not ranks:
            del self._rooms[room]
        del self._held[account][room, rank]
        self._count -= 1
        if not self._held[account]:
            del self._held[account]


def _held_since(held: dict[tuple[int, int], int], tick: int) -> list[tuple[int, int]]:
    """The places of one account that were taken at that tick or before."""
    return list(itertools.takewhile(lambda place: held[place] <= tick, held))


def displaced(reserve: Reserve) -> Abort:
    """What a receiver is told whose place another life of its rank has taken; nothing was sent to it."""
    detail = f"another life of rank {reserve.rank} reserved the room after this one"
    failure = Failure.of(FailureCode.Displaced, detail, state=KVPoll.Bootstrapping, rank=reserve.rank)
    return Abort(failure=failure, quiescent=True, **_address(reserve))


def refusal(reserve: Reserve, limit: str, value: float) -> Abort:
    """What a receiver is told whose reservation is not kept for a limit of ours; nothing was sent to it."""
    why = f"no sender opened the room within {value:g} s" if limit == "orphan_s" else f"{limit}={value:g} is reached"
    detail = f"the sender's endpoint gives the reservation up: {why}"
    failure = Failure.of(FailureCode.LimitReached, detail, state=KVPoll.Bootstrapping, rank=reserve.rank)
    return Abort(failure=failure, quiescent=True, **_address(reserve))


def _address(message: Reserve | Abort | Withdraw) -> dict[str, Any]:
    """The fields that address one life of a room, for an answer."""
    names = ("room", "rank", "sender_generation", "receiver_generation")
    return {name: getattr(message, name) for name in names}
