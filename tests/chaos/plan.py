"""What a run is to do, all of it drawn from the seed: endpoints, rooms, faults. Nothing in here acts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from tests.faults.namespaces import NETWORK

__all__ = [
    "DEADLINES",
    "HOSTS",
    "RECEIVERS",
    "SENDERS",
    "SURVIVORS",
    "TCP",
    "Fault",
    "Plan",
    "Rank",
    "RoomPlan",
    "Step",
]

HOSTS = 3
SENDERS, RECEIVERS = ("s0", "s1", "s2"), ("r0", "r1", "r2")
"""Programs; the digit is the host they run on."""
SURVIVORS = ("s0", "r0")
"""Never killed, so that their memory can be compared; all else befalls them too."""
DEADLINES = {
    "heartbeat_s": 0.2,
    "peer_lost_s": 1.2,
    "bootstrap_s": 3.0,
    "input_s": 6.0,
    "stall_s": 1.5,
    "resume_s": 3.0,
    "room_timeout_s": 12.0,
    "withdraw_s": 0.2,
    "quarantine_max_s": 3.0,
    "linger_s": 1.0,
}
TCP = {"connect_s": 1.0, "handshake_s": 1.0, "cancel_patience_s": 0.5, "dead_peer_s": 2.0}
BETWEEN_S = 0.6
"""From fault to fault, on the average."""
LAYOUTS = 2
ENGINE_BLOCKS = 4096
"""An engine has blocks for all its rooms at a time."""
MAX_LIVES = 3
"""How often one room number is opened."""
CONTROL_PORT, DATA_PORT = 6000, 7000
DTYPES = ("bfloat16", "float16", "float32", "float64", "int8", "int32", "uint8")
WIDTHS = (1, 7, 16, 33, 64)


@dataclass(frozen=True)
class Rank:
    """One receiver rank of a room: the program it runs in, the size of its grants, how it resumes."""

    program: str
    tokens: int
    resume: str


@dataclass(frozen=True)
class Step:
    """What a host does to a room, so long after its start: open it, supply data, abort or clear it."""

    after_s: float
    do: str
    side: str
    rank: int = 0


@dataclass(frozen=True)
class RoomPlan:
    """One life of a room: who takes part, how much it carries, and what its hosts do.

    Attributes:
        again: If its sender fails, the room is opened once more.
    """

    number: int
    life: int
    layout: int
    sender: str
    ranks: tuple[Rank, ...]
    told_ranks: bool
    tokens: int
    steps: tuple[Step, ...]
    again: bool


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong at a time, and for how long.

    Attributes:
        at_s: Seconds after the first fault of the run could come.
        kind: kill, leave, stop, weather or unplug.
        what: The kind in more words, for the summary.
        target: A program, or (from host, to host) for weather, or a host.
        for_s: How long until it is over.
        weather: What changes; see `relay.Weather`.
    """

    at_s: float
    kind: str
    what: str
    target: Any
    for_s: float
    weather: dict[str, Any]


class Plan:
    """Everything that is drawn, by seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        dice = self._dice("layouts")
        self.layouts = [self._layout(dice) for _ in range(LAYOUTS)]

    def endpoints(self, program: str) -> list[dict[str, Any]]:
        """The endpoints of a program: one per layout; receivers have one more of an engine's own blocks."""
        dice, host = self._dice(f"endpoints {program}"), int(program[1])
        made = []
        for number, (layout, adopt) in enumerate(((0, False), (1, False), (0, True))[: 2 if program in SENDERS else 3]):
            port = number + (0 if program in SENDERS else 10)
            made.append(
                {
                    "name": f"engine{layout}" if adopt else str(layout),
                    "fields": self.layouts[layout],
                    "block_tokens": dice.choice((4, 8, 16)),
                    "blocks": ENGINE_BLOCKS if adopt else dice.randint(16, 40),
                    "adopt": adopt,
                    "host": f"{NETWORK}{host + 1}",
                    "port": CONTROL_PORT + port,
                    "data_port": DATA_PORT + port,
                }
            )
        return made

    def address(self, sender: str, layout: int) -> str:
        """The control address of a sender."""
        return f"tcp://{NETWORK}{int(sender[1]) + 1}:{CONTROL_PORT + layout}"

    def room(self, number: int, *, calm: bool, life: int = 0) -> RoomPlan:
        """A room by its number; a calm one is aborted, cleared or left waiting by nobody.

        Later lives of a room have the data of the first; where its ranks are, and what its hosts do, is drawn anew.
        """
        dice = self._dice(f"room {number}")
        layout, sender = dice.randrange(LAYOUTS), dice.choice(SENDERS)
        count = dice.choice((1, 1, 1, 2, 2, 4))
        tokens = dice.randint(1, dice.choice((1, 64, 300, 300, 1500)))
        dice = self._dice(f"room {number} life {life}")
        ranks = tuple(self._rank(dice, layout) for _ in range(count))
        steps = [Step(dice.uniform(0, 0.1), "open", "sender"), Step(dice.uniform(0.1, 0.5), "supply", "sender")]
        steps += [Step(dice.uniform(0, 0.2), "open", "receiver", rank) for rank in range(len(ranks))]
        if not calm:
            steps = self._disturbed(dice, steps)
        told, again = dice.random() < 0.7, not calm and life < MAX_LIVES - 1 and dice.random() < 0.7
        return RoomPlan(number, life, layout, sender, ranks, told, tokens, tuple(steps), again)

    def faults(self) -> Iterator[Fault]:
        """Faults without an end, in order of time."""
        dice, at_s = self._dice("faults"), 0.0
        while True:
            at_s += dice.expovariate(1 / BETWEEN_S)
            kind = dice.choices(list(_KINDS), [weight for _, weight in _KINDS.values()])[0]
            yield _KINDS[kind][0](dice, at_s, kind)

    def _dice(self, what: str) -> random.Random:
        return random.Random(f"{self.seed} {what}")

    def _layout(self, dice: random.Random) -> list[dict[str, Any]]:
        """Fields of random dtypes and widths; up to 512 bytes per token, and some that exist once per room."""
        fields = [{"name": "a", "dtype": dice.choice(DTYPES), "shape": [dice.choice(WIDTHS)], "per_room": False}]
        if dice.random() < 0.7:
            fields.append({"name": "b", "dtype": dice.choice(DTYPES), "shape": [], "per_room": False})
        if dice.random() < 0.7:
            fields.append({"name": "c", "dtype": "int64", "shape": [dice.choice(WIDTHS)], "per_room": True})
        return fields

    def _rank(self, dice: random.Random, layout: int) -> Rank:
        """A grant of at most a quarter of the pool: all ranks of a room may come to one endpoint."""
        program, modes = dice.choice(RECEIVERS), ("drain", "extend", "manual")[: 3 - layout]
        endpoint = self.endpoints(program)[layout]
        most = endpoint["blocks"] // 4 * endpoint["block_tokens"]
        return Rank(program, dice.randint(most // 8 + 1, most), dice.choice(modes))

    def _disturbed(self, dice: random.Random, steps: list[Step]) -> list[Step]:
        """Aborts and clears at any moment; now and then a rank that never comes, or data that never does."""
        chance, victim = dice.random(), dice.choice([step for step in steps if step.do == "open"])
        moment = dice.choice((dice.uniform(0.2, 0.5), dice.uniform(0.2, 1.5)))
        if chance < 0.10:
            steps.append(Step(moment, "abort", victim.side, victim.rank))
        elif chance < 0.20:
            steps.append(Step(moment, "clear", victim.side, victim.rank))
        elif chance < 0.23:
            steps.remove(victim)
        elif chance < 0.25:
            steps = [step for step in steps if step.do != "supply"]
        return steps


# How each kind of fault is drawn


def _program(dice: random.Random) -> str:
    return dice.choice(SENDERS + RECEIVERS)


def _victim(dice: random.Random) -> str:
    return dice.choice([name for name in SENDERS + RECEIVERS if name not in SURVIVORS])


def _kill(dice: random.Random, at_s: float, what: str) -> Fault:
    return Fault(at_s, "kill", what, _victim(dice), dice.choice((0.0, dice.uniform(0.1, 2.0))), {})


def _leave(dice: random.Random, at_s: float, what: str) -> Fault:
    return Fault(at_s, "leave", what, _victim(dice), 0.0, {})


def _stop(low_s: float, high_s: float) -> Any:
    def draw(dice: random.Random, at_s: float, what: str) -> Fault:
        return Fault(at_s, "stop", what, _program(dice), dice.uniform(low_s, high_s), {})

    return draw


def _cut(low_s: float, high_s: float, ways: int) -> Any:
    def draw(dice: random.Random, at_s: float, what: str) -> Fault:
        return Fault(at_s, "weather", what, _ways(dice, ways), dice.uniform(low_s, high_s), {"cut": True})

    return draw


def _rain(dice: random.Random, at_s: float, what: str) -> Fault:
    weather = {
        "loss": dice.uniform(0.0, 0.1),
        "duplicate": dice.uniform(0.0, 0.05),
        "delay_s": dice.uniform(0.0, 0.04),
        "jitter_s": dice.uniform(0.0, 0.02),
        "rate_nbytes_s": dice.choice((0.0, 300_000.0, 2_000_000.0)),
    }
    return Fault(at_s, "weather", what, _ways(dice, 2), dice.uniform(1.0, 4.0), weather)


def _blocked(dice: random.Random, at_s: float, what: str) -> Fault:
    ports = frozenset(range(DATA_PORT, DATA_PORT + 20))
    return Fault(at_s, "weather", what, _ways(dice, 2), dice.uniform(0.5, 3.0), {"blocked_ports": ports})


def _hole(dice: random.Random, at_s: float, what: str) -> Fault:
    weather = {"largest_nbytes": dice.choice((600, 1000, 1400))}
    return Fault(at_s, "weather", what, _ways(dice, 1), dice.uniform(0.5, 3.0), weather)


def _unplug(dice: random.Random, at_s: float, what: str) -> Fault:
    return Fault(at_s, "unplug", what, dice.randrange(HOSTS), dice.choice((0.3, dice.uniform(1.5, 3.0))), {})


def _ways(dice: random.Random, ways: int) -> tuple[tuple[int, int], ...]:
    a, b = dice.choice(list(permutations(range(HOSTS), 2)))
    return ((a, b), (b, a))[:ways]


_KINDS: dict[str, tuple[Any, float]] = {
    "killed": (_kill, 3.0),
    "closed in order": (_leave, 1.0),
    "stopped for a moment": (_stop(0.05, 0.6), 2.0),
    "stopped for long": (_stop(1.5, 2.5), 1.0),
    "cut for a moment": (_cut(0.05, 0.5, 2), 2.0),
    "cut for long": (_cut(1.5, 3.0, 2), 1.0),
    "cut one way": (_cut(0.3, 2.5, 1), 1.0),
    "loss, delay, reordering, repeats": (_rain, 3.0),
    "data ports blocked": (_blocked, 1.0),
    "MTU black hole": (_hole, 1.0),
    "host unplugged": (_unplug, 0.7),
}
