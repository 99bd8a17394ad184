"""The sending side of one link: asks the peer's adapter, and has our engine write what it allows.

Each link has an engine of its own, so that what a peer does to it (a first contact that hangs, say) holds up nobody
else; and a new one whenever the peer's engine is another, for the old one remembers what does not hold any more.
"""

from __future__ import annotations

import time

from kvpoll_common.loop import Reactor
from kvpoll_fsm.errors import MalformedMessage
from kvpoll_fsm.spi import Failed, LinkDown, LinkUp
from kvpoll_mooncake import frames, wire
from kvpoll_mooncake.caller import Caller
from kvpoll_mooncake.frames import Event
from kvpoll_mooncake.handshake import Descriptor
from kvpoll_mooncake.roles import Running
from kvpoll_mooncake.tickets import Job, Stage, Tickets, entries_for
from kvpoll_mooncake.trouble import Ending, Ours, Sources, Trouble
from kvpoll_mooncake.wire import Doubt, Engine, Gone, Message, Over

__all__ = ["Lane"]

_MOURNING_S = 150.0
"""How long a link that is closed waits to hear that what it left cannot land any more."""
_EXIT_S = 5.0
"""How long an engine that is being ended is waited for; after that its tickets end with their sources in doubt."""


class Lane:
    """One link. Used by the reactor's thread alone.

    It is up once the peer's adapter and both engines have answered.
    """

    def __init__(self, number: int, peer: Descriptor, sources: Sources, reactor: Reactor) -> None:
        self._number = number
        self._peer = peer
        self._sources = sources
        self._reactor = reactor
        self._caller: Caller | None = None
        self._engine = Ours()
        self._theirs: Engine | None = None
        self._tickets = Tickets(sources.outbox)
        self._trouble: Trouble | None = None
        self._ghosts: set[Running] = set()
        self._told_up = False
        self._end = Ending()

    @property
    def is_over(self) -> bool:
        """Closed, nothing of ours is running, and the peer is not waited for."""
        return self._end.over

    # What the driver asks

    def open(self) -> None:
        """Reach the peer's adapter and start an engine; `LinkUp` or `LinkDown` follows."""
        if self._end.closed or self._engine.running is not None or self._trouble is not None:
            return
        if self._caller is None:
            self._caller = Caller(self._reactor, self._peer, self._sources.writer, self._sources.maker.settings, self)
            if not self._caller.open():
                return
        self._start_engine()

    def submit(self, job: Job) -> None:
        """Take a ticket."""
        if self._end.closed:
            return self._sources.outbox.put(Failed(job.ticket, "the link is closed", quiescent=True))
        self._tickets.add(job)
        if self._is_up:
            self._ask(job)
        else:
            self.open()

    def cancel(self, ticket: int) -> None:
        """End a ticket soon: what has begun is waited for."""
        job = self._tickets.get(ticket)
        if job is not None and job.stage is Stage.running:
            self._engine.tell(frames.Cancel(ticket))
        elif job is not None:
            self._drop(job, "cancelled")

    def close(self) -> None:
        """End the link; tickets end once our engine has. May be called twice."""
        if self._end.closed:
            return
        self._end.closed = True
        self._fall("the link was closed", quiet=True)
        self._reactor.later(_MOURNING_S, self.bury)

    def bury(self) -> None:
        """Wait for the peer no longer. May be called twice."""
        self._end.closed = self._end.buried = True
        self._settle()

    def abandon(self) -> None:
        """Close the connection, if there is one."""
        caller, self._caller = self._caller, None
        if caller is not None:
            caller.close()

    # The connection to the peer's adapter

    def proved(self) -> None:
        """Both adapters have proved themselves; the peer's is to name its engine."""
        if self._caller is not None:
            self._caller.asked()

    def is_waiting(self) -> bool:
        """Something has been asked and not been answered."""
        return (
            self._tickets.any(Stage.asked)
            or self._trouble is not None
            or (self._theirs is None and not self._end.closed)
        )

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
        self._tickets.nobody_tells()
        self._fall(reason)

    def _go(self, go: wire.Go) -> None:
        job = self._tickets.get(go.ticket)
        if job is None or job.stage is not Stage.asked:
            return self._tell(Over(go.ticket, quiescent=True))
        if self._theirs is None or go.engine != self._theirs.number:
            raise MalformedMessage("lets us write into an engine that is not there")
        job.stage = Stage.granted
        self._run(job)

    def _no(self, no: wire.No) -> None:
        job = self._tickets.get(no.ticket)
        if job is not None and job.stage is Stage.asked:
            self._tickets.fail(job, no.reason)

    def _gone_there(self, gone: Gone) -> None:
        """The peer's engine has ended: what we had under way there cannot land any more."""
        self._tickets.engine_gone(gone.engine)
        if self._theirs is not None and self._theirs.number == gone.engine:
            self._theirs = None
            self._restart(gone)
        self._settle()

    def _restart(self, gone: Gone) -> None:
        """Our engine goes too; the link stays up, unless it was about to end."""
        trouble = self._trouble
        if trouble is None or trouble.doubted is not None:
            reason = "the receiver's engine ended" if gone.crashed else "the receiver had to stop a write"
            self._trouble = trouble = Trouble(
                reason, lambda job: not gone.crashed and job.ticket not in gone.fenced, restart=not self._end.closed
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
            self._tickets.moved(event.ticket, event.nbytes)
        elif isinstance(event, frames.Ended):
            self._ended(event)
        elif isinstance(event, frames.Broke):
            self._broke(event)
        elif isinstance(event, frames.Ready):
            self._engine.ready = True
            self._probe()

    def gone(self, engine: Running, how: str) -> None:
        """Our engine has ended: it reads no source any more."""
        if engine in self._ghosts:
            self._ghosts.discard(engine)
            if not self._ghosts:
                self._tickets.sources_free()
            return self._settle()
        if engine is not self._engine.running:
            return
        was_up, self._engine = self._engine.up, Ours()
        self._sources.crowd.count -= 1
        if self._trouble is None:
            problem = f"the engine that sends to this peer ended, {how}"
            self._trouble = Trouble(problem, lambda job: False, restart=was_up)
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
        self._engine = Ours(running)
        crowd.count += 1
        self._expect_within(maker.settings.engine_s, "both engines did not get ready")

    def _probe(self) -> None:
        """Once both engines are there, see that theirs answers ours."""
        ours = self._engine
        complete = ours.ready and ours.registered == self._sources.regions.keys()
        if complete and self._theirs is not None and not ours.probing:
            ours.probing = self._theirs.segment
            self._engine.tell(frames.Probe(self._theirs.segment))
            self._expect_within(self._sources.maker.settings.probe_s, "the receiver's engine did not answer a probe")

    def _probed(self, event: frames.Probed) -> None:
        if event.problem:
            return self._fall(f"the receiver's engine cannot be reached: {event.problem}")
        if self._theirs is None or self._theirs.segment != event.segment or self._engine.up:
            return
        self._engine.up = True
        if not self._told_up:
            self._told_up = True
            self._sources.outbox.put(LinkUp(self._number))
        self._watch_over(self._engine)
        for job in self._tickets:
            if job.stage is Stage.waiting:
                self._ask(job)
            elif job.stage is Stage.granted:
                self._run(job)

    def _ended(self, event: frames.Ended) -> None:
        job = self._tickets.get(event.ticket)
        if job is not None:
            self._tell(Over(event.ticket, quiescent=True))
            self._tickets.ended(job, event.nbytes)

    def _broke(self, event: frames.Broke) -> None:
        """A transfer failed. Nothing more is read or sent; why it failed, the peer may know."""
        if self._trouble is not None:
            return
        self._trouble = Trouble(event.problem, lambda job: job.ticket != event.ticket, restart=not self._end.closed)
        if self._theirs is not None and self._caller is not None:
            self._trouble.doubted = self._theirs.number
            self._tell(Doubt(self._theirs.number))
            self._caller.asked()
        self._end_engine()

    def _end_engine(self) -> None:
        running = self._engine.running
        if running is not None:
            running.kill()
            self._reactor.later(_EXIT_S, lambda: self._haunted(running))

    def _haunted(self, engine: Running) -> None:
        """Our engine has not ended: a call in it hangs. Its tickets end, their sources stay as they are."""
        if engine is self._engine.running:
            self._ghosts.add(engine)
            self._engine = Ours()
            self._sources.crowd.count -= 1
            if self._trouble is not None:
                self._trouble.ghost = True
            self._settle()

    # Tickets

    @property
    def _is_up(self) -> bool:
        return self._engine.up and self._trouble is None and not self._end.closed

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
        try:
            entries = entries_for(job.writes, self._theirs)
        except ValueError as error:
            return self._drop(job, str(error))
        job.stage = Stage.running
        job.moved_at = time.monotonic()
        self._engine.tell(frames.Order(job.ticket, self._theirs.segment, frames.pack_entries(entries)))

    def _drop(self, job: Job, reason: str) -> None:
        """End a ticket of which nothing has begun."""
        if job.stage is not Stage.waiting:
            self._tell(Over(job.ticket, quiescent=True))
        self._tickets.fail(job, reason)

    def _watch_over(self, ours: Ours) -> None:
        """Look from time to time whether the oldest ticket moves; all others come after it."""
        if ours is not self._engine or self._trouble is not None:
            return
        stall_s = self._sources.maker.settings.stall_s
        oldest = self._tickets.oldest()
        if oldest is not None and time.monotonic() - oldest.moved_at >= stall_s:
            self._trouble = Trouble(f"no progress within {stall_s:g} s", lambda job: job is not oldest, restart=True)
            return self._end_engine()
        self._reactor.later(stall_s / 4, lambda: self._watch_over(ours))

    def _fall(self, reason: str, quiet: bool = False) -> None:
        """Give the link up: our engine is ended, and all tickets end once it has."""
        self._trouble = trouble = self._trouble or Trouble(reason, lambda job: False)
        trouble.doubted, trouble.restart = None, False
        trouble.quiet |= quiet
        self._end_engine()
        self._settle()

    def _settle(self) -> None:
        """Report the end of what was under way, once nothing of it is read any more and its cause is known."""
        trouble = self._trouble
        if trouble is not None and self._engine.running is None and trouble.doubted is None:
            self._trouble = None
            self._report(trouble)
            if trouble.restart and (trouble.quiescent or any(self._tickets)):
                return self.open()  # otherwise the next ticket does
        idle = self._engine.running is None and not self._ghosts
        if self._end.closed and idle and (self._end.buried or not self._tickets.in_doubt):
            self._end.over = True
            self.abandon()

    def _report(self, trouble: Trouble) -> None:
        reason = trouble.words(self._peer)
        if not trouble.restart:
            self._told_up = False
            if not trouble.quiet:
                self._sources.outbox.put(LinkDown(self._number, reason))
        for job in self._tickets:
            if job.stage is Stage.running:
                self._give_up(job, reason, trouble)
            elif not trouble.restart:
                self._drop(job, reason)
            elif job.stage is Stage.granted and trouble.quiescent:
                job.stage = Stage.waiting  # it was granted for an engine that is gone

    def _give_up(self, job: Job, reason: str, trouble: Trouble) -> None:
        """End a ticket that was under way."""
        collateral = trouble.is_collateral(job)
        if trouble.quiescent and not trouble.ghost:
            return self._tickets.fail(job, reason, collateral)
        if not trouble.quiescent:
            self._tell(Over(job.ticket, quiescent=False))
        engine = None if trouble.quiescent or self._theirs is None else self._theirs.number
        self._tickets.give_up(job, reason, collateral, engine, trouble.ghost)

    def _expect_within(self, seconds: float, problem: str) -> None:
        """Give up if our engine is not in use by then."""
        ours, probing = self._engine, self._engine.probing

        def look() -> None:
            if ours is self._engine and not ours.up and ours.probing == probing and self._trouble is None:
                if self._theirs is not None:  # if it hangs, nobody else may tell its adapter
                    self._tell(Doubt(self._theirs.number))
                self._fall(f"{problem} within {seconds:g} s")

        self._reactor.later(seconds, look)

    def _tell(self, message: Message) -> None:
        if self._caller is not None:
            self._caller.tell(message)
