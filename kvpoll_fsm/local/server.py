"""The endpoint's end of its control socket: a few short conversations in the driver's loop, which never wait.

One request per connection. A caller that says nothing, or does not read its answer, keeps one of few places until
somebody else needs it, and keeps nobody waiting.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.local.places import UNBORN, folder, is_dead, sweep
from kvpoll_fsm.local.words import MAX_REQUEST_NBYTES

__all__ = ["ControlSocket"]

log = logging.getLogger("kvpoll_fsm")
MAX_CALLERS = 8
PER_TURN = 4
"""Callers that are let in in one turn of the driver."""
CHUNK = 1 << 16
_CREDENTIALS = struct.Struct("3i")


class Watcher(Protocol):
    """Whose loop we have a turn in."""

    def watch(self, fd: int, *, writable: bool = False) -> None:
        """Wake when `fd` is readable, or also when it is writable."""
        ...

    def unwatch(self, fd: int) -> None:
        """Stop watching."""
        ...


class _Caller:
    """One conversation."""

    __slots__ = ("answer", "said", "socket")

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.said = bytearray()
        self.answer: memoryview | None = None


class ControlSocket:
    """Listens at a path, if there is one. Used by the driver's thread alone."""

    def __init__(self, path: str | Path | None, answer: Callable[[bytes], bytes]) -> None:
        """Store what is needed.

        Args:
            path: Where to listen; None for nowhere.
            answer: Makes the answer to a line; never raises.
        """
        self._path = None if path is None else Path(path)
        self._answer = answer
        self._listener: socket.socket | None = None
        self._inode = (0, 0)
        self._callers: dict[int, _Caller] = {}
        self._spare: int | None = None

    def open(self, watcher: Watcher) -> None:
        """Listen, and have a turn whenever somebody calls.

        Raises:
            InvalidInput: Nothing can listen there; says why.
        """
        if self._path is None:
            return
        self._watcher = watcher
        try:
            if self._path.parent == folder():
                sweep()
            self._listener = self._listen(self._path)
        except OSError as error:
            raise InvalidInput(f"control_socket={str(self._path)!r}: {error}") from error
        self._spare = _spare()
        watcher.watch(self._listener.fileno())

    def _listen(self, path: Path) -> socket.socket:
        _check_parent(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        unborn = f"{path}{UNBORN}"  # it gets its name once it can be reached: before, it would look like a dead one
        try:
            os.fchmod(listener.fileno(), 0o600)  # before it has a name, so it never has another mode
            with contextlib.suppress(FileNotFoundError):
                os.unlink(unborn)
            listener.bind(unborn)
            listener.listen(MAX_CALLERS)
            try:
                _take_name(unborn, path)
            finally:
                os.unlink(unborn)
        except BaseException:
            listener.close()
            raise
        found = path.lstat()
        self._inode = (found.st_dev, found.st_ino)
        return listener

    def take_turn(self, readable: set[int]) -> None:
        """Let callers in, hear them, answer; a moment each. `readable` are descriptors that something is up with."""
        if self._listener is None:
            return
        for fd in self._callers.keys() & readable:
            self._serve(self._callers[fd])
        if self._listener.fileno() in readable:
            for _ in range(PER_TURN):
                if not self._let_in(self._listener):
                    break

    def close(self) -> None:
        """Stop listening, and remove the path if it is still ours. May be called twice."""
        for caller in list(self._callers.values()):
            caller.socket.close()
        self._callers.clear()
        listener, self._listener = self._listener, None
        if listener is None or self._path is None:
            return
        listener.close()
        if self._spare is not None:
            os.close(self._spare)
        with contextlib.suppress(OSError):
            found = self._path.lstat()
            if (found.st_dev, found.st_ino) == self._inode:
                self._path.unlink()

    def after_fork(self) -> None:
        """This is a forked child: let go of what the parent has, so that its end shows when the parent's has come."""
        for caller in list(self._callers.values()):
            caller.socket.close()
        if self._listener is not None:
            self._listener.close()

    # Callers

    def _let_in(self, listener: socket.socket) -> bool:
        """Take one who calls; False if there is nobody more."""
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, ConnectionError):
            return False
        except OSError as error:  # no descriptor is left
            log.warning("control socket: %s", error)
            self._turn_away(listener)
            return False
        connection.setblocking(False)
        uid = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[1]
        if uid not in (os.geteuid(), 0):
            log.warning("control socket: user %d was turned away", uid)
            connection.close()
            return True
        if len(self._callers) >= MAX_CALLERS:
            self._drop(next(iter(self._callers.values())))
        caller = self._callers[connection.fileno()] = _Caller(connection)
        self._watcher.watch(connection.fileno())
        self._serve(caller)
        return True

    def _turn_away(self, listener: socket.socket) -> None:
        """End a call there is no descriptor for, by means of one that is kept for that: it would wake us for ever."""
        if self._spare is not None:
            os.close(self._spare)
            with contextlib.suppress(OSError):
                listener.accept()[0].close()
            self._spare = _spare()
        if self._spare is None:
            log.error("control socket: no descriptor is left, nobody is heard any more")
            self._watcher.unwatch(listener.fileno())

    def _serve(self, caller: _Caller) -> None:
        try:
            over = self._hear(caller) if caller.answer is None else self._say(caller, caller.answer)
        except BlockingIOError:
            return
        except OSError:
            over = True
        if over:
            self._drop(caller)

    def _hear(self, caller: _Caller) -> bool:
        data = caller.socket.recv(CHUNK)
        caller.said += data
        line, end, _ = caller.said.partition(b"\n")
        if not end:
            return not data or len(caller.said) > MAX_REQUEST_NBYTES
        if len(line) > MAX_REQUEST_NBYTES:
            return True
        caller.answer = memoryview(self._answer(bytes(line)))
        self._watcher.watch(caller.socket.fileno(), writable=True)
        return self._say(caller, caller.answer)

    def _say(self, caller: _Caller, answer: memoryview) -> bool:
        caller.answer = answer[caller.socket.send(answer) :]
        return not caller.answer

    def _drop(self, caller: _Caller) -> None:
        fd = caller.socket.fileno()
        del self._callers[fd]
        self._watcher.unwatch(fd)
        caller.socket.close()


def _spare() -> int | None:
    """A descriptor to give up when there is no other."""
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def _take_name(unborn: str, path: Path) -> None:
    """Give a listening socket its path, unless somebody lives there."""
    try:
        os.link(unborn, path)
    except FileExistsError:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise
        if not is_dead(path):
            raise OSError(errno.EADDRINUSE, "another endpoint listens there") from None
        path.unlink()
        os.link(unborn, path)


def _check_parent(path: Path) -> None:
    """Others must not be able to put something else where the socket is."""
    found = path.parent.stat()
    open_to_others = found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX
    if open_to_others or found.st_uid not in (os.geteuid(), 0):
        why = f"others can write to {path.parent}; choose a folder that is yours (chmod 700)"
        raise InvalidInput(f"control_socket={str(path)!r}: {why}")
