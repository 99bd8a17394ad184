"""Draws plans: rooms that come in bursts, and faults around them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from msgspec.structs import replace

from kvpoll_fsm.deadlines import Deadlines
from kvpoll_fsm.testing.sim_plan import (
    Abort,
    Break,
    Clear,
    Crash,
    Disturb,
    Event,
    Freeze,
    Machine,
    Open,
    Part,
    Plan,
    Quiet,
    Rank,
    Slow,
)

__all__ = ["draw"]

BURST_S = 60.0
"""Rooms of one burst begin within a third of this; faults strike within all of it."""
PROBES = 12
PROBE_ROOM = 1_000_000
"""Rooms that must succeed have numbers of their own from here on."""
PROBE_GAP_S = 60.0
SETTLE_S = 3.0
"""How long after the last fault, and the silence that tells, each side knows who of the others is still there."""
HASTY = Deadlines(
    bootstrap_s=6.0,
    input_s=12.0,
    stall_s=3.0,
    resume_s=4.0,
    room_timeout_s=60.0,
    heartbeat_s=0.25,
    peer_lost_s=1.5,
    host_alive_s=4.0,
    withdraw_s=0.1,
    quarantine_max_s=5.0,
    linger_s=2.0,
)
"""Deadlines that pass in the middle of everything."""


def draw(seed: int, mode: str, rooms: int, hours: float) -> Plan:
    """The plan of a seed.

    Args:
        seed: Decides everything.
        mode: "safety", or "liveness": faults stop before the end, and rooms follow that must succeed.
        rooms: How many are opened while there are faults.
        hours: Of virtual time.
    """
    dice = random.Random(seed)
    one_way = dice.random() < 0.5
    deadlines = dice.choice([Deadlines(), HASTY])
    machines = _machines(dice, slowest_s=1.0 if deadlines.stall_s > HASTY.stall_s else 0.3)
    transports = dice.choice([("a",), ("a", "b")])
    pace = 1.0 if deadlines is not HASTY else 0.15
    drawing = _Draw(dice, machines, transports, one_way, max(3, rooms // 2), pace)
    events = [event for burst in _bursts(dice, hours, rooms) for event in drawing.burst(*burst)]
    events += drawing.rain(hours * 3600)
    heal_s = hours * 3600 if mode == "liveness" else 0.0
    if heal_s:
        events = drawing.heal(events, heal_s, deadlines)
    return Plan(
        seed=seed,
        mode=mode,
        hours=hours,
        noise=dice.getrandbits(32),
        machines=machines,
        events=tuple(sorted(events, key=lambda event: event.at_s)),
        transports=transports,
        checksums=dice.random() < 0.5,
        costly_fence=dice.random() < 0.3,
        one_way=one_way,
        heal_s=heal_s,
        deadlines=deadlines,
    )


def _machines(dice: random.Random, slowest_s: float) -> tuple[Machine, ...]:
    block_tokens = [dice.choice([1, 1, 2, 4, 8]) for _ in range(2)]
    return tuple(
        Machine(
            name=f"m{number}",
            blocks=dice.randint(1, 12),
            block_tokens=dice.choice(block_tokens),
            managed=number == 0 or dice.random() < 0.8,
            latency_s=round(slowest_s * 10 ** dice.uniform(-4, -1), 6),
            work_s=round(slowest_s * 10 ** dice.uniform(-3, 0), 6),
        )
        for number in range(dice.randint(2, 5))
    )


def _bursts(dice: random.Random, hours: float, rooms: int) -> Iterator[tuple[float, int]]:
    """When each burst begins, and how many rooms it has."""
    sizes: list[int] = []
    while sum(sizes) < rooms:
        sizes.append(min(dice.choice([1, 2, 3, 5, 8, 13, 30]), rooms - sum(sizes)))
    last_s = max(0.0, hours * 3600 - BURST_S)
    times = sorted(dice.uniform(0, last_s) for _ in sizes)
    yield from zip(times, sizes, strict=True)


def _until(event: Event, heal_s: float) -> Event | None:
    """The part of an event that is over when faults stop."""
    if event.at_s >= heal_s:
        return None
    if isinstance(event, (Open, Abort, Clear)):
        return event
    return replace(event, for_s=min(event.for_s, heal_s - event.at_s))


class _Draw:
    """Draws rooms and faults among some machines."""

    def __init__(
        self,
        dice: random.Random,
        machines: tuple[Machine, ...],
        transports: tuple[str, ...],
        one_way: bool,
        most_room: int,
        pace: float,
    ) -> None:
        self.dice = dice
        self.machines = machines
        self.transports = transports
        self.one_way = one_way
        self.most_room = most_room
        self.pace = pace
        self.wild = dice.choice([0.0, 0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 8.0])

    def heal(self, events: list[Event], heal_s: float, deadlines: Deadlines) -> list[Event]:
        """What of these events is over when faults stop, and the rooms that must succeed afterwards."""
        before = [stopped for event in events if (stopped := _until(event, heal_s)) is not None]
        soon_s, later_s = heal_s + SETTLE_S + deadlines.peer_lost_s, heal_s + SETTLE_S + deadlines.room_timeout_s
        soon = self.one_way and deadlines is not HASTY
        return before + self.probes(soon_s if soon else later_s, later_s)

    # Rooms

    def burst(self, at_s: float, rooms: int) -> list[Event]:
        """Rooms that begin together, and what goes wrong meanwhile."""
        dice = self.dice
        opened = [self.room(at_s + dice.uniform(0, BURST_S / 3)) for _ in range(rooms)]
        count = round(dice.expovariate(1.0) * self.wild * (1 + rooms**0.5)) if self.wild else 0
        return [*opened, *(self.fault(dice.choice(opened)) for _ in range(count))]

    def room(self, at_s: float) -> Open:
        """A room with hosts that take their time."""
        dice = self.dice
        sender, others = self._pair()
        tokens = dice.choice([1, 2, 3, 5, 8, 13, 21, 34])
        moments = sorted(round(dice.uniform(0, 12) * self.pace, 3) for _ in range(dice.choice([0, 0, 2])))
        supply = [(moment, dice.randint(1, tokens)) for moment in moments]
        last = round(moments[-1] + dice.uniform(0, 9) * self.pace, 3) if moments else 0.0
        return Open(
            at_s=round(at_s, 3),
            room=dice.randint(1, self.most_room),
            sender=sender.name,
            tokens=tokens,
            ranks=self._ranks(others, dice.choice([1, 1, 2, 4]), hurry=False),
            supply=(*supply, (last, tokens)),
            after_s=self._hesitation(),
            staged=sender.managed,
            told=dice.random() < 0.5,
            clear_s=round(dice.choice([0.0, 1.0, 20.0]) * dice.random() * self.pace, 3),
        )

    def probes(self, soon_s: float, later_s: float) -> list[Event]:
        """Rooms of hosts that do everything at once, in a world without faults; each must succeed.

        Args:
            soon_s: From here on pools that choose their blocks serve everybody, though older rooms hold some still.
            later_s: From here on older rooms are over, and engines have their blocks back.
        """
        half = PROBES // 2
        soon = [self._probe(soon_s + number * PROBE_GAP_S, number) for number in range(half)]
        later = [self._probe(later_s + number * PROBE_GAP_S, number) for number in range(half, PROBES)]
        return [*(room for room in soon if soon_s == later_s or not self._needs_engine(room)), *later]

    def _needs_engine(self, room: Open) -> bool:
        ours = {machine.name for machine in self.machines if machine.managed}
        return not ours.issuperset(rank.host for rank in room.ranks)

    def _probe(self, at_s: float, number: int) -> Open:
        dice = self.dice
        sender, others = self._pair()
        tokens, count = dice.choice([1, 2, 5, 8]), dice.choice([1, 1, 2, 3])
        return Open(
            at_s=at_s,
            room=PROBE_ROOM + number,
            sender=sender.name,
            tokens=tokens,
            ranks=self._ranks(others, count, hurry=True),
            supply=((0.0, tokens),),
            staged=sender.managed,
            clear_s=1.0,
            must_succeed=True,
        )

    def _pair(self) -> tuple[Machine, list[Machine]]:
        """A sender, and those that may receive from it."""
        half = (len(self.machines) + 1) // 2
        senders, receivers = (self.machines[:half], self.machines[half:]) if self.one_way else (self.machines,) * 2
        sender = self.dice.choice(senders)
        return sender, [machine for machine in receivers if machine is not sender]

    def _ranks(self, among: list[Machine], count: int, *, hurry: bool) -> tuple[Rank, ...]:
        """Receivers of one room; together they ask of no pool more than it has."""
        dice = self.dice
        chosen = [dice.choice(among) for _ in range(count)]
        ranks = []
        for number, machine in enumerate(chosen):
            share = machine.blocks // chosen.count(machine)
            dummy = (number > 0 and dice.random() < 0.15) or share == 0
            blocks = 0 if dummy else dice.randint(1, min(share, 4))
            resume = dice.choice(["drain", "drain", "extend"]) if machine.managed else "manual"
            after_s, think_s = (
                (0.0, 0.0) if hurry else (self._hesitation(), round(dice.expovariate(1.0) * self.pace, 3))
            )
            window = dice.choice([1, 2]) if resume == "drain" else 1
            ranks.append(Rank(machine.name, blocks, resume, after_s, think_s, window))
        if not any(rank.blocks for rank in ranks):
            first = ranks[0]
            ranks[:] = [replace(first, blocks=1)]
        return tuple(ranks)

    def _hesitation(self) -> float:
        return round(self.dice.choice([0.0, 0.0, 0.1, 1.0, 10.0, 40.0]) * self.dice.random() * self.pace, 3)

    # Faults

    def rain(self, for_s: float) -> list[Event]:
        """In some plans every link loses and repeats a little all the time."""
        dice = self.dice
        if dice.random() < 0.6:
            return []
        lose, repeat, late_s = dice.choice([0.0, 0.05, 0.2]), dice.choice([0.0, 0.1]), dice.choice([0.0, 0.02, 0.5])
        names = [machine.name for machine in self.machines]
        return [Disturb(0.0, for_s, a, b, lose, repeat, late_s) for a in names for b in names if a != b]

    def fault(self, room: Open) -> Event:
        """Something that goes wrong around a room, mostly there, mostly while it lives."""
        kinds: list[Callable[[float, Open], Event]] = [
            self._disturb,
            self._disturb,
            self._part,
            self._break,
            self._break,
            self._break,
            self._crash,
            self._freeze,
            self._slow,
            self._quiet,
            self._abort,
            self._abort,
            self._abort,
            self._clear,
        ]
        at_s = room.at_s + self.dice.choice([1.0, 5.0, 20.0, BURST_S]) * self.dice.random()
        return self.dice.choice(kinds)(round(at_s, 3), room)

    def _lasts(self, most_s: float = 30.0) -> float:
        return round(self.dice.choice([0.3, 2.0, 8.0, most_s]) * self.dice.uniform(0.3, 1.0), 3)

    def _two(self, room: Open) -> tuple[str, str]:
        """Two machines, mostly in the direction in which a room's data goes or its answers come."""
        if self.dice.random() < 0.2:
            source, dest = self.dice.sample([machine.name for machine in self.machines], 2)
            return source, dest
        sender, receiver = room.sender, self.dice.choice(room.ranks).host
        return (sender, receiver) if self.dice.random() < 0.7 else (receiver, sender)

    def _one(self, room: Open) -> str:
        return self.dice.choice([room.sender, *(rank.host for rank in room.ranks)])

    def _disturb(self, at_s: float, room: Open) -> Event:
        dice = self.dice
        lose, repeat = (round(dice.choice([0.0, 0.1, 0.5, 0.9]) * dice.random(), 3) for _ in range(2))
        return Disturb(at_s, self._lasts(), *self._two(room), lose, repeat, dice.choice([0.0, 0.05, 1.0, 10.0]))

    def _part(self, at_s: float, room: Open) -> Event:
        plane = self.dice.choice(["control", "data", "both"])
        return Part(at_s, self._lasts(), *self._two(room), both_ways=self.dice.random() < 0.5, plane=plane)

    def _break(self, at_s: float, room: Open) -> Event:
        late = self.dice.choice([0.0, 0.5, 1.0])
        place = (room.sender, self.dice.choice(room.ranks).host)
        transport, port = self.dice.choice(self.transports), self.dice.random() < 0.2
        how = self.dice.choice(["", "reads", "hang", "collateral"])
        broken = Break(at_s, self._lasts(), *place, transport, late, port)
        return replace(broken, **{how: True}) if how else broken

    def _crash(self, at_s: float, room: Open) -> Event:
        return Crash(at_s, self._lasts(60.0), self._one(room), bye=self.dice.random() < 0.3)

    def _freeze(self, at_s: float, room: Open) -> Event:
        return Freeze(at_s, self._lasts(60.0), self._one(room))

    def _slow(self, at_s: float, room: Open) -> Event:
        return Slow(at_s, self._lasts(60.0), self._one(room), self.dice.choice([10.0, 100.0, 1000.0]))

    def _quiet(self, at_s: float, room: Open) -> Event:
        return Quiet(at_s, round(self.dice.uniform(20, 400), 3), self._one(room))

    def _abort(self, at_s: float, room: Open) -> Event:
        return Abort(at_s, self._one(room), room.room)

    def _clear(self, at_s: float, room: Open) -> Event:
        return Clear(at_s, self._one(room), room.room)
