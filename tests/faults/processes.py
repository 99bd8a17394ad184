"""Processes that start within milliseconds: forked from one that has imported everything and started nothing.

The mother process runs `worker.py`; a child takes over three file descriptors and serves orders from there on.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

__all__ = ["Mother", "Process"]

END_S = 30.0
"""Longest a process may take to end: a bound against hanging, not an expectation."""


class Mother:
    """Starts processes and learns how they ended."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        script = Path(__file__).with_name("worker.py")
        one_thread = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # a process with threads must not fork
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, "-W", "error", str(script), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=one_thread,
            )

    def start(self, stdin: int, stdout: int, stderr: int) -> Process:
        """Start a process with these file descriptors."""
        socket.send_fds(self._socket, [b"start"], [stdin, stdout, stderr])
        return Process(self, int(self._answer()))

    def reap(self, pid: int) -> int:
        """How a process that has ended did: its exit status, or the negative number of a signal."""
        self._socket.send(b"reap %d" % pid)
        return int(self._answer())

    def close(self) -> None:
        """End the mother process."""
        self._socket.close()
        self._popen.wait(END_S)

    def _answer(self) -> bytes:
        answer = self._socket.recv(100)
        assert answer, "the mother of all workers has died"
        return answer


class Process:
    """A process, by its pidfd: no other can ever be meant."""

    def __init__(self, mother: Mother, pid: int) -> None:
        self.pid = pid
        self._mother = mother
        self._fd = os.pidfd_open(pid)
        self._status: int | None = None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        signal.pidfd_send_signal(self._fd, number)

    def has_ended(self, timeout_s: float = 0.0) -> bool:
        """Whether it has ended, or does so in time."""
        if self._status is not None:
            return True
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))

    def wait(self, timeout_s: float = END_S) -> int:
        """Wait for the end; returns the exit status, or the negative number of a signal."""
        assert self.has_ended(timeout_s), f"process {self.pid} does not end"
        if self._status is None:
            self._status = self._mother.reap(self.pid)
            os.close(self._fd)
        return self._status
