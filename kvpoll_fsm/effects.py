"""What an `EndpointCore` asks the world to do, and the outbox its parts put that into.

- `Transmit(conn, packet)`: put a packet on the wire;
- `Do(key, command)`: carry out a session's command (or, with `key` None, set a timer of the core);
- `Changed(key)`: the room's state, gate or parts may have changed;
- `Hangup(conn)`: the connection has ended.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from kvpoll_fsm.commands import Command
from kvpoll_fsm.inputs import Input
from kvpoll_fsm.messages import Packet
from kvpoll_fsm.session import RoomKey

__all__ = ["Changed", "Do", "Effect", "Hangup", "Outbox", "Transmit"]


@dataclass(frozen=True, slots=True)
class Transmit:
    """Put a packet on the wire of a connection."""

    conn: int
    packet: Packet


@dataclass(frozen=True, slots=True)
class Do:
    """Carry out a command of a room, or of the core itself (`key` None)."""

    key: RoomKey | None
    command: Command


@dataclass(frozen=True, slots=True)
class Changed:
    """Look at this room again."""

    key: RoomKey


@dataclass(frozen=True, slots=True)
class Hangup:
    """The connection has ended; its sockets and links can go."""

    conn: int


Effect = Transmit | Do | Changed | Hangup


@dataclass(slots=True)
class Outbox:
    """What one call of the core leads to.

    Attributes:
        inputs: For rooms of this endpoint; they are fed before the call returns.
        effects: For the host, in order.
    """

    inputs: deque[tuple[RoomKey, Input]] = field(default_factory=deque)
    effects: list[Effect] = field(default_factory=list)

    def feed(self, key: RoomKey, event: Input) -> None:
        """Queue an input for a room."""
        self.inputs.append((key, event))

    def emit(self, effect: Effect) -> None:
        """Ask the host for something."""
        self.effects.append(effect)

    def clone(self) -> Outbox:
        """A copy that shares nothing mutable."""
        return Outbox(deque(self.inputs), list(self.effects))
