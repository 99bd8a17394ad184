"""What a sender's rooms are sent from, besides arrays that this process can read (`staging.TokenSource`)."""

from __future__ import annotations

import abc
from collections.abc import Callable

from kvpoll_fsm.commands import StartPart
from kvpoll_fsm.layout import cut, runs
from kvpoll_fsm.staging import TokenSource

__all__ = ["EngineBlocks", "RoomSource", "Runs", "StagedElsewhere", "Unreadable"]

Runs = list[tuple[int, int]]
"""(first slot, length) of tokens that lie side by side."""


class EngineBlocks:
    """Source blocks that the engine names, in token order; each addition starts at its first block's start."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._runs: Runs = []
        self._first_block: int | None = None

    def add(self, blocks: tuple[int, ...], tokens: int) -> None:
        """Append `tokens` tokens that lie in `blocks`."""
        self._runs += runs(blocks, self._block_tokens, tokens)
        if self._first_block is None:
            self._first_block = blocks[0]

    def slots(self, offset: int, tokens: int) -> Runs:
        """Where tokens [offset, offset + tokens) lie: (first slot, length) runs."""
        return list(cut(self._runs, offset, tokens))

    @property
    def room_block(self) -> int:
        """The block that holds the per-room values."""
        return self._first_block or 0


class StagedElsewhere(abc.ABC):
    """A room's data that this process cannot read: another copies them into our blocks."""

    @abc.abstractmethod
    def stage(self, command: StartPart, then: Callable[[Exception | None], None]) -> None:
        """Have a part copied, and call `then` on the driver's thread, once, with what kept it from being so."""


class Unreadable(Exception):
    """A source cannot be read here after all.

    Attributes:
        instead: What the room is staged from instead.
    """

    def __init__(self, why: str, instead: StagedElsewhere) -> None:
        super().__init__(why)
        self.instead = instead


RoomSource = TokenSource | EngineBlocks | StagedElsewhere
