"""The tickets of one link: how far each is, and what is still in doubt of those that have ended."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from kvpoll_common.outbox import Outbox
from kvpoll_fsm.spi import Done, Failed, Progress, Quiesced, Write
from kvpoll_mooncake.frames import Entry
from kvpoll_mooncake.wire import Engine

__all__ = ["Job", "Stage", "Tickets", "entries_for"]


class Stage(enum.Enum):
    """How far a ticket is."""

    waiting = "waiting"
    """Nobody has been told of it."""
    asked = "asked"
    """The receiver's adapter has been asked."""
    granted = "granted"
    """It has said yes; our engine has not been told."""
    running = "running"
    """Our engine has been told: its source is read, and bytes land."""


@dataclass(eq=False)
class Job:
    """One ticket."""

    ticket: int
    token: bytes
    writes: Sequence[Write]
    nbytes: int
    stage: Stage = Stage.waiting
    moved_nbytes: int = 0
    moved_at: float = field(default_factory=time.monotonic)


@dataclass
class _Loose:
    """A ticket that has ended, and may land still: in that engine of the peer's. Its source may be read still."""

    engine: int
    may_land: bool
    may_read: bool


def entries_for(writes: Sequence[Write], engine: Engine) -> list[Entry]:
    """Writes as our engine is told of them.

    Args:
        writes: What a ticket is to move.
        engine: The peer's.

    Raises:
        ValueError: One goes beyond what the peer's engine has.
    """
    bases = {base.region: base for base in engine.bases}
    entries: list[Entry] = []
    for write in writes:
        base = bases.get(write.region)
        if base is None or write.dst_offset + write.nbytes > base.nbytes:
            raise ValueError(f"{write}: outside the receiver's region")
        entries.append((write.region, write.nbytes, write.src_offset, base.address + write.dst_offset))
    return entries


class Tickets:
    """Used by one thread. Every ticket that is added ends once, by `done`, `fail` or `give_up`."""

    def __init__(self, outbox: Outbox) -> None:
        """Store where ends are reported."""
        self._outbox = outbox
        self._jobs: dict[int, Job] = {}
        self._loose: dict[int, _Loose] = {}

    def __iter__(self) -> Iterator[Job]:
        return iter(list(self._jobs.values()))

    def add(self, job: Job) -> None:
        """Take one."""
        self._jobs[job.ticket] = job

    def get(self, ticket: int) -> Job | None:
        """One that has not ended."""
        return self._jobs.get(ticket)

    def any(self, stage: Stage) -> bool:
        """Whether one is so far."""
        return any(job.stage is stage for job in self._jobs.values())

    @property
    def in_doubt(self) -> bool:
        """Of one that has ended something may still land or be read."""
        return bool(self._loose)

    def oldest(self) -> Job | None:
        """The first of those that run."""
        return next((job for job in self._jobs.values() if job.stage is Stage.running), None)

    def moved(self, ticket: int, nbytes: int) -> None:
        """So much of it has landed."""
        job = self._jobs.get(ticket)
        if job is not None and job.moved_nbytes < nbytes < job.nbytes:
            job.moved_nbytes, job.moved_at = nbytes, time.monotonic()
            self._outbox.put(Progress(ticket, nbytes))

    def ended(self, job: Job, nbytes: int) -> None:
        """Nothing of it is under way any more."""
        del self._jobs[job.ticket]
        if nbytes == job.nbytes:
            self._outbox.put(Done(job.ticket))
        else:
            self._outbox.put(Failed(job.ticket, "cancelled", quiescent=True))
        oldest = self.oldest()
        if oldest is not None:
            oldest.moved_at = time.monotonic()  # its time counts from when it became the oldest

    def fail(self, job: Job, reason: str, collateral: bool = False) -> None:
        """It ends, and nothing of it is under way."""
        del self._jobs[job.ticket]
        self._outbox.put(Failed(job.ticket, reason, quiescent=True, collateral=collateral))

    def give_up(self, job: Job, reason: str, collateral: bool, engine: int | None, may_read: bool) -> None:
        """It ends, and what is on its way may land in that engine of the peer's; nobody will tell if it is None."""
        del self._jobs[job.ticket]
        if engine is not None or may_read:
            self._loose[job.ticket] = _Loose(engine or 0, engine is not None, may_read)
        self._outbox.put(Failed(job.ticket, reason, quiescent=False, source_free=not may_read, collateral=collateral))

    def engine_gone(self, engine: int) -> None:
        """That engine of the peer's is no more."""
        self._calm(lambda loose: loose.engine == engine, "may_land")

    def nobody_tells(self) -> None:
        """What may land is for the peer to fence; what may be read is ours to know."""
        silent = [ticket for ticket, loose in self._loose.items() if not loose.may_read]
        for ticket in silent:
            del self._loose[ticket]
        self._calm(lambda loose: True, "may_land")

    def sources_free(self) -> None:
        """No engine of ours that was given up reads any more."""
        self._calm(lambda loose: True, "may_read")

    def _calm(self, which: Callable[[_Loose], bool], doubt: str) -> None:
        for ticket, loose in list(self._loose.items()):
            if which(loose):
                setattr(loose, doubt, False)
                if not (loose.may_land or loose.may_read):
                    del self._loose[ticket]
                    self._outbox.put(Quiesced(ticket))
