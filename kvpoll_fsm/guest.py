"""Who has a turn of his own in the driver's loop."""

from __future__ import annotations

from typing import Protocol

from kvpoll_fsm.layout import Layout
from kvpoll_fsm.staging import Destination
from kvpoll_fsm.switching import Choice

__all__ = ["Guest"]


class Guest(Protocol):
    """Has a turn in every turn of the loop; the mover's desk is one."""

    def fileno(self) -> int:
        """Readable when the guest has something to do; watched from the start."""
        ...

    def take_turn(self, readable: set[int]) -> None:
        """Do what there is to do, before the core's effects are carried out; `readable` are watched descriptors."""
        ...

    def tell(self) -> None:
        """Tell the host what is new of its rooms: peers are about to be told."""
        ...

    def end_turn(self) -> None:
        """The effects of this turn have been carried out."""
        ...

    def switched(self, choice: Choice) -> None:
        """New rooms have other transports from now on."""
        ...

    def destination(self, layout: Layout, total_tokens: int) -> Destination:
        """Where a receiver's room goes, instead of new arrays."""
        ...
