"""Socket calls that block in the kernel, not in Python, and can be cut off by another thread.

`settimeout()` makes every call poll first, and next to a busy Python thread each of those system calls waits
for the interpreter again. Timeouts are therefore the kernel's, by SO_RCVTIMEO and SO_SNDTIMEO.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

from kvpoll_tcp.settings import TcpSettings

__all__ = [
    "Broken",
    "Plug",
    "Sock",
    "advance",
    "connect",
    "prepare",
    "receive_exactly",
    "receive_timeout",
    "send_timeout",
]

_TIMEVAL = struct.Struct("@ll")
_SAME_HOST_BUFFER_NBYTES = 1 << 20
"""Within one machine more is no faster: what was sent is to be in the cache still when it is read."""
_SAME_HOST_CONGESTION = b"reno"
"""No path to congest lies within one machine, and an algorithm that paces (bbr) costs a third of the speed there."""


class Broken(ConnectionError):
    """The connection is of no use any more; the text says why."""


class Sock(Protocol):
    """The calls of a connected socket that this transport makes; with TLS it is something else that has them."""

    def fileno(self) -> int:
        """To poll."""
        ...

    def setsockopt(self, level: int, option: int, value: bytes, /) -> None:
        """Set a timeout."""
        ...

    def recv(self, nbytes: int, flags: int = 0, /) -> bytes:
        """At most so many bytes; none once the peer has closed."""
        ...

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0) -> int:
        """The same, into place."""
        ...

    def recvmsg_into(
        self, buffers: Sequence[memoryview], ancillary: int = 0, flags: int = 0, /
    ) -> tuple[int, list[Any], int, Any]:
        """The same, into several places."""
        ...

    def sendall(self, data: bytes | bytearray, flags: int = 0, /) -> None:
        """All of it."""
        ...

    def sendmsg(self, buffers: Sequence[memoryview], ancillary: tuple[()] = (), flags: int = 0, /) -> int:
        """The first bytes of several places; says how many. After BlockingIOError come the same bytes again."""
        ...


class Plug:
    """Holds one thread's socket so that another thread may cut it off.

    Shutting down and closing exclude each other: a number that was closed may be another socket's already.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._is_cut = False

    def insert(self, sock: socket.socket) -> None:
        """Take the socket, or close it if we have been cut off.

        Raises:
            Broken: Cut off before.
        """
        with self._lock:
            if not self._is_cut:
                self._socket = sock
                return
        sock.close()
        raise Broken("closed by this side")

    def cut(self) -> None:
        """Make every call on the socket return, now and later. For any thread."""
        with self._lock:
            self._is_cut = True
            if self._socket is not None:
                with contextlib.suppress(OSError):  # not connected (any more): nobody is waiting in a call
                    self._socket.shutdown(socket.SHUT_RDWR)

    def pull(self) -> None:
        """Close the socket, if there is one."""
        with self._lock:
            sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()


def connect(plug: Plug, host: str, port: int, settings: TcpSettings) -> socket.socket:
    """Reach a peer; the socket is in `plug` from the start, so that waiting can be cut short.

    Raises:
        OSError: Refused, unreachable, timed out or cut off.
    """
    flags = socket.AI_NUMERICHOST
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)[0]
    sock = socket.socket(family, kind)
    plug.insert(sock)
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        sock.connect(address)
    poller = select.poll()
    poller.register(sock, select.POLLOUT)
    if not poller.poll(settings.connect_s * 1000):
        raise Broken(f"not reached within {settings.connect_s:g} s")
    error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise OSError(error, os.strerror(error))
    prepare(sock, settings)
    return sock


def prepare(sock: socket.socket, settings: TcpSettings) -> None:
    """Set a connected socket to block, not to wait for more before sending, and to notice a dead machine."""
    sock.setblocking(True)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    probe_s = max(1, round(settings.dead_peer_s / 5))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, probe_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(settings.dead_peer_s * 1000))
    nbytes = settings.buffer_nbytes
    if sock.getsockname()[0] == sock.getpeername()[0]:
        nbytes = nbytes or _SAME_HOST_BUFFER_NBYTES
        with contextlib.suppress(OSError):  # not to be had: then what the system prefers
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _SAME_HOST_CONGESTION)
    if nbytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, nbytes)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, nbytes)


def receive_timeout(sock: Sock, seconds: float) -> None:
    """Make a blocking receive return after so long; 0 waits for ever."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(seconds))


def send_timeout(sock: Sock, seconds: float) -> None:
    """Make a blocking send return after so long; 0 waits for ever."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(seconds))


def receive_exactly(sock: Sock, nbytes: int, deadline: float) -> bytes:
    """Read so many bytes before `deadline`, on `time.monotonic`'s clock.

    Raises:
        Broken: The deadline passed or the peer closed.
        OSError: As the socket says.
    """
    data = bytearray()
    while len(data) < nbytes:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise Broken("took too long")
        receive_timeout(sock, left_s)
        try:
            piece = sock.recv(nbytes - len(data), socket.MSG_WAITALL)
        except BlockingIOError:
            continue
        if not piece:
            raise Broken("the peer closed the connection")
        data += piece
    return bytes(data)


def advance(views: list[memoryview], nbytes: int) -> None:
    """Drop the first `nbytes` bytes of a list of byte views."""
    whole = 0
    while whole < len(views) and nbytes >= len(views[whole]):
        nbytes -= len(views[whole])
        whole += 1
    del views[:whole]
    if nbytes:
        views[0] = views[0][nbytes:]


def _timeval(seconds: float) -> bytes:
    micros = max(1, round(seconds * 1e6)) if seconds > 0 else 0
    return _TIMEVAL.pack(*divmod(micros, 1_000_000))
