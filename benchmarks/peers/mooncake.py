"""Mooncake's transfer engine over tcp: one-sided writes into registered memory."""

from __future__ import annotations

from typing import Any

from benchmarks.cases import MIB, Case
from benchmarks.peers.base import Peer, Side, Told

__all__ = ["PEERS"]

BATCH = 512
"""Pieces of one call; from 2,048 on the engine refuses, and 1,024 may be outstanding."""


class _Engine(Side):
    """What both have."""

    def _start(self) -> None:
        from mooncake.engine import TransferEngine

        self._engine: Any = TransferEngine()
        self._check("initialize", self._engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""))
        self._check("register_memory", self._engine.register_memory(self.memory.address, len(self.memory.buffer)))

    def _check(self, what: str, code: int) -> None:
        if code:
            raise RuntimeError(f"{what} returned {code}")


class Receiver(_Engine):
    """Owns the memory; its engine does the rest."""

    def listen(self) -> Told:
        """Start the engine."""
        self._start()
        return {"name": f"127.0.0.1:{self._engine.get_rpc_port()}", "address": self.memory.address}


class Sender(_Engine):
    """Writes."""

    def join(self, told: Told) -> None:
        """Start the engine."""
        self._start()
        self._peer, self._base = told["name"], told["address"]

    def prepare(self, case: Case, told: Told) -> Told:
        """The addresses of each call."""
        pieces = case.pieces()
        self._calls = [
            (
                [self.memory.address + piece.src for piece in batch],
                [self._base + piece.dst for piece in batch],
                [piece.nbytes for piece in batch],
            )
            for batch in (pieces[first : first + BATCH] for first in range(0, len(pieces), BATCH))
        ]
        return {}

    def transfer(self) -> None:
        """Write all; the engine says when they are in place."""
        for sources, targets, sizes in self._calls:
            if len(sizes) == 1:
                code = self._engine.transfer_sync_write(self._peer, sources[0], targets[0], sizes[0])
            else:
                code = self._engine.batch_transfer_sync_write(self._peer, sources, targets, sizes)
            self._check("transfer", code)


PEERS = [
    Peer(
        "mooncake tcp",
        "other",
        Sender,
        Receiver,
        settings="P2PHANDSHAKE, synchronous writes, 512 pieces a batch, MC_TCP_SLICE_SIZE=4 MiB "
        "instead of its default of 64 KiB",
        needs=("mooncake",),
        env={"MC_FORCE_TCP": "1", "MC_TCP_SLICE_SIZE": str(4 * MIB), "MC_LOG_LEVEL": "ERROR"},
    )
]
