"""A `World` in which everything pending happens at its time, under a weather of faults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from kvpoll_fsm import inputs
from kvpoll_fsm.channel import ACK_AFTER_S, RESEND_AFTER_S
from kvpoll_fsm.commands import CancelPart, CancelWrites, CopyOut, Fence, Preflight, SetTimer, StartPart, Verify
from kvpoll_fsm.messages import Frame, Packet
from kvpoll_fsm.session import RoomKey
from kvpoll_fsm.testing import work
from kvpoll_fsm.testing.hosts import Delivery, Host, Job, LateWrite
from kvpoll_fsm.testing.sim_clock import ANSWER, PACKET, TIMER, Clock
from kvpoll_fsm.testing.sim_plan import Plan
from kvpoll_fsm.testing.sim_weather import Weather
from kvpoll_fsm.testing.world import World

__all__ = ["TimedWorld"]

RETRY_S = 0.5
"""How often a write that cannot go on looks again."""
STUCK_S = 90.0
"""How long a write tries at most."""
PORT_S = 3.0
"""How long it takes to find that a data port does not answer."""
HANGS = 0.2
"""The share of a worker's jobs during which it does nothing."""
LATE_S = 60.0
"""How long at most a write that ended unknown may land."""


class TimedWorld(World):
    """Every packet, write, copy and timer at its time.

    Attributes:
        clock: Virtual time.
        weather: What is wrong at this moment.
        watch: Called with each room that may have changed.
    """

    def __init__(self, plan: Plan, clock: Clock, weather: Weather) -> None:
        super().__init__(plan.deadlines, checksums=plan.checksums, transports=plan.transports)
        self.plan = plan
        self.clock = clock
        self.weather = weather
        self.watch: Callable[[Host, RoomKey], None] = lambda host, key: None
        self._ticking: set[tuple[bytes, str]] = set()
        self._landed: dict[tuple[bytes, RoomKey], int] = {}
        self._cancelled: set[tuple[bytes, RoomKey]] = set()
        self._working: list[tuple[bytes, RoomKey]] = []

    # Hosts that may stand still

    def when_running(self, name: str, order: int, action: Callable[[], None]) -> None:
        """Act now, or when the host goes on that stands still."""
        thaw_s = self.weather.thaw_s(name)
        if thaw_s > self.clock.now:
            self.clock.at(thaw_s, order, lambda: self.when_running(name, order, action))
        else:
            action()

    def for_host(self, host: Host, order: int, action: Callable[[], None]) -> None:
        """As `when_running`, if this incarnation is there by then."""

        def act() -> None:
            if self.hosts.get(host.name) is host:
                action()

        self.when_running(host.name, order, act)

    def after(self, seconds: float, host: Host, order: int, action: Callable[[], None]) -> None:
        """Act in a while, if this incarnation is there by then."""
        self.clock.after(seconds, order, lambda: self.for_host(host, order, action))

    def drop_host(self, name: str) -> None:
        """As `World.drop_host`; its workers end with it."""
        host = self.hosts.get(name)
        super().drop_host(name)
        if host is not None:
            self._working = [place for place in self._working if place[0] != host.incarnation]

    def settle(self, host: Host) -> None:
        """As `World.settle`, and see to it that the host is woken when it must be."""
        super().settle(host)
        core = host.core
        if core.owes_ack:
            self._tick(host, "ack", ACK_AFTER_S)
        if core.connections:
            self._tick(host, "heartbeat", self.deadlines.heartbeat_s)
        if _must_resend(host):
            self._tick(host, "resend", RESEND_AFTER_S)

    def _tick(self, host: Host, kind: str, after_s: float) -> None:
        """Set one of the driver's own timers, unless it runs. A host without peers needs none of them."""
        if (host.incarnation, kind) not in self._ticking:
            self._ticking.add((host.incarnation, kind))
            self.after(after_s, host, TIMER, lambda: self._ticked(host, kind))

    def _ticked(self, host: Host, kind: str) -> None:
        self._ticking.discard((host.incarnation, kind))
        if kind == "ack":
            host.core.flush(ack_now=True)
        elif kind == "heartbeat":
            working = [key for incarnation, key in self._working if incarnation == host.incarnation]
            host.core.heartbeat_tick(self._host_alive(host), dict.fromkeys(working))
        else:
            if _must_resend(host):  # once more after the last, so that the wait between resends is short again
                self._tick(host, kind, RESEND_AFTER_S)
            host.core.resend_tick()
        self.settle(host)

    def _host_alive(self, host: Host) -> bool:
        return self.weather.host_alive(host.name, self.clock.now, self.deadlines.host_alive_s)

    # Packets

    def on_packet(self, delivery: Delivery) -> None:
        """Each copy of a packet arrives at its time."""
        for delay_s in self.weather.fates(delivery.source, delivery.dest):
            self.clock.after(delay_s, PACKET, lambda: self._deliver(delivery))

    def _deliver(self, delivery: Delivery) -> None:
        def arrive() -> None:
            self.clock.log(f"{delivery.source} -> {delivery.dest}: {_said(delivery.packet)}")
            self.arrive(delivery)

        self.when_running(delivery.dest, PACKET, arrive)

    # Timers

    def on_timer(self, host: Host, key: RoomKey | None, command: SetTimer) -> None:
        """The timer fires at its time, unless it was set again or cancelled."""
        super().on_timer(host, key, command)

        def fire() -> None:
            if host.timers.get((key, command.name)) == command.epoch:
                self.clock.log(f"{host.name}: timer {command.name} of {_named(key)}")
                self.fire(host.name, key, command.name, host_alive=self._host_alive(host))

        self.after(command.after_s, host, TIMER, fire)

    # Work

    def on_changed(self, host: Host, key: RoomKey) -> None:
        """Somebody looks at the room."""
        self.watch(host, key)

    def on_job(self, host: Host, job: Job) -> None:
        """Work of a host's own takes its time."""
        self.jobs.append(job)
        command, ok = job.command, True
        if isinstance(command, (CopyOut, Verify)):
            return self._by_worker(host, job.key, lambda: self._finish(host, job, ok=True))
        seconds = self.weather.work_s(host.name)
        if isinstance(command, Preflight):
            seconds, ok = self._reach(host, command)
        elif isinstance(command, Fence):
            ok = command.force or not self.plan.costly_fence
        self.after(seconds, host, ANSWER, lambda: self._finish(host, job, ok=ok))

    def _by_worker(self, host: Host, key: RoomKey, done: Callable[[], None]) -> None:
        """A worker of the host is busy for a while, or hangs."""
        place = (host.incarnation, key)
        hangs = self.weather.dice("workers", host.name).random() < HANGS
        if not hangs:
            self._working.append(place)

        def end() -> None:
            if not hangs:
                self._working.remove(place)
            done()

        self.after(self.weather.work_s(host.name), host, ANSWER, end)

    def _reach(self, host: Host, command: Preflight) -> tuple[float, bool]:
        """How long it takes to reach a data port, and whether it answers."""
        dest = host.address(command.conn)
        if dest is None or dest not in self.hosts or self.weather.parted(host.name, dest, "data"):
            return PORT_S, False
        trip = self.weather.work_s(host.name)
        broken = self.weather.broken(host.name, dest, command.transport)
        return trip, broken is None or not broken.port

    def _finish(self, host: Host, job: Job, *, ok: bool, loose: bool = False, **how: bool) -> None:
        """A job ends; its host hears of it when it goes on."""
        if not _take(self.jobs, job):
            return
        answer = work.answer(self, host, job, ok=ok, loose=loose, **how)
        self.clock.log(f"{host.name}: {_work(job)} {'done' if ok else 'failed, may land' if loose else 'failed'}")
        if answer is not None:
            self.for_host(host, ANSWER, lambda: self.feed(host.name, job.key, answer))

    # Writes

    def on_part(self, host: Host, key: RoomKey, command: StartPart) -> None:
        """A part is staged, then written to each target."""

        def staged() -> None:
            host.stage(key, command)
            self.clock.log(f"{host.name}: part {command.part} of {_named(key)} staged")
            for target in command.targets:
                self._start(host, Job(host.name, key, command, target))

        self._by_worker(host, key, staged)

    def _start(self, host: Host, job: Job) -> None:
        self.jobs.append(job)
        if (host.incarnation, job.key) in self._cancelled or (job.target and job.target.shut):
            return self._finish(host, job, ok=False)
        tokens = job.command.tokens
        pieces = min(tokens, self.weather.dice("pieces", host.name).choice([1, 1, 2, 4]))
        marks = [tokens * piece // pieces for piece in range(1, pieces)]
        self._go_on(host, job, marks, self.clock.now + STUCK_S)

    def _go_on(self, host: Host, job: Job, marks: Sequence[int], until_s: float) -> None:
        """The next piece of a write takes its time."""
        seconds = self.weather.work_s(host.name)
        self.clock.after(seconds, ANSWER, lambda: self._piece(host, job, marks, until_s))

    def _piece(self, host: Host, job: Job, marks: Sequence[int], until_s: float) -> None:
        if not any(job is other for other in self.jobs) or job.target is None:
            return
        dest = host.address(job.target.conn)
        broken = self.weather.broken(host.name, dest or "", job.target.transport)
        if (broken is not None and not broken.hang) or self.clock.now > until_s:
            loose = self.weather.dice("late", host.name).random() < (broken.late if broken else 0.5)
            self.weather.counts["failed writes"] += 1
            how = {"reads": broken.reads, "collateral": broken.collateral} if broken else {}
            return self._finish(host, job, ok=False, loose=loose, **how)
        if broken is not None or self._held_up(host, dest, job.target.transport):
            self.clock.after(RETRY_S, ANSWER, lambda: self._piece(host, job, marks, until_s))
        elif not marks:
            self._finish(host, job, ok=True)
        else:
            self._progress(host, job, marks[0])
            self._go_on(host, job, marks[1:], until_s)

    def _held_up(self, host: Host, dest: str | None, transport: str) -> bool:
        """A write cannot go on: no way there, or, where the receiving host must read, that stands still."""
        if dest is None or dest not in self.hosts:
            return False
        reads = transport == "a"
        return self.weather.parted(host.name, dest, "data") or (reads and self.weather.thaw_s(dest) > self.clock.now)

    def _progress(self, host: Host, job: Job, tokens: int) -> None:
        if work.progress(self, host, job, tokens):
            landed = self._landed[host.incarnation, job.key] = self._landed.get((host.incarnation, job.key), 0) + 1
            event = inputs.Progress(job.command.part, landed)
            self.for_host(host, ANSWER, lambda: self.feed(host.name, job.key, event))

    def on_cancel(self, host: Host, key: RoomKey, command: CancelPart) -> None:
        """Some writes stop when they are asked to, some end unknown, some go on."""
        self._cancelled.add((host.incarnation, key))
        for job in self._writes(host, key):
            self._ask_to_end(host, job)

    def on_hurry(self, host: Host, key: RoomKey, command: CancelWrites) -> None:
        """As a cancel, of one attempt."""
        meant = (command.rank, command.part, command.attempt)
        for job in self._writes(host, key):
            if job.target and (job.target.rank, job.command.part, job.command.attempt) == meant:
                self.weather.counts["hurried writes"] += 1
                self._ask_to_end(host, job)

    def _writes(self, host: Host, key: RoomKey) -> list[Job]:
        return [job for job in self.jobs if (job.host, job.key) == (host.name, key) and job.target is not None]

    def _ask_to_end(self, host: Host, job: Job) -> None:
        dest, target = host.address(job.target.conn) if job.target else None, job.target
        broken = self.weather.broken(host.name, dest or "", target.transport if target else "")
        ways = ["stops", "stops", "unknown", "goes on"]
        how = self.weather.dice("cancel", host.name).choice(ways[:3] if broken and broken.hang else ways)
        reads = broken is None or broken.reads
        if how != "goes on":
            seconds = self.weather.work_s(host.name)
            end = partial(self._finish, host, job, ok=False, loose=how == "unknown", reads=reads)
            self.clock.after(seconds, ANSWER, end)

    def on_late(self, late: LateWrite) -> None:
        """Bytes land some times or never, until they can no more."""
        super().on_late(late)
        dice = self.weather.dice("late", late.job.host)
        ends_s = dice.uniform(0, dice.choice([1.0, 10.0, LATE_S]))
        for _ in range(dice.choice([0, 1, 1, 2])):
            self.clock.after(dice.uniform(0, ends_s), ANSWER, lambda: self._land(late))
        self.clock.after(ends_s, ANSWER, lambda: self._quiet(late))

    def _land(self, late: LateWrite) -> None:
        self.weather.counts["late writes"] += 1
        self.clock.log(f"{late.job.host}: {_work(late.job)} lands late")
        self.land_late(late)

    def _quiet(self, late: LateWrite) -> None:
        """The write can land no more; its writer hears of it when it goes on."""
        _take(self.late, late)
        host = self.host_of(late.origin)
        if host is not None and late.job.target is not None:
            self.for_host(host, ANSWER, lambda: self.feed(host.name, late.job.key, late.quiesced()))


def _must_resend(host: Host) -> bool:
    return any(c.peer is None or c.channel.unacked for c in host.core.connections.values())


def _take(items: list[Any], item: Any) -> bool:
    """Take out this very item; returns whether it was there."""
    for at, other in enumerate(items):
        if other is item:
            del items[at]
            return True
    return False


def _named(key: RoomKey | None) -> str:
    return "the pool" if key is None else f"room {key.room} {key.side} {key.rank}"


def _work(job: Job) -> str:
    to = f" to rank {job.target.rank} through {job.target.transport}" if job.target else ""
    part = getattr(job.command, "part", None)
    return f"{type(job.command).__name__}{'' if part is None else f' {part}'}{to} of {_named(job.key)}"


def _said(packet: Packet) -> str:
    if not isinstance(packet, Frame):
        return type(packet).__name__
    said = [f"{type(m).__name__}({getattr(m, 'room', '')})" for m in packet.messages]
    return f"{packet.first_seq}: {', '.join(said)}" if said else "beats" if packet.beats else "ack"
