"""Who holds which block. Pure bookkeeping: every block is in exactly one place.

free: nobody's; leased: held by one (room, generation, part); quarantined: the transfer ended, but a write
might still land, so nobody may have the block yet.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kvpoll_fsm.errors import BlockError, DoubleFree, ForeignBlock, RequestTooLarge
from kvpoll_fsm.spi import LeaseId

__all__ = ["BlockAccounts", "BlockLoad"]


_Waiting = tuple[int, int, int, LeaseId]


def _turn(waiting: _Waiting) -> tuple[int, int]:
    """What the queue is ordered by: room, then rank."""
    return waiting[:2]


@dataclass(frozen=True, slots=True)
class BlockLoad:
    """How a pool's blocks are used; the first three always add up to `total`, `queued` counts requests."""

    total: int
    free: int
    leased: int
    quarantined: int
    queued: int


class BlockAccounts:
    """Leases of the blocks of one pool, and the rooms that wait for some.

    Those waiting are served in room order, so that two endpoints serve the same room first and cannot
    hold on to each other's blocks.
    """

    __slots__ = ("_free", "_leased", "_quarantined", "_waiting", "managed", "total")

    def __init__(self, total: int, managed: bool = True) -> None:
        """Make the accounts of `total` blocks.

        Args:
            total: Blocks in the pool.
            managed: We choose blocks. Otherwise the engine names them and `take_exact` alone works.
        """
        self.total = total
        self.managed = managed
        self._free: list[int] = list(range(total - 1, -1, -1))
        self._leased: dict[LeaseId, tuple[int, ...]] = {}
        self._quarantined: dict[LeaseId, tuple[int, ...]] = {}
        self._waiting: list[_Waiting] = []

    def take(self, lease: LeaseId, count: int) -> tuple[int, ...] | None:
        """Lease `count` blocks, or None if that many are not free or an earlier room waits.

        Raises:
            RequestTooLarge: The pool has fewer blocks in all, or gives none out by itself.
            BlockError: The lease holds blocks already.
        """
        self._check_new(lease)
        self.check(count)
        if self._waiting and _turn(self._waiting[0]) < (lease.room, lease.rank):
            return None
        blocks = self._take(lease, count)
        if blocks is not None:
            self.forget(lease)
        return blocks

    def check(self, count: int) -> None:
        """Refuse what can never be had.

        Raises:
            RequestTooLarge: As `take`.
        """
        if not 0 < count <= (self.total if self.managed else 0):
            raise RequestTooLarge(count, self.total if self.managed else 0)

    def take_exact(self, lease: LeaseId, blocks: Iterable[int]) -> tuple[int, ...]:
        """Lease exactly these blocks.

        Raises:
            ForeignBlock: Ids outside the pool, named twice, or not free.
            BlockError: The lease holds blocks already.
        """
        self._check_new(lease)
        wanted = tuple(blocks)
        self.check_exact(wanted)
        chosen = set(wanted)
        self._free = [block for block in self._free if block not in chosen]
        self.forget(lease)
        self._leased[lease] = wanted
        return wanted

    def check_exact(self, wanted: tuple[int, ...]) -> None:
        """Refuse blocks that cannot be had at this moment.

        Raises:
            ForeignBlock: As `take_exact`.
        """
        if not wanted or any(not 0 <= block < self.total for block in wanted):
            raise ForeignBlock(wanted, f"block ids of this pool are 0 to {self.total - 1}, and at least one is needed")
        if len(set(wanted)) != len(wanted):
            raise ForeignBlock(wanted, "an id is named twice")
        free = set(self._free)
        busy = tuple(block for block in wanted if block not in free)
        if busy:
            raise ForeignBlock(busy, "held by a room, or quarantined until no write can land in them")

    def wait(self, lease: LeaseId, count: int) -> None:
        """Queue a request; `serve()` returns it once it can be met. An earlier one of that lease is replaced.

        Raises:
            RequestTooLarge: As `take`; it would block the queue for ever.
            BlockError: The lease holds blocks already.
        """
        self._check_new(lease)
        self.check(count)
        self.forget(lease)
        bisect.insort(self._waiting, (lease.room, lease.rank, count, lease), key=_turn)

    def forget(self, lease: LeaseId) -> None:
        """Drop a waiting request, if there is one."""
        room_and_rank = (lease.room, lease.rank)
        at = bisect.bisect_left(self._waiting, room_and_rank, key=_turn)
        while at < len(self._waiting) and _turn(self._waiting[at]) == room_and_rank:
            if self._waiting[at][3] == lease:
                del self._waiting[at]
            else:
                at += 1

    def serve(self) -> list[tuple[LeaseId, tuple[int, ...]]]:
        """Give free blocks to those waiting, in room order, until the first that cannot be met."""
        served = []
        while self._waiting:
            _, _, count, lease = self._waiting[0]
            blocks = self._take(lease, count)
            if blocks is None:
                break
            self._waiting.pop(0)
            served.append((lease, blocks))
        return served

    def relabel(self, old: LeaseId, new: LeaseId, count: int) -> tuple[int, ...]:
        """Turn one lease into another, keeping its first `count` blocks and freeing the rest.

        Raises:
            DoubleFree: `old` holds nothing, or only quarantined blocks.
            BlockError: `new` holds blocks already.
        """
        if new != old:
            self._check_new(new)
        blocks = self._pop(self._leased, old)
        self._free.extend(reversed(blocks[count:]))
        self.forget(new)
        self._leased[new] = blocks[:count]
        return blocks[:count]

    def quarantine(self, lease: LeaseId) -> None:
        """The transfer has ended but writes may land still.

        Raises:
            DoubleFree: The lease holds nothing, or only quarantined blocks.
        """
        self._quarantined[lease] = self._pop(self._leased, lease)

    def release(self, lease: LeaseId) -> tuple[int, ...]:
        """End a lease, quarantined or not; its blocks are free.

        Raises:
            DoubleFree: The lease holds nothing.
        """
        held = self._quarantined if lease in self._quarantined else self._leased
        blocks = self._pop(held, lease)
        self._free.extend(reversed(blocks))
        return blocks

    def holds(self, lease: LeaseId) -> bool:
        """Whether the lease holds blocks, quarantined or not."""
        return lease in self._leased or lease in self._quarantined

    def blocks_of(self, lease: LeaseId) -> tuple[int, ...]:
        """The blocks of a lease, or nothing."""
        return self._leased.get(lease) or self._quarantined.get(lease, ())

    @property
    def first_waiting(self) -> LeaseId | None:
        """The request that is served next."""
        return self._waiting[0][3] if self._waiting else None

    def leases(self) -> tuple[LeaseId, ...]:
        """Every lease that holds blocks."""
        return (*self._leased, *self._quarantined)

    def load(self) -> BlockLoad:
        """Counts of blocks by place."""
        leased = sum(map(len, self._leased.values()))
        quarantined = sum(map(len, self._quarantined.values()))
        return BlockLoad(self.total, len(self._free), leased, quarantined, len(self._waiting))

    def clone(self) -> BlockAccounts:
        """A copy that shares nothing mutable."""
        copy = BlockAccounts(0, self.managed)
        copy.total = self.total
        copy._free = list(self._free)
        copy._leased = dict(self._leased)
        copy._quarantined = dict(self._quarantined)
        copy._waiting = list(self._waiting)
        return copy

    def key(self) -> tuple[Any, ...]:
        """Canonical plain value of the state."""
        return (
            tuple(self._free),
            frozenset(self._leased.items()),
            frozenset(self._quarantined.items()),
            tuple(self._waiting),
        )

    def _take(self, lease: LeaseId, count: int) -> tuple[int, ...] | None:
        if count > len(self._free):
            return None
        blocks = tuple(self._free[: -count - 1 : -1])
        del self._free[-count:]
        self._leased[lease] = blocks
        return blocks

    def _check_new(self, lease: LeaseId) -> None:
        if self.holds(lease):
            raise BlockError(f"{lease!r} holds blocks already: a lease is given once")

    @staticmethod
    def _pop(held: dict[LeaseId, tuple[int, ...]], lease: LeaseId) -> tuple[int, ...]:
        blocks = held.pop(lease, None)
        if blocks is None:
            raise DoubleFree(lease)
        return blocks
