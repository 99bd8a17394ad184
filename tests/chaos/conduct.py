"""Carries a plan out: opens rooms, makes things go wrong, hears how rooms end."""

from __future__ import annotations

import dataclasses
import heapq
import queue
import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

from tests.chaos.crew import Member
from tests.chaos.data import digest, make_arrays
from tests.chaos.judge import Room, Side, judged
from tests.chaos.plan import DEADLINES, HOSTS, RECEIVERS, SENDERS, SURVIVORS, TCP, Fault, Plan, RoomPlan, Step
from tests.faults.processes import Mother
from tests.faults.relay import Relay, Weather

__all__ = ["Conductor", "surplus"]

AT_ONCE = 24
"""Rooms under way at a time."""
END_S = 60.0
"""Longest a room, or anything else, may take: a bound against hanging, several times what deadlines allow."""
TURN_S = 0.02
"""How often the agenda is looked at."""
PROGRAMS = SENDERS + RECEIVERS


class Conductor:
    """One run: programs, rooms under way, and what is to be done when.

    Attributes:
        violations: What must not be.
        ends: How often a side of a room ended how: (phase, side, Success or the failure's code).
        faults: How often what went wrong.
    """

    def __init__(self, plan: Plan) -> None:
        self.violations: list[str] = []
        self.ends: Counter[tuple[str, str, str]] = Counter()
        self.faults: Counter[str] = Counter()
        self._plan = plan
        self._mother = Mother("tests.chaos.worker")
        self._relay = Relay(HOSTS, plan.seed)
        self._heard: queue.SimpleQueue[tuple[Member, dict[str, Any]]] = queue.SimpleQueue()
        self._answers: dict[tuple[Member, int], Any] = {}
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._rooms: dict[int, Room] = {}
        self._members: dict[str, Member] = {}
        self._at_first: dict[str, dict[str, int]] = {}

    # The run

    def start(self) -> None:
        """Start all programs, and count what they have when nothing has happened yet."""
        for program in PROGRAMS:
            self._start(program)
        self._at_first = {program: self.ask(member, "counts") for program, member in self._members.items()}

    def perform(self, phase: str, numbers: range, rooms_per_s: float, *, faults: bool) -> None:
        """Perform these rooms, and return when all have ended and nothing is wrong any more."""
        started_s = time.monotonic()
        coming = self._plan.faults() if faults else iter(())
        fault = next(coming, None)
        for number in numbers:
            due_s = started_s + (number - numbers[0]) / rooms_per_s
            while len(self._rooms) >= AT_ONCE or time.monotonic() < due_s:
                self._turn(phase)
                while fault is not None and started_s + fault.at_s < time.monotonic():
                    self._go_wrong(fault)
                    fault = next(coming)
            self._open(self._plan.room(number, calm=not faults), must_succeed=not faults)
        ends_s = time.monotonic() + 2 * END_S
        while self._rooms or self._agenda or not all(member.alive for member in self._members.values()):
            self._turn(phase)
            if time.monotonic() > ends_s:
                raise TimeoutError(f"{phase} does not end: {self._rooms}, {self._members}")

    def settle(self) -> None:
        """Wait until nothing is left of all rooms, in any process; what stays is a leak."""
        for program, member in self._members.items():
            ends_s, more = time.monotonic() + END_S, {"?": [0, 0]}
            while more and time.monotonic() < ends_s:
                more = surplus(self._at_first[program], self.ask(member, "counts"))
            if more:
                self.violations.append(f"{program} keeps, as [at first, now]: {more}")

    def memory(self) -> dict[str, int]:
        """Resident bytes of the programs that are never killed."""
        return {program: self.ask(self._members[program], "rss") for program in SURVIVORS}

    def ask(self, member: Member, do: str) -> Any:
        """Give an order and wait for the answer."""
        place, ends_s = (member, member.post(do)), time.monotonic() + END_S
        while place not in self._answers:
            self._turn("")
            if time.monotonic() > ends_s:
                raise TimeoutError(f"{member.program} does not answer: {do}")
        return self._answers.pop(place)

    def end(self) -> None:
        """End all programs."""
        alive = [member for member in self._members.values() if member.alive]
        for member in alive:
            member.leave()
        for member in alive:
            self._bury(member, 0)
        self._relay.close()
        self._mother.close()

    # One turn

    def _turn(self, phase: str) -> None:
        try:
            self._hear(*self._heard.get(timeout=TURN_S))
            while True:
                self._hear(*self._heard.get_nowait())
        except queue.Empty:
            pass
        while self._agenda and self._agenda[0][0] <= time.monotonic():
            heapq.heappop(self._agenda)[2]()
        for number, room in list(self._rooms.items()):
            if room.is_over:
                self._close(phase, self._rooms.pop(number))
            elif time.monotonic() - room.opened_s > END_S:
                self._give_up(self._rooms.pop(number))

    def _later(self, after_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (time.monotonic() + after_s, next(self._numbers), action))

    def _hear(self, member: Member, said: dict[str, Any]) -> None:
        if "violation" in said:
            self.violations.append(f"{member.program}: {said['violation']}")
        elif "ended" in said:
            self._died(member)
        elif "error" in said:
            self.violations.append(f"{member.program} could not {said['error']}")
        elif "id" in said:
            if said["value"] is not None:
                self._answers[member, said["id"]] = said["value"]
        else:
            room = self._rooms.get(said["room"])
            side = room.sides.get((said["side"], said["rank"])) if room else None
            if side is not None and side.member is member:
                side.report = said

    def _bury(self, member: Member, wanted: int) -> None:
        """A process has ended; what it wrote is a traceback or a warning."""
        status, text = member.end()
        if status != wanted or text:
            self.violations.append(f"{member.program} ended with {status}: {text}")

    def _died(self, member: Member) -> None:
        """A process ended: as it was told to, or of itself; it is replaced."""
        if member.alive:
            member.leave()
        if not member.buried:
            self._bury(member, 0)
            self._start(member.program)

    # Rooms

    def _open(self, plan: RoomPlan, *, must_succeed: bool = False) -> None:
        fields = self._plan.layouts[plan.layout]
        wanted = digest(fields, make_arrays(fields, self._plan.seed, plan.number, plan.tokens))
        room = Room(plan, wanted, must_succeed, time.monotonic(), len(plan.steps))
        self._rooms[plan.number] = room
        for step in plan.steps:
            self._later(step.after_s, partial(self._step, room, step))

    def _step(self, room: Room, step: Step) -> None:
        room.steps_left -= 1
        plan, place = room.plan, (step.side, step.rank)
        if step.do == "open":
            program = plan.sender if step.side == "sender" else plan.ranks[step.rank].program
            member = self._members[program]
            if member.alive:  # else this side is missing
                room.sides[place] = Side(member)
                member.post(step.side, **self._opening(room, step))
        elif place in room.sides and room.sides[place].member.alive:
            room.sides[place].member.post(step.do, side=step.side, room=plan.number, rank=step.rank)

    def _opening(self, room: Room, step: Step) -> dict[str, Any]:
        plan, ranks = room.plan, len(room.plan.ranks)
        order = {"endpoint": str(plan.layout), "room": plan.number}
        if step.side == "sender":
            return {**order, "ranks": ranks if plan.told_ranks else None, "tokens": plan.tokens}
        rank = plan.ranks[step.rank]
        peer = self._plan.address(plan.sender, plan.layout)
        return {**order, "peer": peer, "rank": step.rank, "ranks": ranks, "grant": rank.tokens, "resume": rank.resume}

    def _close(self, phase: str, room: Room) -> None:
        self.violations += judged(room)
        for (kind, _), side in room.sides.items():
            end = "gone" if side.report is None else side.report["code"] or side.report["state"]
            self.ends[phase, kind, end] += 1
        sender, plan = room.sides.get(("sender", 0)), room.plan
        if plan.again and not (sender and sender.report and sender.report["state"] == "Success"):
            self.ends[phase, "room", "opened again"] += 1
            self._open(self._plan.room(plan.number, calm=False, life=plan.life + 1))

    def _give_up(self, room: Room) -> None:
        live = [(place, side.member.program) for place, side in room.sides.items() if not side.is_over]
        self.violations.append(f"room {room.plan.number} did not end: {live}")
        for side in room.sides.values():
            if not side.is_over:
                side.member.post("complain", room=room.plan.number)

    # Faults

    def _start(self, program: str) -> None:
        member = self._members[program] = Member(self._mother, program, self._heard)
        member.post(
            "open",
            namespace=self._relay.hosts[int(program[1])].namespace,
            seed=self._plan.seed,
            endpoints=self._plan.endpoints(program),
            deadlines=DEADLINES,
            tcp=TCP,
        )

    def _go_wrong(self, fault: Fault) -> None:
        self.faults[fault.what] += 1
        getattr(self, f"_{fault.kind}")(fault)

    def _kill(self, fault: Fault) -> None:
        member = self._members[fault.target]
        if member.alive:
            member.kill()
            self._bury(member, -signal.SIGKILL)
            self._later(fault.for_s, lambda: self._start(fault.target))

    def _leave(self, fault: Fault) -> None:
        member = self._members[fault.target]
        if member.alive:
            member.leave()  # replaced when it has ended

    def _stop(self, fault: Fault) -> None:
        member = self._members[fault.target]
        if member.alive:
            member.stop()
            self._later(fault.for_s, member.resume)

    def _weather(self, fault: Fault) -> None:
        fine = {name: value for name, value in dataclasses.asdict(Weather()).items() if name in fault.weather}
        for way in fault.target:
            self._relay.set(*way, **fault.weather)
            self._later(fault.for_s, partial(self._relay.set, *way, **fine))

    def _unplug(self, fault: Fault) -> None:
        host = self._relay.hosts[fault.target]
        host.plug(False)
        self._later(fault.for_s, host.plug)


def surplus(at_first: dict[str, int], now: dict[str, int]) -> dict[str, list[int]]:
    """What there is more of than at first, as [at first, now]."""
    return {what: [at_first.get(what, 0), n] for what, n in now.items() if n > at_first.get(what, 0)}
