"""The two processes of a peer, driven from here; whatever hangs is killed."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from benchmarks.cases import Case
from benchmarks.peers.base import Peer

__all__ = ["ROOT", "Pair", "PeerFailed"]

ROOT = Path(__file__).resolve().parent.parent
GRACE_S = 3.0
MOST_TRANSFERS = 300


class PeerFailed(Exception):
    """A peer could not be measured, or hung: the reason, for the report."""


class _Process:
    """One worker."""

    def __init__(self, peer: Peer, side: str, nbytes: int) -> None:
        self.side = side
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", peer.sender.__module__, peer.name, side, str(nbytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=ROOT,
            env={**os.environ, **peer.env},
            start_new_session=True,  # killed with its children
        )
        self._rest = b""

    def order(self, do: str, **arguments: Any) -> None:
        """Give an order."""
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerFailed(self._epitaph()) from None

    @property
    def answers(self) -> IO[bytes]:
        """Where it answers."""
        assert self._process.stdout is not None
        return self._process.stdout

    def take(self) -> dict[str, Any] | None:
        """What has come of the answer to the last order: all of it, or None if it is not complete."""
        data = os.read(self.answers.fileno(), 1 << 16)
        if not data:
            raise PeerFailed(self._epitaph())
        self._rest += data
        if not self._rest.endswith(b"\n"):
            return None
        answer: dict[str, Any] = json.loads(self._rest)
        self._rest = b""
        if "error" in answer:
            raise PeerFailed(f"{self.side}: {answer['error']}")
        return answer

    def end(self, grace_s: float) -> None:
        """Let it end; kill it, and all that it started, if it does not."""
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                assert pipe is not None
                pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def _epitaph(self) -> str:
        try:
            code = self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            code = 0
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        return f"{self.side} {how}" + (f": {lines[-1]}" if lines else "")


class Pair:
    """A context manager: both processes, met and ready.

    Attributes:
        ends_s: Monotonic time at which it gives up, whatever is under way.
    """

    def __init__(self, peer: Peer, nbytes: int, within_s: float) -> None:
        self.ends_s = time.monotonic() + within_s
        self._peer, self._nbytes = peer, nbytes
        self._processes: list[_Process] = []

    def __enter__(self) -> Pair:
        try:
            for side in ("sender", "receiver"):
                self._processes.append(_Process(self._peer, side, self._nbytes))
            told = self.ask("receiver", "listen")
            self.ask_both("join", told=told)
        except BaseException:
            self._end(0.0)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.ends_s = time.monotonic() + GRACE_S
            with contextlib.suppress(PeerFailed):  # its figures have been taken; it is killed
                self.ask_both("close")
        self._end(GRACE_S if error is None else 0.0)

    def ask(self, side: str, do: str, **arguments: Any) -> Any:
        """One order to one side."""
        process = self._processes[side == "receiver"]
        process.order(do, **arguments)
        return self._collect([process])[0]

    def ask_both(self, do: str, **arguments: Any) -> list[Any]:
        """The same order to both, at the same time; answers of sender and receiver."""
        for process in reversed(self._processes):
            process.order(do, **arguments)
        return self._collect(self._processes)

    def prepare(self, case: Case) -> None:
        """Get ready for a case: one transfer, and what arrived is compared with what was sent.

        Raises:
            PeerFailed: It differs.
        """
        told = self.ask("sender", "prepare", case=case.name, told={})
        told = self.ask("receiver", "prepare", case=case.name, told=told)
        self.ask("sender", "ready", told=told)
        self.ask_both("run", count=1)
        if self._peer.verify:
            sent, received = self.ask_both("digest")
            if sent != received:
                raise PeerFailed(f"{case.name}: what arrived is not what was sent")

    def measure(self, budget_s: float) -> tuple[list[tuple[float, int]], float]:
        """Samples (seconds, bytes) for about `budget_s` seconds, and processor seconds of both ends for them."""
        started_s = time.monotonic()
        self.ask_both("run", count=1)
        first_s = max(time.monotonic() - started_s, 1e-4)
        before_s = sum(self.ask_both("cpu"))
        samples, _ = self.ask_both("run", count=max(1, min(MOST_TRANSFERS, int(budget_s / first_s))))
        return [(seconds, nbytes) for seconds, nbytes in samples], sum(self.ask_both("cpu")) - before_s

    def _collect(self, processes: list[_Process]) -> list[Any]:
        """The answers of these, whoever is first: one that fails leaves the other waiting for it."""
        answers: dict[str, Any] = {}
        with selectors.DefaultSelector() as selector:
            for process in processes:
                selector.register(process.answers, selectors.EVENT_READ, process)
            while selector.get_map():
                ready = selector.select(max(0.0, self.ends_s - time.monotonic()))
                if not ready:
                    late = " and ".join(key.data.side for key in selector.get_map().values())
                    raise PeerFailed(f"{late}: no answer in time, killed")
                for key, _ in ready:
                    answer = key.data.take()
                    if answer is not None:
                        answers[key.data.side] = answer["ok"]
                        selector.unregister(key.fileobj)
        return [answers[process.side] for process in processes]

    def _end(self, grace_s: float) -> None:
        for process in self._processes:
            process.end(grace_s)
