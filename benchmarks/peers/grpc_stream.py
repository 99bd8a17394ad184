"""grpc: chunks of 1 MiB on one stream, copied into place by the server, one message back."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent import futures
from typing import Any

from benchmarks.cases import MIB, Case
from benchmarks.peers.base import Peer, Side, Told

__all__ = ["PEERS"]

CHUNK_NBYTES = MIB
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Receiver(Side):
    """The server; its own thread receives."""

    def listen(self) -> Told:
        """Serve."""
        import grpc

        handler = grpc.stream_stream_rpc_method_handler(self._serve)  # messages are bytes as they are
        self._server: Any = grpc.server(futures.ThreadPoolExecutor(2), options=OPTIONS)
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("bench", {"put": handler})])
        port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        return {"port": port}

    def prepare(self, case: Case, told: Told) -> Told:
        """Where each message goes."""
        self._case, self._views = case, self.memory.views([(piece.dst, piece.nbytes) for piece in case.pieces()])
        return {}

    def close(self) -> None:
        """Stop serving."""
        self._server.stop(0)

    def _serve(self, chunks: Iterator[bytes], context: object) -> Iterator[bytes]:
        at = 0
        for chunk in chunks:
            self._place(memoryview(chunk), at)
            at += len(chunk)
            if at == self._case.nbytes:
                at = 0
                yield b"!"

    def _place(self, chunk: memoryview, at: int) -> None:
        size = self._case.block_nbytes
        while chunk:
            number, start = divmod(at, size)
            take = min(len(chunk), size - start)
            self._views[number][start : start + take] = chunk[:take]
            chunk, at = chunk[take:], at + take


class Sender(Side):
    """The client."""

    def join(self, told: Told) -> None:
        """Open the stream."""
        import grpc

        self._channel = grpc.insecure_channel(f"127.0.0.1:{told['port']}", options=OPTIONS)
        self._chunks: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._answers = self._channel.stream_stream("/bench/put")(iter(self._chunks.get, None))

    def prepare(self, case: Case, told: Told) -> Told:
        """Cut the places into messages; small blocks share one."""
        step = min(CHUNK_NBYTES, case.block_nbytes)
        views = [
            self.memory.buffer[start : start + step]
            for piece in case.pieces()
            for start in range(piece.src, piece.src + piece.nbytes, step)
        ]
        each = max(1, CHUNK_NBYTES // step)
        self._messages = [views[first : first + each] for first in range(0, len(views), each)]
        return {}

    def transfer(self) -> None:
        """Send all, wait for the answer."""
        for views in self._messages:
            self._chunks.put(b"".join(views))
        next(self._answers)

    def close(self) -> None:
        """End the stream."""
        self._chunks.put(None)
        self._channel.close()


PEERS = [
    Peer(
        "grpc stream",
        "other",
        Sender,
        Receiver,
        settings="one bidirectional stream of raw bytes, messages of 1 MiB, no size limit",
        needs=("grpc",),
    )
]
