"""The receiving engine: who may write through it, its end as a fence, and the next one.

An engine that is asked to stop one writer can only be killed: nothing lands through it any more, and the memory, which
is ours, stays. So the others' writes end too. They are told, and so are told apart from those that were meant.
"""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from kvpoll_common.grants import Grant, Grants
from kvpoll_common.loop import Reactor
from kvpoll_fsm.errors import TransportUnavailable
from kvpoll_fsm.spi import Region
from kvpoll_mooncake import frames, wire
from kvpoll_mooncake.frames import Event
from kvpoll_mooncake.installed import unimportable
from kvpoll_mooncake.maker import Maker
from kvpoll_mooncake.roles import Running
from kvpoll_mooncake.wire import Ask, Base, Engine, Go, Gone, Message, No, Sound

__all__ = ["Asker", "Keeper", "Visit"]

_log = logging.getLogger("kvpoll_mooncake")

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
UNKNOWN_TOKEN = "the receiver does not know the token, or not from this writer, or has revoked it"
OUT_OF_RANGE = "a write lies outside the ranges that the token admits"


class Asker(Protocol):
    """Somebody who wants to write."""

    writer: bytes

    def tell(self, message: Message) -> None:
        """Answer him."""
        ...

    def entered(self, visit: Visit) -> None:
        """He may write, until he says that it is over."""
        ...

    def left(self, visit: Visit) -> None:
        """He may not any more, and cannot."""
        ...


@dataclass(eq=False)
class Visit:
    """A ticket that may write through the engine that is there; without an asker, once his connection has ended."""

    asker: Asker | None
    ticket: int
    grant: Grant


class Keeper:
    """Has one engine running, time and again. Used by the reactor's thread alone, which owns the engine's process."""

    def __init__(
        self,
        reactor: Reactor,
        maker: Maker,
        regions: Mapping[int, Region],
        grants: Grants,
        tell: Callable[[Message], None],
    ) -> None:
        """Store what is needed.

        Args:
            reactor: The thread's.
            maker: Makes engines.
            regions: What may be written to.
            grants: Who may write.
            tell: Tells all who are connected.
        """
        self.current: Engine | None = None
        self._reactor = reactor
        self._maker = maker
        self._regions = regions
        self._grants = grants
        self._tell = tell
        self._life = _Life()
        self._numbers = itertools.count(1)  # of engines, and of doubts
        self._visits: set[Visit] = set()
        self._asks: deque[tuple[Asker, Ask]] = deque()
        self._doubters: deque[tuple[int, Asker | None]] = deque()
        self._registering: dict[int, Future[None]] = {}

    # Its life

    def start(self, ready: Future[None] | None = None) -> None:
        """Start an engine; `ready` is told whether it works."""
        life = self._life
        if life.stopped:
            return
        life.number, life.ready, life.segment, life.bases = next(self._numbers), ready, "", {}
        try:
            life.process = self._maker.start(self, f"receiving engine {life.number}", self._regions)
        except OSError as error:
            self._failed(TransportUnavailable("mooncake", str(error)))
            return self._again()
        number = life.number
        self._reactor.later(self._maker.settings.engine_s, lambda: self._too_slow(number))

    def replace(self, ready: Future[None]) -> None:
        """End the engine that is there, nobody having been told of it, and start another; `ready` is told of that."""
        self._life.successor = ready
        self._life.kill()

    def register(self, region: Region, done: Future[None]) -> None:
        """Make a region writable, in the engine that is there and in all that come."""
        self._registering[region.number] = done
        if self._life.process is None:
            return self._failed(TransportUnavailable("mooncake", "its engine has ended"))
        try:
            self._life.process.register(region)
        except OSError as error:  # out of file descriptors
            self._failed(TransportUnavailable("mooncake", f"region {region.number}: {error}"))

    def stop(self) -> None:
        """End for good; `over` turns True once nothing can land any more."""
        self._life.stopped = True
        while self._asks:
            asker, ask = self._asks.popleft()
            asker.tell(No(ask.ticket, "the receiver is closing"))
        if self._life.process is not None:
            self._life.process.kill()

    @property
    def over(self) -> bool:
        """No engine is running."""
        return self._life.process is None

    def heard(self, engine: Running, event: Event) -> None:
        """The engine says something."""
        life = self._life
        if engine is not life.process:
            return
        if isinstance(event, frames.Ready):
            life.segment = event.segment
            self._note_up()
        elif isinstance(event, frames.Unusable):
            error = TransportUnavailable("mooncake", f"{event.problem}: {engine.last_words()}")
            self._failed(unimportable(event.problem) if event.missing else error)
        elif isinstance(event, frames.Registered):
            self._note_region(event)
        elif isinstance(event, frames.Pong) and self._doubters:
            _, doubter = self._doubters.popleft()
            if doubter is not None:
                doubter.tell(Sound(life.number))

    def gone(self, engine: Running, how: str) -> None:
        """The engine has ended: whatever was to land has landed, or never will."""
        life = self._life
        if engine is not life.process:
            return
        life.process, self.current = None, None
        crashed = not life.fencing
        if crashed and not life.stopped and life.successor is None:
            _log.warning("the receiving engine ended, %s: %s", how, engine.last_words())
        self._failed(TransportUnavailable("mooncake", f"its engine ended, {how}: {engine.last_words()}"))
        self._clear_out(crashed)
        life.fencing.clear()
        self._doubters.clear()
        self._again()

    def _again(self) -> None:
        """Start the next engine: at once, unless the last one never worked."""
        life = self._life
        pause_s = life.pause_s
        life.pause_s = min(max(2 * pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
        ready, life.successor = life.successor, None
        self._reactor.later(pause_s if ready is None else 0.0, lambda: self.start(ready))

    def _note_region(self, event: frames.Registered) -> None:
        done = self._registering.pop(event.region, None)
        if event.problem:
            error = TransportUnavailable("mooncake", f"region {event.region}: {event.problem}")
            if done is None:
                return self._life.kill()
            return done.set_exception(error)
        self._life.bases[event.region] = Base(event.region, event.address, len(self._regions[event.region].buffer))
        self._note_up()
        if done is not None:
            done.set_result(None)

    def _note_up(self) -> None:
        """The engine takes writes once it has all regions."""
        life = self._life
        if not life.segment or life.bases.keys() != self._regions.keys():
            return self._tell_ready()
        life.pause_s = 0.0
        self.current = Engine(life.number, life.segment, tuple(life.bases.values()))
        self._tell_ready()
        self._tell(self.current)
        while self._asks and not self._life.fencing:  # one who turns out to be gone takes his other questions along
            self.ask(*self._asks.popleft())

    def _tell_ready(self) -> None:
        ready, self._life.ready = self._life.ready, None
        if ready is not None:
            ready.set_result(None)

    def _failed(self, error: TransportUnavailable) -> None:
        """Whoever waits for the engine, or for a region of it, hears why there is none."""
        ready, self._life.ready = self._life.ready, None
        waiting = [*self._registering.values(), *([ready] if ready is not None else [])]
        self._registering.clear()
        for future in waiting:
            future.set_exception(error)

    def _too_slow(self, number: int) -> None:
        if number == self._life.number and not self._life.segment and self._life.process is not None:
            self._failed(TransportUnavailable("mooncake", f"no engine within {self._maker.settings.engine_s:g} s"))
            self._life.kill()

    # Writers

    def ask(self, asker: Asker, ask: Ask) -> None:
        """Answer, or keep the question until there is an engine."""
        if self.current is None or self._life.fencing:
            self._asks.append((asker, ask))
            self._reactor.later(self._maker.settings.engine_s, lambda: self._expire(asker, ask))
            return
        grant = self._grants.enter(ask.token, asker.writer)
        if grant is None:
            return asker.tell(No(ask.ticket, UNKNOWN_TOKEN))
        # What is granted lies inside its region, so this checks against both.
        if not grant.admits(wire.unpack_ranges(ask.ranges)):
            self._grants.refusals.add("a write outside the granted ranges")
            self._grants.leave(grant)
            return asker.tell(No(ask.ticket, OUT_OF_RANGE))
        visit = Visit(asker, ask.ticket, grant)
        self._visits.add(visit)
        asker.entered(visit)
        asker.tell(Go(ask.ticket, self.current.number))

    def leave(self, visit: Visit) -> None:
        """The writer says that nothing of it is under way."""
        self._visits.discard(visit)
        self._grants.leave(visit.grant)

    def forget(self, asker: Asker) -> None:
        """His connection has ended; what he has under way may land as long as the engine lives."""
        self._asks = deque((other, ask) for other, ask in self._asks if other is not asker)
        self._doubters = deque((number, None if other is asker else other) for number, other in self._doubters)
        for visit in self._visits:
            if visit.asker is asker:
                visit.asker = None

    def withdraw(self, asker: Asker, ticket: int) -> None:
        """He does not want to write any more; there is no answer."""
        self._asks = deque(each for each in self._asks if each[0] is not asker or each[1].ticket != ticket)

    def fence(self, token: bytes) -> None:
        """See that nothing lands under a token: at once, or by the end of the engine."""
        if any(visit.grant.token == token for visit in self._visits):
            self._life.fencing.add(token)
            self._life.kill()

    def doubt(self, asker: Asker | None) -> None:
        """A transfer failed. An engine that does not answer does nothing any more, and is replaced."""
        if self.current is None or self._life.process is None:
            return  # its end is told soon
        number = next(self._numbers)
        self._doubters.append((number, asker))
        self._life.process.send(frames.Ping())
        self._reactor.later(self._maker.settings.answer_s, lambda: self._silent(number))

    def _silent(self, doubt: int) -> None:
        if any(number == doubt for number, _ in self._doubters):
            self._life.kill()

    def _expire(self, asker: Asker, ask: Ask) -> None:
        if (asker, ask) in self._asks:
            self._asks.remove((asker, ask))
            asker.tell(No(ask.ticket, f"the receiver has had no engine for {self._maker.settings.engine_s:g} s"))

    def _clear_out(self, crashed: bool) -> None:
        """Nobody can write any more: tell the writers, and those who wait for that."""
        fenced: defaultdict[Asker, list[int]] = defaultdict(list)
        visits, self._visits = self._visits, set()
        for visit in visits:
            if visit.asker is not None:
                if visit.grant.token in self._life.fencing:
                    fenced[visit.asker].append(visit.ticket)
                visit.asker.left(visit)
        for asker, tickets in fenced.items():
            asker.tell(Gone(self._life.number, tuple(tickets), crashed))
        self._tell(Gone(self._life.number, (), crashed))  # a second time to some, which says nothing new
        for visit in visits:
            self._grants.leave(visit.grant)


@dataclass
class _Life:
    """What is known of the engine that is there, or comes next."""

    process: Running | None = None
    number: int = 0
    segment: str = ""
    ready: Future[None] | None = None
    successor: Future[None] | None = None
    pause_s: float = 0.0
    stopped: bool = False

    def __post_init__(self) -> None:
        self.bases: dict[int, Base] = {}
        self.fencing: set[bytes] = set()

    def kill(self) -> None:
        """End the engine."""
        if self.process is not None:
            self.process.kill()
