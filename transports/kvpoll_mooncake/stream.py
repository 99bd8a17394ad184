"""Frames over a connected stream socket, in and out without waiting, and file descriptors with them."""

from __future__ import annotations

import array
import logging
import os
import select
import socket
import traceback
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from kvpoll_common.door import Refused
from kvpoll_common.loop import Reactor
from kvpoll_fsm.errors import MalformedMessage
from kvpoll_mooncake.framing import LENGTH, pack

__all__ = ["ENDED", "Owner", "Stream"]

_log = logging.getLogger("kvpoll_mooncake")

ENDED = "the other side ended the connection"
_READ_NBYTES = 64 << 10
_TURNS = 16
"""Reads before others have their turn."""
_BACKLOG_NBYTES = 64 << 20
"""More than this is not kept for one who does not read."""


class Owner(Protocol):
    """Whom a connection belongs to."""

    def received(self, frame: bytes) -> None:
        """A frame came.

        Raises:
            MalformedMessage: It should not have come: the connection ends.
            Refused: Likewise.
        """
        ...

    def ended(self, error: Exception) -> None:
        """The connection is gone and closed."""
        ...


class Stream:
    """A stream socket on a reactor; used by the reactor's thread alone. It may still be connecting."""

    def __init__(self, reactor: Reactor, sock: socket.socket, owner: Owner, most_nbytes: int) -> None:
        """Take the socket over, which does not block.

        Args:
            reactor: Whose turn it is to read and write.
            sock: The socket.
            owner: Hears what comes.
            most_nbytes: A longer frame ends the connection.
        """
        self._reactor = reactor
        self._socket = sock
        self._owner = owner
        self._most_nbytes = most_nbytes
        self._queue: deque[tuple[memoryview, Sequence[int]]] = deque()
        self._queued_nbytes = 0
        self._received = bytearray()
        self._open = True
        self._mask = 0
        self._watch(select.EPOLLIN | select.EPOLLOUT)

    def send(self, frame: bytes, fds: Sequence[int] = ()) -> None:
        """Send, or keep until there is room. The file descriptors are the stream's to close."""
        if not self._open:
            return _close_all(fds)
        data = memoryview(pack(frame))
        self._queued_nbytes += len(data)
        self._queue.append((data, fds))
        if self._queued_nbytes > _BACKLOG_NBYTES:
            return self._end(Refused("does not read what it is sent"))
        if len(self._queue) == 1 and not self._mask & select.EPOLLOUT:
            self.ready(select.EPOLLOUT)

    def close(self) -> None:
        """End the connection, after what the socket still takes. May be called twice."""
        if not self._open:
            return
        self._open = False
        for _, fds in self._queue:
            _close_all(fds)
        self._queue.clear()
        self._reactor.unwatch(self._socket.fileno())
        self._socket.close()

    def finish(self) -> None:
        """Send nothing more, and tell the other side so, which may still say something."""
        if self._open:
            try:
                self._socket.shutdown(socket.SHUT_WR)
            except OSError as error:  # it has ended already
                self._end(error)

    def ready(self, mask: int) -> None:
        """The socket can be read or written, or has ended."""
        try:
            if mask & ~select.EPOLLIN:
                self._flush()
            if mask & ~select.EPOLLOUT:
                self._read_some()
        except (OSError, MalformedMessage, Refused) as error:
            self._end(error)
        except Exception as error:
            # A mistake of ours: this connection ends, the others go on.
            # Logged as text: a record that keeps the traceback would keep the arenas' memory in use.
            _log.error("a connection is given up:\n%s", traceback.format_exc())
            self._end(error)

    def _end(self, error: Exception) -> None:
        if self._open:
            self.close()
            self._owner.ended(error)

    def _flush(self) -> None:
        while self._queue:
            data, fds = self._queue[0]
            try:
                taken = self._send(data, fds)
            except BlockingIOError:
                return self._watch(select.EPOLLIN | select.EPOLLOUT)
            _close_all(fds)
            self._queued_nbytes -= taken
            if taken < len(data):
                self._queue[0] = data[taken:], ()
            else:
                self._queue.popleft()
        self._watch(select.EPOLLIN)

    def _send(self, data: memoryview, fds: Sequence[int]) -> int:
        if not fds:
            return self._socket.send(data, socket.MSG_NOSIGNAL)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        return self._socket.sendmsg([data], rights, socket.MSG_NOSIGNAL)

    def _watch(self, mask: int) -> None:
        if self._open and mask != self._mask:
            self._mask = mask
            self._reactor.watch(self._socket.fileno(), mask, self)

    def _read_some(self) -> None:
        for _ in range(_TURNS):
            if not self._open:
                return
            try:
                data = self._socket.recv(_READ_NBYTES)
            except BlockingIOError:
                return
            if not data:
                raise ConnectionResetError(ENDED)
            self._received += data
            self._deliver()
            if len(data) < _READ_NBYTES:
                return

    def _deliver(self) -> None:
        """Hand over the frames that are whole."""
        at, received = 0, self._received
        try:
            while self._open and len(received) - at >= LENGTH.size:
                (nbytes,) = LENGTH.unpack_from(received, at)
                if nbytes > self._most_nbytes:
                    raise MalformedMessage(f"a frame of {nbytes} bytes")
                end = at + LENGTH.size + nbytes
                if len(received) < end:
                    return
                frame = bytes(received[at + LENGTH.size : end])
                at = end
                self._owner.received(frame)
        finally:
            del received[:at]


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
