"""One order on its way: read from the sender's memory into ours, a slice at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvpoll_common.grants import Grant, Grants
from kvpoll_shm.wire import Entry, Order, Verdict

__all__ = ["SLICE_NBYTES", "Copying", "Landing"]

SLICE_NBYTES = 4 << 20
"""How much is copied between two looks at whether it still should be: half a millisecond."""


@dataclass(frozen=True)
class Landing:
    """Where bytes may land: the regions by number, and who may write to them."""

    regions: Mapping[int, memoryview]
    grants: Grants


class Copying:
    """Copies what one order says, as long as its token stands.

    Bytes are copied by assigning one slice of a memoryview to another: as fast as memmove, and the interpreter is not
    handed over and waited for again for each block, which takes up to 5 ms beside a busy thread.

    Attributes:
        cancelled: To be ended soon.
        moved_nbytes: Copied so far.
    """

    def __init__(self, order: Order, writer: bytes, sources: Mapping[int, memoryview], landing: Landing) -> None:
        self.cancelled = False
        self.moved_nbytes = 0
        self._order = order
        self._writer = writer
        self._left: list[Entry] = []
        self._sources = sources
        self._landing = landing
        self._grant: Grant | None = None

    def advance(self) -> Verdict | None:
        """Copy a slice. The verdict once it is over: from then on nothing of it is read or written.

        Raises:
            MalformedMessage: The order's entries are none.
        """
        verdict = self._enter() if self._grant is None else None
        if verdict is None:
            verdict = self._copy()
        if verdict is not None:
            self.leave()
        return verdict

    def leave(self) -> None:
        """Copy nothing more, whatever is left."""
        grant, self._grant = self._grant, None
        if grant is not None:
            self._landing.grants.leave(grant)

    def _enter(self) -> Verdict | None:
        """Begin, if all of it is allowed; nothing is written otherwise."""
        if self.cancelled:
            return Verdict.cancelled
        self._left = self._order.unpack()[::-1]
        self._grant = grant = self._landing.grants.enter(self._order.token, self._writer)
        if grant is None:
            return Verdict.unknown_token
        # What is granted lies inside its region, so this checks against both.
        if not grant.admits([(region, dst, nbytes) for region, nbytes, _, dst in self._left]):
            self._landing.grants.refusals.add("a write outside the granted ranges")
            return Verdict.out_of_range
        sizes = {region: len(source) for region, source in self._sources.items()}
        if not all(src + nbytes <= sizes.get(region, 0) for region, nbytes, src, _ in self._left):
            return Verdict.no_source
        return None

    def _copy(self) -> Verdict | None:
        grant = self._grant
        if self.cancelled or grant is None or grant.revoked:
            return Verdict.cancelled if self.cancelled else Verdict.revoked
        room, left = SLICE_NBYTES, self._left
        sources, regions = self._sources, self._landing.regions
        while left and room > 0:
            region, nbytes, src, dst = left.pop()
            if nbytes > room:
                left.append((region, nbytes - room, src + room, dst + room))
                nbytes = room
            room -= nbytes
            regions[region][dst : dst + nbytes] = sources[region][src : src + nbytes]
        self.moved_nbytes += SLICE_NBYTES - room
        return None if left else Verdict.landed
