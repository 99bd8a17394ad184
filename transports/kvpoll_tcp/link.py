"""A way to write into one peer's regions: what the driver holds in its hand."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence

from kvpoll_common.outbox import Outbox
from kvpoll_common.writes import check_writes
from kvpoll_fsm.spi import Failed, LinkDown, LinkUp, Write
from kvpoll_tcp.backlog import Job
from kvpoll_tcp.lane import Lane
from kvpoll_tcp.wire import TOKEN_NBYTES

__all__ = ["LinkStatus", "TcpLink"]


class LinkStatus:
    """Joins what the lanes of one link say: it is up while any lane is."""

    def __init__(self, link: int, outbox: Outbox) -> None:
        self._link = link
        self._outbox = outbox
        self._lock = threading.Lock()
        self._lanes_up = 0

    def went_up(self) -> None:
        """A lane works."""
        with self._lock:
            self._lanes_up += 1
            if self._lanes_up == 1:
                self._outbox.put(LinkUp(self._link))

    def went_down(self, was_up: bool, reason: str) -> None:
        """A lane does not work, or no longer."""
        with self._lock:
            self._lanes_up -= was_up
            if not self._lanes_up:
                self._outbox.put(LinkDown(self._link, reason))


class TcpLink:
    """Tickets over one or more connections. Called from the driver's thread."""

    def __init__(
        self,
        number: int,
        lanes: Sequence[Lane],
        sources: Mapping[int, memoryview],
        outbox: Outbox,
        tickets: Iterator[int],
        max_entries: int,
    ) -> None:
        self._number = number
        self._lanes = lanes
        self._sources = sources
        self._outbox = outbox
        self._tickets = tickets
        self._max_entries = max_entries
        self._given_nbytes = [0] * len(lanes)
        self._pid = os.getpid()
        self.is_closed = False

    @property
    def number(self) -> int:
        """Names this link in LinkUp and LinkDown; unique in its transport."""
        return self._number

    def submit(self, writes: Sequence[Write], token: bytes) -> int:
        """Start writing and return a ticket, which ends exactly once.

        Raises:
            InvalidInput: A write outside the source's regions, nothing to write, or too much.
        """
        nbytes = check_writes(writes, self._sources, self._max_entries)
        ticket = next(self._tickets)
        if len(token) != TOKEN_NBYTES:
            self._outbox.put(Failed(ticket, "the token is none of a tcp transport", quiescent=True))
            return ticket
        job = Job(ticket, writes, nbytes, token)
        chosen = min(range(len(self._lanes)), key=self._load_nbytes) if len(self._lanes) > 1 else 0
        self._given_nbytes[chosen] += nbytes
        if not self._lanes[chosen].submit(job):
            self._outbox.put(Failed(ticket, "the link is closed", quiescent=True))
        return ticket

    def cancel(self, ticket: int) -> None:
        """Ask that a ticket end soon: at the end of the frame that is on its way."""
        for lane in self._lanes:
            lane.cancel(ticket)

    def close(self) -> None:
        """End the link; tickets in flight end Failed. Returns at once and may be called twice.

        Does nothing in a forked child: the connections are the parent's.
        """
        if os.getpid() != self._pid:
            return
        self.is_closed = True
        for lane in self._lanes:
            lane.close()

    def _load_nbytes(self, lane: int) -> int:
        return self._given_nbytes[lane] - self._lanes[lane].ended_nbytes
