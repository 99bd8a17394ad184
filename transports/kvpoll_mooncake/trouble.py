"""The engine of one link, how far it is, and why it is being ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvpoll_common.outbox import Outbox
from kvpoll_fsm.spi import Region
from kvpoll_mooncake.frames import Command
from kvpoll_mooncake.maker import Maker
from kvpoll_mooncake.roles import Running
from kvpoll_mooncake.tickets import Job

__all__ = ["Crowd", "Ending", "Ours", "Sources", "Trouble"]


class Crowd:
    """Counts the engines that send."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.count = 0


@dataclass(frozen=True)
class Sources:
    """What all links of a transport share: our regions, who we are, engines, and whom to report to."""

    regions: Mapping[int, Region]
    writer: bytes
    maker: Maker
    outbox: Outbox
    crowd: Crowd


@dataclass
class Ending:
    """How far a link has ended: closed by the driver; waiting for nobody any more; with nothing left of it."""

    closed: bool = False
    buried: bool = False
    over: bool = False


class Ours:
    """The engine that sends, and how far it is."""

    def __init__(self, running: Running | None = None) -> None:
        self.running = running
        self.ready = False
        self.registered: set[int] = set()
        self.probing = ""
        self.up = False

    def tell(self, command: Command) -> None:
        """Tell it something, if there is one."""
        if self.running is not None:
            self.running.send(command)


class Trouble:
    """Why our engine is being ended, and what that means for the tickets.

    Attributes:
        reason: In words.
        is_collateral: Whether another ticket's trouble ended this one.
        restart: The link stays up: another engine follows.
        quiescent: The peer's engine is gone too: nothing can land.
        quiet: The link was closed: its end is no news.
        doubted: The peer's engine, while the peer is being asked about it.
        details: Our engine's last words.
        ghost: Our engine has not ended in time, and may still read.
    """

    def __init__(self, reason: str, is_collateral: Callable[[Job], bool], restart: bool = False) -> None:
        self.reason = reason
        self.is_collateral = is_collateral
        self.restart = restart
        self.quiescent = False
        self.quiet = False
        self.doubted: int | None = None
        self.details = ""
        self.ghost = False

    def words(self, peer: object) -> str:
        """The reason, with whom it concerns and what Mooncake said."""
        reason = f"{peer}: {self.reason}"
        return f"{reason} [{self.details}]" if self.details else reason
