"""Many timers on one monotonic clock: a heap with lazy deletion."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable

__all__ = ["Timers"]

_Entry = tuple[float, int, Hashable, int]
"""When it is due, its number, which settles ties, its name and its epoch."""


class Timers:
    """Timers by name; setting one again replaces it.

    Args:
        clock: Seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._serial = 0
        self._heap: list[_Entry] = []
        self._current: dict[Hashable, _Entry] = {}

    def __len__(self) -> int:
        return len(self._current)

    def set(self, name: Hashable, after_s: float, epoch: int = 0) -> None:
        """Fire `name` with `epoch` after `after_s` seconds."""
        self._serial += 1
        entry = self._current[name] = (self._clock() + after_s, self._serial, name, epoch)
        heapq.heappush(self._heap, entry)
        self._shrink()

    def cancel(self, name: Hashable) -> None:
        """Forget a timer; unknown ones are ignored."""
        self._current.pop(name, None)
        self._shrink()

    def left_s(self, name: Hashable) -> float | None:
        """Seconds until a timer is due, or None if it is not set."""
        entry = self._current.get(name)
        return None if entry is None else max(0.0, entry[0] - self._clock())

    def next_in_s(self) -> float | None:
        """Seconds until the next timer is due (0 if one is), or None without timers."""
        while self._heap and not self._live(self._heap[0]):
            heapq.heappop(self._heap)
        return max(0.0, self._heap[0][0] - self._clock()) if self._heap else None

    def due(self) -> list[tuple[Hashable, int]]:
        """The timers that are due, in order, each removed: (name, epoch)."""
        now = self._clock()
        fired: list[tuple[Hashable, int]] = []
        while self._heap and self._heap[0][0] <= now:
            entry = heapq.heappop(self._heap)
            if self._live(entry):
                del self._current[entry[2]]
                fired.append(entry[2:])
        return fired

    def _shrink(self) -> None:
        if len(self._heap) > 64 and len(self._heap) > 4 * len(self._current):
            self._heap = [entry for entry in self._heap if self._live(entry)]
            heapq.heapify(self._heap)

    def _live(self, entry: _Entry) -> bool:
        return self._current.get(entry[2]) is entry
