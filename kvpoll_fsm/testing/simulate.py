"""Simulates days of rooms and faults: production cores in virtual time, by a plan drawn from a seed.

The laws are those of `kvpoll_fsm.testing.invariants`, after every step; every room ends within `room_timeout_s` and
becomes quiescent; when all are over, nothing is left of them. Where faults stop (`liveness`), every room that is
open then ends within its deadlines, and every room that is opened afterwards succeeds.
"""

from __future__ import annotations

import math
import traceback
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

from kvpoll_fsm import inputs
from kvpoll_fsm.testing.hosts import Host
from kvpoll_fsm.testing.invariants import check_host_empty
from kvpoll_fsm.testing.sim_clock import ANSWER, CHECK, Clock
from kvpoll_fsm.testing.sim_plan import Abort, Clear, Crash, Event, Machine, Open, Plan
from kvpoll_fsm.testing.sim_rooms import Rooms
from kvpoll_fsm.testing.sim_weather import Weather
from kvpoll_fsm.testing.sim_world import TimedWorld

__all__ = ["Outcome", "Violation", "simulate"]

REST_S = 3600.0
"""How long after the last event, or the end of what lasts, everything is over: a room's life, and its quarantine."""
BYE_S = 0.5
"""How long an endpoint that closes speaks."""


@dataclass
class Violation:
    """A law that does not hold.

    Attributes:
        law: What is broken, as a sentence.
        where: The line of code that found it, which tells one law from another.
        at_s: Virtual time.
        recent: The last events before.
    """

    law: str
    where: str
    at_s: float
    recent: list[str]

    @classmethod
    def of(cls, error: Exception, clock: Clock) -> Violation:
        """What an exception tells that left the world."""
        last = traceback.extract_tb(error.__traceback__)[-1]
        law = str(error).split("\n")[0]
        if not isinstance(error, AssertionError):
            law = f"{type(error).__name__} escaped: {law}"
        return cls(law, f"{last.name}: {last.line}", clock.now, list(clock.recent))


@dataclass
class Outcome:
    """What became of a plan.

    Attributes:
        steps: Things that happened.
        virtual_hours: Until nothing was left to happen.
        faults: How many struck, by kind, and how often packets and writes were hit.
        outcomes: Lives of rooms that ended, by state; each side and each rank counts.
        failure_codes: Of those that failed.
        digest: Names the whole run: equal plans give equal digests.
        violation: The first broken law, if there was one.
    """

    plan: Plan
    steps: int = 0
    virtual_hours: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    failure_codes: Counter[str] = field(default_factory=Counter)
    digest: str = ""
    violation: Violation | None = None


def simulate(plan: Plan, until_s: float = math.inf) -> Outcome:
    """Run a plan to its end, or to some moment, or to the first broken law."""
    run = _Run(plan)
    violation = None
    try:
        run.to_the_end(until_s)
    except Exception as error:  # whatever leaves a core, or a law, is the finding
        violation = Violation.of(error, run.clock)
    return Outcome(
        plan,
        run.clock.steps,
        run.clock.now / 3600,
        run.faults + run.weather.counts,
        run.rooms.outcomes,
        run.rooms.codes,
        run.clock.digest,
        violation,
    )


class _Run:
    """One plan under way."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.clock = Clock()
        self.weather = Weather(plan)
        self.world = TimedWorld(plan, self.clock, self.weather)
        self.rooms = Rooms(self.world)
        self.faults: Counter[str] = Counter()
        self._machines = {machine.name: machine for machine in plan.machines}
        for machine in plan.machines:
            self._boot(machine)
        for event in plan.events:
            self.clock.at(event.at_s, ANSWER, partial(self._happens, event))
        if plan.heal_s:
            self.clock.at(plan.heal_s + self._healing_s, CHECK, self._must_be_healed)

    def to_the_end(self, until_s: float) -> None:
        """Until nothing is left to happen; then nothing may be left of any room."""
        last = max((event.at_s + getattr(event, "for_s", 0.0) for event in self.plan.events), default=0.0)
        while self.clock.step():
            if self.clock.now > until_s:
                return
            assert self.clock.now < last + REST_S, f"{REST_S:g} s after the last event things happen still"
        for host in self.world.hosts.values():
            check_host_empty(host)
            assert not host.core.connections, f"{host.name} keeps {len(host.core.connections)} connections"

    # Events

    def _happens(self, event: Event) -> None:
        if not isinstance(event, Open):
            self.faults[type(event).__name__.lower()] += 1
        self.clock.log(f"plan: {event}")
        world, rooms = self.world, self.rooms
        if isinstance(event, Open):
            rooms.open(event)
        elif isinstance(event, Abort):
            world.when_running(event.host, ANSWER, lambda: rooms.abort(event))
        elif isinstance(event, Clear):
            world.when_running(event.host, ANSWER, lambda: rooms.clear(event))
        elif isinstance(event, Crash):
            self._crash(event)
        else:
            self.weather.begins(event)
            self.clock.after(event.for_s, ANSWER, lambda: self.weather.ends(event, self.clock.now))

    def _crash(self, event: Crash) -> None:
        host = self.world.hosts.get(event.host)
        if host is None:
            return
        if event.bye and self.weather.thaw_s(event.host) <= self.clock.now:
            self._say_bye(host)
            self.clock.after(BYE_S, ANSWER, lambda: self._die(host, event))
        else:
            self._die(host, event)

    def _say_bye(self, host: Host) -> None:
        """As the driver closes: every room fails, and every peer is told."""
        for key in list(host.core.sessions):
            self.world.feed(host.name, key, inputs.AbortRoom("the endpoint was closed"))
            self.world.clear(host.name, key)
        host.core.say_bye()
        self.world.settle(host)

    def _die(self, host: Host, event: Crash) -> None:
        if self.world.hosts.get(host.name) is host:
            self.clock.log(f"{host.name} dies")
            self.world.drop_host(host.name)
            self.weather.trouble_s = self.clock.now
            self.clock.after(event.for_s, ANSWER, lambda: self._boot(self._machines[host.name]))

    def _boot(self, machine: Machine) -> None:
        self.clock.log(f"{machine.name} starts")
        self.weather.trouble_s = self.clock.now
        self.world.add_host(machine.name, machine.blocks, machine.block_tokens, machine.managed)

    # Liveness

    @property
    def _healing_s(self) -> float:
        """How long rooms may live on after the last fault.

        Where each machine sends or receives, that is once through all gates. Two machines that send to each other
        may hold each the blocks the other waits for, until `input_s` ends one room after the other.
        """
        deadlines = self.world.deadlines
        if not self.plan.one_way:
            return deadlines.room_timeout_s
        return deadlines.bootstrap_s + 2 * deadlines.input_s + deadlines.stall_s + deadlines.resume_s

    def _must_be_healed(self) -> None:
        live = self.rooms.live_before(self.plan.heal_s)
        assert not live, f"{self._healing_s:g} s after the last fault: {live[0]}"
