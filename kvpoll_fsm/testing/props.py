"""What a universe consists of: memory cells, tickets in flight, jobs not done, endpoints."""

from __future__ import annotations

from typing import Any, NamedTuple

from kvpoll_fsm.commands import StartPart, Target
from kvpoll_fsm.core import EndpointCore
from kvpoll_fsm.session import RoomKey

__all__ = ["Cell", "Job", "Node", "Ticket"]


class Cell(NamedTuple):
    """What a block holds: the token it carries and whose transfer it belongs to."""

    room: int
    sender_generation: int
    part: int
    token: int


class Ticket(NamedTuple):
    """Writes of one part to one rank.

    Attributes:
        command: What it carries out, for `target`.
        source: Incarnation that writes.
        token: Under which the destination admits it.
        loose: It has ended for its writer, or its writer is gone, but its bytes may land still.
        bytes: What it carries if the source is not read any more.
        hung: Nothing happens to it until it is cancelled.
        cancelled: It was asked to end.
    """

    key: RoomKey
    command: StartPart
    target: Target
    source: int
    token: bytes
    loose: bool = False
    bytes: tuple[Any, ...] | None = None
    hung: bool = False
    cancelled: bool = False


class Job(NamedTuple):
    """Work a node was asked to do and has not done."""

    node: str
    key: RoomKey
    command: Any


class Node:
    """One endpoint of the universe. Copied before it is changed."""

    __slots__ = ("core", "exposed", "incarnation", "memory", "name", "out", "timers")

    def __init__(self, name: str, incarnation: int, core: EndpointCore) -> None:
        self.name = name
        self.incarnation = incarnation
        self.core = core
        self.memory: dict[int, Cell] = {}
        self.out: dict[RoomKey, tuple[Cell | None, ...]] = {}
        self.exposed: dict[bytes, tuple[RoomKey, int, str]] = {}
        self.timers: dict[tuple[RoomKey | None, str], int] = {}

    def clone(self) -> Node:
        """A copy that shares nothing mutable."""
        copy = Node(self.name, self.incarnation, self.core.clone())
        copy.memory, copy.out = dict(self.memory), dict(self.out)
        copy.exposed, copy.timers = dict(self.exposed), dict(self.timers)
        return copy

    def key(self) -> tuple[Any, ...]:
        """Canonical plain value."""
        memory = frozenset(self.memory.items())
        out = frozenset(self.out.items())
        return (self.core.key(), memory, out, frozenset(self.exposed.items()), frozenset(self.timers))
