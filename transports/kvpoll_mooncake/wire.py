"""What two adapters say to each other, over TCP: each message one frame of a `stream.Stream`; version 1.

Opening, once: as `kvpoll_common.handshake` has it, each Hello and each Proof in an Opening, with the sender as the
caller and the magic "KVPOLMOO". A token is good for the first writer that uses it. Then, in any order and number,
without waiting for answers:

    receiver -> sender   Engine   the engine that takes writes from now on, and where its regions are
    sender -> receiver   Ask      ticket, token, ranges: may I write there?
    receiver -> sender   Go       ticket: yes, into this engine; once per Ask, or
    receiver -> sender   No       ticket: no, and why
    sender -> receiver   Over     ticket: nothing of it is under way any more; or else its writer has been killed, and
                                  what is on its way may land
    receiver -> sender   Gone     an engine is no more: nothing can land through it. Which of your tickets were to be
                                  stopped, and whether it was for these or had another cause
    sender -> receiver   Doubt    a transfer failed: what of this engine?
    receiver -> sender   Sound    it works; or else Gone
    sender -> receiver   Ping     answered by Pong

Whatever is none of these, or comes when it should not, ends the connection.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Annotated

import msgspec
from msgspec import Meta

from kvpoll_common.handshake import Kind, Opening
from kvpoll_fsm.errors import MalformedMessage

__all__ = [
    "FRAME_NBYTES",
    "KIND",
    "MAX_RANGES",
    "MAX_REGIONS",
    "MAX_TICKETS",
    "TOKEN_NBYTES",
    "Ask",
    "Base",
    "Doubt",
    "Engine",
    "Go",
    "Gone",
    "Message",
    "No",
    "Opening",
    "Over",
    "Ping",
    "Pong",
    "Sound",
    "decode",
    "encode",
    "pack_ranges",
    "unpack_ranges",
]

KIND = Kind("mooncake", b"KVPOLMOO", version=1)
MAX_RANGES = 1024
MAX_TICKETS = 1024
"""Most tickets of one connection that may be under way, by `Capabilities`; twice as many are taken."""
MAX_REGIONS = 1024
TOKEN_NBYTES = 16
_RANGE = struct.Struct("<IIQ")
FRAME_NBYTES = 64 << 10
"""Longer frames are none of ours."""

Unsigned = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Text = Annotated[str, Meta(max_length=256)]
Range = tuple[int, int, int]
"""(region, offset, bytes)."""


def _exactly(nbytes: int) -> Meta:
    return Meta(min_length=nbytes, max_length=nbytes)


class Base(msgspec.Struct, frozen=True, array_like=True):
    """Where an engine has a region."""

    region: Annotated[int, Meta(ge=0, lt=1 << 16)]
    address: Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]
    nbytes: Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]


class Engine(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """An engine that takes writes: its number among those of the receiver, its name, its regions."""

    number: Unsigned
    segment: Annotated[str, Meta(min_length=1, max_length=256)]
    bases: Annotated[tuple[Base, ...], Meta(max_length=MAX_REGIONS)]


class Ask(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """What one ticket would write."""

    ticket: Unsigned
    token: Annotated[bytes, _exactly(TOKEN_NBYTES)]
    ranges: Annotated[bytes, Meta(min_length=_RANGE.size, max_length=MAX_RANGES * _RANGE.size)]


class Go(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """A ticket may write, into this engine."""

    ticket: Unsigned
    engine: Unsigned


class No(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """A ticket may not write."""

    ticket: Unsigned
    reason: Text


class Over(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """A ticket has ended."""

    ticket: Unsigned
    quiescent: bool


class Gone(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """An engine has ended. `crashed`: not because somebody's tickets were to be stopped; it also may have closed."""

    engine: Unsigned
    fenced: Annotated[tuple[Unsigned, ...], Meta(max_length=2 * MAX_TICKETS)]
    crashed: bool


class Doubt(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """A transfer into this engine failed."""

    engine: Unsigned


class Sound(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """This engine works."""

    engine: Unsigned


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """Are you there?"""


class Pong(msgspec.Struct, frozen=True, array_like=True, tag=12):
    """Here I am."""


Message = Opening | Engine | Ask | Go | No | Over | Gone | Doubt | Sound | Ping | Pong
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """As the bytes of one frame."""
    return _encoder.encode(message)


def decode(frame: bytes | memoryview) -> Message:
    """Read one frame.

    Raises:
        MalformedMessage: It is none of ours.
    """
    try:
        return _decoder.decode(frame)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors too
        raise MalformedMessage(f"does not speak the kvpoll mooncake protocol: {error}") from error


def pack_ranges(ranges: Iterable[Range]) -> bytes:
    """As the bytes of an Ask's ranges."""
    return b"".join([_RANGE.pack(region, nbytes, offset) for region, offset, nbytes in ranges])


def unpack_ranges(packed: bytes) -> list[Range]:
    """Read an Ask's ranges.

    Raises:
        MalformedMessage: An empty range, or a piece of one.
    """
    if len(packed) % _RANGE.size:
        raise MalformedMessage("ranges that are cut")
    ranges: list[Range] = [(region, offset, nbytes) for region, nbytes, offset in _RANGE.iter_unpack(packed)]
    if not all(nbytes for _, _, nbytes in ranges):
        raise MalformedMessage("an empty range")
    return ranges
