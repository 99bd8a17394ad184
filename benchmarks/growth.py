"""What open rooms cost: memory, the driver's idle time, and one turn of its loop, from 10 rooms to 100,000.

The rooms are senders' that wait for their receivers: what a busy engine has most of.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator

from benchmarks import meters
from benchmarks.results import Results
from kvpoll_fsm import BlockPool, Deadlines, Endpoint, Field, Layout

__all__ = ["measure"]

IDLE_S = 1.0
TURNS = 200
DAY_S = 86_400.0


def measure(results: Results, rooms: tuple[int, ...]) -> Iterator[None]:
    """Open more and more rooms; `rooms` are the steps."""
    pool = BlockPool(Layout(block_tokens=1, fields=[Field("x", "uint8", (64,))]), blocks=4)
    deadlines = Deadlines(bootstrap_s=DAY_S, room_timeout_s=DAY_S)
    with Endpoint(pool=pool, transports="tcp", deadlines=deadlines) as endpoint:
        endpoint.load()
        handles = [endpoint.sender(0, required_ranks=1)]
        gc.collect()
        empty_nbytes = meters.memory_nbytes()
        for step in rooms:
            started_s, before = time.perf_counter(), len(handles)
            handles += [endpoint.sender(room, required_ranks=1) for room in range(before, step)]
            endpoint.load()  # an answer comes after all that was asked for before
            opening_s = (time.perf_counter() - started_s) / max(1, step - before)
            results.numbers[f"opening a room, {step} rooms"] = opening_s
            _tick(results, endpoint, step)
            gc.collect()
            results.numbers[f"bytes per room, {step} rooms"] = (meters.memory_nbytes() - empty_nbytes) / step
            yield


def _tick(results: Results, endpoint: Endpoint, rooms: int) -> None:
    """The driver left alone, and asked questions."""
    cpu_s = meters.cpu_s()
    time.sleep(IDLE_S)
    results.numbers[f"idle processor share, {rooms} rooms"] = (meters.cpu_s() - cpu_s) / IDLE_S
    turns = []
    for _ in range(TURNS):
        started_s = time.perf_counter()
        endpoint.load()
        turns.append(time.perf_counter() - started_s)
    results.numbers[f"turn of the driver, {rooms} rooms"] = statistics.median(turns)
