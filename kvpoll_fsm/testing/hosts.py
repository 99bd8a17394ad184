"""What a `World` is made of: endpoints with their machines, packets on their way, work not done yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvpoll_fsm.commands import HeldPart, Target
from kvpoll_fsm.core import EndpointCore
from kvpoll_fsm.lessor import lease_of
from kvpoll_fsm.messages import Packet
from kvpoll_fsm.session import RoomKey

__all__ = ["Delivery", "Host", "Job", "LateWrite", "token_of"]


@dataclass(frozen=True, slots=True)
class Delivery:
    """A packet on its way between hosts.

    Attributes:
        origin: The incarnation of the host that sent it.
        answers: The name of the connection whose frame a Stranger answers.
    """

    source: str
    dest: str
    origin: bytes
    packet: Packet
    answers: bytes = b""


@dataclass(frozen=True, slots=True)
class Job:
    """Work that an endpoint was asked to do and has not done yet."""

    host: str
    key: RoomKey
    command: Any
    target: Target | None = None


@dataclass(frozen=True, slots=True)
class LateWrite:
    """A write that ended unknown, or whose writer died: its bytes, by now wrong, may land until it is fenced.

    Attributes:
        origin: The writer's incarnation.
        dest: The incarnation it writes to.
    """

    job: Job
    origin: bytes
    dest: bytes


@dataclass
class Host:
    """One endpoint and its machine.

    Attributes:
        memory: The value in each slot (block, place in it) that was ever written.
        out: What each life of a room copied out, by token.
        granted: Whom each token was made for: (room, part, blocks).
        exposed: Tokens that admit writes.
        fenced: Tokens under which nothing lands any more.
        routes: For a connection that came to us, the host it came from and that host's incarnation.
        timers: Epoch of each timer that is set.
    """

    name: str
    core: EndpointCore
    memory: dict[tuple[int, int], Any] = field(default_factory=dict)
    out: dict[RoomKey, dict[int, Any]] = field(default_factory=dict)
    granted: dict[bytes, tuple[RoomKey, int, tuple[int, ...]]] = field(default_factory=dict)
    exposed: set[bytes] = field(default_factory=set)
    fenced: set[bytes] = field(default_factory=set)
    routes: dict[int, tuple[str, bytes]] = field(default_factory=dict)
    timers: dict[tuple[RoomKey | None, str], int] = field(default_factory=dict)

    @property
    def incarnation(self) -> bytes:
        """Which start of the endpoint this is."""
        return self.core.options.incarnation

    @property
    def block_tokens(self) -> int:
        """Tokens per block of this endpoint's pool."""
        return self.core.options.layout.block_tokens

    def slots(self, blocks: tuple[int, ...], tokens: int) -> list[tuple[int, int]]:
        """Where the tokens of a part lie: (block, place in it)."""
        return [(blocks[at // self.block_tokens], at % self.block_tokens) for at in range(tokens)]

    def read(self, held: HeldPart) -> list[Any]:
        """The values of a part where it lies."""
        return [self.memory.get(slot) for slot in self.slots(held.blocks, held.tokens)]

    def end_tokens(self, key: RoomKey, part: int, *, fence: bool) -> None:
        """The tokens of a part admit nothing new; behind a fence nothing lands any more."""
        tokens = {token for token, (k, p, _) in self.granted.items() if (k, p) == (key, part)}
        self.exposed -= tokens
        if fence:
            self.fenced |= tokens

    def store(self, token: bytes, values: list[Any]) -> bool:
        """Bytes land in the blocks a token was made for, unless they were fenced off."""
        if token in self.fenced:
            return False
        key, part, blocks = self.granted[token]
        lease = lease_of(key, part)
        assert self.core.accounts.blocks_of(lease) == blocks, f"a write lands in {lease}, which holds {blocks} no more"
        for slot, value in zip(self.slots(blocks, len(values)), values, strict=True):
            self.memory[slot] = value
        return True


def token_of(target: Target) -> bytes:
    """The token that admits a target's writes."""
    return target.grant.token(target.transport)
