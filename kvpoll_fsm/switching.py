"""Which policy a new room has: the endpoint's, or for a share of the rooms the one that is being tried out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import xxhash

from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.selection import Policy

__all__ = ["Choice", "TransportStatus", "read_share"]

_PLACES = 1 << 64


@dataclass(frozen=True, slots=True)
class Choice:
    """What holds for rooms that are opened from now on and have no policy of their own.

    Attributes:
        policy: For all, or for those that the canary leaves.
        canary: For the share, or None.
        share: How many of the rooms, above 0 and below 1; 0 without a canary.
    """

    policy: Policy
    canary: Policy | None = None
    share: float = 0.0

    def of(self, room: int) -> Policy:
        """A room's policy. By its number alone: the same on every endpoint, and in every run.

        A room in a share is in every larger one, too.
        """
        if self.canary is not None and place_of(room) < self.share:
            return self.canary
        return self.policy

    def switched(self, policy: Policy, share: float | None) -> Choice:
        """What holds after a switch: `policy` for all, or for the share of rooms, which the others go on without."""
        return Choice(policy) if share is None else Choice(self.policy, policy, share)

    def __str__(self) -> str:
        return str(self.policy) if self.canary is None else f"{self.policy}, canary {self.canary} for {self.share:.2%}"


@dataclass(frozen=True, slots=True)
class TransportStatus:
    """How rooms are carried that are opened from now on.

    Attributes:
        policy: For all rooms, or for those that the canary leaves.
        canary: The policy that is being tried out, or None.
        share: How many of the rooms it has, from 0 to 1.
        usable: The transports that are loaded and work.
        unusable: Those that were wanted and do not, and why.
    """

    policy: str
    canary: str | None = None
    share: float = 0.0
    usable: tuple[str, ...] = ()
    unusable: dict[str, str] = field(default_factory=dict)


def read_share(share: object) -> float | None:
    """A share of rooms as a user gives it; None is none.

    Raises:
        InvalidInput: Not a number above 0 and below 1.
    """
    if share is None:
        return None
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1 or math.isnan(share):
        raise InvalidInput(f"canary={share!r}: give a share of the rooms above 0 and below 1, or none for all of them")
    return float(share)


def place_of(room: int) -> float:
    """Where a room lies between 0 and 1, evenly spread."""
    return xxhash.xxh64_intdigest(room.to_bytes(8, "little")) / _PLACES
