"""What can happen to a room's lifecycle.

Seven kinds, all plain frozen values. `PartDone` is the one whose flags decide the destination; the rows
that read them are in `kvpoll_fsm.lifecycle`.
"""

from __future__ import annotations

from msgspec import Struct

__all__ = [
    "FAILING",
    "Aborted",
    "Bootstrapped",
    "DeadlinePassed",
    "LifecycleEvent",
    "PartDone",
    "PeerLost",
    "ProtocolError",
    "Resumed",
]


class Bootstrapped(Struct, frozen=True):
    """Every required rank has granted blocks for part 0."""


class PartDone(Struct, frozen=True):
    """One part has an outcome on every required rank.

    Attributes:
        is_last: This part completes the room. Derived from sent + part == total, never passed through.
        all_ok: Every required rank acknowledged the part.
    """

    is_last: bool
    all_ok: bool


class Resumed(Struct, frozen=True):
    """Every required rank has granted blocks for the next part."""


class Aborted(Struct, frozen=True):
    """Somebody gave the room up."""


class PeerLost(Struct, frozen=True):
    """The other endpoint's incarnation is gone."""


class DeadlinePassed(Struct, frozen=True):
    """The gate the room waited at did not open in time."""


class ProtocolError(Struct, frozen=True):
    """The peer did something the protocol does not allow, or this side met a bug of its own."""


LifecycleEvent = Bootstrapped | PartDone | Resumed | Aborted | PeerLost | DeadlinePassed | ProtocolError

FAILING: tuple[LifecycleEvent, ...] = (Aborted(), PeerLost(), DeadlinePassed(), ProtocolError())
"""The events that end any live room as Failed."""
