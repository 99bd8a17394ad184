"""Endpoints as real processes, driven by orders over pipes. See `worker.Host` for what can be ordered."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.proxy import Proxy

__all__ = [
    "BIG",
    "BIG_PART_NBYTES",
    "FAST",
    "GRANT",
    "PATIENT",
    "Cluster",
    "Worker",
    "arrive",
    "free_port",
    "join",
    "through",
    "transfer",
]

ANSWER_S = 30.0
"""Longest a worker may take to answer: a bound against hanging, not an expectation."""
FAST = {"heartbeat_s": 0.1, "peer_lost_s": 0.6, "stall_s": 1.0, "bootstrap_s": 20.0, "resume_s": 20.0}
"""Deadlines of endpoints whose peer will be lost."""
PATIENT = {**FAST, "peer_lost_s": 20.0, "stall_s": 20.0}
"""Deadlines of endpoints that are to get over what happens."""
BIG = {"hidden": 3584, "block_tokens": 128, "blocks": 16}
"""A layout whose parts of 1,024 tokens have 7.3 MB, more than the kernel's buffers take."""
BIG_PART_NBYTES = 1024 * (3584 * 2 + 4)
GRANT = 32
"""Tokens of one grant of the small layout: two blocks."""


class Worker:
    """One process with one endpoint, which is opened at once unless `settings` is None."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.address = ""
        self.data_port = 0
        self.may_complain = False
        self.events: list[dict[str, Any]] = []
        self._answers: dict[int, dict[str, Any]] = {}
        self._orders = 0
        self._eof = False
        self._changed = threading.Condition()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115: closed in `end`
        script = Path(__file__).with_name("worker.py")
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, name=f"reads {label}", daemon=True)
        self._reader.start()

    # Orders

    def post(self, do: str, **order: Any) -> int:
        """Give an order; `answer` waits for what comes of it."""
        self._orders += 1
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"id": self._orders, "do": do, **order}) + "\n")
        self._process.stdin.flush()
        return self._orders

    def answer(self, order: int, timeout_s: float = ANSWER_S) -> Any:
        """What came of an order.

        Raises:
            AssertionError: The worker raised, died or did not answer.
        """
        self._await(lambda: order in self._answers or self._eof, timeout_s)
        answer = self._answers.pop(order, None)
        assert answer is not None, f"{self.label} did not answer: {self.complaints()}"
        assert "error" not in answer, f"{self.label}: {answer['error']}"
        return answer["value"]

    def __call__(self, do: str, **order: Any) -> Any:
        """Give an order and wait for what comes of it."""
        return self.answer(self.post(do, **order))

    def open(self, **settings: Any) -> Worker:
        """Open the worker's endpoint."""
        opened = self("open", **settings)
        self.address, self.data_port = opened["address"], opened["data_port"]
        return self

    def event(self, name: str, timeout_s: float = ANSWER_S) -> Any:
        """Wait for something the worker says of its own accord."""
        found = lambda: [e for e in self.events if e["event"] == name]  # noqa: E731
        self._await(lambda: bool(found()) or self._eof, timeout_s)
        assert found(), f"{self.label} never said {name}: {self.complaints()}"
        return found()[0]["value"]

    # Rooms, in short

    def until(self, side: str, room: int, rank: int = 0, **wanted: Any) -> dict[str, Any]:
        """Wait until a room is where it is wanted.

        Raises:
            AssertionError: It did not get there; shows where it is.
        """
        state: dict[str, Any] = self("until", side=side, room=room, rank=rank, **wanted)
        assert state["reached"], f"{self.label}: {side} {room}/{rank} is not {wanted}: {state}"
        return state

    def end_of(self, side: str, room: int, rank: int = 0, **more: Any) -> dict[str, Any]:
        """Wait until a room has ended and nothing of it is under way."""
        return self.until(side, room, rank, ended=True, quiescent=True, **more)

    # Signals

    def kill(self) -> None:
        """End the process without a word."""
        self._process.kill()
        self._process.wait(ANSWER_S)

    def stop(self) -> None:
        """Freeze the process, and wait until it is frozen."""
        self._process.send_signal(signal.SIGSTOP)
        stat = Path(f"/proc/{self._process.pid}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "T":
            pass

    def resume(self) -> None:
        """Let a frozen process go on."""
        self._process.send_signal(signal.SIGCONT)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def wait_exit(self, timeout_s: float = ANSWER_S) -> int:
        """The exit status, once the process has ended by itself."""
        return self._process.wait(timeout_s)

    def exit(self) -> int:
        """Let the process end in order, but without closing its endpoints."""
        self.post("exit")
        return self.wait_exit()

    # The end

    def complaints(self) -> str:
        """What the process wrote to stderr."""
        self._errors.seek(0)
        return self._errors.read()

    def end(self) -> str:
        """End the process if it runs; returns its complaints unless they were expected."""
        if self._process.poll() is None:
            self.resume()
            self.kill()
        self._reader.join(ANSWER_S)
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what was not flushed is nobody's
                pipe.close()  # type: ignore[union-attr]
        text = self.complaints()
        self._errors.close()
        return "" if self.may_complain else text

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            with self._changed:
                if "event" in said:
                    self.events.append(said)
                else:
                    self._answers[said["id"]] = said
                self._changed.notify_all()
        with self._changed:
            self._eof = True
            self._changed.notify_all()

    def _await(self, condition: Callable[[], bool], timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(condition, timeout_s)


class Cluster:
    """The processes of one test. They start at once and in parallel; `open` waits for each."""

    def __init__(self) -> None:
        self.workers: list[Worker] = []

    def start(self, label: str) -> Worker:
        """Start a process without an endpoint."""
        self.workers.append(Worker(label))
        return self.workers[-1]

    def open(self, *labels: str, **settings: Any) -> list[Worker]:
        """Start processes with equal endpoints."""
        workers = [self.start(label) for label in labels]
        orders = [(worker, worker.post("open", **settings)) for worker in workers]
        for worker, order in orders:
            opened = worker.answer(order)
            worker.address, worker.data_port = opened["address"], opened["data_port"]
        return workers

    def end(self) -> None:
        """End all processes.

        Raises:
            AssertionError: One of them wrote to stderr: a traceback or a warning.
        """
        complaints = [(worker.label, worker.end()) for worker in self.workers]
        assert not any(text for _, text in complaints), "\n".join(f"{who}: {text}" for who, text in complaints)


def through(proxy: Proxy, worker: Worker, **settings: Any) -> Worker:
    """Open a receiver whose data port is reached through the proxy."""
    tcp = {**settings.pop("tcp", {}), "advertise": f"127.0.0.1:{proxy.port}"}
    worker.open(tcp=tcp, **settings)
    proxy.target = worker.data_port
    return worker


def join(worker: Worker, tx: Worker, room: int, ranks: tuple[int, ...], total: int, tokens: int = GRANT) -> None:
    """Open receiver ranks of a room."""
    for rank in ranks:
        worker("receiver", room=room, peer=tx.address, rank=rank, ranks=total, tokens=tokens)


def transfer(tx: Worker, receivers: dict[Worker, tuple[int, ...]], room: int, tokens: int) -> None:
    """A room from start to end, as if nothing had ever happened."""
    total = sum(map(len, receivers.values()))
    tx("sender", room=room, ranks=total, tokens=tokens)
    for worker, ranks in receivers.items():
        join(worker, tx, room, ranks, total, tokens=1024 if tokens > 1000 else GRANT)
    arrive(tx, receivers, room, tokens)


def arrive(tx: Worker, receivers: dict[Worker, tuple[int, ...]], room: int, tokens: int) -> None:
    """A room that is open everywhere ends in Success, and every rank has every byte."""
    for worker, ranks in receivers.items():
        assert all(worker("data", room=room, rank=rank, tokens=tokens) for rank in ranks)
    assert tx.end_of("sender", room)["state"] == "Success"


def free_port() -> int:
    """A port nobody has, outside the range the kernel takes ports from by itself."""
    while True:
        port = random.randrange(10_000, 30_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
