"""Makes engines: in processes of their own, or in threads of this one."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from kvpoll_common.loop import Reactor
from kvpoll_fsm.spi import Region
from kvpoll_mooncake.environment import variables
from kvpoll_mooncake.frames import P2P, Setup
from kvpoll_mooncake.hosted import Hosted
from kvpoll_mooncake.memory import Addresses
from kvpoll_mooncake.process import Process
from kvpoll_mooncake.roles import Master, Running
from kvpoll_mooncake.settings import MooncakeSettings

__all__ = ["Maker"]


class Maker:
    """What all engines of a transport have in common. Used by the reactor's thread alone.

    Attributes:
        hosted: Engines are in threads of this process.
    """

    def __init__(self, reactor: Reactor, settings: MooncakeSettings, host: str, protocol: str) -> None:
        """Store what is needed.

        Args:
            reactor: The thread's.
            settings: The transport's.
            host: Where peers reach this machine, in numbers.
            protocol: "tcp" or "rdma".
        """
        self.settings = settings
        self.hosted = settings.engine == "host"
        self._reactor = reactor
        self._host = host
        self._protocol = protocol
        self._addresses = Addresses()
        self._made: list[Process | Hosted] = []

    def start(self, master: Master, name: str, regions: Mapping[int, Region]) -> Running:
        """Start one, with these regions.

        Raises:
            OSError: The system has nothing left to give.
        """
        setup = Setup(
            name=self._name(),
            metadata=self.settings.metadata,
            protocol=self._protocol,
            device=self.settings.device,
        )
        engine: Process | Hosted
        if self.hosted:
            engine = Hosted(self._reactor, master, name)
        else:
            engine = Process(self._reactor, master, name, self._addresses)
        self._made = [other for other in self._made if other.is_alive]
        self._made.append(engine)
        engine.start(setup, variables(self.settings, self._protocol, self._host), regions)
        return engine

    def end_all(self) -> None:
        """End all, and wait for the ends of processes: for when the reactor's thread is no more."""
        for engine in self._made:
            engine.end()

    def _name(self) -> str:
        """What the engine calls itself: with servers for that, a name nobody has had."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return host if self.settings.metadata == P2P else f"{host}:{secrets.randbelow(60_000) + 1024}"
