"""A way to write into one peer's regions: what the driver holds in its hand."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

from kvpoll_common.outbox import Outbox
from kvpoll_common.writes import check_writes
from kvpoll_fsm.spi import Failed, Write
from kvpoll_shm import wire
from kvpoll_shm.sender import Lane

__all__ = ["ShmLink"]


class ShmLink:
    """Tickets over one connection. Called from the driver's thread.

    Attributes:
        lane: The connection.
    """

    def __init__(
        self,
        number: int,
        lane: Lane,
        sources: Mapping[int, memoryview],
        outbox: Outbox,
        tickets: Iterator[int],
    ) -> None:
        self.lane = lane
        self._number = number
        self._sources = sources
        self._outbox = outbox
        self._tickets = tickets
        self._pid = os.getpid()

    @property
    def number(self) -> int:
        """Names this link in LinkUp and LinkDown; unique in its transport."""
        return self._number

    def submit(self, writes: Sequence[Write], token: bytes) -> int:
        """Start writing and return a ticket, which ends exactly once.

        Raises:
            InvalidInput: A write outside the source's regions, nothing to write, or too much.
        """
        check_writes(writes, self._sources, wire.MAX_ENTRIES)
        ticket = next(self._tickets)
        if len(token) != wire.TOKEN_NBYTES:
            self._outbox.put(Failed(ticket, "the token is none of a shm transport", quiescent=True))
            return ticket
        self.lane.submit(wire.Order(ticket, token, wire.pack_entries(writes)))
        return ticket

    def cancel(self, ticket: int) -> None:
        """Ask that a ticket end soon: at the end of the slice that is being copied."""
        self.lane.cancel(ticket)

    def close(self) -> None:
        """End the link; tickets in flight end Failed. Returns at once and may be called twice.

        Does nothing in a forked child: the connection is the parent's.
        """
        if os.getpid() == self._pid:
            self.lane.close()
