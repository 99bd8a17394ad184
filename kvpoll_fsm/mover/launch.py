"""Starting a mover, and seeing it end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import kvpoll_fsm
from kvpoll_fsm.errors import MoverUnavailable
from kvpoll_fsm.mover import frames
from kvpoll_fsm.mover.memory import allow_reading
from kvpoll_fsm.mover.pipe import Pipe

__all__ = ["Launched", "environment", "launch"]

EXIT_S = 5.0
"""How long a mover that has closed its pipe may take to end, before it is killed."""


class Launched:
    """A mover's process.

    Attributes:
        pipe: To it.
    """

    def __init__(self, process: subprocess.Popen[bytes], pipe: Pipe[frames.Event]) -> None:
        self._process = process
        self.pipe = pipe

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """It has not ended. Its socket alone would not tell: a child forked during the launch has that too."""
        return self._process.poll() is None

    def end(self, within_s: float = EXIT_S) -> str:
        """Wait until it has ended, and kill it if it does not; returns how it did."""
        self.pipe.close()
        try:
            status = self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def after_fork(self) -> None:
        """This is a forked child: the mover is the parent's, whose end must show on the pipe."""
        self.pipe.abandon()
        self._process.returncode = 0  # nothing to wait for here


def launch() -> Launched:
    """Start a mover, which waits for its `Setup`.

    Raises:
        MoverUnavailable: No process can be started.
    """
    if not sys.executable:
        raise MoverUnavailable("sys.executable does not say which Python to start")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        command = [sys.executable, "-m", "kvpoll_fsm.mover", str(theirs.fileno())]
        try:
            process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment(),
            )
        except (OSError, subprocess.SubprocessError) as error:
            ours.close()
            raise MoverUnavailable(f"{command[0]} cannot be started: {error}") from error
    allow_reading(process.pid)
    return Launched(process, Pipe(ours, frames.Event))


def environment() -> dict[str, str]:
    """The host's, with this package where the child finds it, and no script's folder in the way."""
    home = str(Path(kvpoll_fsm.__file__).resolve().parents[1])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if home not in map(sysconfig.get_path, ("purelib", "platlib")):
        paths.append(home)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
