"""Rooms over Mooncake whose engines are killed: they end well by another transport, and Mooncake comes back."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from kvpoll_fsm import BlockPool, Deadlines, Endpoint, Field, KVPoll, Layout, Sender
from tests.helpers import SOON_S, until
from tests.transports.mooncake_raw import needs_mooncake

pytestmark = needs_mooncake

LAYOUT = Layout(block_tokens=128, fields=[Field("x", "float32", (4096,))])
BLOCKS = 32
TOKENS = BLOCKS * 128
"""One part of 64 MiB."""
DEADLINES = Deadlines(breaker_s=2.0, breaker_max_s=4.0)
LIVE = [KVPoll.Bootstrapping, KVPoll.WaitingForInput]


@contextmanager
def endpoint(isolation: str) -> Iterator[tuple[Endpoint, set[int]]]:
    """One endpoint, and the processes of the engines that it starts with."""
    before, pool = engines(), BlockPool(LAYOUT, blocks=BLOCKS)
    how = {"transports": "prefer:mooncake,tcp", "isolation": isolation, "deadlines": DEADLINES, "arrays": "numpy"}
    with Endpoint(pool=pool, **how) as started:
        yield started, engines() - before


def engines() -> set[int]:
    """The processes of Mooncake engines below this one."""
    parents: dict[int, int] = {}
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if b"kvpoll_mooncake.child" in (process / "cmdline").read_bytes():
                found.add(int(process.name))
        except OSError:  # it has ended meanwhile
            continue
    return {pid for pid in found if os.getpid() in _ancestors(pid, parents)}


def _ancestors(pid: int, parents: dict[int, int]) -> list[int]:
    above = []
    while pid in parents:
        pid = parents[pid]
        above.append(pid)
    return above


def transfer(tx: Endpoint, rx: Endpoint, room: int, tokens: int = 1) -> Sender:
    """A room from start to end, which must be Success with every byte."""
    data = {"x": np.full((tokens, 4096), room, np.float32)}
    sender = tx.sender(room)
    receiver = rx.receiver(room, peer=str(tx.address), tokens=TOKENS)
    sender.send(data)
    assert np.array_equal(receiver.result(SOON_S)["x"], data["x"])
    assert sender.wait(SOON_S) is KVPoll.Success
    receiver.clear()
    return sender


def carrier(sender: Sender) -> str:
    (part,) = sender.parts
    return part.transport


def kill_in_the_middle(tx: Endpoint, rx: Endpoint, victim: int, room: int) -> Sender:
    """Kill an engine when the first bytes of 64 MiB have landed, and not the last."""
    data = {"x": np.random.default_rng(room).random((TOKENS, 4096), np.float32)}
    sender = tx.sender(room)
    receiver = rx.receiver(room, peer=str(tx.address), tokens=TOKENS)
    sender.send(data)
    until(lambda: sender.bytes_done > 0)
    os.kill(victim, signal.SIGKILL)
    assert sender.bytes_done < TOKENS * 4096 * 4
    assert np.array_equal(receiver.result(SOON_S)["x"], data["x"])
    assert sender.wait(SOON_S) is KVPoll.Success
    assert receiver.history == sender.history == (*LIVE, KVPoll.Success)
    receiver.clear()
    return sender


@pytest.mark.parametrize(
    ("victim", "isolation"),
    [
        ("sends", "process"),
        ("receives", "thread"),
        pytest.param("sends", "thread", marks=pytest.mark.slow),
        pytest.param("receives", "process", marks=pytest.mark.slow),
    ],
)
def test_pain_10_an_engine_is_killed_in_the_middle_of_a_part(victim: str, isolation: str) -> None:
    with endpoint(isolation) as (tx, of_tx), endpoint(isolation) as (rx, receives):
        assert carrier(transfer(tx, rx, 1)) == "mooncake"
        sends = engines() - of_tx - receives
        (pid,) = sends if victim == "sends" else receives
        struck = kill_in_the_middle(tx, rx, pid, 2)
        assert carrier(struck) == "tcp"
        assert "mooncake to rank 0: " in struck.parts[0].passed_over
        assert tx.load().free == rx.load().free == BLOCKS
        assert carrier(transfer(tx, rx, 3)) == "tcp", "the next room does not run into it again"
        rooms = itertools.count(4)
        until(lambda: carrier(transfer(tx, rx, next(rooms))) == "mooncake", "one part tries it when the time is over")
