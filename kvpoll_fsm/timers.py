"""Many timers on one monotonic clock: a heap with lazy deletion."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable

from msgspec import Struct

__all__ = ["Timers"]


class _Timer(Struct, order=True, gc=False):
    """One in the heap.

    Attributes:
        serial: Settles ties.
        name: Empty once it was cancelled, replaced or fired.
        other: The next of the same owner, which has few: a list of them would take more than they do.
    """

    due_s: float
    serial: int
    owner: Hashable
    name: str
    epoch: int
    other: _Timer | None = None


class Timers:
    """Timers by owner and name; setting one again replaces it. No owner is a name.

    Args:
        clock: Seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._serial = 0
        self._heap: list[_Timer] = []
        self._of: dict[Hashable, _Timer] = {}  # those without an owner, who may be many, by name

    def __len__(self) -> int:
        return sum(bool(timer.name) for timer in self._heap)

    def set(self, name: str, after_s: float, epoch: int = 0, owner: Hashable = None) -> None:
        """Fire `name` with `epoch` after `after_s` seconds."""
        self.cancel(name, owner)
        self._serial += 1
        place = name if owner is None else owner
        timer = _Timer(self._clock() + after_s, self._serial, owner, name, epoch, self._of.get(place))
        self._of[place] = timer
        heapq.heappush(self._heap, timer)

    def cancel(self, name: str, owner: Hashable = None) -> None:
        """Forget a timer; unknown ones are ignored."""
        place = name if owner is None else owner
        before, timer = None, self._of.get(place)
        while timer is not None and timer.name != name:
            before, timer = timer, timer.other
        if timer is None:
            return
        if before is not None:
            before.other = timer.other
        elif timer.other is not None:
            self._of[place] = timer.other
        else:
            del self._of[place]
        timer.name, timer.owner, timer.other = "", None, None
        if len(self._heap) > max(64, 8 * len(self._of)):
            self._heap = [each for each in self._heap if each.name]
            heapq.heapify(self._heap)

    def left_s(self, name: str, owner: Hashable = None) -> float | None:
        """Seconds until a timer is due, or None if it is not set."""
        timer = self._of.get(name if owner is None else owner)
        while timer is not None and timer.name != name:
            timer = timer.other
        return None if timer is None else max(0.0, timer.due_s - self._clock())

    def next_in_s(self) -> float | None:
        """Seconds until the next timer is due (0 if one is), or None without timers."""
        while self._heap and not self._heap[0].name:
            heapq.heappop(self._heap)
        return max(0.0, self._heap[0].due_s - self._clock()) if self._heap else None

    def due(self) -> list[tuple[Hashable, str, int]]:
        """The timers that are due, in order, each removed: (owner, name, epoch)."""
        now = self._clock()
        fired: list[tuple[Hashable, str, int]] = []
        while self._heap and self._heap[0].due_s <= now:
            timer = heapq.heappop(self._heap)
            if timer.name:
                fired.append((timer.owner, timer.name, timer.epoch))
                self.cancel(timer.name, timer.owner)
        return fired
