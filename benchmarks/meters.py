"""What a process and its children have used: processor time and memory."""

from __future__ import annotations

import contextlib
import resource
import time
from pathlib import Path

__all__ = ["cpu_s", "memory_nbytes"]

_SCHED = 2


def cpu_s() -> float:
    """Processor seconds of this process, its living descendants, and the children it has waited for."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + sum(map(_clock_s, _descendants("self")))


def memory_nbytes() -> int:
    """Resident memory of this process and its descendants; shared pages count once, divided among those who map them.

    Source: proc(5), Pss in smaps_rollup.
    """
    return sum(_pss(pid) for pid in ("self", *_descendants("self")))


def _clock_s(pid: str) -> float:
    # clock_getcpuclockid(3) as glibc computes it: exact where /proc/PID/stat counts in steps of 10 ms.
    with contextlib.suppress(OSError):
        return time.clock_gettime((~int(pid) << 3) | _SCHED)
    return 0.0


def _descendants(pid: str) -> list[str]:
    found: list[str] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                found += [child, *_descendants(child)]
    return found


def _pss(pid: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return 0
