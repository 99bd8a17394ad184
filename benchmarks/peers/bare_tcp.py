"""A bare pair of sockets: what the kernel's tcp gives a process that does nothing else."""

from __future__ import annotations

import socket

from benchmarks.cases import KIB, Case
from benchmarks.peers.base import Peer, Side, Told

__all__ = ["PEERS"]

READ_NBYTES = 64 * KIB
BUFFER_NBYTES = 512 * KIB
IOVECS = 1024


def tune(sock: socket.socket) -> None:
    """Buffers that hold several reads, and no waiting for more to send."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_NBYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_NBYTES)
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


class Receiver(Side):
    """Reads into place and answers one byte."""

    def listen(self) -> Told:
        """Listen."""
        self._listening = socket.create_server(("127.0.0.1", 0))
        tune(self._listening)
        return {"port": self._listening.getsockname()[1]}

    def join(self, told: Told) -> None:
        """Take the sender's connection."""
        self._sock, _ = self._listening.accept()
        tune(self._sock)

    def prepare(self, case: Case, told: Told) -> Told:
        """Cut the places into reads."""
        self._reads = [
            self.memory.buffer[start : min(start + READ_NBYTES, piece.dst + piece.nbytes)]
            for piece in case.pieces()
            for start in range(piece.dst, piece.dst + piece.nbytes, READ_NBYTES)
        ]
        return {}

    def transfer(self) -> None:
        """Read all, answer."""
        for view in self._reads:
            got = self._sock.recv_into(view)
            while got < len(view):
                more = self._sock.recv_into(view[got:])
                if not more:
                    raise ConnectionError("the sender has closed the connection")
                got += more
        self._sock.sendall(b"!")

    def close(self) -> None:
        """Hang up."""
        self._sock.close()
        self._listening.close()


class Sender(Side):
    """Sends from place and waits for one byte."""

    def join(self, told: Told) -> None:
        """Connect."""
        self._sock = socket.create_connection(("127.0.0.1", told["port"]))
        tune(self._sock)

    def prepare(self, case: Case, told: Told) -> Told:
        """Cut the places into vectors."""
        views = self.memory.views([(piece.src, piece.nbytes) for piece in case.pieces()])
        self._vectors = [views[first : first + IOVECS] for first in range(0, len(views), IOVECS)]
        return {}

    def transfer(self) -> None:
        """Send all, wait for the answer."""
        for vector in self._vectors:
            send_all(self._sock, vector)
        if self._sock.recv(1) != b"!":
            raise ConnectionError("the receiver has closed the connection")

    def close(self) -> None:
        """Hang up."""
        self._sock.close()


def send_all(sock: socket.socket, views: list[memoryview]) -> None:
    """One sendmsg, and what it left over."""
    sent = sock.sendmsg(views)
    for view in views:
        if sent < len(view):
            sock.sendall(view[sent:])
        sent = max(0, sent - len(view))


PEERS = [
    Peer(
        "bare tcp",
        "limit",
        Sender,
        Receiver,
        settings="one connection, reno, sendmsg of up to 1,024 pieces, reads of 64 KiB into 512 KiB, a byte back",
        loop="beside",
    )
]
