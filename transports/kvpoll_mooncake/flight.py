"""Transfers under way in one engine: begun a few at a time, looked after until each has ended.

Of several transfers in one batch Mooncake tells only how the first one is, and one bad entry fails a batch whose rest
goes on. So every piece is a transfer of its own. What has ended is never asked about again: its number may be another
one's already.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from kvpoll_mooncake.frames import Broke, Ended, Entry, Event, Moved

__all__ = ["CHUNK_NBYTES", "MAX_OUTSTANDING", "WINDOW_NBYTES", "Flights", "Submits"]

CHUNK_NBYTES = 1 << 20
"""Most bytes of one transfer: so that progress shows, and a cancel acts soon."""
WINDOW_NBYTES = 32 << 20
"""Begun at a time."""
MAX_OUTSTANDING = 1024
"""Likewise; from about 2,048 on Mooncake refuses."""
_PATIENCE = 32
"""Transfers end nearly in the order they began: after so many that have not, the rest is not asked about yet."""
PENDING, DONE = 0, 1


class Submits(Protocol):
    """What is used of a `mooncake.engine.TransferEngine`."""

    def transfer_submit_write(self, peer: str, source: int, destination: int, nbytes: int) -> int:
        """Begin; returns a number, or 0 if it failed."""
        ...

    def transfer_check_status(self, number: int) -> int:
        """0 while it is under way, 1 once it is done, else it failed."""
        ...


@dataclass
class _Ticket:
    segment: str
    pieces: deque[tuple[int, int, int]]
    total_nbytes: int
    moved_nbytes: int = 0
    told_nbytes: int = 0
    outstanding: int = 0


@dataclass
class Flights:
    """All tickets of one engine, in their order. Used by one thread.

    Attributes:
        broken: A transfer failed: nothing is begun or asked about any more.
    """

    engine: Submits
    say: Callable[[Event], None]
    broken: bool = False
    _tickets: dict[int, _Ticket] = field(default_factory=dict)
    _begun: deque[tuple[int, int, int]] = field(default_factory=deque)
    _begun_nbytes: int = 0

    def add(self, ticket: int, segment: str, pieces: Iterable[tuple[int, int, int]]) -> None:
        """Take a ticket: (source address, destination address, bytes) each."""
        queue = deque(pieces)
        self._tickets[ticket] = _Ticket(segment, queue, sum([nbytes for _, _, nbytes in queue]))

    def cancel(self, ticket: int) -> None:
        """Begin no more of it."""
        known = self._tickets.get(ticket)
        if known is not None:
            known.pieces.clear()
            self._settle(ticket, known)

    def fail(self, ticket: int, problem: str) -> None:
        """Say that a ticket failed, and stop."""
        if not self.broken:
            self.broken = True
            self.say(Broke(ticket, problem))

    @property
    def idle(self) -> bool:
        """There is nothing to begin and nothing to look after."""
        return self.broken or not self._tickets

    def turn(self) -> bool:
        """Begin what may begin, and look after what has; whether anything moved."""
        began = self._begin()
        return self._look() or began

    def _begin(self) -> bool:
        began = False
        for number, ticket in self._tickets.items():
            while ticket.pieces:
                full = len(self._begun) >= MAX_OUTSTANDING or self._begun_nbytes >= WINDOW_NBYTES
                if full or not self._submit(number, ticket):
                    return began
                began = True
        return began

    def _submit(self, number: int, ticket: _Ticket) -> bool:
        source, destination, nbytes = ticket.pieces.popleft()
        ticket.outstanding += 1
        transfer = self.engine.transfer_submit_write(ticket.segment, source, destination, nbytes)
        if not transfer:
            self.fail(number, f"Mooncake did not take a write of {nbytes} bytes to {ticket.segment}")
            return False
        self._begun.append((transfer, number, nbytes))
        self._begun_nbytes += nbytes
        return True

    def _look(self) -> bool:
        pending: list[tuple[int, int, int]] = []
        moved: set[int] = set()
        while self._begun and len(pending) < _PATIENCE and not self.broken:
            begun = transfer, number, nbytes = self._begun.popleft()
            status = self.engine.transfer_check_status(transfer)
            if status == PENDING:
                pending.append(begun)
                continue
            if status != DONE:
                self.fail(number, f"Mooncake failed a write of {nbytes} bytes, status {status}")
                return True
            self._begun_nbytes -= nbytes
            ticket = self._tickets[number]
            ticket.moved_nbytes += nbytes
            ticket.outstanding -= 1
            moved.add(number)
        self._begun.extendleft(reversed(pending))
        for number in moved:
            self._settle(number, self._tickets[number])
        return bool(moved)

    def _settle(self, number: int, ticket: _Ticket) -> None:
        """Say how far a ticket is, or that it has ended."""
        if not ticket.pieces and not ticket.outstanding:
            del self._tickets[number]
            self.say(Ended(number, ticket.moved_nbytes))
        elif ticket.moved_nbytes - ticket.told_nbytes >= CHUNK_NBYTES and ticket.moved_nbytes < ticket.total_nbytes:
            ticket.told_nbytes = ticket.moved_nbytes
            self.say(Moved(number, ticket.moved_nbytes))


def cut(entries: Iterable[Entry], sources: Callable[[int], tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Turn entries into pieces that Mooncake is given: neighbours joined, long ones cut.

    Args:
        entries: Of an Order.
        sources: Where a region is and how long.

    Raises:
        ValueError: An entry reaches beyond its source.
    """
    joined: list[tuple[int, int, int]] = []
    for region, nbytes, offset, destination in entries:
        start, size = sources(region)
        if not 0 < nbytes <= size or offset + nbytes > size:
            raise ValueError(f"bytes {offset} to {offset + nbytes} of region {region}, which has {size}")
        source = start + offset
        if joined:
            last_source, last_destination, last_nbytes = joined[-1]
            if last_source + last_nbytes == source and last_destination + last_nbytes == destination:
                joined[-1] = (last_source, last_destination, last_nbytes + nbytes)
                continue
        joined.append((source, destination, nbytes))
    return [
        (source + done, destination + done, min(CHUNK_NBYTES, nbytes - done))
        for source, destination, nbytes in joined
        for done in range(0, nbytes, CHUNK_NBYTES)
    ]
