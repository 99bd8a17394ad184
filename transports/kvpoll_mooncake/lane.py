"""The sending side of one link: asks the peer's adapter, and has our engine write what it allows.

Each link has an engine of its own, so that what a peer does to it (a first contact that hangs, a connection that is
being made again and again) holds up nobody else; and a new one whenever the peer's engine is another, for the old one
remembers what does not hold any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvpoll_common.loop import Reactor
from kvpoll_common.outbox import Outbox
from kvpoll_fsm.errors import MalformedMessage
from kvpoll_fsm.spi import Done, Failed, LinkDown, LinkUp, Progress, Quiesced, Region
from kvpoll_mooncake import frames, wire
from kvpoll_mooncake.caller import Caller
from kvpoll_mooncake.frames import Event
from kvpoll_mooncake.handshake import Descriptor
from kvpoll_mooncake.jobs import Job, Stage
from kvpoll_mooncake.maker import Maker
from kvpoll_mooncake.roles import Running
from kvpoll_mooncake.wire import Doubt, Engine, Gone, Message, Over

__all__ = ["Crowd", "Lane", "Sources"]

_MOURNING_S = 150.0
"""How long a link that is closed waits to hear that what it left cannot land any more."""


class Crowd:
    """Counts the engines that send."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.count = 0


@dataclass(frozen=True)
class Sources:
    """What all links of a transport share: our regions, who we are, engines, and whom to report to."""

    regions: Mapping[int, Region]
    writer: bytes
    maker: Maker
    outbox: Outbox
    crowd: Crowd


class Lane:
    """One link. Used by the reactor's thread alone.

    It is up once the peer's adapter and both engines have answered. A ticket that has ended without its engine's word
    is loose, until the peer says that its own engine is gone.

    Attributes:
        is_over: Closed, nothing of ours is running, and the peer is not waited for.
    """

    def __init__(self, number: int, peer: Descriptor, sources: Sources, reactor: Reactor) -> None:
        self.is_over = False
        self._number = number
        self._peer = peer
        self._sources = sources
        self._reactor = reactor
        self._caller: Caller | None = None
        self._engine = _Ours()
        self._theirs: Engine | None = None
        self._jobs: dict[int, Job] = {}
        self._loose: dict[int, int] = {}  # ticket: the peer's engine
        self._trouble: _Trouble | None = None
        self._closed = self._buried = False

    # What the driver asks

    def open(self) -> None:
        """Reach the peer's adapter and start an engine; `LinkUp` or `LinkDown` follows."""
        if self._closed or self._engine.running is not None or self._trouble is not None:
            return
        if self._caller is None:
            self._caller = Caller(self._reactor, self._peer, self._sources.writer, self._sources.maker.settings, self)
            try:
                self._caller.open()
            except OSError as error:
                self._caller = None
                return self._down(f"cannot be reached: {error.strerror or error}")
        self._start_engine()

    def submit(self, job: Job) -> None:
        """Take a ticket."""
        if self._closed:
            return self._put(Failed(job.ticket, "the link is closed", quiescent=True))
        self._jobs[job.ticket] = job
        if self._is_up:
            self._ask(job)
        else:
            self.open()

    def cancel(self, ticket: int) -> None:
        """End a ticket soon: what has begun is waited for."""
        job = self._jobs.get(ticket)
        if job is None or job.cancelled:
            return
        job.cancelled = True
        if job.stage is Stage.running:
            self._tell_engine(frames.Cancel(ticket))
        elif job.stage is not Stage.asked:  # then the answer ends it
            self._drop(job, "cancelled")

    def close(self) -> None:
        """End the link; tickets end once our engine has. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._fall("the link was closed", quiet=True)
        self._reactor.later(_MOURNING_S, self.bury)

    def bury(self) -> None:
        """Wait for the peer no longer. May be called twice."""
        self._closed = self._buried = True
        self._settle()

    # The connection to the peer's adapter

    def proved(self) -> None:
        """Both adapters have proved themselves."""
        if self._caller is not None:
            self._caller.asked()  # for its engine

    def is_waiting(self) -> bool:
        """Something has been asked and not been answered."""
        asked = any(job.stage is Stage.asked for job in self._jobs.values())
        return asked or self._trouble is not None or (self._theirs is None and not self._closed)

    def told(self, message: Message) -> None:
        """The peer's adapter says something.

        Raises:
            MalformedMessage: It should not.
        """
        if isinstance(message, Engine):
            self._theirs = message
            self._probe()
        elif isinstance(message, wire.Go):
            self._go(message)
        elif isinstance(message, wire.No):
            self._no(message)
        elif isinstance(message, Gone):
            self._gone_there(message)
        elif isinstance(message, wire.Sound):
            self._confirmed(message.engine)
        else:
            raise MalformedMessage("says what only a sender says")

    def hung_up(self, reason: str) -> None:
        """The peer's adapter has gone, or is silent."""
        self._caller, self._theirs = None, None
        self._loose.clear()  # nobody will tell
        self._fall(reason)

    def _go(self, go: wire.Go) -> None:
        job = self._jobs.get(go.ticket)
        if job is None or job.stage is not Stage.asked:
            return self._tell(Over(go.ticket, quiescent=True))
        job.stage = Stage.granted
        if self._theirs is None or go.engine != self._theirs.number:
            raise MalformedMessage("lets us write into an engine that is not there")
        if job.cancelled:
            self._drop(job, "cancelled")
        else:
            self._run(job)

    def _no(self, no: wire.No) -> None:
        job = self._jobs.pop(no.ticket, None)
        if job is not None:
            self._put(Failed(no.ticket, "cancelled" if job.cancelled else no.reason, quiescent=True))

    def _gone_there(self, gone: Gone) -> None:
        """The peer's engine has ended: what we had under way there cannot land any more."""
        settled = [ticket for ticket, engine in self._loose.items() if engine == gone.engine]
        for ticket in settled:
            del self._loose[ticket]
        self._put(*map(Quiesced, settled))
        if self._theirs is not None and self._theirs.number == gone.engine:
            self._theirs = None
            self._restart(gone)
        self._settle()

    def _restart(self, gone: Gone) -> None:
        """Our engine goes too; the link stays up, unless it was about to end."""
        trouble = self._trouble
        if trouble is None or trouble.doubted is not None:
            reason = "the receiver's engine ended" if gone.crashed else "the receiver had to stop a write"
            self._trouble = trouble = _Trouble(
                reason, lambda job: not gone.crashed and job.ticket not in gone.fenced, restart=not self._closed
            )
        trouble.quiescent = True
        self._end_engine()

    def _confirmed(self, number: int) -> None:
        """The peer's engine works: it was not the cause of the failure."""
        trouble = self._trouble
        if trouble is not None and trouble.doubted == number:
            trouble.doubted = None
            self._settle()

    # Our engine

    def heard(self, engine: Running, event: Event) -> None:
        """Our engine says something."""
        if engine is not self._engine.running:
            return
        if isinstance(event, frames.Registered):
            self._engine.registered.add(event.region)
            if event.problem:
                return self._fall(f"region {event.region}: {event.problem}")
            self._probe()
        elif isinstance(event, frames.Unusable):
            self._fall(event.problem)
        elif isinstance(event, frames.Probed):
            self._probed(event)
        elif isinstance(event, frames.Moved):
            self._moved(event)
        elif isinstance(event, frames.Ended):
            self._ended(event)
        elif isinstance(event, frames.Broke):
            self._broke(event)
        elif isinstance(event, frames.Ready):
            self._engine.ready = True
            self._probe()

    def gone(self, engine: Running, how: str) -> None:
        """Our engine has ended: it reads no source any more."""
        if engine is not self._engine.running:
            return
        was_up, self._engine = self._engine.up, _Ours()
        self._sources.crowd.count -= 1
        if self._trouble is None:
            problem = f"the engine that sends to this peer ended, {how}"
            self._trouble = _Trouble(problem, lambda job: False, restart=was_up)
        self._trouble.details = engine.last_words()
        self._settle()

    def _start_engine(self) -> None:
        crowd, maker = self._sources.crowd, self._sources.maker
        if crowd.count >= crowd.most:
            return self._fall(f"{crowd.count} peers are being sent to already, as many as max_senders allows")
        try:
            running = maker.start(self, f"engine that sends to {self._peer}", self._sources.regions)
        except OSError as error:
            return self._fall(str(error))
        self._engine = _Ours(running)
        crowd.count += 1
        self._expect_within(maker.settings.engine_s, "both engines did not get ready")

    def _probe(self) -> None:
        """Once both engines are there, see that theirs answers ours."""
        ours = self._engine
        complete = ours.ready and ours.registered == self._sources.regions.keys()
        if complete and self._theirs is not None and not ours.probing:
            ours.probing = self._theirs.segment
            self._tell_engine(frames.Probe(self._theirs.segment))
            self._expect_within(self._sources.maker.settings.probe_s, "the receiver's engine did not answer a probe")

    def _probed(self, event: frames.Probed) -> None:
        if event.problem:
            return self._fall(f"the receiver's engine cannot be reached: {event.problem}")
        if self._theirs is None or self._theirs.segment != event.segment or self._engine.up:
            return
        self._engine.up = True
        self._put(LinkUp(self._number))
        self._watch_over(self._engine)
        for job in list(self._jobs.values()):
            if job.stage is Stage.waiting:
                self._ask(job)
            elif job.stage is Stage.granted:
                self._run(job)

    def _moved(self, event: frames.Moved) -> None:
        job = self._jobs.get(event.ticket)
        if job is not None and job.moved_nbytes < event.nbytes < job.nbytes:
            job.moved_nbytes, job.moved_at = event.nbytes, time.monotonic()
            self._put(Progress(event.ticket, event.nbytes))

    def _ended(self, event: frames.Ended) -> None:
        job = self._jobs.pop(event.ticket, None)
        if job is None:
            return
        self._tell(Over(event.ticket, quiescent=True))
        landed = event.nbytes == job.nbytes
        self._put(Done(event.ticket) if landed else Failed(event.ticket, "cancelled", quiescent=True))
        self._touch()

    def _broke(self, event: frames.Broke) -> None:
        """A transfer failed. Nothing more is read or sent; why it failed, the peer may know."""
        if self._trouble is not None:
            return
        self._trouble = _Trouble(event.problem, lambda job: job.ticket != event.ticket, restart=not self._closed)
        if self._theirs is not None and self._caller is not None:
            self._trouble.doubted = self._theirs.number
            self._tell(Doubt(self._theirs.number))
            self._caller.asked()
        self._end_engine()

    def _tell_engine(self, command: frames.Command) -> None:
        if self._engine.running is not None:
            self._engine.running.send(command)

    def _end_engine(self) -> None:
        if self._engine.running is not None:
            self._engine.running.kill()

    # Tickets

    @property
    def _is_up(self) -> bool:
        return self._engine.up and self._trouble is None and not self._closed

    def _ask(self, job: Job) -> None:
        job.stage = Stage.asked
        ranges = [(write.region, write.dst_offset, write.nbytes) for write in job.writes]
        self._tell(wire.Ask(job.ticket, job.token, wire.pack_ranges(ranges)))
        if self._caller is not None:
            self._caller.asked()

    def _run(self, job: Job) -> None:
        """Have it written, if what the receiver's engine has is what we were told."""
        if not self._is_up or self._theirs is None:
            return
        bases = {base.region: base for base in self._theirs.bases}
        entries = []
        for write in job.writes:
            base = bases.get(write.region)
            if base is None or write.dst_offset + write.nbytes > base.nbytes:
                return self._drop(job, f"{write}: outside the receiver's region")
            entries.append((write.region, write.nbytes, write.src_offset, base.address + write.dst_offset))
        job.stage = Stage.running
        job.moved_at = time.monotonic()
        self._tell_engine(frames.Order(job.ticket, self._theirs.segment, frames.pack_entries(entries)))

    def _drop(self, job: Job, reason: str) -> None:
        """End a ticket of which nothing has begun."""
        del self._jobs[job.ticket]
        if job.stage is Stage.granted:
            self._tell(Over(job.ticket, quiescent=True))
        self._put(Failed(job.ticket, reason, quiescent=True))

    def _touch(self) -> None:
        """The oldest ticket's time counts from when it became the oldest."""
        oldest = self._oldest()
        if oldest is not None:
            oldest.moved_at = time.monotonic()

    def _oldest(self) -> Job | None:
        return next((job for job in self._jobs.values() if job.stage is Stage.running), None)

    def _watch_over(self, ours: _Ours) -> None:
        """Look from time to time whether the oldest ticket moves; all others come after it."""
        if ours is not self._engine or self._trouble is not None:
            return
        stall_s = self._sources.maker.settings.stall_s
        oldest = self._oldest()
        if oldest is not None and time.monotonic() - oldest.moved_at >= stall_s:
            self._trouble = _Trouble(f"no progress within {stall_s:g} s", lambda job: job is not oldest, restart=True)
            return self._end_engine()
        self._reactor.later(stall_s / 4, lambda: self._watch_over(ours))

    # The end

    def _fall(self, reason: str, quiet: bool = False) -> None:
        """Give the link up: our engine is ended, and all tickets end once it has."""
        if self._trouble is None:
            self._trouble = _Trouble(reason, lambda job: False)
        self._trouble.doubted = None
        self._trouble.restart = False
        self._trouble.quiet |= quiet
        self._end_engine()
        self._settle()

    def _settle(self) -> None:
        """Report the end of what was under way, once nothing of it is read any more and its cause is known."""
        trouble = self._trouble
        if trouble is not None and self._engine.running is None and trouble.doubted is None:
            self._trouble = None
            self._report(trouble)
            if trouble.restart and not self._closed:
                return self.open()
        if self._closed and self._engine.running is None and (self._buried or not self._loose):
            self.is_over = True
            if self._caller is not None:
                self._caller.close()
                self._caller = None

    def _report(self, trouble: _Trouble) -> None:
        reason = f"{self._peer}: {trouble.reason}"
        full = f"{reason} [{trouble.details}]" if trouble.details else reason
        if not trouble.restart and not trouble.quiet:
            self._put(LinkDown(self._number, full))
        over = [job for job in self._jobs.values() if not trouble.restart or job.stage is Stage.running]
        for job in over:
            del self._jobs[job.ticket]
            begun = job.stage is Stage.running and not trouble.quiescent
            if job.stage is not Stage.waiting and not trouble.quiescent:
                self._tell(Over(job.ticket, quiescent=not begun))
            if begun and self._theirs is not None:
                self._loose[job.ticket] = self._theirs.number
            self._put(Failed(job.ticket, full, quiescent=not begun, collateral=trouble.is_collateral(job)))
        for job in self._jobs.values():
            if job.stage is Stage.granted and trouble.quiescent:
                job.stage = Stage.waiting  # it was granted for an engine that is gone

    def _down(self, reason: str) -> None:
        """The link never came up."""
        self._fall(reason)

    def _expect_within(self, seconds: float, problem: str) -> None:
        """Give up if our engine is not in use by then."""
        ours, probing = self._engine, self._engine.probing

        def look() -> None:
            if ours is self._engine and not ours.up and ours.probing == probing and self._trouble is None:
                self._fall(f"{problem} within {seconds:g} s")

        self._reactor.later(seconds, look)

    def _tell(self, message: Message) -> None:
        if self._caller is not None:
            self._caller.tell(message)

    def _put(self, *completions: Done | Failed | Quiesced | Progress | LinkUp | LinkDown) -> None:
        self._sources.outbox.put(*completions)


class _Ours:
    """The engine that sends, and how far it is."""

    def __init__(self, running: Running | None = None) -> None:
        self.running = running
        self.ready = False
        self.registered: set[int] = set()
        self.probing = ""
        self.up = False


class _Trouble:
    """Why our engine is being ended, and what that means for the tickets.

    Attributes:
        reason: In words.
        is_collateral: Whether another ticket's trouble ended this one.
        quiescent: The peer's engine is gone too: nothing can land.
        restart: The link stays up: another engine follows.
        quiet: The link was closed: its end is no news.
        doubted: The peer's engine, while the peer is being asked about it.
        details: Our engine's last words.
    """

    def __init__(self, reason: str, is_collateral: Callable[[Job], bool], restart: bool = False) -> None:
        self.reason = reason
        self.is_collateral = is_collateral
        self.quiescent = False
        self.restart = restart
        self.quiet = False
        self.doubted: int | None = None
        self.details = ""
