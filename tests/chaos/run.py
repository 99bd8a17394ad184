"""Rooms between real processes on three hosts of a network of our own, under random faults.

    python -m tests.chaos.run --rooms 1000 --seed 7 --json

Exit status 1 if anything was found that must not be; see docs/chaos.md.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from typing import Any

from tests.chaos.conduct import Conductor
from tests.chaos.plan import Plan
from tests.faults.relay import missing

__all__ = ["grown", "run"]

CALM_ROOMS_PER_S = 10.0
GROWTH_NBYTES = 16 << 20
"""How much more memory a program may have at the end than after the warm-up."""


def run(seed: int, rooms: int, rooms_per_s: float, calm_rooms: int = 60) -> dict[str, Any]:
    """Perform a run; returns its summary."""
    conductor, started_s = Conductor(Plan(seed)), time.monotonic()
    seconds: dict[str, float] = {}
    resident: dict[str, list[int]] = {}
    first = 0
    try:
        conductor.start()
        for phase, number, per_s in (
            ("warm-up", calm_rooms, CALM_ROOMS_PER_S),
            ("faults", rooms, rooms_per_s),
            ("healthy", calm_rooms, CALM_ROOMS_PER_S),
        ):
            conductor.perform(phase, range(first, first + number), per_s, faults=phase == "faults")
            conductor.settle()
            first += number
            seconds[phase] = round(time.monotonic() - started_s - sum(seconds.values()), 1)
            for program, nbytes in conductor.memory().items():
                resident.setdefault(program, []).append(nbytes)
    finally:
        conductor.end()
    return {
        "seed": seed,
        "rooms": {"warm-up": calm_rooms, "faults": rooms, "healthy": calm_rooms},
        "seconds": {**seconds, "all": round(time.monotonic() - started_s, 1)},
        "faults": dict(conductor.faults.most_common()),
        "ends": _by_phase(conductor.ends),
        "resident_nbytes": resident,
        "violations": conductor.violations + grown(resident),
    }


def grown(resident: dict[str, list[int]]) -> list[str]:
    """Which programs have more memory at the end than after the warm-up, and more than allowed."""
    return [
        f"{program} grew from {first} to {last} resident bytes"
        for program, (first, *_, last) in resident.items()
        if last > first + GROWTH_NBYTES
    ]


def _by_phase(ends: Counter[tuple[str, str, str]]) -> dict[str, dict[str, int]]:
    phases: dict[str, dict[str, int]] = {}
    for (phase, side, end), number in sorted(ends.items(), key=lambda item: (item[0][:2], -item[1])):
        phases.setdefault(f"{phase}, {side}s", {})[end] = number
    return phases


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rooms", type=int, default=1000, help="rooms under faults (default 1000)")
    parser.add_argument("--rate", type=float, default=6.0, help="rooms opened in a second (default 6)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31), help="default: a random one")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a page")
    options = parser.parse_args()
    problem = missing()
    if problem:
        print(problem, file=sys.stderr)
        return 2
    print(f"seed {options.seed}", file=sys.stderr, flush=True)
    summary = run(options.seed, options.rooms, options.rate)
    print(json.dumps(summary) if options.json else _page(summary))
    return 1 if summary["violations"] else 0


def _page(summary: dict[str, Any]) -> str:
    """The summary for people."""
    lines = [f"seed {summary['seed']}"]
    for name in ("rooms", "seconds", "faults"):
        lines.append(f"{name}: " + ", ".join(f"{key} {value}" for key, value in summary[name].items()))
    for phase, ends in summary["ends"].items():
        lines.append(f"{phase}: " + ", ".join(f"{end} {number}" for end, number in ends.items()))
    for program, sizes in summary["resident_nbytes"].items():
        lines.append(f"resident MB of {program} after each phase: " + ", ".join(f"{size / 1e6:.1f}" for size in sizes))
    lines.append(f"violations: {len(summary['violations'])}")
    return "\n".join([*lines, *summary["violations"]])


if __name__ == "__main__":
    sys.exit(main())
