"""Endpoints with movers, as a host sees them."""

from __future__ import annotations

import gc
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvpoll_fsm import Endpoint, Gate, KVPoll
from tests.helpers import PATIENT, SOON_S, make_data, open_pair, pool, run_script, same, transfer, until
from tests.mover.movers import BIG_TOKENS, engine, frozen, moved, moved_pair, pid, worth

W, T, S = KVPoll.WaitingForInput, KVPoll.Transferring, KVPoll.Success


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_every_room_goes_through_every_state(transport: str) -> None:
    """However fast it is over."""
    with moved_pair(transport) as (tx, rx):
        for room in range(200):
            sender, receiver = open_pair(tx, rx, room, tokens=16)
            sender.send(make_data(17 + room % 16, seed=room))
            assert receiver.wait(SOON_S) is sender.wait(SOON_S) is S
            assert sender.history == receiver.history == (KVPoll.Bootstrapping, W, T, S)
            assert [part.tokens for part in receiver.parts] == [16, 1 + room % 16]


def test_poll_asks_nobody() -> None:
    """With every lock of the engine held by another thread, and the mover stopped, it answers."""
    with moved_pair() as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        until(lambda: receiver.poll() is sender.poll() is W)
        held, go_on = threading.Event(), threading.Event()
        lock, flushing = engine(rx)._lock, engine(rx).mover.pipe._flushing  # type: ignore[union-attr]

        def hold() -> None:
            with lock, flushing:
                held.set()
                go_on.wait(SOON_S)

        holder = threading.Thread(target=hold)
        with frozen(pid(rx)):
            holder.start()
            assert held.wait(SOON_S)
            assert [receiver.poll() for _ in range(1000)] == [W] * 1000
            assert receiver.gate is Gate.queued
            assert not go_on.is_set()
            go_on.set()
            holder.join()


@pytest.mark.slow
def test_a_stopped_mover_does_not_stop_its_host() -> None:
    """Calls about rooms do not wait, and all that was asked happens in the end."""
    with moved_pair(deadlines=PATIENT) as (tx, rx):
        with frozen(pid(tx)), frozen(pid(rx)):
            rooms = [open_pair(tx, rx, room) for room in range(1000)]
            for sender, _ in rooms:
                sender.send(make_data(8))
            assert {receiver.poll() for _, receiver in rooms} == {KVPoll.Bootstrapping}
        for sender, receiver in rooms:
            assert receiver.wait(3 * SOON_S) is S, receiver.failure
            assert sender.wait(SOON_S) is S


# Results


@pytest.mark.slow
def test_results_share_the_movers_memory_and_are_used_again() -> None:
    with _roomy() as (tx, rx):
        places = set()
        for room in range(8):
            data = make_data(BIG_TOKENS, seed=room)
            sender, receiver = open_pair(tx, rx, room, tokens=512)
            sender.send(data)
            got = receiver.result(3 * SOON_S)
            assert same(got, data)
            first = got["embeddings"].__array_interface__["data"][0]
            assert _mapped_name(first).startswith("/memfd:kvpoll")
            assert receiver.result(0)["embeddings"].__array_interface__["data"][0] == first
            places.add(first)
            sender.clear()
            receiver.clear()
            del got, receiver
            gc.collect()
        assert len(places) <= 2


@contextmanager
def _roomy() -> Iterator[tuple[Endpoint, Endpoint]]:
    """Two ends with pools of their own that take a grant of 512 tokens."""
    with moved("shm", pool=pool(64)) as tx, moved("shm", pool=pool(64)) as rx:
        yield tx, rx


def _mapped_name(address: int) -> str:
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        if low <= address < high:
            return line.split(maxsplit=5)[5] if len(line.split()) > 5 else ""
    return ""


def test_results_are_the_hosts_own_and_outlive_the_endpoint() -> None:
    data = make_data(BIG_TOKENS)
    with _roomy() as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1, tokens=512)
        sender.send(data)
        got = receiver.result(3 * SOON_S)
        assert got["fill_ids"].flags.writeable
    del tx, rx, sender, receiver
    gc.collect()
    assert same(got, data)
    got["fill_ids"][:] = 7
    assert not same(got, data)


KEEPS_MANY = """
import resource
from tests.helpers import make_data, open_pair, pool, same, SOON_S
from tests.mover.movers import moved, pid, worth
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 4096))
with moved("shm", pool=pool(256)) as tx, moved("shm", pool=pool(256)) as rx:
    kept = []
    data = make_data(2000)
    for first in range(0, 1000, 50):
        rooms = [open_pair(tx, rx, room, tokens=512) for room in range(first, first + 50)]
        for sender, _ in rooms:
            sender.send(data)
        for sender, receiver in rooms:
            kept.append(receiver.result(30))
            sender.clear()
            receiver.clear()
    assert all(same(got, data) for got in kept)
    held = worth()
    print(len(kept), held["mapped"] >= 1000, sum(n for kind, n in held.items() if kind != "mapped") < 150)
    del kept, rooms, receiver
    sender = tx.sender(5000)
    receiver = rx.receiver(5000, peer=tx.address, tokens=512)
    sender.send(data)
    assert same(receiver.result(30), data)
"""


@pytest.mark.slow
def test_a_host_may_keep_a_thousand_results() -> None:
    """With no more descriptors than before."""
    done = run_script(KEEPS_MANY, timeout_s=55)
    assert (done.returncode, done.stdout) == (0, "1000 True True\n"), done.stderr


@pytest.mark.slow
def test_memory_of_results_goes_back_once_their_arrays_are_gone() -> None:
    with moved_pair("shm") as (tx, rx):
        transfer(tx, rx, 1, tokens=100)
        before = worth()["mapped"]
        kept = [_received(tx, rx, room) for room in range(2, 8)]
        assert worth()["mapped"] >= before + 6
        kept.clear()
        gc.collect()
        for room in range(10, 16):  # found again, not taken anew
            transfer(tx, rx, room, tokens=30_000)
        assert worth()["mapped"] <= before + 7


def _received(tx: Endpoint, rx: Endpoint, room: int) -> dict[str, Any]:
    sender, receiver = open_pair(tx, rx, room, tokens=512)
    sender.send(make_data(30_000))
    try:
        return receiver.result(SOON_S)
    finally:
        sender.clear()
        receiver.clear()


@pytest.mark.slow
def test_many_results_at_once() -> None:
    """More than the kernel passes descriptors in one message."""
    with _roomy() as (tx, rx):
        rooms = [open_pair(tx, rx, room, tokens=32) for room in range(400)]
        data = make_data(1700)
        for sender, _ in rooms:
            sender.send(data)
        for _, receiver in rooms:
            assert same(receiver.result(5 * SOON_S), data)


# Settings


def test_a_mover_may_stand_back_and_stay_on_some_processors() -> None:
    [cpu, *_] = sorted(os.sched_getaffinity(0))
    with moved(mover_nice=7, mover_cpus=[cpu]) as tx:
        assert os.getpriority(os.PRIO_PROCESS, pid(tx)) == 7
        assert os.sched_getaffinity(pid(tx)) == {cpu}
        for thread in Path(f"/proc/{pid(tx)}/task").iterdir():
            assert os.sched_getaffinity(int(thread.name)) == {cpu}


@pytest.mark.slow
def test_the_kernels_numbers_say_who_moves() -> None:
    """The host's processor time does not grow with the bytes."""
    with _roomy() as (tx, rx):
        transfer(tx, rx, 1)
        movers = [_ticks(pid(end)) for end in (tx, rx)]
        sender, receiver = open_pair(tx, rx, 2, tokens=512)
        sender.send(make_data(BIG_TOKENS * 10))
        assert receiver.wait(5 * SOON_S) is S
        assert [_ticks(pid(end)) > before for end, before in zip((tx, rx), movers, strict=True)] == [True, True]


def _ticks(process: int) -> int:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_any_text_can_be_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "kvpoll_fsm")  # a line with such a tag cannot be handed to the main process
    with moved_pair() as (tx, rx):
        odd = tx.sender(1, tag="\ud800")
        plain, receiver = open_pair(tx, rx, 2)
        plain.send(make_data(40))
        assert receiver.wait(SOON_S) is S
        odd.abort("\udfff")
        assert odd.wait(SOON_S) is KVPoll.Failed
        assert odd.failure is not None
        assert odd.failure.detail == "?"


# Staging by the host


def test_where_the_mover_cannot_read_the_host_the_host_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvpoll_fsm.mover import keeper

    monkeypatch.setattr(keeper, "address_of", lambda buffer: 8)  # the challenge fails
    with _roomy() as (tx, rx):
        for room, tokens in enumerate([1, 16, 100, 40_000]):
            transfer(tx, rx, room, tokens=tokens)


UNDUMPABLE = """
import ctypes, logging
logging.basicConfig(level=logging.INFO, format="%(message)s")
assert ctypes.CDLL(None).prctl(4, 0, 0, 0, 0) == 0
from tests.helpers import pool, transfer
from tests.mover.movers import moved
with moved("tcp", pool=pool(64)) as tx, moved("tcp", pool=pool(64)) as rx:
    transfer(tx, rx, 1, tokens=40_000)
    print("fine")
"""


def test_a_host_that_may_not_be_read_stages_by_itself() -> None:
    done = run_script(UNDUMPABLE)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr
    if os.geteuid() != 0:  # root reads what it likes
        assert "the mover cannot read this process's memory" in done.stderr


# Starts that fail


CANNOT_START = """
import gc, sys
from tests.mover.movers import children, moved, worth

def show(**settings):
    gc.collect()
    before, real, sys.executable = worth(), sys.executable, settings.pop("python", sys.executable)
    try:
        moved(**settings).start()
    except Exception as error:
        print(type(error).__name__, str(error).partition(";")[0])
    sys.executable = real
    gc.collect()
    assert worth() == before, settings
    assert not children()

moved().start().close()
show(python="/nowhere/python")
show(python="")
show(python="/bin/true")
show(transports="nixl")
show(transport_options={"tcp": {"x": object}})
show(transport_options={"tcp": {"x": 1}})
show(mover_cpus=[4000])
import socket
with socket.create_server(("127.0.0.1", 0)) as taken:
    show(listen=f"tcp://127.0.0.1:{taken.getsockname()[1]}")
"""


def test_a_mover_that_cannot_start_says_so_and_leaves_nothing() -> None:
    done = run_script(CANNOT_START)
    assert done.returncode == 0, done.stderr
    starts = [
        "MoverUnavailable no mover: /nowhere/python cannot be started",
        "MoverUnavailable no mover: sys.executable does not say which Python to start",
        "MoverUnavailable no mover: it ended before it served: exit status 0",
        "TransportUnavailable transport 'nixl': ",
        "InvalidInput ",
        "InvalidInput transport_options: 'tcp': ",
        "InvalidInput mover_cpus",
        "AddressError ",
    ]
    lines = done.stdout.splitlines()
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts, lines
