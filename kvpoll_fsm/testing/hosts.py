"""What a `World` is made of: endpoints with their machines, packets on their way, work not done yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvpoll_fsm.commands import CopyOut, Expose, Fence, HeldPart, StartPart, Target
from kvpoll_fsm.core import EndpointCore
from kvpoll_fsm.inputs import Fenced, Granted, RankQuiesced
from kvpoll_fsm.lessor import lease_of
from kvpoll_fsm.messages import Packet
from kvpoll_fsm.session import RoomKey

__all__ = ["Cell", "Delivery", "Host", "Job", "LateWrite", "token_of"]


class Cell(NamedTuple):
    """What one slot of a block holds: a token, and whose transfer it belongs to.

    Attributes:
        origin: The incarnation it comes from.
        generation: The sender's life of the room.
    """

    origin: bytes
    room: int
    generation: int
    part: int
    token: int


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

    def quiesced(self) -> RankQuiesced:
        """What its writer is told when it can land no more."""
        rank = self.job.target.rank if self.job.target else 0
        return RankQuiesced(rank, self.job.command.part, self.job.command.attempt)


@dataclass
class Host:
    """One endpoint and its machine.

    Attributes:
        memory: The value in each slot (block, place in it) that was ever written.
        out: What each life of a room copied out, by token.
        granted: Whom each token was made for: (room, part, blocks).
        tokens: The tokens of each part of a room, and the transport of each.
        exposed: Tokens that admit writes.
        fenced: Tokens under which nothing lands any more.
        addresses: For a connection we opened, the host it goes to.
        routes: For a connection that came to us, the host it came from and that host's incarnation.
        timers: Epoch of each timer that is set.
    """

    name: str
    core: EndpointCore
    memory: dict[tuple[int, int], Any] = field(default_factory=dict)
    out: dict[RoomKey, dict[int, Any]] = field(default_factory=dict)
    granted: dict[bytes, tuple[RoomKey, int, tuple[int, ...]]] = field(default_factory=dict)
    tokens: dict[tuple[RoomKey, int], dict[bytes, str]] = field(default_factory=dict)
    exposed: set[bytes] = field(default_factory=set)
    fenced: set[bytes] = field(default_factory=set)
    addresses: dict[int, str] = field(default_factory=dict)
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

    def address(self, conn: int) -> str | None:
        """The host at the other end of a connection, open or not, if that is known."""
        route = self.routes.get(conn)
        return self.addresses.get(conn) or (route[0] if route else None)

    # Memory

    def slots(self, blocks: tuple[int, ...], tokens: int) -> list[tuple[int, int]]:
        """Where the tokens of a part lie: (block, place in it)."""
        size = self.block_tokens
        return [(blocks[at // size], at % size) for at in range(tokens)]

    def read(self, held: HeldPart) -> list[Any]:
        """The values of a part where it lies."""
        return [self.memory.get(slot) for slot in self.slots(held.blocks, held.tokens)]

    def cells(self, key: RoomKey, command: StartPart) -> list[Cell]:
        """What a sender's part consists of."""
        first, end = command.offset, command.offset + command.tokens
        return [Cell(self.incarnation, key.room, key.generation, command.part, token) for token in range(first, end)]

    def stage(self, key: RoomKey, command: StartPart) -> None:
        """Copy a part into its source blocks, unless they are the engine's own or hold it already."""
        if command.blocks and command.attempt == 0:
            self._check_lease(key, command.part, command.blocks, "is staged")
            self.memory.update(zip(self.slots(command.blocks, command.tokens), self.cells(key, command), strict=True))

    def source(self, key: RoomKey, command: StartPart) -> list[Any]:
        """The values of a part as they are read when its write lands."""
        if not command.blocks:
            return list(self.cells(key, command))
        self._check_lease(key, command.part, command.blocks, "is read")
        return [self.memory[slot] for slot in self.slots(command.blocks, command.tokens)]

    def store(self, token: bytes, values: Sequence[Any]) -> bool:
        """Bytes land in the blocks a token was made for, unless they were fenced off."""
        if token in self.fenced:
            return False
        key, part, blocks = self.granted[token]
        self._check_lease(key, part, blocks, "is written")
        self.memory.update(zip(self.slots(blocks, len(values)), values, strict=True))
        return True

    def copy_out(self, key: RoomKey, command: CopyOut) -> None:
        """Copy landed parts to their place in the room's own memory."""
        for held in command.parts:
            self.out[key].update(enumerate(self.read(held), held.offset))

    def _check_lease(self, key: RoomKey, part: int, blocks: tuple[int, ...], what: str) -> None:
        lease = lease_of(key, part)
        assert self.core.accounts.blocks_of(lease) == blocks, f"{lease} {what}, but holds {blocks} no more"

    # Tokens

    def expose(self, key: RoomKey, command: Expose, tokens: dict[str, bytes]) -> Granted:
        """Admit writes to leased blocks under these tokens, by transport."""
        for transport, token in tokens.items():
            self._admit(key, command.part, command.blocks, transport, token)
        capacity = len(command.blocks) * self.block_tokens
        return Granted(command.part, command.blocks, capacity, tuple(tokens.items()))

    def end_tokens(self, key: RoomKey, part: int, *, fence: bool) -> None:
        """The tokens of a part admit nothing new; behind a fence nothing lands any more."""
        tokens = self.tokens.get((key, part), ())
        self.exposed.difference_update(tokens)
        if fence:
            self.fenced.update(tokens)

    def fence_one(self, key: RoomKey, command: Fence, token: bytes) -> Fenced:
        """Nothing lands any more that was written through one transport; if it was offered it gets this new token."""
        ours = [old for old, name in self.tokens.get((key, command.part), {}).items() if name == command.transport]
        alive = self.exposed.intersection(ours)
        self.fenced.update(ours)
        self.exposed.difference_update(ours)
        if not alive:
            return Fenced(command.part, command.transport)
        blocks = self.granted[ours[-1]][2]
        self._admit(key, command.part, blocks, command.transport, token)
        return Fenced(command.part, command.transport, token)

    def _admit(self, key: RoomKey, part: int, blocks: tuple[int, ...], transport: str, token: bytes) -> None:
        self.granted[token] = (key, part, blocks)
        self.exposed.add(token)
        self.tokens.setdefault((key, part), {})[token] = transport  # beside those of a grant that was withdrawn


def token_of(target: Target) -> bytes:
    """The token that admits a target's writes."""
    return target.grant.token(target.transport)
