"""What one transfer consists of: a size, in one piece or scattered over blocks."""

from __future__ import annotations

import random
from dataclasses import dataclass

__all__ = ["CASES", "KIB", "MIB", "ROOM", "Case", "Piece"]

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes that lie together on both sides."""

    src: int
    dst: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Case:
    """One transfer.

    Attributes:
        blocks: How many blocks, each `block_nbytes`; 1 means contiguous.
        block_nbytes: Bytes of a block.
    """

    blocks: int
    block_nbytes: int

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return self.blocks * self.block_nbytes

    @property
    def span_nbytes(self) -> int:
        """Memory a side needs: scattered blocks take every second slot."""
        return self.nbytes * (1 if self.blocks == 1 else 2)

    @property
    def name(self) -> str:
        """As tables and the JSON have it: `64MiB`, `64x128KiB`."""
        return _size(self.nbytes) if self.blocks == 1 else f"{self.blocks}x{_size(self.block_nbytes)}"

    def slots(self, side: str) -> list[int]:
        """Which slots of `block_nbytes` the blocks lie in, in the order they are sent; other ones on each side."""
        if self.blocks == 1:
            return [0]
        slots = list(range(side == "receiver", 2 * self.blocks, 2))
        random.Random(side).shuffle(slots)
        return slots

    def pieces(self) -> list[Piece]:
        """Where the bytes lie on both sides."""
        both = zip(self.slots("sender"), self.slots("receiver"), strict=True)
        return [Piece(src * self.block_nbytes, dst * self.block_nbytes, self.block_nbytes) for src, dst in both]


def _size(nbytes: int) -> str:
    for unit, name in ((MIB, "MiB"), (KIB, "KiB")):
        if nbytes >= unit and not nbytes % unit:
            return f"{nbytes // unit}{name}"
    return f"{nbytes}B"


_ALL = (
    Case(1, KIB),
    Case(1, 64 * KIB),
    Case(1, MIB),
    Case(1, 8 * MIB),
    Case(1, 64 * MIB),
    Case(1, 256 * MIB),
    Case(64, 128 * KIB),
    Case(2048, 4 * KIB),
)
CASES = {case.name: case for case in _ALL}
"""All cases by name, in the order of the tables."""

ROOM = CASES["1KiB"]
"""What a small room carries."""
