"""What an `EndpointCore` is told when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvpoll_fsm.deadlines import Deadlines
from kvpoll_fsm.layout import Layout
from kvpoll_fsm.limits import Limits
from kvpoll_fsm.messages import TransportOffer

__all__ = ["CoreOptions"]


@dataclass(frozen=True, slots=True)
class CoreOptions:
    """What an endpoint is.

    Attributes:
        incarnation: 16 random bytes, new with every start.
        layout: Fields, and tokens per block of its own pool.
        offers: The transports peers can write to us through.
        blocks: Blocks in the pool.
        managed: We choose blocks; otherwise the engine names them.
        deadlines: How long each gate may stay shut, and how often peers are spoken to.
        limits: How much peers may take.
    """

    incarnation: bytes
    layout: Layout
    offers: tuple[TransportOffer, ...]
    blocks: int
    managed: bool = True
    deadlines: Deadlines = field(default_factory=Deadlines)
    limits: Limits = field(default_factory=Limits)
