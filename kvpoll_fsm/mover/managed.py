"""What an engine with a mover cannot do: memory that the host's engine owns cannot be given to a mover."""

from __future__ import annotations

from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.requests import ReceiverOrder
from kvpoll_fsm.sources import EngineBlocks
from kvpoll_fsm.view import RoomView

__all__ = ["ManagedOnly", "needs_thread"]


class ManagedOnly:
    """The methods of an `engine.Engine` that are for memory of the host's own: each raises InvalidInput."""

    def admit_receiver(self, view: RoomView, order: ReceiverOrder) -> None:
        """For blocks that the host names."""
        raise needs_thread()

    def add_blocks(self, source: EngineBlocks, blocks: tuple[int, ...], tokens: int) -> None:
        """For blocks that the host has filled."""
        raise needs_thread()

    def resume(self, view: RoomView, blocks: tuple[int, ...]) -> None:
        """For blocks that the host names."""
        raise needs_thread()

    def release(self, view: RoomView, part: int) -> None:
        """For blocks that the host named."""
        raise needs_thread()


def needs_thread() -> InvalidInput:
    """Why it is refused."""
    return InvalidInput("memory of the engine's own needs isolation='thread'")
