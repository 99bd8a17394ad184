"""Counts who was turned away and why, and logs it without letting a flood fill the log."""

from __future__ import annotations

import logging
import threading

__all__ = ["Refusals"]


class Refusals:
    """Counts by reason; for any thread.

    Reasons are ours and few. What a stranger can choose goes into the detail, which is logged and not kept.

    Args:
        plane: What the log calls it: "control", or a transport's name.
        log: Where it is logged: the 1st, 2nd, 4th, 8th, ... refusal for the same reason.
    """

    def __init__(self, plane: str, log: logging.Logger) -> None:
        self._plane = plane
        self._log = log
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}

    def add(self, reason: str, detail: str = "", level: int = logging.WARNING) -> None:
        """Count one."""
        with self._lock:
            count = self._counts[reason] = self._counts.get(reason, 0) + 1
        if count & (count - 1) == 0:
            self._log.log(level, "refused plane=%s count=%d reason=%s %s", self._plane, count, reason, detail)

    def follow(self, counts: dict[str, int]) -> None:
        """Take over counts that are kept elsewhere and only grow; each that has grown is one line in the log."""
        with self._lock:
            grown = [(reason, count) for reason, count in counts.items() if count != self._counts.get(reason)]
            self._counts.update(grown)
        for reason, count in grown:
            self._log.warning("refused plane=%s count=%d reason=%s", self._plane, count, reason)

    def counts(self) -> dict[str, int]:
        """How many, by reason."""
        with self._lock:
            return dict(self._counts)

    def count(self, reason: str) -> int:
        """How many for this reason."""
        with self._lock:
            return self._counts.get(reason, 0)
