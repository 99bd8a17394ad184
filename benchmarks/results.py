"""What was measured, round by round; every figure is taken from here."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Results", "Series", "percentile"]


def percentile(values: list[float], percent: float) -> float:
    """The smallest value that `percent` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


@dataclass
class Series:
    """One thing measured again and again.

    Attributes:
        rounds: Its values by round: seconds of one transfer, or of one call.
        nbytes: Bytes of one transfer, 0 for a call.
        cpu_s: Processor seconds of both ends over all transfers.
        moved_nbytes: Bytes over all transfers.
    """

    rounds: dict[int, list[float]] = field(default_factory=dict)
    nbytes: int = 0
    cpu_s: float = 0.0
    moved_nbytes: int = 0

    def add(self, round_: int, values: list[float]) -> None:
        """Values of a round."""
        self.rounds.setdefault(round_, []).extend(values)

    @property
    def values(self) -> list[float]:
        """Of all rounds."""
        return [value for values in self.rounds.values() for value in values]

    @property
    def median_s(self) -> float:
        """Median of the rounds' medians: a round that was disturbed as a whole counts once."""
        return statistics.median(map(statistics.median, self.rounds.values()))

    @property
    def gb_per_s(self) -> float:
        """At the median."""
        return self.nbytes / self.median_s / 1e9

    @property
    def cpu_s_per_gb(self) -> float | None:
        """Both ends together."""
        return self.cpu_s / self.moved_nbytes * 1e9 if self.moved_nbytes else None

    def faster_than(self, other: Series) -> float | None:
        """How many times: the median over rounds both took part in; None if there is none."""
        common = self.rounds.keys() & other.rounds.keys()
        if not common:
            return None
        return statistics.median(
            statistics.median(other.rounds[round_]) / statistics.median(self.rounds[round_]) for round_ in common
        )

    def as_json(self) -> dict[str, Any]:
        """Everything about it."""
        values = self.values
        known: dict[str, Any] = {
            "samples": len(values),
            "median_s": self.median_s,
            "p50_s": percentile(values, 50),
            "p99_s": percentile(values, 99),
            "round_medians_s": [statistics.median(each) for each in self.rounds.values()],
        }
        if self.nbytes:
            known |= {"nbytes": self.nbytes, "gb_per_s": self.gb_per_s, "cpu_s_per_gb": self.cpu_s_per_gb}
        return known


@dataclass
class Results:
    """Everything one run has found out.

    Attributes:
        plane: Transfers, by (peer, case, "alone" or "busy").
        calls: Calls and small rooms, by name.
        numbers: Single figures, by name.
        memory: Resident bytes of both ends of a peer, without the payload.
        missing: Why a peer or a figure is not there, by its name.
        settings: How each peer was set up, by its name: settings, checksum, where the loop ran.
        machine: Where and when.
    """

    plane: dict[tuple[str, str, str], Series] = field(default_factory=dict)
    calls: dict[str, Series] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    settings: dict[str, dict[str, str]] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    def call(self, name: str) -> Series:
        """The series of that name, made if need be."""
        return self.calls.setdefault(name, Series())

    def as_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        plane = [
            {"peer": peer, "case": case, "loop": loop, **series.as_json()}
            for (peer, case, loop), series in self.plane.items()
        ]
        calls = {name: series.as_json() for name, series in self.calls.items()}
        return {
            "machine": self.machine,
            "peers": self.settings,
            "memory_nbytes": self.memory,
            "data_plane": plane,
            "calls": calls,
            "numbers": self.numbers,
            "missing": self.missing,
        }
