"""What adapter and engine say to each other, over a socket pair: each message one frame of a `stream.Stream`.

The adapter first says `Setup`, and hears `Ready` or `Unusable`. Then `Register` for every region, each answered by
`Registered`. Then, in any order and number:

    Probe    whether the engine at a segment answers; `Probed`
    Order    write this; `Moved` as it goes, and once `Ended`, or `Broke`
    Cancel   write no more of it than has begun; it is `Ended` all the same
    Ping     `Pong`

After `Broke` the engine does nothing any more: what it has begun may still be going on, and is for the adapter to end.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable

import msgspec

__all__ = [
    "FRAME_NBYTES",
    "MAX_ENTRIES",
    "P2P",
    "Broke",
    "Cancel",
    "Command",
    "Ended",
    "Entry",
    "Event",
    "Moved",
    "Order",
    "Ping",
    "Pong",
    "Probe",
    "Probed",
    "Ready",
    "Register",
    "Registered",
    "Setup",
    "Unusable",
    "encode",
    "pack_entries",
    "unpack_entries",
]

P2P = "P2PHANDSHAKE"
"""How engines find each other without anybody's help, in Mooncake's words."""
MAX_ENTRIES = 1024
_ENTRY = struct.Struct("<IIQQ")
FRAME_NBYTES = MAX_ENTRIES * _ENTRY.size + 4096
"""Longer frames are none of ours."""

Entry = tuple[int, int, int, int]
"""(region, bytes, source offset, destination address)."""


class Setup(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """What engine to make.

    Attributes:
        name: Of the segment, as `TransferEngine.initialize` wants it.
        metadata: How engines find each other.
        protocol: "tcp" or "rdma".
        device: Names of RDMA devices.
    """

    name: str
    metadata: str
    protocol: str
    device: str


class Register(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """A region.

    Attributes:
        region: Its number.
        nbytes: How long it is.
        address: Where it is, or is to be mapped.
        offset: Where in the file that comes with the frame it begins; None where it is mapped already.
    """

    region: int
    nbytes: int
    address: int
    offset: int | None


class Probe(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Ask whether a segment's engine answers."""

    segment: str


class Order(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """What one ticket is to move."""

    ticket: int
    segment: str
    entries: bytes


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """A ticket is to end soon."""

    ticket: int


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """Are you there?"""


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """The engine is there; peers reach it under the segment's name."""

    segment: str


class Unusable(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """There will be no engine. `missing`: the package cannot be imported."""

    problem: str
    missing: bool


class Registered(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """What became of a region: where it is, or why not."""

    region: int
    address: int
    problem: str = ""


class Probed(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """What became of a probe: nothing if the engine answered."""

    segment: str
    problem: str


class Moved(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """So many bytes of the ticket are in place."""

    ticket: int
    nbytes: int


class Ended(msgspec.Struct, frozen=True, array_like=True, tag=12):
    """Nothing of the ticket is under way any more; all of it is in place if `nbytes` says so."""

    ticket: int
    nbytes: int


class Broke(msgspec.Struct, frozen=True, array_like=True, tag=13):
    """A transfer failed, and nobody knows what it still does."""

    ticket: int
    problem: str


class Pong(msgspec.Struct, frozen=True, array_like=True, tag=14):
    """Here I am."""


Command = Setup | Register | Probe | Order | Cancel | Ping
Event = Ready | Unusable | Registered | Probed | Moved | Ended | Broke | Pong
_encoder = msgspec.msgpack.Encoder()


def encode(message: Command | Event) -> bytes:
    """As the bytes of one frame."""
    return _encoder.encode(message)


def pack_entries(entries: Iterable[Entry]) -> bytes:
    """As the bytes of an Order's entries."""
    flat = list(entries)
    return struct.pack("<" + "IIQQ" * len(flat), *itertools.chain.from_iterable(flat))


def unpack_entries(packed: bytes) -> list[Entry]:
    """The entries of an Order."""
    return list(_ENTRY.iter_unpack(packed))
