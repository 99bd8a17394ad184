"""Endpoints whose drivers are in processes of their own, and what can be done to those processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvpoll_fsm import Deadlines, Endpoint
from kvpoll_fsm.deadlines import Gate
from kvpoll_fsm.handles import Room
from kvpoll_fsm.mover.client import ProcessEngine
from tests.helpers import BRISK, endpoint, pair, until

__all__ = ["BIG_TOKENS", "away", "children", "engine", "frozen", "kill", "moved", "moved_pair", "pid", "state", "worth"]

BIG_TOKENS = 100_000
"""Rooms of this many tokens have 2 MB: their results do not travel inline, and take several parts."""
LOSABLE = Deadlines(heartbeat_s=0.1, peer_lost_s=2.0)


def moved(transports: str = "tcp", **settings: Any) -> Endpoint:
    """An endpoint with a mover."""
    return endpoint(transports, **{"isolation": "process", "deadlines": BRISK, **settings})


@contextmanager
def moved_pair(transports: str = "tcp", **settings: Any) -> Iterator[tuple[Endpoint, Endpoint]]:
    """A sending and a receiving endpoint, each with a mover."""
    with pair(transports, **{"isolation": "process", "deadlines": BRISK, **settings}) as ends:
        yield ends


def engine(end: Endpoint) -> ProcessEngine:
    found = end.engine
    assert isinstance(found, ProcessEngine)
    return found


def pid(end: Endpoint) -> int:
    """The mover's; waits for it where it is being replaced."""
    until(lambda: engine(end).mover is not None, "a mover")
    mover = engine(end).mover
    assert mover is not None
    return mover.pid


def kill(end: Endpoint) -> int:
    """End the mover without a word, and wait for the next one; returns its pid."""
    old = pid(end)
    os.kill(old, signal.SIGKILL)
    until(lambda: away(old), "the mover's end")
    until(lambda: end.address.port and pid(end) != old, "another mover")
    return pid(end)


def state(process: int) -> str:
    """A letter, as in proc(5); nothing if there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def away(process: int) -> bool:
    """There is no such process, or only its exit status, for nobody has asked for it."""
    return state(process) in ("", "Z")


@contextmanager
def frozen(process: int) -> Iterator[None]:
    """A process stopped in all of its threads."""
    os.kill(process, signal.SIGSTOP)
    tasks = Path(f"/proc/{process}/task")
    try:
        until(lambda: all((t / "stat").read_text().rpartition(")")[2].split()[0] == "T" for t in tasks.iterdir()))
        yield
    finally:
        if not away(process):
            os.kill(process, signal.SIGCONT)


def at(handle: Room, gate: Gate) -> bool:
    return handle.gate is gate


def children() -> set[int]:
    """This process's, those that have ended and were not waited for included."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        found |= set(map(int, (task / "children").read_text().split()))
    return found


def worth(process: int = 0) -> dict[str, int]:
    """What a process holds that could leak: descriptors and mapped memfds by what they are."""
    proc = Path(f"/proc/{process or 'self'}")
    counts: dict[str, int] = {}
    for fd in (proc / "fd").iterdir():
        try:
            kind = os.readlink(fd).split(":")[0]
        except FileNotFoundError:
            continue
        counts[kind] = counts.get(kind, 0) + 1
    counts["mapped"] = (proc / "maps").read_text().count("memfd:kvpoll")
    return counts
