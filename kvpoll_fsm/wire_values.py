"""The values that messages are made of, each with its bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

__all__ = [
    "MAX_BLOCKS_PER_GRANT",
    "MAX_RANKS",
    "MAX_ROOM",
    "BlockGrant",
    "BlockId",
    "Count",
    "FieldSpec",
    "Incarnation",
    "Name",
    "Part",
    "Positive",
    "Rank",
    "Ranks",
    "Room",
    "Token",
    "TransportOffer",
    "all_different",
]

MAX_ROOM = (1 << 63) - 1
MAX_BLOCKS_PER_GRANT = 1 << 16
MAX_RANKS = 4096

Room = Annotated[int, Meta(ge=0, le=MAX_ROOM)]
Rank = Annotated[int, Meta(ge=0, lt=MAX_RANKS)]
Ranks = Annotated[int, Meta(ge=1, le=MAX_RANKS)]
Count = Annotated[int, Meta(ge=0, le=MAX_ROOM)]
Positive = Annotated[int, Meta(ge=1, le=MAX_ROOM)]
Part = Annotated[int, Meta(ge=0, lt=1 << 31)]
BlockId = Annotated[int, Meta(ge=0, lt=1 << 31)]
Incarnation = Annotated[bytes, Meta(min_length=16, max_length=16)]
Name = Annotated[str, Meta(min_length=1, max_length=128)]
Token = Annotated[bytes, Meta(max_length=1024)]


class FieldSpec(msgspec.Struct, frozen=True, array_like=True):
    """A layout field as a peer declares it."""

    name: Name
    dtype: Annotated[str, Meta(max_length=32)]
    shape: Annotated[tuple[Annotated[int, Meta(ge=1, le=1 << 40)], ...], Meta(max_length=16)]
    per_room: bool


class TransportOffer(msgspec.Struct, frozen=True):
    """A transport the peer can be written through: how to connect, and its registered regions."""

    name: Name
    descriptor: Annotated[bytes, Meta(max_length=1 << 16)]
    regions: Annotated[tuple[Annotated[bytes, Meta(max_length=1 << 16)], ...], Meta(max_length=64)] = ()


class BlockGrant(msgspec.Struct, frozen=True):
    """Blocks one rank gives to one part. One part consumes one grant.

    Attributes:
        part: The part it is for.
        tokens: How many tokens the blocks hold.
        blocks: Block ids in token order; any order, not necessarily neighbours.
        tokens_by_transport: For each transport offered, its name and the token that admits writes to
            exactly these blocks.
    """

    part: Part
    tokens: Positive
    blocks: Annotated[tuple[BlockId, ...], Meta(min_length=1, max_length=MAX_BLOCKS_PER_GRANT)]
    tokens_by_transport: Annotated[tuple[tuple[Name, Token], ...], Meta(min_length=1, max_length=16)]

    def __post_init__(self) -> None:
        all_different("block", self.blocks)
        all_different("transport", [each[0] for each in self.tokens_by_transport])

    @property
    def transports(self) -> tuple[str, ...]:
        """Names of the transports offered."""
        return tuple([name for name, _ in self.tokens_by_transport])

    def token(self, transport: str) -> bytes:
        """The token for one of `transports`.

        Raises:
            KeyError: That transport was not offered.
        """
        return dict(self.tokens_by_transport)[transport]

    def with_token(self, transport: str, token: bytes | None) -> BlockGrant:
        """The same blocks with another token for one of `transports`; without one it is not offered any more."""
        tokens = {**dict(self.tokens_by_transport), transport: token}
        left = tuple((name, each) for name, each in tokens.items() if each is not None)
        return msgspec.structs.replace(self, tokens_by_transport=left)


def all_different(what: str, values: Sequence[object]) -> None:
    """Refuse a value that comes twice; while decoding that makes the packet malformed.

    Raises:
        ValueError: One does.
    """
    if len(set(values)) != len(values):
        raise ValueError(f"a {what} that comes twice")
