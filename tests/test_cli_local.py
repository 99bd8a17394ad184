"""`kvpoll switch` and `kvpoll report` against running endpoints."""

from __future__ import annotations

import itertools
import json
import re
import socket
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvpoll_fsm import BlockPool, Endpoint, KVPoll, Receiver, Sender
from kvpoll_fsm.cli import command
from kvpoll_fsm.cli_local import _time
from tests.helpers import LAYOUT, endpoint, make_data, open_pair, pair, same, transfer, until

KVPOLL = [sys.executable, "-m", "kvpoll_fsm.cli"]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(command(), [str(argument) for argument in arguments])


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's runtime folder, and no other place where sockets may be."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("kvpoll_fsm.local.places._folders", lambda: [tmp_path / "kvpoll"])
    return tmp_path


@pytest.fixture
def end(runtime: Path) -> Iterator[Endpoint]:
    with endpoint("shm", isolation="thread", standby=("tcp",), control_socket="auto") as end:
        yield end


def test_the_one_endpoint_is_found(end: Endpoint) -> None:
    done = invoke("switch", "tcp")
    assert (done.exit_code, done.output) == (0, f"new rooms of {end.address}: require:tcp\n")
    assert end.transports().policy == "require:tcp"
    done = invoke("switch", "prefer:shm,tcp", "--canary", "0.05")
    assert done.output == f"new rooms of {end.address}: require:tcp; 5.00% of them: prefer:shm,tcp\n"
    assert end.transports().share == 0.05
    done = invoke("switch", "shm", "--json", "--socket", end.control_socket)
    assert json.loads(done.output)["policy"] == "require:shm"


def test_of_several_one_must_be_named(end: Endpoint) -> None:
    with endpoint("shm", isolation="thread", control_socket="auto") as other:
        done = invoke("switch", "tcp")
        assert done.exit_code == 2
        assert "2 endpoints run here; name one:" in done.output
        for each in (end, other):
            assert f"--socket {each.control_socket}  {each.address}, process" in done.output
        assert invoke("switch", "tcp", "--socket", end.control_socket).exit_code == 0
        assert end.transports().policy == "require:tcp"
        assert other.transports().policy == "require:shm"


def test_those_that_have_died_do_not_count(end: Endpoint, runtime: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(runtime / "kvpoll" / "1-dead.sock"))
    assert invoke("report").exit_code == 0


def test_without_any_it_says_what_to_do(runtime: Path) -> None:
    for arguments in (["switch", "tcp"], ["report"]):
        done = invoke(*arguments)
        assert done.exit_code == 2
        assert 'control_socket="auto"' in done.output


def test_what_the_endpoint_refuses(end: Endpoint) -> None:
    done = invoke("switch", "memory")
    assert done.exit_code == 1
    assert "kvpoll: TransportUnavailable: transport 'memory': is not loaded by this endpoint; standby=" in done.output
    assert end.transports().policy == "require:shm"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["fastest:tcp"], "unknown mode"),
        (["tcp", "--canary", "1.5"], "above 0 and below 1"),
        (["tcp", "--canary", "nan"], "above 0 and below 1"),
        (["tcp", "--canary", "many"], "not a valid float"),
        ([], "Missing argument"),
    ],
)
def test_what_is_not_asked(runtime: Path, arguments: list[str], problem: str) -> None:
    done = invoke("switch", *arguments)
    assert done.exit_code == 2
    assert problem in done.output


def test_nobody_at_the_socket(runtime: Path) -> None:
    done = invoke("switch", "tcp", "--socket", runtime / "none")
    assert done.exit_code == 1
    assert f"kvpoll: no endpoint answers at {runtime / 'none'}: No such file" in done.output


def test_a_folder_that_others_can_enter(end: Endpoint, runtime: Path) -> None:
    (runtime / "kvpoll").chmod(0o755)
    done = invoke("report")
    (runtime / "kvpoll").chmod(0o700)
    assert done.exit_code == 2
    assert "must be yours alone" in done.output


def test_the_report_for_people(end: Endpoint) -> None:
    with endpoint("shm", isolation="thread", standby=("tcp",)) as rx:
        transfer(end, rx, 1)
        end.sender(2).clear()
        lines = invoke("report").output.splitlines()
    assert re.fullmatch(rf"{end.address}, \d+ s, 0 rooms open", lines[0])
    assert " ".join(lines[1].split()) == "transport rooms success p50 p90 p99 parts bytes again"
    none, shm = (line.split() for line in lines[2:4])
    assert none == ["sent", "none", "1", "0.00%", "0", "0.0", "MB", "0"]
    assert shm[:4] == ["sent", "shm", "1", "100.00%"]
    assert shm[-4:] == ["2", "0.0", "MB", "0"]
    assert lines[4:] == ["sent by none, failures: Aborted 1"]


@pytest.mark.parametrize(("seconds", "text"), [(None, ""), (0.00123, "1.23 ms"), (1.5, "1.5 s"), (120.0, "120 s")])
def test_durations(seconds: float | None, text: str) -> None:
    assert _time(seconds) == text


# Under load

IN_FLIGHT = 200
MOVING = 30
TOKENS = 40
PATIENT_S = 40.0


def kvpoll(*arguments: object) -> dict[str, Any]:
    """The command itself, in a process."""
    done = subprocess.run(
        [*KVPOLL, *map(str, arguments), "--json"], capture_output=True, text=True, timeout=PATIENT_S, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


class Load:
    """At least 200 rooms open at any time, some of which move; when it is told to stop, it brings all to their end."""

    def __init__(self, tx: Endpoint, rx: Endpoint) -> None:
        self.tx, self.rx = tx, rx
        self.ended: dict[int, KVPoll] = {}
        self.unequal: list[int] = []
        self.by: Counter[str] = Counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        rooms = itertools.count()
        waiting: deque[tuple[Sender, Receiver]] = deque()
        moving: deque[tuple[Sender, Receiver]] = deque()
        while waiting or moving or not self._stop.is_set():
            while len(waiting) <= IN_FLIGHT and not self._stop.is_set():
                waiting.append(open_pair(self.tx, self.rx, next(rooms), tokens=32))
            if waiting:
                moving.append(waiting.popleft())
                moving[-1][0].send(make_data(TOKENS, seed=moving[-1][0].room))
            if len(moving) == MOVING or not waiting:
                self._close(*moving.popleft())

    def _close(self, sender: Sender, receiver: Receiver) -> None:
        room = sender.room
        self.ended[room] = sender.wait(PATIENT_S)
        if receiver.wait(PATIENT_S) is not KVPoll.Success or not same(receiver.result(0), make_data(TOKENS, seed=room)):
            self.unequal.append(room)
        self.by.update(part.transport for part in sender.parts)
        sender.clear()
        receiver.clear()


@pytest.mark.both
def test_switched_there_and_back_with_200_rooms_in_flight_no_room_is_lost(isolation: str, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with (
        pair("shm", standby=("tcp",), tx={"control_socket": path}, rx={"pool": BlockPool(LAYOUT, 512)}) as (tx, rx),
        Load(tx, rx) as load,
    ):
        until(lambda: load.ended, "rooms move")
        for policy in ("tcp", "shm"):
            assert kvpoll("switch", policy, "--socket", path)["policy"] == f"require:{policy}"
        until(lambda: load.by["tcp"], "the switch has had its effect", PATIENT_S)
        report = kvpoll("report", "--socket", path)
        assert report["live"] >= IN_FLIGHT
    assert len(load.ended) > 2 * IN_FLIGHT
    assert set(load.ended.values()) == {KVPoll.Success}
    assert not load.unequal
    assert load.by.keys() == {"shm", "tcp"}
    assert load.by.total() == 2 * len(load.ended)
    assert {name: row["success_share"] for name, row in report["sent"].items()} == {"shm": 1.0, "tcp": 1.0}
    assert all(row["latency_s"]["count"] == row["rooms"] > 0 for row in report["sent"].values())
