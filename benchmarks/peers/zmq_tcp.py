"""pyzmq over tcp: a message per piece, received into place, one message back."""

from __future__ import annotations

import zmq

from benchmarks.cases import Case
from benchmarks.peers.base import Peer, Side, Told

__all__ = ["PEERS"]


class _Pair(Side):
    """What both have."""

    def close(self) -> None:
        """Close socket and context."""
        self._context.destroy(linger=0)

    def _open(self) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)


class Receiver(_Pair):
    """Reads into place."""

    def listen(self) -> Told:
        """Bind."""
        self._open()
        return {"port": self._socket.bind_to_random_port("tcp://127.0.0.1")}

    def prepare(self, case: Case, told: Told) -> Told:
        """Where each message goes."""
        self._views = self.memory.views([(piece.dst, piece.nbytes) for piece in case.pieces()])
        return {}

    def transfer(self) -> None:
        """Take all, answer."""
        for view in self._views:
            self._socket.recv_into(view)
        self._socket.send(b"!")


class Sender(_Pair):
    """Sends from place."""

    def join(self, told: Told) -> None:
        """Connect."""
        self._open()
        self._socket.connect(f"tcp://127.0.0.1:{told['port']}")

    def prepare(self, case: Case, told: Told) -> Told:
        """What each message is."""
        self._views = self.memory.views([(piece.src, piece.nbytes) for piece in case.pieces()])
        return {}

    def transfer(self) -> None:
        """Send all as one message of many frames, wait for the answer."""
        self._socket.send_multipart(self._views, copy=False)
        self._socket.recv()


PEERS = [
    Peer(
        "pyzmq tcp",
        "other",
        Sender,
        Receiver,
        settings="PAIR, one io thread, send_multipart(copy=False), recv_into the destination",
        needs=("zmq",),
    )
]
