"""The limit: one thread copies into memory of the other process that it has mapped. Nobody is told of it."""

from __future__ import annotations

import mmap
import os

from benchmarks.cases import Case
from benchmarks.peers.base import Peer, Side, Told

__all__ = ["PEERS"]


class Receiver(Side):
    """Owns the memory and does nothing."""

    def listen(self) -> Told:
        """Where the memory is to be had."""
        return {"pid": os.getpid(), "fd": self.memory.fd}


class Sender(Side):
    """Copies."""

    def join(self, told: Told) -> None:
        """Map the receiver's memory, every page present."""
        fd = os.open(f"/proc/{told['pid']}/fd/{told['fd']}", os.O_RDWR)
        try:
            mapped = mmap.mmap(fd, len(self.memory.buffer), flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        finally:
            os.close(fd)
        self._target = memoryview(mapped)
        self._copies: list[tuple[memoryview, memoryview]] = []

    def prepare(self, case: Case, told: Told) -> Told:
        """Cut both sides into the views to copy: the copy itself is then one memmove in C each."""
        self._copies = [
            (
                self._target[piece.dst : piece.dst + piece.nbytes],
                self.memory.buffer[piece.src : piece.src + piece.nbytes],
            )
            for piece in case.pieces()
        ]
        return {}

    def transfer(self) -> None:
        """Copy all."""
        for target, source in self._copies:
            target[:] = source


PEERS = [
    Peer(
        "memmove",
        "limit",
        Sender,
        Receiver,
        settings="one thread, a mapping of the destination, no word to the receiver",
        checksum="none",
        loop="beside",
    )
]
