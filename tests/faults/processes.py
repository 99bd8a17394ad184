"""Processes that start within milliseconds: forked from one that has imported everything and started nothing.

The mother process runs a module that calls `be_mother`; there a child takes over three file descriptors and goes on.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

__all__ = ["Mother", "Process", "be_mother"]

PR_SET_PDEATHSIG = 1
ROOT = Path(__file__).resolve().parents[2]
END_S = 30.0
"""Longest a process may take to end: a bound against hanging, not an expectation."""


class Mother:
    """Starts processes and learns how they ended."""

    def __init__(self, module: str = "tests.faults.worker") -> None:
        self._socket, theirs = socket.socketpair()
        one_thread = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # a process with threads must not fork
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, "-W", "error", "-m", module, str(theirs.fileno())],
                cwd=ROOT,
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


def be_mother(fd: int) -> bool:
    """Start a process for each order, until there are no more; True in each of these processes."""
    with socket.socket(fileno=fd) as orders:
        while True:
            order, fds, _, _ = socket.recv_fds(orders, 100, 3)
            if not order:
                return False
            if order == b"start":
                pid = _fork(fds)
                if not pid:
                    return True
                orders.send(b"%d" % pid)
            else:
                _, status = os.waitpid(int(order.split()[1]), 0)
                orders.send(b"%d" % os.waitstatus_to_exitcode(status))


def _fork(fds: list[int]) -> int:
    """Returns 0 in the new process, which has taken over the descriptors by the time its pid is known."""
    ready, taken_over = os.pipe()
    pid = os.fork()
    if not pid:
        _take_over(fds)
    os.close(taken_over)
    if pid:
        os.read(ready, 1)  # the end of it: nobody has the other side open any more
        for fd in fds:
            os.close(fd)
    os.close(ready)
    return pid


def _take_over(fds: list[int]) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing is left behind, not even what is frozen
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
