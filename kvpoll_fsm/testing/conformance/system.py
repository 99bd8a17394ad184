"""What the system knows of processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

__all__ = ["members", "offspring", "states"]


def offspring() -> set[int]:
    """The child processes of this one, also those that have ended and were not waited for."""
    return {pid for pid, _ in _processes(lambda parent, group: parent == os.getpid())}


def members(group: int) -> set[int]:
    """The processes of a group that have not ended."""
    return {pid for pid, state in _processes(lambda parent, of: of == group) if state not in "ZX"}


def states(group: int) -> list[str]:
    """In which states the processes of a group are, as in /proc: T is stopped."""
    return [state for _, state in _processes(lambda parent, of: of == group)]


def _processes(wanted: Callable[[int, int], bool]) -> Iterable[tuple[int, str]]:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, group, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if wanted(int(parent), int(group)):
            yield int(entry.name), state
