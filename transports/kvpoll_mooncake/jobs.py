"""The tickets of one link, and how far each is."""

from __future__ import annotations

import enum
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvpoll_fsm.spi import Write

__all__ = ["Job", "Stage"]


class Stage(enum.Enum):
    """How far a ticket is."""

    waiting = "waiting"
    """Nobody has been told of it."""
    asked = "asked"
    """The receiver's adapter has been asked."""
    granted = "granted"
    """It has said yes; our engine has not been told."""
    running = "running"
    """Our engine has been told: its source is read, and bytes land."""


@dataclass(eq=False)
class Job:
    """One ticket."""

    ticket: int
    token: bytes
    writes: Sequence[Write]
    nbytes: int
    stage: Stage = Stage.waiting
    cancelled: bool = False
    moved_nbytes: int = 0
    moved_at: float = field(default_factory=time.monotonic)
