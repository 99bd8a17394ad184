"""The sender's end of one connection: frames go out, answers come back."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
import time

from kvpoll_tcp.handshake import Descriptor, call_securely, prove_to_receiver
from kvpoll_tcp.settings import TcpSettings
from kvpoll_tcp.sockets import Broken, Plug, Sock, connect, send_timeout
from kvpoll_tcp.wire import ACK_NBYTES, Ack

__all__ = ["SEND_LOOK_S", "Stream"]

SEND_LOOK_S = 0.1
"""How long a send may wait before its thread looks at its orders and answers again."""
_ANSWERS_NBYTES = ACK_NBYTES << 10
_COUNT = struct.Struct("@i")


class Stream:
    """A connection on which the handshake has succeeded. Used by one thread; `Plug.cut` is for the others."""

    def __init__(self, sock: Sock) -> None:
        self._socket = sock
        self._rest = b""
        self._moved_at = time.monotonic()
        self._outgoing_nbytes = 0

    @classmethod
    def open(cls, plug: Plug, peer: Descriptor, settings: TcpSettings, writer: bytes) -> Stream:
        """Connect and shake hands, as the transport of number `writer`.

        Raises:
            OSError: Not reached, or cut off.
            Refused: Not the peer we mean.
            MalformedMessage: Whoever answers does not speak our protocol.
        """
        plain = connect(plug, peer.host, peer.port, settings)
        deadline = time.monotonic() + settings.handshake_s
        sock: Sock = plain
        if settings.tls is not None:
            sock = call_securely(plain, peer, settings.tls[1], settings.handshake_s)
        prove_to_receiver(sock, peer, deadline - time.monotonic(), writer)
        send_timeout(sock, SEND_LOOK_S)
        return cls(sock)

    def fileno(self) -> int:
        """Readable when answers are here."""
        return self._socket.fileno()

    def send(self, views: list[memoryview], flags: int = 0) -> int:
        """Hand bytes to the kernel; returns how many it took, perhaps none. MSG_DONTWAIT among the flags: at once.

        Raises:
            OSError: As the socket says.
        """
        try:
            sent = self._socket.sendmsg(views, (), flags | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        self._moved_at = time.monotonic()
        return sent

    def answers(self) -> list[Ack]:
        """The answers that are here, without waiting.

        Raises:
            Broken: The peer has closed the connection.
            MalformedMessage: It sent something else.
            OSError: As the socket says.
        """
        data = self._rest + self._read()
        if len(data) == len(self._rest):
            return []
        self._moved_at = time.monotonic()
        whole = len(data) - len(data) % ACK_NBYTES
        self._rest = data[whole:]
        return Ack.unpack_all(data[:whole])

    def _read(self) -> bytes:
        """What is here. That the connection has ended counts once nothing is left to read; it is met again then."""
        data = b""
        while True:
            try:
                more = self._socket.recv(_ANSWERS_NBYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return data
            except OSError:
                if data:
                    return data
                raise
            if not more and not data:
                raise Broken("the peer closed the connection")
            data += more
            if len(more) < _ANSWERS_NBYTES:  # else TLS may hold some that no poll of the socket shows
                return data

    def still_since(self) -> float:
        """When something moved last: a send, an answer, or bytes that the peer's kernel took from ours."""
        (nbytes,) = _COUNT.unpack(fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(_COUNT.size)))
        if nbytes != self._outgoing_nbytes:
            self._outgoing_nbytes = nbytes
            self._moved_at = time.monotonic()
        return self._moved_at
