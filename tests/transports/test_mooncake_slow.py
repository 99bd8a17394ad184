"""Mooncake's faults in their own time, with the deadlines that users have, and rooms that go on meanwhile."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from kvpoll_fsm import BlockPool, Deadlines, Endpoint, Field, KVPoll, Layout
from kvpoll_fsm.spi import Done, Range, Write
from kvpoll_fsm.testing.conformance.sides import CANARY, HUGE, MIB, SIZES, Pair, Side, until
from kvpoll_mooncake import MooncakeTransport
from tests.transports import mooncake_raw as raw

pytestmark = [raw.needs_mooncake, pytest.mark.slow, pytest.mark.timeout(180)]

LAYOUT = Layout(block_tokens=128, fields=[Field("x", "float32", (1024,))])
TOKENS = 4096
"""A part of 16 MiB."""
MOST_S = 2.0
"""How much longer a room may take because of somebody else's trouble."""


# Rooms


def processes_below(pid: int) -> list[int]:
    """A process and all that come from it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += processes_below(int(child))
    return found


class Party:
    """An endpoint in a process of its own, which can be frozen with all that belongs to it."""

    def __init__(self, **settings: object) -> None:
        how = {"transports": "require:mooncake", "isolation": "process", "arrays": "numpy", **settings}
        self.endpoint = Endpoint(pool=BlockPool(LAYOUT, blocks=256), **how).start()  # type: ignore[arg-type]
        self._frozen: list[int] = []

    def freeze(self) -> None:
        mover = self.endpoint.engine.mover  # type: ignore[attr-defined]
        self._frozen = processes_below(mover.pid)
        for pid in self._frozen:
            raw.stop(pid)

    def thaw(self) -> None:
        for pid in self._frozen:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def close(self) -> None:
        self.thaw()
        self.endpoint.close()


@contextmanager
def parties(count: int, **settings: object) -> Iterator[list[Party]]:
    made: list[Party] = []
    try:
        for _ in range(count):
            made.append(Party(**settings))
        yield made
    finally:
        for party in made:
            party.close()


DATA = {"x": np.arange(TOKENS * 1024, dtype=np.float32).reshape(TOKENS, 1024)}


def transfer_s(tx: Party, rx: Party, room: int) -> float:
    """How long a room takes from its opening until its data are there."""
    started = time.monotonic()
    sender = tx.endpoint.sender(room, required_ranks=1)
    sender.send(DATA)
    data = rx.endpoint.receiver(room, peer=str(tx.endpoint.address), tokens=TOKENS).result(timeout=60)
    took_s = time.monotonic() - started
    assert np.array_equal(data["x"], DATA["x"])
    assert sender.wait(60) is KVPoll.Success
    return took_s


@pytest.mark.parametrize("when", ["before contact", "after contact"])
def test_rooms_of_others_do_not_wait_for_a_peer_that_is_frozen(when: str) -> None:
    """Mooncake itself would keep them all waiting, for 61 s."""
    with parties(3, deadlines=Deadlines(stall_s=8.0, bootstrap_s=10.0, peer_lost_s=60.0)) as (tx, hung, other):
        usual_s = max(transfer_s(tx, other, room) for room in range(3))
        if when == "after contact":
            transfer_s(tx, hung, 10)
        victims = [tx.endpoint.sender(20 + n, required_ranks=1) for n in range(4)]
        for victim in victims:
            victim.send(DATA)
        receivers = [hung.endpoint.receiver(20 + n, peer=str(tx.endpoint.address), tokens=TOKENS) for n in range(4)]
        hung.freeze()
        ends_s, room, slowest_s = time.monotonic() + 90, 100, 0.0
        while not all(victim.poll() in (KVPoll.Failed, KVPoll.Success) for victim in victims):
            assert time.monotonic() < ends_s, "the frozen peer's rooms do not end"
            slowest_s = max(slowest_s, transfer_s(tx, other, room))
            room += 1
        assert slowest_s < usual_s + MOST_S
        assert room > 103
        for victim in victims:
            assert victim.poll() is KVPoll.Success or victim.failure is not None
        assert any(victim.poll() is KVPoll.Failed for victim in victims)
        hung.thaw()
        for receiver in receivers:
            assert receiver.wait(60) in (KVPoll.Failed, KVPoll.Success)
        assert transfer_s(tx, other, 9_000) < usual_s + MOST_S


def test_engines_are_killed_under_200_rooms_and_none_is_lost() -> None:
    """Whatever dies, what was to be moved is moved: again over Mooncake, or over tcp."""
    rng = random.Random(5)
    with parties(2, transports="prefer:mooncake,tcp") as (tx, rx):
        senders, receivers = [], []
        for room in range(200):
            sender = tx.endpoint.sender(room, required_ranks=1)
            sender.send({"x": DATA["x"][:1024]})
            senders.append(sender)
            receivers.append(rx.endpoint.receiver(room, peer=str(tx.endpoint.address), tokens=512))
        struck = 0
        while not all(sender.poll() in (KVPoll.Failed, KVPoll.Success) for sender in senders):
            ends = [party.endpoint.engine.mover.pid for party in (tx, rx)]  # type: ignore[attr-defined]
            engines = [pid for end in ends for pid in processes_below(end)[1:]]
            if engines and struck < 20:
                with suppress(ProcessLookupError):
                    os.kill(rng.choice(engines), signal.SIGKILL)
                struck += 1
            time.sleep(0.1)
        assert struck > 2
        assert [sender.failure for sender in senders if sender.poll() is KVPoll.Failed] == []
        for receiver in receivers:
            assert np.array_equal(receiver.result(timeout=60)["x"], DATA["x"][:1024])


# Tickets


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair(Side(MooncakeTransport(), filled=True, within_s=60), Side(MooncakeTransport(), within_s=60))
    yield pair
    pair.close()


def test_what_a_frozen_engine_had_in_hand_never_lands_in_memory_that_was_given_on(pair: Pair) -> None:
    """It goes on after 40 s, with 4 MB in hand: it was killed before that memory was given to anybody."""
    link = pair.tx.connect(pair.rx)
    token = pair.rx.grant()
    pair.done(link.submit([Write(1, 0, 0, 100)], token))
    pid = raw.receiving_pid(pair.rx)
    ticket = link.submit(HUGE, token)
    pair.until(lambda: pair.rx.arenas[0][0] == pair.tx.arenas[0][0], "the first byte")
    raw.stop(pid)
    number = pair.rx.transport.fence(token)
    pair.until(lambda: number in pair.rx.fenced, "the fence")
    pair.rx.arenas[0][:] = CANARY * SIZES[0]
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    ends = pair.ended(ticket)
    assert isinstance(ends[0], Done) or ends[0].quiescent
    ends_s = time.monotonic() + 40
    pair.until(lambda: time.monotonic() > ends_s, "40 s to pass")
    assert pair.rx.arenas[0][:] == CANARY * SIZES[0]


def test_a_source_is_not_read_after_its_ticket_has_ended(pair: Pair) -> None:
    """By itself Mooncake reads most of it later, when it holds something else: here, all of it is overwritten."""
    link = pair.tx.connect(pair.rx)
    token = pair.rx.grant()
    pair.done(link.submit([Write(1, 0, 0, 100)], token))
    pid = raw.receiving_pid(pair.rx)
    raw.stop(pid)
    tickets = [link.submit([Write(0, n * MIB, n * MIB, MIB)], token) for n in range(5)]
    for end in pair.ended(*tickets):
        assert isinstance(end, Done) or end.source_free
    pair.tx.arenas[0][:] = CANARY * SIZES[0]
    os.kill(pid, signal.SIGCONT)
    ends_s = time.monotonic() + 10
    pair.until(lambda: time.monotonic() > ends_s, "10 s to pass")
    assert CANARY * 4096 not in pair.rx.arenas[0][:]


def test_a_hundred_fences_in_the_middle_of_writes(pair: Pair) -> None:
    link = pair.tx.connect(pair.rx)
    for number in range(100):
        token, other = pair.rx.grant(Range(0, 0, SIZES[0])), pair.rx.grant(Range(1, 0, SIZES[1]))
        tickets = [link.submit(HUGE, token) for _ in range(2)]
        survivor = link.submit([Write(1, 0, 0, 50_000)], other)
        pair.pump()
        pair.fence(token)
        pair.rx.arenas[0][:] = CANARY * SIZES[0]
        pair.ended(*tickets, survivor)
        assert pair.rx.arenas[0][:] == CANARY * SIZES[0], number
    assert False not in pair.tx.links[link.number]


# Other ways for engines to find each other


@contextmanager
def server(*command: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("kind", ["http", "etcd"])
def test_engines_find_each_other_through_a_server(kind: str, tmp_path: Path) -> None:
    port, other = raw.free_port(), raw.free_port()
    if kind == "http":
        command = [sys.executable, "-m", "mooncake.http_metadata_server", "--host", "127.0.0.1", "--port", str(port)]
        metadata = f"http://me:hunter2@127.0.0.1:{port}/metadata"
    else:
        where = ["--listen-client-urls", f"http://127.0.0.1:{port}", "--advertise-client-urls"]
        peers = ["--listen-peer-urls", f"http://127.0.0.1:{other}", "--data-dir", str(tmp_path / "etcd")]
        command = ["etcd", *where, f"http://127.0.0.1:{port}", *peers]
        metadata = f"etcd://127.0.0.1:{port}"
    try:
        context = server(*command, folder=tmp_path)
        with context:
            until(lambda: raw.listens(port), "the server")
            _exchange(metadata)
    except FileNotFoundError:
        pytest.skip("etcd is not installed: apt-get install etcd-server")


def _exchange(metadata: str) -> None:
    """A write, a fence in the middle of others, and a write through the next engine."""
    sides = [Side(MooncakeTransport(metadata=metadata), filled=filled, within_s=60) for filled in (True, False)]
    assert not [side for side in sides if b"hunter2" in side.transport.descriptor()]
    pair = Pair(*sides)
    link = pair.tx.connect(pair.rx)
    token = pair.rx.grant()
    pair.done(link.submit([Write(0, 1, 2, 100_000)], token))
    assert pair.rx.arenas[0][2:100_002] == pair.tx.arenas[0][1:100_001]
    tickets = [link.submit(HUGE, token) for _ in range(4)]
    pair.until(lambda: pair.rx.arenas[0][0] == pair.tx.arenas[0][0], "the first byte")
    pair.fence(token)
    pair.ended(*tickets)
    pair.done(link.submit([Write(1, 0, 0, 1000)], pair.rx.grant()))
    pair.close()
