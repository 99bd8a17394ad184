"""What an `EndpointCore` asks the world to do, and the outbox its parts put that into.

- `Transmit(conn, packet)`: put a packet on the wire;
- `Do(key, command)`: carry out a session's command (or, with `key` None, set a timer of the core);
- `Changed(key)`: the room's state, gate or parts may have changed; once per room, when all else has been carried out;
- `BreakerMoved(conn, transport, ...)`: a transport to a peer is not to be tried for a while, or is again;
- `Hangup(conn)`: the connection has ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

from msgspec import Struct

from kvpoll_fsm.commands import CancelTimer, Command, SetTimer
from kvpoll_fsm.inputs import Input
from kvpoll_fsm.messages import Packet
from kvpoll_fsm.session import RoomKey

__all__ = ["BreakerMoved", "Changed", "Do", "Effect", "Hangup", "Outbox", "Transmit"]


class Transmit(Struct, frozen=True):
    """Put a packet on the wire of a connection."""

    conn: int
    packet: Packet


class Do(Struct, frozen=True):
    """Carry out a command of a room, or of the core itself (`key` None)."""

    key: RoomKey | None
    command: Command


class Changed(Struct, frozen=True):
    """Look at this room again."""

    key: RoomKey


class Hangup(Struct, frozen=True):
    """The connection has ended; its sockets and links can go."""

    conn: int


class BreakerMoved(Struct, frozen=True):
    """The breaker of a transport to a peer has changed.

    Attributes:
        state: "open", "half-open" or "closed".
        cause: Why it opened last.
        wait_s: How long it stays open.
        again: It has opened from half-open.
        port: It was the port that could not be reached; no part was lost by it.
    """

    conn: int
    transport: str
    state: str
    cause: str
    wait_s: float = 0.0
    again: bool = False
    port: bool = False


Effect = Transmit | Do | Changed | BreakerMoved | Hangup


@dataclass(slots=True)
class Outbox:
    """What one call of the core leads to.

    Attributes:
        inputs: For rooms of this endpoint; they are fed before the call returns.
        effects: For the host, in order.
        last: For the host once there are no `effects` left: what a later one makes needless, such as a timer that was
            set again meanwhile, by what it is about.
    """

    inputs: deque[tuple[RoomKey, Input]] = field(default_factory=deque)
    effects: list[Effect] = field(default_factory=list)
    last: dict[Hashable, Effect] = field(default_factory=dict)

    def feed(self, key: RoomKey, event: Input) -> None:
        """Queue an input for a room."""
        self.inputs.append((key, event))

    def emit(self, effect: Effect) -> None:
        """Ask the host for something."""
        self.effects.append(effect)

    def do(self, key: RoomKey, command: Command) -> None:
        """Have a command of a room carried out by the host."""
        self.effects.append(Do(key, command))

    def changed(self, key: RoomKey) -> None:
        """Have a room looked at again."""
        if key not in self.last:
            self.last[key] = Changed(key)

    def timer(self, key: RoomKey | None, command: SetTimer | CancelTimer) -> None:
        """Have a timer of a room, or of the core itself, set or cancelled."""
        self.last[key, command.name] = Do(key, command)

    def drain(self) -> list[Effect]:
        """What is to be done now, in order."""
        effects, self.effects = self.effects, []
        if not effects:
            effects.extend(self.last.values())
            self.last.clear()
        return effects

    def clone(self) -> Outbox:
        """A copy that shares nothing mutable."""
        return Outbox(deque(self.inputs), list(self.effects), dict(self.last))
