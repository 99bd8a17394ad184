"""What travels over one connection: a unix socket of packets (SOCK_SEQPACKET), each one message; version 1.

Opening, once: as `kvpoll_common.handshake` has it, each Hello and each Proof in an Opening, with the sender as the
caller and the magic "KVPOLSHM"; then

    sender -> receiver   Regions  where the sender's regions lie in files whose descriptors, for reading only,
                                  come with this packet
    receiver -> sender   Ready    it has mapped them

A token is good for the first writer that uses it. Then, in any order and number:

    sender -> receiver   Order    ticket, token, entries: read this from my regions into yours
    sender -> receiver   Cancel   ticket: end it soon
    receiver -> sender   End      ticket, verdict; once per Order, after its last byte was read and written

Several Orders may come as one Orders, and several Ends as one Ends: they mean the same as one after the other.

Whatever is none of these, or comes when it should not, ends the connection. So does the end of either side: the
receiver closes only after it has stopped to read and write for that connection.
"""

from __future__ import annotations

import enum
import itertools
import struct
from collections.abc import Iterable, Iterator
from typing import Annotated

import msgspec
from msgspec import Meta

from kvpoll_common.handshake import Kind, Opening
from kvpoll_fsm.errors import MalformedMessage
from kvpoll_fsm.spi import MAX_TICKET_NBYTES, Write

__all__ = [
    "KIND",
    "MAX_ENTRIES",
    "MAX_ORDERS",
    "MAX_REGIONS",
    "PACKET_NBYTES",
    "Cancel",
    "End",
    "Ends",
    "Entry",
    "Message",
    "Opening",
    "Order",
    "Orders",
    "Place",
    "Ready",
    "Regions",
    "Verdict",
    "decode",
    "encode",
    "pack_entries",
    "pack_orders",
]

KIND = Kind("shm", b"KVPOLSHM", version=1)
MAX_ENTRIES = 1024
MAX_ORDERS = 1024
"""Most orders of one connection that may be unanswered."""
MAX_REGIONS = 128
"""Most regions of a sender: their file descriptors travel in one packet, which can hold 253."""
TOKEN_NBYTES = 16

_ENTRY = struct.Struct("<HHIQQ")
PACKET_NBYTES = MAX_ENTRIES * _ENTRY.size + 1024
"""Longer packets are none of ours."""

_ORDER_NBYTES = 64
"""More than what an order takes besides its entries."""

Entry = tuple[int, int, int, int]
"""(region, bytes, source offset, destination offset)."""
Unsigned = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


def _exactly(nbytes: int) -> Meta:
    return Meta(min_length=nbytes, max_length=nbytes)


class Place(msgspec.Struct, frozen=True, array_like=True):
    """A region in the file that came with it."""

    region: Annotated[int, Meta(ge=0, lt=1 << 16)]
    offset: Unsigned
    nbytes: Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]


class Regions(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """The sender's regions, in the order of the file descriptors."""

    places: Annotated[tuple[Place, ...], Meta(min_length=1, max_length=MAX_REGIONS)]


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """The receiver takes orders."""


class Order(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """What one ticket is to move."""

    ticket: Unsigned
    token: Annotated[bytes, _exactly(TOKEN_NBYTES)]
    entries: Annotated[bytes, Meta(min_length=_ENTRY.size, max_length=MAX_ENTRIES * _ENTRY.size)]

    def unpack(self) -> list[Entry]:
        """The entries.

        Raises:
            MalformedMessage: An empty entry, a piece of one, or more bytes than a ticket may have.
        """
        if len(self.entries) % _ENTRY.size:
            raise MalformedMessage("an order that is cut")
        read = list(_ENTRY.iter_unpack(self.entries))
        entries: list[Entry] = [
            (region, nbytes, src, dst) for region, zero, nbytes, src, dst in read if nbytes and not zero
        ]
        if len(entries) < len(read):
            raise MalformedMessage("an order with an entry that is none")
        total = sum([nbytes for _, nbytes, _, _ in entries])
        if total > MAX_TICKET_NBYTES:
            raise MalformedMessage(f"an order of {total} bytes")
        return entries


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """A ticket is to end soon."""

    ticket: Unsigned


class Verdict(enum.IntEnum):
    """What became of an order."""

    landed = 0
    unknown_token = 1
    out_of_range = 2
    revoked = 3
    cancelled = 4
    no_source = 5

    @property
    def reason(self) -> str:
        """The verdict as a sentence for people."""
        return _REASONS[self]


_REASONS = {
    Verdict.landed: "the bytes are in place",
    Verdict.unknown_token: "the receiver does not know the token, or not from this writer, or has revoked it",
    Verdict.out_of_range: "a write lies outside the ranges that the token admits",
    Verdict.revoked: "the receiver revoked the token in the middle of the copy",
    Verdict.cancelled: "cancelled",
    Verdict.no_source: "the receiver knows no such source",
}


class End(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """An order is over: nothing is read or written for it any more."""

    ticket: Unsigned
    verdict: Verdict


class Orders(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """Several orders, as many as a packet holds."""

    orders: Annotated[tuple[Order, ...], Meta(min_length=1, max_length=MAX_ORDERS)]


class Ends(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """Several orders are over."""

    ends: Annotated[tuple[End, ...], Meta(min_length=1, max_length=MAX_ORDERS)]


Message = Opening | Regions | Ready | Order | Cancel | End | Orders | Ends
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """As the bytes of one packet."""
    return _encoder.encode(message)


def decode(packet: bytes | memoryview) -> Message:
    """Read one packet.

    Raises:
        MalformedMessage: It is none of ours.
    """
    try:
        return _decoder.decode(packet)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors too
        raise MalformedMessage(f"does not speak the kvpoll shm protocol: {error}") from error


def pack_orders(orders: Iterable[Order]) -> Iterator[Message]:
    """Orders in as few messages as packets of the allowed size can hold."""
    together: list[Order] = []
    nbytes = 0
    for order in orders:
        size = len(order.entries) + _ORDER_NBYTES
        if together and nbytes + size > PACKET_NBYTES - _ORDER_NBYTES:
            yield together[0] if len(together) == 1 else Orders(tuple(together))
            together, nbytes = [], 0
        together.append(order)
        nbytes += size
    if together:
        yield together[0] if len(together) == 1 else Orders(tuple(together))


def pack_entries(writes: Iterable[Write]) -> bytes:
    """Writes as the bytes of an Order's entries."""
    places = [(write.region, 0, write.nbytes, write.src_offset, write.dst_offset) for write in writes]
    return struct.pack("<" + "HHIQQ" * len(places), *itertools.chain.from_iterable(places))
