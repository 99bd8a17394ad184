"""What one receiver rank of a room is opened with."""

from __future__ import annotations

from msgspec import Struct

__all__ = ["ReceiverOptions"]


class ReceiverOptions(Struct, frozen=True):
    """What a receiver's room is opened with.

    Attributes:
        conn: The connection to the sender's endpoint.
        ranks: How many receiver ranks the room has.
        blocks: Blocks of one grant; 0 for a dummy rank, which holds no data.
        block_tokens: Tokens per block.
        resume: "drain", "extend" or "manual".
        exact: The engine's own blocks for part 0, or () to let the pool choose.
        window: Grants the room may have out at a time: 1, or 2 with "drain".
    """

    conn: int
    ranks: int
    blocks: int
    block_tokens: int
    resume: str
    exact: tuple[int, ...] = ()
    window: int = 1

    @property
    def dummy(self) -> bool:
        """The rank counts, grants nothing, acks by definition and gets every outcome."""
        return self.blocks == 0
