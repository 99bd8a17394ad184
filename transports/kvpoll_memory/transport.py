"""The transport: work is done by whoever calls `completions()`, so nothing happens behind a test's back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.spi import (
    Capabilities,
    Completion,
    Done,
    Failed,
    Fenced,
    FenceKind,
    LeaseId,
    LinkDown,
    LinkUp,
    Progress,
    Quiesced,
    Range,
    Region,
    Write,
)
from kvpoll_memory import fabric
from kvpoll_memory.fabric import LOCK, Host
from kvpoll_memory.faults import Faults
from kvpoll_memory.tickets import MemoryTicket, check_writes

__all__ = ["MemoryLink", "MemoryTransport"]

_MAGIC = b"kvpoll-memory:"


class MemoryTransport:
    """Copies between instances of one process. Follows `kvpoll_fsm.spi.Transport`.

    Nothing moves but in `completions()` of the writing side, which does a number of steps, oldest ticket first.

    Attributes:
        faults: What shall go wrong.
    """

    name = "memory"
    capabilities = Capabilities(
        scatter_entries=1024,
        max_outstanding=1024,
        cancellable=True,
        fence=FenceKind.token,
        reports_progress=False,
        integrity=False,
        cuda=False,
        one_process=True,
    )

    def __init__(
        self,
        *,
        faults: Faults | None = None,
        steps: int | None = None,
        step_nbytes: int | None = None,
        costly_fence: bool = False,
    ) -> None:
        """Make a transport.

        Args:
            faults: What shall go wrong; by default nothing.
            steps: Ticket steps per call of `completions()`; None does all there is to do.
            step_nbytes: Bytes per step; None takes a whole ticket at once, of which no progress is seen.
            costly_fence: Say that a fence hurts other rooms, so that it comes late or where nothing else helps.
        """
        if costly_fence:
            self.capabilities = replace(self.capabilities, fence=FenceKind.process)
        self.faults = Faults() if faults is None else faults
        self._steps = steps
        self._step_nbytes = step_nbytes
        if step_nbytes is not None:
            self.capabilities = replace(self.capabilities, reports_progress=True)
        self._host = Host()
        self._links: list[MemoryLink] = []
        self._link_numbers = itertools.count()
        self._tickets = itertools.count()
        self._fence_numbers = itertools.count()
        self._fences: list[int] = []
        self._out: list[Completion] = []

    def start(self) -> None:
        """Be found by others."""
        fabric.join(self._host)

    def descriptor(self) -> bytes:
        """Names this instance within the process."""
        return _MAGIC + self._host.id

    def register(self, region: Region) -> bytes:
        """Make a region writable for peers and readable as a source.

        Raises:
            InvalidInput: Not writable contiguous bytes, or a number that is taken.
        """
        buffer = region.buffer
        if buffer.readonly or not buffer.contiguous or buffer.format != "B" or buffer.ndim != 1:
            raise InvalidInput(f"region {region.number}: needs writable contiguous bytes, format 'B'")
        with LOCK:
            if region.number < 0 or region.number in self._host.regions:
                raise InvalidInput(f"region {region.number}: the number is taken, or below 0")
            self._host.regions[region.number] = buffer
        return _MAGIC + str(region.number).encode()

    def grant(self, lease: LeaseId, ranges: Sequence[Range]) -> bytes:
        """Admit writes to exactly these ranges.

        Raises:
            InvalidInput: A range outside its region, or an empty one.
        """
        with LOCK:
            for each in ranges:
                size = len(self._host.regions.get(each.region, b""))
                if each.offset < 0 or each.nbytes < 1 or each.offset + each.nbytes > size:
                    raise InvalidInput(f"{lease}: {each} is not within its region of {size} bytes")
            return self._host.grant(ranges)

    def revoke(self, token: bytes) -> None:
        """Admit nothing more under the token. Unknown: ignored."""
        with LOCK:
            self._host.revoke(token)

    def fence(self, token: bytes) -> int:
        """Revoke; `Fenced` follows at the next `completions()`."""
        with LOCK:
            self._host.revoke(token)
            self._fences.append(next(self._fence_numbers))
            return self._fences[-1]

    def connect(self, descriptor: bytes, regions: Sequence[bytes]) -> MemoryLink:
        """A link to the instance that gave this descriptor.

        Raises:
            InvalidInput: A descriptor cannot be read.
        """
        if not all(each.startswith(_MAGIC) for each in (descriptor, *regions)):
            raise InvalidInput("not the descriptors of a memory transport")
        link = MemoryLink(next(self._link_numbers), descriptor[len(_MAGIC) :], self)
        with LOCK:
            self._links = [other for other in self._links if not other.is_closed]
            self._links.append(link)
        return link

    def completions(self) -> list[Completion]:
        """Do the work that is due, and tell what has happened since the last call, in order."""
        with LOCK:
            self._work()
            out, self._out = self._out, []
        return out

    def fileno(self) -> None:
        """There is none: poll at an interval."""
        return None

    def close(self) -> None:
        """End links, and be found no more. May be called twice."""
        fabric.leave(self._host)
        with LOCK:
            for link in self._links:
                link.close()
            self._links.clear()
            self._report_fences()
            self._host.clear()

    # What follows is for the links.

    def report(self, *completions: Completion) -> None:
        """Add completions."""
        self._out.extend(completions)

    def submitted(self, writes: Sequence[Write], token: bytes) -> MemoryTicket:
        """Check and number a ticket."""
        check_writes(writes, self._host.regions, self.capabilities.scatter_entries)
        return MemoryTicket(next(self._tickets), self.faults.count(), writes, token)

    def copy(self, ticket: MemoryTicket, host: Host, most: int | None, flips: Sequence[int]) -> str | None:
        """Copy from our regions to a host's."""
        return ticket.copy(self._host.regions, host, most, flips)

    def snapshot(self, ticket: MemoryTicket) -> None:
        """Free our regions of a ticket's bytes."""
        ticket.take_snapshot(self._host.regions)

    def _work(self) -> None:
        breaking = self.faults.take_breaking()
        for link in self._links:
            link.look(breaking)
        left = self._steps
        for link in self._links:
            left = link.step(left, self._step_nbytes)
        if not self.faults.fences_held:
            self._report_fences()

    def _report_fences(self) -> None:
        self.report(*map(Fenced, self._fences))
        self._fences.clear()


class MemoryLink:
    """A way to write into one other instance of this process."""

    def __init__(self, number: int, host_id: bytes, owner: MemoryTransport) -> None:
        self._number = number
        self._host_id = host_id
        self._owner = owner
        self._tickets: dict[int, MemoryTicket] = {}
        self._late: list[MemoryTicket] = []
        self._is_up: bool | None = None
        self.is_closed = False

    @property
    def number(self) -> int:
        """Names this link in LinkUp and LinkDown; unique in its transport."""
        return self._number

    def submit(self, writes: Sequence[Write], token: bytes) -> int:
        """Queue writes and return a ticket, which ends exactly once.

        Raises:
            InvalidInput: A write outside the source's regions, nothing to write, or too much.
        """
        with LOCK:
            ticket = self._owner.submitted(writes, token)
            if self.is_closed:
                self._owner.report(Failed(ticket.number, "the link is closed", quiescent=True))
            else:
                self._tickets[ticket.number] = ticket
        return ticket.number

    def cancel(self, ticket: int) -> None:
        """Ask that a ticket end at its next step, held or not."""
        with LOCK:
            if ticket in self._tickets:
                self._tickets[ticket].cancelled = True

    def close(self) -> None:
        """End the link; tickets in flight end Failed. May be called twice."""
        with LOCK:
            self.is_closed = True
            self._fail_all("the link was closed")
            self._owner.report(*(Quiesced(ticket.number) for ticket in self._late))
            self._late.clear()

    def look(self, breaking: str | None) -> None:
        """Find out whether the link works; one that is down is tried again when there is a ticket."""
        refusal = self._owner.faults.refusal
        if refusal is None and fabric.find(self._host_id) is None:
            refusal = "the peer is gone"
        problem = (breaking if self._is_up else None) or refusal
        if problem is not None and (self._is_up is not False or self._tickets):
            self._is_up = False
            self._owner.report(LinkDown(self._number, problem))
            self._fail_all(problem)
        elif problem is None and (self._is_up is None or (not self._is_up and self._tickets)):
            self._is_up = True
            self._owner.report(LinkUp(self._number))

    def step(self, left: int | None, step_nbytes: int | None) -> int | None:
        """Do at most `left` ticket steps; returns how many are left to do. None is without limit."""
        host = fabric.find(self._host_id)
        for late in [ticket for ticket in self._late if self._owner.faults.plan(ticket.nth).landing]:
            self._land(late, host)
        for ticket in list(self._tickets.values()):
            if host is None or left == 0:
                break
            if self._owner.faults.plan(ticket.nth).held and not ticket.cancelled:
                continue
            left = None if left is None else left - 1
            self._advance(ticket, host, step_nbytes)
        return left

    def _advance(self, ticket: MemoryTicket, host: Host, step_nbytes: int | None) -> None:
        """One step of one ticket."""
        if ticket.cancelled:
            return self._end(ticket, Failed(ticket.number, "cancelled", quiescent=True))
        plan = self._owner.faults.plan(ticket.nth)
        most = plan.after_nbytes - ticket.written if plan.failure is not None else step_nbytes
        problem = self._owner.copy(ticket, host, most, plan.flips)
        if problem is None and plan.failure is not None and plan.late:
            if not plan.reading:
                self._owner.snapshot(ticket)
            self._late.append(ticket)
            how = {"quiescent": False, "source_free": not plan.reading, "collateral": plan.collateral}
            self._end(ticket, Failed(ticket.number, plan.failure, **how))
        elif problem is not None or plan.failure is not None:
            reason = problem or plan.failure or ""
            self._end(ticket, Failed(ticket.number, reason, quiescent=True, collateral=plan.collateral))
        elif ticket.is_complete:
            self._end(ticket, Done(ticket.number))
        else:
            self._owner.report(Progress(ticket.number, ticket.written))

    def _land(self, ticket: MemoryTicket, host: Host | None) -> None:
        """The bytes of a ticket that failed long ago arrive, where they are still admitted."""
        self._late.remove(ticket)
        if host is not None:
            self._owner.copy(ticket, host, None, ())
        self._owner.report(Quiesced(ticket.number))

    def _end(self, ticket: MemoryTicket, end: Done | Failed) -> None:
        del self._tickets[ticket.number]
        self._owner.report(end)

    def _fail_all(self, reason: str) -> None:
        for ticket in list(self._tickets.values()):
            self._end(ticket, Failed(ticket.number, reason, quiescent=True))
