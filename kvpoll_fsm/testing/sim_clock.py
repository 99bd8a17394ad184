"""Virtual time: what happens when, and what happened."""

from __future__ import annotations

import hashlib
import heapq
from collections import deque
from collections.abc import Callable

__all__ = ["ANSWER", "CHECK", "PACKET", "TIMER", "Clock"]

PACKET, ANSWER, TIMER, CHECK = range(4)
"""What comes first of what happens at the same moment, as in one turn of the driver's loop."""
REMEMBERED = 25


class Clock:
    """Virtual seconds, and a heap of what is to happen.

    Attributes:
        now: Seconds since the beginning.
        steps: Things that happened.
        recent: The last of them, as lines.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.steps = 0
        self.recent: deque[str] = deque(maxlen=REMEMBERED)
        self._heap: list[tuple[float, int, int, Callable[[], None]]] = []
        self._pushed = 0
        self._digest = hashlib.blake2b(digest_size=16)

    def at(self, when: float, order: int, action: Callable[[], None]) -> None:
        """Let something happen at a moment, which is not before now."""
        self._pushed += 1
        heapq.heappush(self._heap, (max(when, self.now), order, self._pushed, action))

    def after(self, seconds: float, order: int, action: Callable[[], None]) -> None:
        """Let something happen in a while."""
        self.at(self.now + seconds, order, action)

    def step(self) -> bool:
        """The next thing happens; returns whether there was one."""
        if not self._heap:
            return False
        self.now, _, _, action = heapq.heappop(self._heap)
        self.steps += 1
        action()
        return True

    def log(self, line: str) -> None:
        """Note what happened."""
        line = f"{self.now:.6f} {line}"
        self.recent.append(line)
        self._digest.update(line.encode() + b"\n")

    @property
    def digest(self) -> str:
        """Names everything that was noted, and when."""
        return self._digest.hexdigest()
