"""A way to write into one peer's regions: what the driver holds in its hand."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence

from kvpoll_common.outbox import Outbox
from kvpoll_common.writes import check_writes
from kvpoll_fsm.spi import Failed, Write
from kvpoll_mooncake import wire
from kvpoll_mooncake.lane import Lane
from kvpoll_mooncake.tickets import Job

__all__ = ["MooncakeLink"]


class MooncakeLink:
    """Tickets for one peer. Called from the driver's thread; what it is asked is done by the transport's.

    Attributes:
        lane: For the transport's thread.
    """

    def __init__(
        self,
        number: int,
        lane: Lane,
        sources: Mapping[int, memoryview],
        outbox: Outbox,
        tickets: Iterator[int],
        post: Callable[[Callable[[], None]], bool],
    ) -> None:
        self.lane = lane
        self._number = number
        self._sources = sources
        self._outbox = outbox
        self._tickets = tickets
        self._post = post
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
        nbytes = check_writes(writes, self._sources, wire.MAX_RANGES)
        ticket = next(self._tickets)
        if len(token) != wire.TOKEN_NBYTES:
            self._outbox.put(Failed(ticket, "the token is none of a mooncake transport", quiescent=True))
            return ticket
        job = Job(ticket, token, tuple(writes), nbytes)
        if not self._post(lambda: self.lane.submit(job)):
            self._outbox.put(Failed(ticket, "the transport is closed", quiescent=True))
        return ticket

    def cancel(self, ticket: int) -> None:
        """Ask that a ticket end soon: once the pieces of it that are on their way have arrived."""
        self._post(lambda: self.lane.cancel(ticket))

    def close(self) -> None:
        """End the link; tickets in flight end Failed. Returns at once and may be called twice.

        Does nothing in a forked child: the lock that `post` takes may have been held at the fork.
        """
        if os.getpid() == self._pid:
            self._post(self.lane.close)
