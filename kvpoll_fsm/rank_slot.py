"""What a sender knows of one receiver rank of a room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvpoll_fsm.messages import BlockGrant

__all__ = ["RankSlot"]


@dataclass(slots=True)
class RankSlot:
    """What the sender knows of one receiver rank.

    Attributes:
        transports: Those still worth trying, best first; the first is in use.
        reachable: The data port answered on the first of them.
        contested: It took the place of a life that another endpoint had announced. Who came last need not be the later.
        passed_over: Why others that the policy likes better are not among them; for people.
        grant: Blocks for the current part.
        second: Blocks for the part after it, which the rank granted when this one had landed.
        poll: The rank's answer for the current part: None until it is known.
        reported: PartReport has been sent; an ack is due.
        writing: A StartPart target whose PartWritten is due.
        landing: Writes ended, but may land still.
        reading: Writes ended, but may read the source still.
        told: The rank knows that nothing is in flight after the room's end.
        waits_for_blocks: Its last heartbeat said so.
        closed: Nothing can land there any more: it has fenced, or its endpoint is gone.
        gave_up: It has ended the room itself, and waits for no more than word that nothing is in flight.
    """

    conn: int
    generation: int
    dummy: bool
    transports: tuple[str, ...] = ()
    reachable: bool = False
    grant: BlockGrant | None = None
    second: BlockGrant | None = None
    poll: bool | None = None
    reported: bool = False
    writing: bool = False
    landing: bool = False
    reading: bool = False
    told: bool = False
    waits_for_blocks: bool = False
    closed: bool = False
    gave_up: bool = False
    attempt: int = 0
    contested: bool = False
    passed_over: tuple[str, ...] = ()

    def close(self) -> None:
        """Nothing can land there any more, and there is nobody who needs to be told so."""
        self.closed = self.told = True
        self.landing = False

    @property
    def in_flight(self) -> bool:
        """A write to this rank may land still."""
        return self.writing or self.landing

    def key(self) -> tuple[Any, ...]:
        """Canonical plain value."""
        return tuple(getattr(self, name) for name in self.__slots__ if name != "passed_over")
