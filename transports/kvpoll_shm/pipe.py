"""One connection: messages in and out without waiting, and file descriptors with them."""

from __future__ import annotations

import logging
import os
import select
import socket
import traceback
from array import array
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from kvpoll_common.door import Refused
from kvpoll_common.loop import Reactor
from kvpoll_fsm.errors import MalformedMessage
from kvpoll_shm import wire

__all__ = ["ENDED", "Owner", "Pipe"]

_log = logging.getLogger("kvpoll_shm")

ENDED = "the other side ended the connection"
_ANCILLARY_NBYTES = socket.CMSG_SPACE(wire.MAX_REGIONS * array("i").itemsize)
_TURNS = 64
"""Packets read before others have their turn."""
_FLAGS = socket.MSG_CMSG_CLOEXEC


class Owner(Protocol):
    """Whom a connection belongs to."""

    def received(self, message: wire.Message, fds: list[int]) -> None:
        """A message came; the file descriptors with it are closed afterwards.

        Raises:
            MalformedMessage: It should not have come: the connection ends.
            Refused: Likewise.
            OSError: Likewise.
        """
        ...

    def ended(self, error: Exception, by_peer: bool) -> None:
        """The connection is gone and closed. `by_peer`: the other side has closed it, or is no more."""
        ...


class Pipe:
    """A connected socket on a reactor; used by the reactor's thread alone."""

    def __init__(self, reactor: Reactor, sock: socket.socket, owner: Owner) -> None:
        """Take the socket over."""
        self._reactor = reactor
        self._socket = sock
        self._owner = owner
        self._queue: deque[tuple[bytes, Sequence[int]]] = deque()
        self._buffer = memoryview(bytearray(wire.PACKET_NBYTES))
        self._open = True
        self._mask = 0
        self._watch(select.EPOLLIN)

    def send(self, packet: bytes, fds: Sequence[int] = ()) -> None:
        """Send, or keep until there is room. The file descriptors are the pipe's to close."""
        if not self._open:
            return _close_all(fds)
        self._queue.append((packet, fds))
        if len(self._queue) == 1:
            self.ready(select.EPOLLOUT)

    def finish(self) -> None:
        """Send nothing more, and tell the other side so."""
        self._drop_queue()
        try:
            self._watch(select.EPOLLIN)
            self._socket.shutdown(socket.SHUT_WR)
        except OSError as error:  # it has ended already
            self._end(error, by_peer=True)

    def close(self) -> None:
        """End the connection, for the other side too, whoever else has a copy of the socket. May be called twice."""
        if not self._open:
            return
        self._open = False
        self._drop_queue()
        self._reactor.unwatch(self._socket.fileno())
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other side was first
            pass
        finally:
            self._socket.close()

    def ready(self, mask: int) -> None:
        """The socket can be read or written, or has ended."""
        try:
            if mask & ~select.EPOLLIN:
                self._flush()
            if mask & ~select.EPOLLOUT:
                self._read_some()
        except OSError as error:
            self._end(error, by_peer=isinstance(error, (BrokenPipeError, ConnectionResetError, EOFError)))
        except (MalformedMessage, Refused) as error:
            self._end(error, by_peer=False)
        except Exception as error:
            # A mistake of ours: this connection ends, the others go on.
            # Logged as text: a record that keeps the traceback would keep the arenas' memory in use.
            _log.error("a connection is given up:\n%s", traceback.format_exc())
            self._end(error, by_peer=False)

    def _end(self, error: Exception, by_peer: bool) -> None:
        if self._open:
            self.close()
            self._owner.ended(error, by_peer)

    def _flush(self) -> None:
        while self._queue:
            packet, fds = self._queue[0]
            try:
                self._send(packet, fds)
            except BlockingIOError:
                return self._watch(select.EPOLLIN | select.EPOLLOUT)
            self._queue.popleft()
            _close_all(fds)
        self._watch(select.EPOLLIN)

    def _watch(self, mask: int) -> None:
        if mask != self._mask:
            self._mask = mask
            self._reactor.watch(self._socket.fileno(), mask, self)

    def _send(self, packet: bytes, fds: Sequence[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        self._socket.sendmsg([packet], rights, socket.MSG_NOSIGNAL)

    def _read_some(self) -> None:
        """Take what is there, and not too much of it: a driver that turns for each packet does little else."""
        for _ in range(_TURNS):
            if not self._open or not self._read():
                return

    def _read(self) -> bool:
        """Take one packet, if there is one."""
        try:
            nbytes, ancillary, flags, _ = self._socket.recvmsg_into([self._buffer], _ANCILLARY_NBYTES, _FLAGS)
        except BlockingIOError:
            return False
        fds = [fd for _, _, data in ancillary for fd in _fds(data)] if ancillary else []
        try:
            if not nbytes:
                raise ConnectionResetError(ENDED)
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise MalformedMessage(f"a packet of more than {wire.PACKET_NBYTES} bytes, or too much with it")
            self._owner.received(wire.decode(self._buffer[:nbytes]), fds)
        finally:
            _close_all(fds)
        return True

    def _drop_queue(self) -> None:
        for _, fds in self._queue:
            _close_all(fds)
        self._queue.clear()


def _fds(data: bytes) -> array[int]:
    fds = array("i")
    fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
