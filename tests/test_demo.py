"""What the command line's demo is made of, and how it takes what goes wrong."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from kvpoll_fsm import InvalidInput, PolicyError, TransportUnavailable, demo
from kvpoll_fsm.arrays import empty
from kvpoll_fsm.demos import crew, plan
from kvpoll_fsm.demos.crew import Worker
from kvpoll_fsm.demos.data import STEP_NBYTES, Arrays, allocate, fill, hash_into
from kvpoll_fsm.demos.lines import Lines, Message, encode
from kvpoll_fsm.demos.plan import DTYPES, Plan, available_nbytes, require_transport
from kvpoll_fsm.demos.report import Account, Report, same_hashes
from kvpoll_fsm.demos.screen import Screen, print_report
from kvpoll_fsm.layout import Field, Layout

SMALL = Plan(tokens=2000, hidden=8)
LONG = Plan(tokens=50_000, blocks=1, block_tokens=1, hidden=4)
SUCCESS = ["Bootstrapping", "WaitingForInput", "Transferring", "Success"]
LIMIT_S = 40.0


# Plans


def test_the_defaults_take_two_parts() -> None:
    assert Plan().grant_tokens == 1024
    assert Plan().parts == 2
    assert Plan().room_nbytes == 2000 * (3584 * 2 + 4) + 16 * 8
    assert Plan(rooms=3).room_numbers == range(42, 45)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"tokens": 0}, "tokens=0: give an integer from 1"),
        ({"tokens": True}, "tokens=True"),
        ({"blocks": 65_537}, "blocks=65537"),
        ({"dtype": "bool"}, "dtype='bool': choose one of bfloat16"),
        ({"resume": "manual"}, "resume='manual': choose one of drain, extend"),
        ({"transport": "a,b"}, "require takes exactly one"),
    ],
)
def test_a_plan_that_cannot_work(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint):
        Plan(**values)


def test_pools_hold_a_reservation_per_room_at_once() -> None:
    fitted = Plan(rooms=200).fitted(1 << 40)
    assert fitted.at_once == plan.MOST_AT_ONCE
    assert fitted.sender_blocks == fitted.receiver_blocks == plan.MOST_AT_ONCE * 8


def test_rooms_that_extend_get_a_reservation_per_part() -> None:
    fitted = Plan(tokens=5000, resume="extend").fitted(1 << 40)
    assert (fitted.sender_blocks, fitted.receiver_blocks) == (8, 40)


def test_less_memory_means_fewer_rooms_at_once() -> None:
    wide = Plan(tokens=100_000, rooms=200, ranks=2)
    memory_nbytes = 16 << 30
    fitted = wide.fitted(memory_nbytes)
    assert 1 < fitted.at_once < plan.MOST_AT_ONCE
    assert fitted.nbytes_at_once <= memory_nbytes // 2


def test_a_room_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"one room takes 1\.4 GB .* where 1\.1 GB are free"):
        Plan(tokens=100_000).fitted(1 << 30)


def test_available_memory_is_what_the_kernel_says(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:       7 kB\n")
    assert available_nbytes(meminfo) == 7 << 10
    assert available_nbytes() > 0


@pytest.mark.parametrize("text", ["", "MemTotal: 9 kB\n", "MemAvailable:\n", "MemAvailable: much\n", None])
def test_available_memory_that_nobody_says(tmp_path: Path, text: str | None) -> None:
    meminfo = tmp_path / "meminfo"
    if text is not None:
        meminfo.write_text(text)
    assert available_nbytes(meminfo) == 8 << 30


def test_one_transport_of_a_policy_must_be_installed() -> None:
    require_transport("prefer:nosuch,tcp")
    with pytest.raises(TransportUnavailable, match="'nosuch': is not installed"):
        require_transport("prefer:nosuch,neither")
    with pytest.raises(PolicyError):
        require_transport("fastest:tcp")


# Data


def made(layout: Layout, tokens: int, room: int) -> Arrays:
    arrays = allocate(layout, tokens)
    assert all(step is None for step in fill(layout, arrays, room))
    return arrays


def hashed(arrays: Arrays) -> dict[str, str]:
    hashes: dict[str, str] = {}
    assert all(step is None for step in hash_into(hashes, arrays))
    return hashes


def test_data_depends_on_the_room_alone() -> None:
    first, again, other = (made(SMALL.layout, 100, room) for room in (42, 42, 43))
    assert hashed(first) == hashed(again)
    assert all(hashed(first)[name] != hashed(other)[name] for name in first)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floats_are_finite(dtype: str) -> None:
    values = made(Plan(dtype=dtype, hidden=64).layout, 1000, 42)["embeddings"]
    assert values.dtype == dtype
    assert np.abs(values).max() < 2
    assert len(np.unique(values)) > 10_000


@pytest.mark.parametrize(("dtype", "infinity"), [("bfloat16", 0x7F80), ("float8_e5m2", 0x7C)])
def test_raw_floats_are_finite(dtype: str, infinity: int) -> None:
    bits = made(Plan(dtype=dtype, hidden=64).layout, 1000, 42)["embeddings"]
    assert not ((bits & infinity) == infinity).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_can_be_made(dtype: str) -> None:
    arrays = made(Plan(dtype=dtype, hidden=3).layout, 5, 42)
    assert arrays["embeddings"].shape == (5, 3)
    assert arrays["aux"].shape == (16,)


def test_a_hash_is_that_of_all_bytes() -> None:
    field = Field("long", "uint8", (1,))
    array = empty(field, 2 * STEP_NBYTES + 3, "numpy")
    array[:] = np.arange(len(array)).reshape(-1, 1) % 251
    assert hashed({"long": array}) == {"long": hashlib.sha256(array.tobytes()).hexdigest()}


# Lines


def test_lines_are_put_together() -> None:
    sent = [{"event": "a"}, {"event": "b", "text": "line\nend"}]
    stream = b"".join(map(encode, sent))
    lines, taken = Lines(), []
    for at in range(len(stream)):
        taken += lines.feed(stream[at : at + 1])
    assert taken == sent
    assert Lines().feed(stream) == sent


# Comparing


def finished(data: Arrays, other: Arrays) -> Report:
    """The report of a room that ended in Success, with these arrays at the sender and at the receiver."""
    report = Report(SMALL)
    room = report.rooms[42]
    room.sender = Account(SUCCESS, [], hashed(data), sent_s=1.0, over=True)
    room.receivers[0] = Account(SUCCESS, [], hashed(other), ended_s=3.0, over=True)
    return report


def test_equal_bytes_are_ok() -> None:
    data = made(SMALL.layout, SMALL.tokens, 42)
    report = finished(data, made(SMALL.layout, SMALL.tokens, 42))
    assert report.ok
    assert report.problems() == []
    assert report.rooms[42].seconds == report.seconds == 2.0
    assert report.rooms[42].gb_per_s == SMALL.room_nbytes / 1e9 / 2.0


@pytest.mark.parametrize("name", ["embeddings", "fill_ids", "aux"])
def test_one_flipped_bit_is_not(name: str) -> None:
    data = made(SMALL.layout, SMALL.tokens, 42)
    other = made(SMALL.layout, SMALL.tokens, 42)
    other[name].reshape(-1).view(np.uint8)[-1] ^= 1
    report = finished(data, other)
    assert not report.ok
    assert report.problems() == ["room 42, receiver 0: its SHA-256 differ from the sender's"]
    document = report.as_json()
    assert document["ok"] is False
    assert document["rooms"][0]["receivers"][0]["sha256_equal"] is False
    assert "DIFFERENT" in shown(report)


def test_hashes_that_are_missing_are_not_equal() -> None:
    assert same_hashes(["a", "b"], {"a": "1", "b": "2"}, {"b": "2", "a": "1"})
    assert not same_hashes(["a"], {}, {})
    assert not same_hashes(["a", "b"], {"a": "1"}, {"a": "1"})
    assert not same_hashes(["a"], {"a": "1"}, {"a": "1", "b": "2"})


@pytest.mark.parametrize("rooms", [1, 20])
def test_hashes_that_are_missing_are_shown_as_such(rooms: int) -> None:
    report = Report(Plan(rooms=rooms))
    report.rooms[42].sender.sha256 = {"embeddings": "ab", "fill_ids": "cd", "aux": "ef"}
    report.rooms[42].receivers[0].sha256 = {"embeddings": "ab", "fill_ids": "cd", "aux": "ef"}
    sound = shown(report)
    report.rooms[42].receivers[0].sha256 = {}
    assert shown(report).count("incomplete") > sound.count("incomplete")
    report.rooms[42].receivers[0].sha256 = {"embeddings": "ab", "fill_ids": "cd", "aux": "00"}
    assert "DIFFERENT" in shown(report)


def test_a_side_that_did_not_succeed_is_not_ok() -> None:
    data = made(SMALL.layout, SMALL.tokens, 42)
    report = finished(data, data)
    report.rooms[42].sender.states = SUCCESS[:-1]
    assert not report.ok
    assert report.problems() == ["room 42, sender, Transferring: did not end"]


# Runs that go wrong


class Saboteur:
    """Does something to a process once, when it is in the middle of a transfer."""

    def __init__(self, side: str, number: signal.Signals) -> None:
        self.side = side
        self.number = number
        self.victim: Worker | None = None
        self.workers: dict[str, Worker] = {}

    def saw(self, worker: Worker, message: Message, report: Report) -> None:
        self.workers[worker.name] = worker
        moves = message["event"] == "states" and message["states"][-1] == "Transferring"
        if self.victim is None and moves and worker.name == self.side:
            self.victim = worker
            os.kill(worker.process.pid, self.number)


def test_a_receiver_that_is_killed() -> None:
    saboteur = Saboteur("receiver 1", signal.SIGKILL)
    report = demo.run(Plan(tokens=50_000, blocks=1, block_tokens=1, hidden=4, ranks=2), saboteur)
    assert not report.ok
    assert saboteur.victim is not None
    death = f"process {saboteur.victim.process.pid} was killed by SIGKILL"
    assert report.trouble == [f"receiver 1: {death}"]
    room = report.rooms[42]
    assert room.receivers[1].failure == death
    assert room.receivers[1].states[-1] == "Transferring"  # as far as it could tell
    assert room.sender.states[-1] == room.receivers[0].states[-1] == "Failed"
    assert room.sender.failure is not None
    assert room.sender.failure.startswith("PeerLost on rank 1")
    assert room.receivers[0].failure == room.sender.failure
    assert all(worker.process.returncode is not None for worker in saboteur.workers.values())
    assert "FAILED: 0 of 1 room" in shown(report)


def test_a_process_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SILENCE_S", 1.0)
    monkeypatch.setattr(crew, "GRACE_S", 3.0)
    saboteur = Saboteur("receiver 0", signal.SIGSTOP)
    report = demo.run(replace(LONG, isolation="thread"), saboteur)  # a mover would go on without its host
    assert not report.ok
    assert report.trouble[0] == "nothing has happened for 1 s"
    assert saboteur.victim is not None
    assert saboteur.victim.process.returncode == -signal.SIGKILL


def test_a_process_that_cannot_start() -> None:
    report = demo.run(Plan(transport="require:nosuch", hidden=8, tokens=1))
    assert not report.ok
    assert len(report.trouble) >= 1
    assert "TransportUnavailable: transport 'nosuch': is not installed" in report.trouble[0]
    assert "not opened" in shown(report)


def test_transports_that_do_not_reach_the_peer() -> None:
    report = demo.run(Plan(transport="memory", hidden=8, tokens=1))
    assert not report.ok
    assert report.trouble == []
    assert all("TransportUnavailable" in line for line in report.problems())


def test_no_process_is_left_if_not_all_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def second_fails(*arguments: Any, **settings: Any) -> subprocess.Popen[bytes]:
        if started:
            raise OSError("no more processes")
        started.append(real(*arguments, **settings))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", second_fails)
    with pytest.raises(OSError, match="no more processes"):
        demo.run(SMALL)
    assert started[0].returncode is not None


@pytest.mark.parametrize("side", [["sender"], ["receiver", "0"]])
def test_a_worker_nobody_talks_to_ends(side: list[str]) -> None:
    command = [sys.executable, "-m", "kvpoll_fsm.demo_worker", *side]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT_S)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")


# The screen


def shown(report: Report, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_report(console, report)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def screened(small: Plan) -> tuple[Report, str]:
    """A run, and all that a terminal got to see of it."""
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    with Screen(console, small) as screen:
        report = demo.run(small, screen)
    print_report(console, report)
    assert isinstance(console.file, io.StringIO)
    return report, console.file.getvalue()


def test_a_few_rooms_are_shown_each() -> None:
    report, text = screened(Plan(tokens=2000, hidden=8, rooms=2))
    assert report.ok
    for room in ("room 42", "room 43"):
        for side in ("sender", "receiver 0"):
            lines = [line for line in text.splitlines() if room in line and side in line]
            assert [" → ".join(pair) for pair in pairwise(SUCCESS)] == [line.split(side)[1].strip() for line in lines]
    assert report.rooms[43].sender.sha256["aux"] in text


def test_many_rooms_are_shown_together() -> None:
    report, text = screened(Plan(tokens=20, hidden=8, rooms=9, at_once=4))
    assert report.ok
    assert "Success             9" in text
    assert text.count("equal") == 10
    assert "OK: 9 rooms ended in Success" in text


def test_parts_that_are_alike_share_a_line() -> None:
    report = demo.run(Plan(tokens=5000, hidden=8))
    assert "parts 0 to 3, each: 1,024 tokens, not last, shm" in shown(report)
    assert "part 4: 904 tokens, last, shm" in shown(report)


def test_the_choice_of_a_transport_is_shown_with_its_cause() -> None:
    report = demo.run(Plan(tokens=500, hidden=8, transport="prefer:memory,tcp"))
    (choice,) = report.rooms[42].choices
    assert choice.startswith("tcp: memory to rank 0: ")
    assert f"over {choice}" in " ".join(shown(report).split())


def test_hashes_fit_into_eighty_columns() -> None:
    data = made(SMALL.layout, SMALL.tokens, 42)
    text = shown(finished(data, data), width=80)
    assert text.count(hashed(data)["embeddings"]) == 2


def test_of_many_problems_the_first_are_shown() -> None:
    report = Report(Plan(rooms=20))
    text = shown(report)
    assert "room 42, sender, not opened: did not end" in text
    assert "... and 30 more" in text
