"""The processes of the demo: started, talked to, and ended whatever happens."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import IO

from kvpoll_fsm.demos.lines import Lines, Message, encode
from kvpoll_fsm.demos.plan import Plan

__all__ = ["Crew", "Worker"]

GRACE_S = 8.0
"""How long a process may take to close its endpoint before it is killed."""
_CHUNK = 1 << 16
_LOG_NBYTES = 4096


@dataclass(eq=False)
class Worker:
    """One process.

    Attributes:
        side: "sender" or "receiver".
        rank: The receiver's; 0 for the sender.
        process: Its handle.
        log: What it wrote to standard error.
        gone: It has ended, or told us that it says no more.
    """

    side: str
    rank: int
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    gone: bool = False
    lines: Lines = field(default_factory=Lines)

    @property
    def name(self) -> str:
        """As people call it."""
        return "sender" if self.side == "sender" else f"receiver {self.rank}"

    def send(self, message: Message) -> None:
        """Give an order; one that has died takes none, and `Crew.read` says so."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(encode(message))

    def epitaph(self) -> str:
        """How it ended, and its last line on standard error. Kills it if it has not ended."""
        code = self.reap(GRACE_S)
        text = f"process {self.process.pid} ended with exit status {code}"
        if code < 0:
            text = f"process {self.process.pid} was killed by {signal.Signals(-code).name}"
        lines = self._last_words()
        return f"{text}: {lines[-1].strip()}" if lines and code else text

    def stop(self) -> None:
        """Tell it that there are no more orders and that nobody listens."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def end(self, within_s: float) -> int:
        """Stop it, kill it if need be, and return its exit status, below 0 for a signal."""
        self.stop()
        code = self.reap(within_s)
        self.log.close()
        return code

    def reap(self, within_s: float) -> int:
        """Wait for its end, kill it if that does not come; its exit status, below 0 for a signal."""
        try:
            return self.process.wait(max(0.0, within_s))
        except BaseException as error:  # also Ctrl-C while we wait: no process is left behind
            self.process.kill()
            code = self.process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return code

    def _last_words(self) -> list[str]:
        size = self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, size - _LOG_NBYTES))
        return self.log.read().decode(errors="replace").splitlines()


class Crew:
    """The sender and the receivers of a plan; a context manager that starts and ends them."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.workers: list[Worker] = []
        self._selector = selectors.DefaultSelector()

    @property
    def sender(self) -> Worker:
        """The sender's process."""
        return self.workers[0]

    @property
    def receivers(self) -> list[Worker]:
        """The receivers' processes, by rank."""
        return self.workers[1:]

    def __enter__(self) -> Crew:
        try:
            self._start("sender", 0)
            for rank in range(self.plan.ranks):
                self._start("receiver", rank)
        except BaseException:
            self._end_all()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_all()

    def read(self, timeout_s: float) -> list[tuple[Worker, Message]]:
        """What the processes have said since, waiting for it at most `timeout_s`.

        The last message of each is `gone`, with its `detail`.
        """
        messages: list[tuple[Worker, Message]] = []
        for key, _ in self._selector.select(timeout_s):
            worker: Worker = key.data
            data = os.read(key.fd, _CHUNK)
            messages += [(worker, message) for message in worker.lines.feed(data)]
            if not data:
                self._selector.unregister(key.fileobj)
                worker.gone = True
                messages.append((worker, {"event": "gone", "detail": worker.epitaph()}))
        return messages

    def finish(self) -> list[str]:
        """End the processes that are left in good order; returns what went wrong with which."""
        for worker in self.workers:
            worker.stop()
        alive = [worker for worker in self.workers if not worker.gone]
        ends_s = time.monotonic() + GRACE_S
        problems = []
        for worker in alive:
            if worker.reap(ends_s - time.monotonic()):
                problems.append(f"{worker.name} did not end well: {worker.epitaph()}")
        return problems

    def _start(self, side: str, rank: int) -> None:
        arguments = [side] if side == "sender" else [side, str(rank)]
        log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the worker)
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "kvpoll_fsm.demo_worker", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                start_new_session=True,  # Ctrl-C is for us; we end them
            )
        except BaseException:
            log.close()
            raise
        worker = Worker(side, rank, process, log)
        self.workers.append(worker)
        assert process.stdout is not None
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)
        worker.send(asdict(self.plan))

    def _end_all(self) -> None:
        """Bounded: GRACE_S for all together, then they are killed."""
        self._selector.close()
        for worker in self.workers:
            worker.stop()
        ends_s = time.monotonic() + GRACE_S
        interrupted: BaseException | None = None
        for worker in self.workers:
            try:
                worker.end(0.0 if interrupted else ends_s - time.monotonic())
            except BaseException as error:  # Ctrl-C again: all others are killed at once
                interrupted = error
        if interrupted is not None:
            raise interrupted
