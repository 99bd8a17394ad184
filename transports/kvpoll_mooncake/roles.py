"""Who starts an engine, and what one has of it."""

from __future__ import annotations

from typing import Protocol

from kvpoll_fsm.spi import Region
from kvpoll_mooncake.frames import Command, Event

__all__ = ["Master", "Running"]


class Running(Protocol):
    """An engine, wherever it runs."""

    @property
    def pid(self) -> int:
        """The process it runs in."""
        ...

    def send(self, command: Command) -> None:
        """Tell it something."""
        ...

    def register(self, region: Region) -> None:
        """Give it a region."""
        ...

    def kill(self) -> None:
        """End it as soon as that can be done; `Master.gone` follows. May be called twice."""
        ...

    def last_words(self) -> str:
        """What it wrote last to its standard error."""
        ...


class Master(Protocol):
    """Whom an engine belongs to."""

    def heard(self, engine: Running, event: Event) -> None:
        """It says something."""
        ...

    def gone(self, engine: Running, how: str) -> None:
        """It has ended: it reads and writes no memory any more. Once, however that came."""
        ...
