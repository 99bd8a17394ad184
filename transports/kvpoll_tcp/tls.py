"""TLS around a connection, for those who give two `ssl.SSLContext`s.

A socket here blocks in the kernel, with the kernel's timeouts, and is used by one thread. Python's own SSLSocket
would wait for ever in that case, so records go through memory: what it costs is one copy of the bytes on either
side, besides the encryption, and no scatter and gather by the kernel.

The receiver's descriptor, which travels over the control plane, names the certificate it shows. So the sender
knows it is the receiver that it speaks to even where its context verifies less.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import socket
import ssl
import time
from collections.abc import Iterable, Sequence
from typing import Any

from kvpoll_tcp.sockets import Broken, receive_timeout, send_timeout

__all__ = ["TlsSocket", "check_fingerprint"]

_PIECE_NBYTES = 1 << 18
"""So many bytes are encrypted, or read from the kernel, at a time."""


class _NoRecord(BlockingIOError):
    """Something came, but no whole record."""


class TlsSocket:
    """The calls of a socket that this transport makes, with their meaning, over TLS."""

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool, hostname: str | None = None
    ) -> None:
        self._socket = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side, hostname)
        self._unsent = memoryview(b"")
        self._promised = 0
        self._has_ended = False

    def shake_hands(self, deadline: float) -> None:
        """Agree on keys before `deadline`, on `time.monotonic`'s clock.

        Raises:
            Broken: The deadline passed or the peer closed.
            OSError: As the socket or TLS says.
        """
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush_before(deadline)
                self._read_before(deadline)
            except ssl.SSLError:
                with contextlib.suppress(OSError):
                    self._flush_before(deadline)  # the alert: tells the peer why
                raise
            else:
                return self._flush_before(deadline)

    def peer_certificate(self) -> bytes:
        """The peer's certificate (DER), or nothing if it showed none."""
        return self._tls.getpeercert(binary_form=True) or b""

    def fileno(self) -> int:
        """Readable when something has come that was not read from the kernel."""
        return self._socket.fileno()

    def setsockopt(self, level: int, option: int, value: Any, /) -> None:
        """As a socket's: timeouts are the kernel's here too."""
        self._socket.setsockopt(level, option, value)

    def recv(self, nbytes: int, flags: int = 0, /) -> bytes:
        """At most `nbytes` bytes; may come back with BlockingIOError before a timeout is over."""
        data = bytearray(nbytes)
        return bytes(data[: self._read([memoryview(data)], flags)])

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """At least one byte, unless the peer has closed or a timeout is over."""
        view = memoryview(buffer)
        while True:
            try:
                return self._read([view[: nbytes or len(view)]], flags)
            except _NoRecord:
                continue

    def recvmsg_into(
        self, buffers: Iterable[Any], ancillary: int = 0, flags: int = 0, /
    ) -> tuple[int, list[Any], int, Any]:
        """What has come; BlockingIOError if that is nothing yet, also where bytes trickle in."""
        return self._read([memoryview(buffer) for buffer in buffers], flags), [], 0, None

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        """Encrypt and send all.

        Raises:
            Broken: The kernel's timeout passed.
        """
        self._encrypt(memoryview(data))
        try:
            self._socket.sendall(self._unsent, flags)
        except BlockingIOError as error:
            raise Broken("took too long") from error
        self._unsent = memoryview(b"")

    def sendmsg(self, buffers: Sequence[Any], ancillary: Iterable[Any] = (), flags: int = 0, /) -> int:
        """Encrypt and send the first bytes, and say how many; after BlockingIOError call again with the same bytes."""
        if not self._promised:
            piece = _gather(buffers, _PIECE_NBYTES)
            self._encrypt(memoryview(piece))
            self._promised = len(piece)
        while self._unsent:
            self._unsent = self._unsent[self._socket.send(self._unsent, flags) :]
        sent, self._promised = self._promised, 0
        return sent

    def _encrypt(self, data: memoryview) -> None:
        while data:
            data = data[self._tls.write(data) :]
        self._unsent = memoryview(bytes(self._unsent) + self._outgoing.read())

    def _read(self, views: Sequence[memoryview], flags: int) -> int:
        got = self._decrypt(views)
        if got or self._has_ended:
            return got
        data = self._socket.recv(_PIECE_NBYTES, flags & socket.MSG_DONTWAIT)
        self._incoming.write(data) if data else self._incoming.write_eof()
        got = self._decrypt(views)
        if not got and not self._has_ended:
            raise _NoRecord(errno.EAGAIN, "no whole record yet")
        return got

    def _decrypt(self, views: Sequence[memoryview]) -> int:
        """Read into place what is here already."""
        got = 0
        for view in views:
            left = view
            while left:
                nbytes = self._decrypt_into(left)
                if not nbytes:
                    return got
                left, got = left[nbytes:], got + nbytes
        return got

    def _decrypt_into(self, view: memoryview) -> int:
        read: Any = self._tls.read  # the one method has two types: with a buffer it returns how much
        try:
            nbytes = int(read(len(view), view))
        except ssl.SSLWantReadError:
            return 0
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            nbytes = 0
        self._has_ended = not nbytes
        return nbytes

    def _flush_before(self, deadline: float) -> None:
        data = self._outgoing.read()
        if data:
            send_timeout(self._socket, _left(deadline))
            self._socket.sendall(data, socket.MSG_NOSIGNAL)

    def _read_before(self, deadline: float) -> None:
        receive_timeout(self._socket, _left(deadline))
        with contextlib.suppress(BlockingIOError):
            data = self._socket.recv(_PIECE_NBYTES)
            if not data:
                raise Broken("the peer closed the connection")
            self._incoming.write(data)


def _left(deadline: float) -> float:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise Broken("took too long")
    return left_s


def _gather(buffers: Iterable[Any], most: int) -> bytes:
    """The first bytes of several pieces, at most so many."""
    pieces = []
    for buffer in buffers:
        pieces.append(memoryview(buffer)[:most])
        most -= len(pieces[-1])
        if not most:
            break
    return b"".join(pieces)


def check_fingerprint(sock: TlsSocket, expected: bytes) -> None:
    """See that the peer is the one whose descriptor we have.

    Raises:
        Broken: It shows another certificate.
    """
    if not hmac.compare_digest(hashlib.sha256(sock.peer_certificate()).digest(), expected):
        raise Broken("whoever answers at the peer's address shows another certificate than the peer's")
