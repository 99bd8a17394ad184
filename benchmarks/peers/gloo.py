"""torch.distributed with gloo: a tensor per piece, all in flight at once."""

from __future__ import annotations

import datetime
import socket
from typing import Any

from benchmarks.cases import Case
from benchmarks.peers.base import Peer, Side, Told

__all__ = ["PEERS"]


class _Rank(Side):
    """What both have."""

    rank = 0
    other = 1

    def join(self, told: Told) -> None:
        """Form a group of two."""
        import torch
        import torch.distributed as dist

        self._dist: Any = dist
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{told['port']}",
            rank=self.rank,
            world_size=2,
            timeout=datetime.timedelta(seconds=60),
        )
        self._memory = torch.frombuffer(self.memory.buffer, dtype=torch.uint8)
        self._answer = torch.zeros(1, dtype=torch.uint8)

    def prepare(self, case: Case, told: Told) -> Told:
        """A tensor per piece."""
        pieces = case.pieces()
        starts = [piece.dst if self.rank == 0 else piece.src for piece in pieces]
        self._tensors = [self._memory[start : start + case.block_nbytes] for start in starts]
        return {}

    def close(self) -> None:
        """Leave the group."""
        self._dist.destroy_process_group()


class Receiver(_Rank):
    """Rank 0."""

    def listen(self) -> Told:
        """Find a free port for the group's store."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            return {"port": free.getsockname()[1]}

    def transfer(self) -> None:
        """Receive all, answer."""
        for work in [self._dist.irecv(tensor, self.other) for tensor in self._tensors]:
            work.wait()
        self._dist.send(self._answer, self.other)


class Sender(_Rank):
    """Rank 1."""

    rank = 1
    other = 0

    def transfer(self) -> None:
        """Send all, wait for the answer."""
        for work in [self._dist.isend(tensor, self.other) for tensor in self._tensors]:
            work.wait()
        self._dist.recv(self._answer, self.other)


PEERS = [
    Peer(
        "torch gloo",
        "other",
        Sender,
        Receiver,
        settings="isend and irecv per piece, all at once; loopback interface",
        needs=("torch",),
        env={"GLOO_SOCKET_IFNAME": "lo"},
    )
]
