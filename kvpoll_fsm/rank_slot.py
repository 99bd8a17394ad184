"""What a sender knows of one receiver rank of a room."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from kvpoll_fsm.messages import BlockGrant

__all__ = ["RankSlot"]


class RankSlot(Struct):
    """What the sender knows of one receiver rank.

    Attributes:
        transports: Those still worth trying, best first; the first is in use.
        shut: Those whose breakers are open: worth trying when nothing else is left.
        insist: Nothing else was left, so those in use now are tried whatever their breakers say.
        stale: A better transport may work again: the next grant chooses anew.
        reachable: The data port answered on the first of them.
        reaching: It was asked to, and has not answered.
        attempt: Numbers the attempts at the current part, from 0.
        hurried: The attempt takes too long and was asked to end.
        probing: The attempt is to show whether its transport works again.
        fencing: The transport through which the attempt that failed may land still, if the rank was asked to see that
            it cannot.
        collaterals: How often the current part failed through no fault of a transport and was tried again there.
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
    shut: tuple[str, ...] = ()
    reaching: bool = False
    insist: bool = False
    stale: bool = False
    attempt: int = 0
    hurried: bool = False
    probing: bool = False
    fencing: str = ""
    collaterals: int = 0
    contested: bool = False
    passed_over: tuple[str, ...] = ()

    def begin(self) -> None:
        """The first attempt at a part."""
        self.attempt, self.collaterals = -1, 0
        self.begin_again()

    def begin_again(self) -> None:
        """The next attempt at the same part."""
        self.writing, self.attempt, self.fencing = True, self.attempt + 1, ""
        self.hurried = self.probing = False

    def choose(self, transports: tuple[str, ...], passed_over: tuple[str, ...]) -> None:
        """Begin anew with these, none of which was reached yet."""
        self.transports, self.shut, self.passed_over = transports, (), passed_over
        self.reachable = self.insist = self.stale = False

    def put_off(self, transport: str, why: str) -> None:
        """Try this transport only when nothing else is left."""
        self.drop(transport, why)
        if not self.insist:
            self.shut = (*self.shut, transport)

    def resort(self) -> bool:
        """Whether any transport is left to try; where nothing else is, those whose breakers are open."""
        if not self.transports and self.shut:
            self.transports, self.shut, self.insist = self.shut, (), True
        return bool(self.transports)

    @property
    def may_fall_back(self) -> bool:
        """The attempt, or the port, need not be waited for as long as it takes: another transport is left."""
        waits = self.reaching or (self.writing and not self.hurried)
        return waits and len(self.transports) > 1

    def drop(self, transport: str, why: str) -> None:
        """Do not try this transport again before the next choice."""
        self.transports = tuple(name for name in self.transports if name != transport)
        self.passed_over = (*self.passed_over, why)

    def abandon(self, why: str) -> None:
        """No transport can carry the part."""
        self.transports, self.shut = (), ()
        self.passed_over = (*self.passed_over, why)

    def close(self) -> None:
        """Nothing can land there any more, and there is nobody who needs to be told so."""
        self.closed = self.told = True
        self.landing = False
        self.fencing = ""

    @property
    def in_flight(self) -> bool:
        """A write to this rank may land still."""
        return self.writing or self.landing

    def key(self) -> tuple[Any, ...]:
        """Canonical plain value."""
        return tuple(getattr(self, name) for name in self.__struct_fields__ if name != "passed_over")
