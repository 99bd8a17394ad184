"""Endpoints as real processes, driven by orders over pipes. See `worker.Host` for what can be ordered."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.processes import Mother
from tests.faults.proxy import Proxy
from tests.faults.relay import Relay

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
    "place",
    "through",
    "transfer",
]

ANSWER_S = 45.0
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
    """One process, as yet without an endpoint.

    Attributes:
        address: Of the endpoint that was opened last.
        data_port: Where that endpoint's tcp transport really listens, whatever it advertises.
        movers: The processes that run this one's endpoints.
        may_complain: The test expects something on stderr.
        events: What the process has said of its own accord.
    """

    def __init__(self, mother: Mother, label: str) -> None:
        self.label = label
        self.address = ""
        self.data_port = 0
        self.movers: list[int] = []
        self.may_complain = False
        self.events: list[dict[str, Any]] = []
        self._answers: dict[int, dict[str, Any]] = {}
        self._orders = 0
        self._eof = False
        self._changed = threading.Condition()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in `end`
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        self.process = mother.start(theirs_in, theirs_out, self._errors.fileno())
        os.close(theirs_in)
        os.close(theirs_out)
        self._reader = threading.Thread(target=self._read, name=f"reads {label}", daemon=True)
        self._reader.start()

    # Orders

    def post(self, do: str, **order: Any) -> int:
        """Give an order; `answer` waits for what comes of it."""
        self._orders += 1
        os.write(self._out, json.dumps({"id": self._orders, "do": do, **order}).encode() + b"\n")
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
        self.movers += [opened["mover"]] if opened["mover"] else []
        return self

    def event(self, name: str, timeout_s: float = ANSWER_S) -> Any:
        """Wait for something the worker says of its own accord."""
        self._await(lambda: any(said["event"] == name for said in self.events) or self._eof, timeout_s)
        values = [said["value"] for said in self.events if said["event"] == name]
        assert values, f"{self.label} never said {name}: {self.complaints()}"
        return values[0]

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
        """End the process, and its movers, without a word."""
        self._signal_movers(signal.SIGSTOP)
        self.process.signal(signal.SIGKILL)
        self.process.wait()
        self._signal_movers(signal.SIGKILL)
        self.movers.clear()

    def _signal_movers(self, number: signal.Signals) -> None:
        """To those that have not ended with their endpoints."""
        for mover in self.movers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(mover, number)

    def stop(self) -> None:
        """Freeze the process with its movers, as a machine that hangs does, and wait until all threads are frozen."""
        self.process.signal(signal.SIGSTOP)
        self._signal_movers(signal.SIGSTOP)
        ends_s = time.monotonic() + ANSWER_S
        for thread in [t for pid in (self.process.pid, *self.movers) for t in Path(f"/proc/{pid}/task").iterdir()]:
            while (thread / "stat").read_text().rpartition(")")[2].split()[0] != "T":
                assert time.monotonic() < ends_s, f"{self.label} does not stop"

    def resume(self) -> None:
        """Let a frozen process go on."""
        self._signal_movers(signal.SIGCONT)
        self.process.signal(signal.SIGCONT)

    def exit(self) -> int:
        """Let the process end in order, but without closing its endpoints; returns its exit status."""
        self.post("exit")
        return self.process.wait()

    # The end

    def complaints(self) -> str:
        """What the process wrote to stderr."""
        self._errors.seek(0)
        return self._errors.read()

    def end(self) -> str:
        """End the process if it runs; returns its complaints unless they were expected."""
        if not self.process.has_ended():
            self.kill()
        self.process.wait()
        self._reader.join()
        os.close(self._out)
        text = self.complaints()
        self._errors.close()
        return "" if self.may_complain else text

    def _read(self) -> None:
        with open(self._in) as lines:
            for line in lines:
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
    """The processes of one test."""

    def __init__(self, mother: Mother) -> None:
        self._mother = mother
        self.workers: list[Worker] = []

    def start(self, label: str) -> Worker:
        """Start a process without an endpoint."""
        self.workers.append(Worker(self._mother, label))
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


def place(relay: Relay, host: int, worker: Worker, **settings: Any) -> Worker:
    """Open an endpoint on a host of the network; without keys unless some are given."""
    worker("enter", namespace=relay.hosts[host].namespace)
    settings.setdefault("insecure", "keys" not in settings)
    return worker.open(listen=f"tcp://{relay.hosts[host].address}:0", **settings)


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
