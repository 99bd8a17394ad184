"""What the tests of the edge share: a small layout, data for it, endpoints, and bounded waiting."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvpoll_fsm import BlockPool, Deadlines, Endpoint, Failure, Field, KVPoll, Layout, Receiver, Sender
from kvpoll_fsm.handles import Room
from kvpoll_memory import Faults

ISOLATION = "KVPOLL_TEST_ISOLATION"
"""Where `endpoint()` runs its driver: "thread" or "process". Of the environment, so that workers have it too."""

BLOCK_TOKENS = 16
FIELDS = [
    Field("embeddings", "bfloat16", (8,)),
    Field("fill_ids", "int32"),
    Field("aux", "int64", (4,), per_room=True),
]
LAYOUT = Layout(BLOCK_TOKENS, FIELDS)
TOKEN_NBYTES, ROOM_NBYTES = 8 * 2 + 4, 4 * 8
TRANSPORTS = ("memory", "tcp", "shm")
ANY_SOURCE = ("memory", "tcp")
"""Those that send from any memory, an engine's own arrays too."""
SOON_S = 20.0
"""Longest wait for what should happen at once: on a busy machine nothing does."""

PATIENT = Deadlines()
BRISK = Deadlines(heartbeat_s=0.05, peer_lost_s=5.0)
"""Frequent heartbeats, no short deadline."""

Data = dict[str, Any]


def make_data(tokens: int, seed: int = 0) -> Data:
    """Random bits for every field of `FIELDS`."""
    random = np.random.default_rng((tokens, seed))
    return {
        "embeddings": random.integers(0, 1 << 16, (tokens, 8), np.uint16),
        "fill_ids": random.integers(-(1 << 31), 1 << 31, tokens, np.int32),
        "aux": random.integers(-(1 << 63), 1 << 63, 4, np.int64, endpoint=False),
    }


def bits(array: Any) -> bytes:
    """An array's or tensor's bytes."""
    if isinstance(array, np.ndarray):
        return array.tobytes()
    return bytes(array.contiguous().view(sys.modules["torch"].uint8).numpy().tobytes())


def same(got: Data, sent: Data) -> bool:
    """Whether two rooms' data agree bit for bit, shapes included."""
    return list(got) == list(sent) and all(
        tuple(got[name].shape) == tuple(sent[name].shape) and bits(got[name]) == bits(sent[name]) for name in sent
    )


def pool(blocks: int = 64, layout: Layout = LAYOUT) -> BlockPool:
    return BlockPool(layout, blocks=blocks)


def adopted(blocks: int, layout: Layout = LAYOUT) -> tuple[BlockPool, Data]:
    """A pool of arrays of the engine's own, and those arrays."""
    size = layout.block_tokens
    arrays: Data = {
        "embeddings": np.zeros((blocks, size, 8), np.uint16),
        "fill_ids": np.zeros((blocks, size), np.int32),
        "aux": np.zeros((blocks, 4), np.int64),
    }
    return BlockPool.adopt(layout, arrays), arrays


def in_process() -> bool:
    """Endpoints are to run their drivers in processes of their own."""
    return os.environ.get(ISOLATION) == "process"


def endpoint(transports: str | None = None, **settings: Any) -> Endpoint:
    """An endpoint that is not started; results are numpy arrays whatever other tests have imported.

    Without `transports` it is the first that works where the driver is to run. What can be tested in a thread alone
    is skipped in the other isolation.
    """
    settings.setdefault("pool", pool())
    settings.setdefault("arrays", "numpy")
    transports = transports or ("shm" if in_process() else "memory")
    if in_process() and settings.get("isolation") != "thread":
        if "memory" in transports or "memory" in settings.get("transport_options", {}):
            pytest.skip("the memory transport works in one process")
        if not settings["pool"].managed:
            pytest.skip("memory of the engine's own is moved by a thread")
    settings.setdefault("isolation", "process" if in_process() else "thread")
    return Endpoint(transports=transports, **settings)


@contextmanager
def pair(
    transports: str | None = None,
    *,
    faults: Faults | None = None,
    tx: dict[str, Any] | None = None,
    rx: dict[str, Any] | None = None,
    **both: Any,
) -> Iterator[tuple[Endpoint, Endpoint]]:
    """A sending and a receiving endpoint, started; `faults` are the sender's."""
    ours = {**both, **(tx or {})}
    if faults is not None:
        options = {**ours.get("transport_options", {}).get("memory", {}), "faults": faults}
        ours["transport_options"] = {**ours.get("transport_options", {}), "memory": options}
    with endpoint(transports, **ours) as sending, endpoint(transports, **{**both, **(rx or {})}) as receiving:
        yield sending, receiving


def open_pair(
    tx: Endpoint, rx: Endpoint, room: int, *, tokens: int | None = 64, ranks: int = 1, **receiver: Any
) -> tuple[Sender, Receiver]:
    """A sender and its receiver, rank 0."""
    sender = tx.sender(room, required_ranks=ranks)
    return sender, rx.receiver(room, peer=str(tx.address), tokens=tokens, ranks=ranks, **receiver)


def transfer(tx: Endpoint, rx: Endpoint, room: int, tokens: int = 100, **receiver: Any) -> None:
    """Show that a room works from start to end, and drop it."""
    data = make_data(tokens, seed=room)
    sender, receiving = open_pair(tx, rx, room, **receiver)
    sender.send(data)
    assert same(receiving.result(timeout=SOON_S), data)
    assert sender.wait(SOON_S) is KVPoll.Success
    assert sender.wait_quiescent(SOON_S)
    sender.clear()
    receiving.clear()
    until(lambda: forgotten(tx, room) and forgotten(rx, room), f"room {room} is forgotten")


def forgotten(endpoint: Endpoint, room: int) -> bool:
    """Nothing is left of a room."""
    return all(entry["room"] != room for entry in endpoint.dump())


def until(condition: Callable[[], object], what: str = "", within_s: float = SOON_S) -> None:
    """Wait for something to become true; it is an error if it does not."""
    ends_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < ends_s, f"not within {within_s:g} s: {what or condition}"
        time.sleep(0.001)


def failed(handle: Room) -> Failure:
    """Wait for a room to end Failed; returns why."""
    assert handle.wait(SOON_S) is KVPoll.Failed, f"{handle!r} at {handle.gate}"
    assert handle.failure is not None
    return handle.failure


def deadlines(**seconds: float) -> Deadlines:
    """`BRISK`, but for these."""
    return replace(BRISK, **seconds)


def parked(endpoint: Endpoint) -> int:
    """Reservations at this endpoint that wait for a sender to open their room."""
    return len(endpoint.driver.core.parking)


def on_driver(endpoint: Endpoint, function: Callable[[], Any]) -> Any:
    """Run on the driver's thread and return what it returns."""
    return endpoint.driver.call(function).result(SOON_S)


@contextmanager
def driver_stopped(endpoint: Endpoint) -> Iterator[None]:
    """Keep the driver's thread busy, as a hung native call would."""
    reached, go_on = threading.Event(), threading.Event()

    def hang() -> None:
        reached.set()
        go_on.wait(SOON_S)

    endpoint.driver.post(hang)
    assert reached.wait(SOON_S)
    try:
        yield
    finally:
        go_on.set()


def open_fds() -> set[str]:
    """This process's open files, by what they are; those of one number may change meanwhile."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        except FileNotFoundError:
            continue
    return found


def run_script(
    script: str, *args: str, timeout_s: float = 30.0, measured: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a Python script in a process of its own; warnings are errors there too.

    `measured`: count its lines when coverage is measured, which imports modules of its own.
    """
    command = [sys.executable, "-W", "error", "-W", "ignore:.*fork.*:DeprecationWarning", "-c", script, *args]
    env = {name: value for name, value in os.environ.items() if measured or not name.startswith("COVERAGE_")}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, env=env)
