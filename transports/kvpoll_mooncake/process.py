"""An engine in a process of its own, as the adapter sees it: started, talked to, and killed."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import sysconfig
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import msgspec

import kvpoll_fsm
from kvpoll_common.loop import Reactor
from kvpoll_fsm.address import hide_passwords
from kvpoll_fsm.errors import MalformedMessage
from kvpoll_fsm.spi import Region
from kvpoll_mooncake import frames
from kvpoll_mooncake.frames import Command, Event, Register, Setup
from kvpoll_mooncake.memory import Addresses
from kvpoll_mooncake.roles import Master
from kvpoll_mooncake.stream import Stream

__all__ = ["Process"]

_log = logging.getLogger("kvpoll_mooncake")
_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
_OURS = ("MC_FORCE_TCP", "MC_FORCE_HCA")
"""Variables that decide the protocol, which is ours to decide."""
_LAST_LINES = 2
_LINE_NBYTES = 300
_REST_NBYTES = 4096
_READS = 4
_NOISE = b"Local segment descriptor not found"
"""Said by every engine that starts."""


class Process:
    """One engine's process. Used by the reactor's thread alone, whose end is its end too."""

    def __init__(self, reactor: Reactor, master: Master, name: str, addresses: Addresses) -> None:
        """Store what is needed.

        Args:
            reactor: Of the thread that starts it.
            master: Hears what it says.
            name: For the log.
            addresses: Where regions may be mapped.
        """
        self._reactor = reactor
        self._master = master
        self._name = name
        self._addresses = addresses
        self._process: subprocess.Popen[bytes] | None = None
        self._stream: Stream | None = None
        self._pidfd = -1
        self._errors = _Errors(name)

    def start(self, setup: Setup, environment: Mapping[str, str], regions: Mapping[int, Region]) -> None:
        """Start it.

        Raises:
            OSError: The system has no process or file descriptor to give.
        """
        if not sys.executable:
            raise OSError("sys.executable does not say which Python to start")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            try:
                self._launch(theirs.fileno(), environment)
            except (OSError, subprocess.SubprocessError) as error:
                ours.close()
                raise OSError(f"{sys.executable} cannot be started: {error}") from error
        ours.setblocking(False)
        self._stream = Stream(self._reactor, ours, self, frames.FRAME_NBYTES)
        try:
            self.send(setup)
            for region in regions.values():
                self.register(region)
        except OSError:  # out of file descriptors
            self.end()
            raise

    def _launch(self, fd: int, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvpoll_mooncake.child", str(fd), str(os.getpid())],
            pass_fds=[fd],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**_environment(), **environment},
        )
        if self._process.stderr is not None:
            os.set_blocking(self._process.stderr.fileno(), False)
            self._errors.fd = self._process.stderr.fileno()
            self._reactor.watch(self._errors.fd, select.EPOLLIN, _Callback(self._read_errors))
        self._pidfd = os.pidfd_open(self._process.pid)
        self._reactor.watch(self._pidfd, select.EPOLLIN, _Callback(self._reap))

    @property
    def pid(self) -> int:
        """Its number; 0 before it is started."""
        return 0 if self._process is None else self._process.pid

    def send(self, command: Command) -> None:
        """Tell it something."""
        if self._stream is not None:
            self._stream.send(frames.encode(command))

    def register(self, region: Region) -> None:
        """Give it a region, which must lie in a file."""
        if self._stream is not None and region.fd is not None:
            nbytes = len(region.buffer)
            command = Register(region.number, nbytes, self._addresses.take(nbytes), region.fd_offset)
            self._stream.send(frames.encode(command), [os.dup(region.fd)])

    def kill(self) -> None:
        """End it at once; `gone` follows. May be called twice."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    @property
    def is_alive(self) -> bool:
        """It has been started, and not been seen to end."""
        return self._process is None or self._process.returncode is None

    def end(self) -> None:
        """Kill it and wait for its end; nobody is told. For when it is no use, or the reactor's thread is no more."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._let_go()

    def _let_go(self) -> None:
        """Close what we have of it."""
        for fd in (self._pidfd, self._errors.fd):
            self._reactor.unwatch(fd)
        if self._pidfd >= 0:
            os.close(self._pidfd)
        if self._process is not None and self._process.stderr is not None:
            self._process.stderr.close()
        self._pidfd = self._errors.fd = -1
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    # What the reactor calls

    def received(self, frame: bytes) -> None:
        """It says something.

        Raises:
            MalformedMessage: Nonsense.
        """
        try:
            event = _decoder.decode(frame)
        except ValueError as error:
            raise MalformedMessage(f"an engine that talks nonsense: {error}") from error
        self._master.heard(self, event)

    def ended(self, error: Exception) -> None:
        """It has closed its socket, or does not make sense: its end is near."""
        self._stream = None
        self.kill()

    def _read_errors(self) -> None:
        if self._errors.read():
            self._reactor.unwatch(self._errors.fd)

    def _reap(self) -> None:
        """It has ended."""
        process = self._process
        status = None if process is None else process.poll()
        if process is None or status is None or self._pidfd < 0:
            return
        if self._stream is not None:
            self._stream.ready(select.EPOLLIN)  # its last words
        self._errors.read()
        self._let_go()
        how = f"killed by {_name_of(-status)}" if status < 0 else f"exit status {status}"
        _log.debug("%s: %s", self._name, how)
        self._master.gone(self, how)

    def last_words(self) -> str:
        """What it wrote last to its standard error, for a failure's detail."""
        return self._errors.last()


class _Callback:
    """A watcher that calls a function."""

    def __init__(self, function: object) -> None:
        self._function = function

    def ready(self, mask: int) -> None:
        if callable(self._function):
            self._function()


class _Errors:
    """The standard error of a process: what Mooncake has to say goes to our log, the last lines are kept."""

    def __init__(self, name: str) -> None:
        self.fd = -1
        self._name = name
        self._lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._rest = b""

    def read(self) -> bool:
        """Take some of what is there; True once nothing more can come."""
        for _ in range(_READS):  # and no more: one that never stops talking must not keep others waiting
            try:
                data = os.read(self.fd, 1 << 16)
            except BlockingIOError:
                return False
            except OSError:
                return True
            *lines, self._rest = (self._rest + data).split(b"\n")
            self._rest = self._rest[-_REST_NBYTES:]
            for line in lines if data else [*lines, self._rest]:
                self._take(line)
            if not data:
                return True
        return False

    def _take(self, line: bytes) -> None:
        # Names the server that engines find each other by, if that is what fails.
        text = hide_passwords(line.decode("utf-8", "replace").strip())[:_LINE_NBYTES]
        if text:
            # Mooncake says many things at level W and E that concern nobody: they are news only if something fails.
            _log.debug("%s: %s", self._name, text)
        if text and line[:1] not in (b"I", b"W") and _NOISE not in line:
            self._lines.append(text)

    def last(self) -> str:
        return " | ".join(self._lines)


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have none
        return f"signal {number}"


def _environment() -> dict[str, str]:
    """This process's, with this package and the library where the child finds them."""
    found = (kvpoll_fsm.__file__, __file__)
    homes = [str(Path(each).resolve().parents[1]) for each in found]
    installed = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    paths += [home for home in homes if home not in paths and home not in installed]
    kept = {name: value for name, value in os.environ.items() if name not in _OURS}
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
