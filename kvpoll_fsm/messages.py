"""What two endpoints say to each other, and the only codec for it.

A packet is one MessagePack map, tagged by `kind`: `Hello` and `Welcome` introduce two incarnations to each
other, `Frame` carries sequenced room messages between them, `Stranger` answers a frame that was meant for
an incarnation that is not here. Everything is bounded; `decode` raises nothing but `MalformedMessage` and
`UnsupportedVersion`. A field a newer peer adds is ignored as long as it is optional.

Each room message names both generations. 0 stands for one the sender of the message does not know yet.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from kvpoll_fsm.errors import Failure, MalformedMessage, UnsupportedVersion
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.wire_values import (
    MAX_BLOCKS_PER_GRANT,
    MAX_RANKS,
    MAX_ROOM,
    BlockGrant,
    Count,
    FieldSpec,
    Incarnation,
    Name,
    Part,
    Positive,
    Rank,
    Ranks,
    Room,
    Token,
    TransportOffer,
    all_different,
)

__all__ = [
    "MAX_BLOCKS_PER_GRANT",
    "MAX_PACKET_NBYTES",
    "MAX_RANKS",
    "MAX_ROOM",
    "MAX_SENT_NBYTES",
    "PROTOCOL",
    "Abort",
    "Beat",
    "BlockGrant",
    "Bye",
    "FencePart",
    "FieldSpec",
    "Frame",
    "Hello",
    "Message",
    "Opened",
    "Packet",
    "PartAck",
    "PartFenced",
    "PartOutcome",
    "PartReport",
    "Quiesced",
    "Reserve",
    "Resume",
    "Stranger",
    "TransportOffer",
    "Welcome",
    "Withdraw",
    "Withdrawn",
    "decode",
    "encode",
]

PROTOCOL = (1, 1)
"""The lowest and the highest protocol version this code speaks."""
MAX_PACKET_NBYTES = 1 << 22
MAX_SENT_NBYTES = 1 << 20
"""No packet of ours is longer, so that a peer may read less than `MAX_PACKET_NBYTES`."""
MAX_MESSAGES_PER_FRAME = 256
MAX_BEATS_PER_FRAME = 4096
MAX_HEARD_PER_FRAME = 256


class _Introduction(msgspec.Struct, frozen=True, kw_only=True):
    incarnation: Incarnation
    min_version: Annotated[int, Meta(ge=0, le=1 << 16)]
    max_version: Annotated[int, Meta(ge=0, le=1 << 16)]
    fields: Annotated[tuple[FieldSpec, ...], Meta(max_length=64)] = ()
    block_tokens: Annotated[int, Meta(ge=1, lt=1 << 31)] = 1
    transports: Annotated[tuple[TransportOffer, ...], Meta(max_length=16)] = ()

    def __post_init__(self) -> None:
        all_different("field", [field.name for field in self.fields])
        all_different("transport", [offer.name for offer in self.transports])


class Hello(_Introduction, frozen=True, tag_field="kind", tag="Hello"):
    """The receiving endpoint introduces itself to the sending one. Repeated until welcomed.

    This and `Welcome` keep their meaning in every protocol version.
    """


class Welcome(_Introduction, frozen=True, kw_only=True, tag_field="kind", tag="Welcome"):
    """The answer to Hello; `answers` is the incarnation that said it."""

    answers: Incarnation


class _RoomMessage(msgspec.Struct, frozen=True, tag_field="kind", kw_only=True, omit_defaults=True):
    """Common to all room messages: which room, which receiver rank, which lives of it."""

    room: Room
    rank: Rank
    sender_generation: Count = 0
    receiver_generation: Count = 0


class Reserve(_RoomMessage, frozen=True, tag="Reserve"):
    """Receiver: rank `rank` of `ranks` is here. Sent again with a grant once blocks came free."""

    ranks: Ranks
    dummy: bool = False
    grant: BlockGrant | None = None


class Resume(_RoomMessage, frozen=True, tag="Resume"):
    """Receiver: blocks for the next part. `sent_tokens` is what it has committed."""

    sent_tokens: Count
    grant: BlockGrant


class Opened(_RoomMessage, frozen=True, tag="Opened"):
    """Sender: all required ranks have granted. Binds the two generations to each other."""

    required: Ranks
    total_tokens: Positive | None = None


class PartReport(_RoomMessage, frozen=True, tag="PartReport"):
    """Sender: every byte of this part has landed at this rank and no write of it is in flight, or (`failure`) why not.

    A failure is reported before it is decided on: the rank answers with it, unless it has a reason of its own, which
    comes first, or is gone. So a receiver that gave up or died is never taken for a transport that failed.

    Attributes:
        offset: First token.
        tokens: Length in tokens.
        total_tokens: Tokens of the whole room; totals travel in messages, never in buffers.
        checksum: XXH3-128 over the part's bytes in field and token order, or None if off.
    """

    part: Part
    offset: Count
    tokens: Positive
    total_tokens: Positive
    is_last: bool
    transport: Name
    checksum: Annotated[bytes, Meta(min_length=16, max_length=16)] | None = None
    failure: Failure | None = None


class PartAck(_RoomMessage, frozen=True, tag="PartAck"):
    """Receiver: the part is right (`failure` is None) or why it is not."""

    part: Part
    failure: Failure | None = None


class PartOutcome(_RoomMessage, frozen=True, tag="PartOutcome"):
    """Sender: the outcome of a part over all ranks. Only this moves a receiver on.

    Attributes:
        quiescent: No write of this room to this rank is in flight any more.
    """

    part: Part
    is_last: bool
    state: KVPoll
    failure: Failure | None = None
    quiescent: bool = True


class FencePart(_RoomMessage, frozen=True, tag="FencePart"):
    """Sender: what was written of this part through one transport has failed and may land still. See that it cannot.

    The blocks stay the part's, and the tokens of the other transports stay good.

    Attributes:
        attempt: Which of the sender's attempts at the part this was; the answer repeats it.
    """

    part: Part
    transport: Name
    attempt: Count


class PartFenced(_RoomMessage, frozen=True, tag="PartFenced"):
    """Receiver: nothing lands any more of what was written of this part through that transport.

    Attributes:
        token: Admits writes to the same blocks through it anew; None if that transport is not to be used any more.
    """

    part: Part
    transport: Name
    attempt: Count
    token: Token | None = None


class Withdraw(_RoomMessage, frozen=True, tag="Withdraw"):
    """Receiver: may I have the unused grant for this part back?"""

    part: Part


class Withdrawn(_RoomMessage, frozen=True, tag="Withdrawn"):
    """Sender: the grant was unused and is forgotten (`ok`), or is in use by now."""

    part: Part
    ok: bool


class Abort(_RoomMessage, frozen=True, tag="Abort"):
    """Either side: the room has failed here, and why.

    Attributes:
        quiescent: From a sender: no write to this rank is in flight any more.
    """

    failure: Failure
    quiescent: bool = False


class Quiesced(_RoomMessage, frozen=True, tag="Quiesced"):
    """No write of this room can land at this rank any more: none is in flight (sender), or it fenced (receiver)."""


class Bye(msgspec.Struct, frozen=True, tag_field="kind", tag="Bye"):
    """This incarnation ends; nothing follows."""


Message = (
    Reserve
    | Resume
    | Opened
    | PartReport
    | PartAck
    | PartOutcome
    | FencePart
    | PartFenced
    | Withdraw
    | Withdrawn
    | Abort
    | Quiesced
    | Bye
)


class Beat(msgspec.Struct, frozen=True, array_like=True):
    """Where one room stands. Not sequenced: it holds until the next one replaces it.

    Attributes:
        to_sender: The receiving end is the sender's side of the room.
        gate: Name of the gate this side waits at.
        bytes_done: Bytes of the room that have landed so far.
        host_alive: The host process has called its endpoint lately; the driver alone does not count.
        working: Staging, checking or copying for this room goes on here.
        tries: How often its writes were given up, or begun again, in all: that keeps a room waiting, too.
    """

    to_sender: bool
    room: Room
    rank: Rank
    sender_generation: Count
    receiver_generation: Count
    gate: Annotated[str, Meta(max_length=32)]
    bytes_done: Count
    host_alive: bool
    working: bool = False
    tries: Count = 0


class Frame(msgspec.Struct, frozen=True, tag_field="kind", tag="Frame", omit_defaults=True):
    """Messages from one incarnation to another, `first_seq` being the number of the first.

    Attributes:
        outgoing: Sent by the side that said Hello. Each direction of Hello has a channel of its own.
        ack: Every message up to this number has arrived.
        beats: Heartbeat entries; a frame without any is a heartbeat of the endpoint all the same.
        beat_serial: Numbers the frames with beats, from 1; 0 from a peer that repeats them all and hears of none.
        heard: Serials of the frames with beats that have arrived since our last frame.
    """

    source: Incarnation
    target: Incarnation
    outgoing: bool
    first_seq: Count = 0
    ack: Count = 0
    messages: Annotated[tuple[Message, ...], Meta(max_length=MAX_MESSAGES_PER_FRAME)] = ()
    beats: Annotated[tuple[Beat, ...], Meta(max_length=MAX_BEATS_PER_FRAME)] = ()
    beat_serial: Count = 0
    heard: Annotated[tuple[Count, ...], Meta(max_length=MAX_HEARD_PER_FRAME)] = ()


class Stranger(msgspec.Struct, frozen=True, tag_field="kind", tag="Stranger"):
    """A frame came for incarnation `target`, which is not here (any more). Says who sent it."""

    source: Incarnation
    target: Incarnation


Packet = Hello | Welcome | Frame | Stranger

_decoder: msgspec.msgpack.Decoder[Packet] = msgspec.msgpack.Decoder(Packet)
_encoder = msgspec.msgpack.Encoder()


def encode(packet: Packet) -> bytes:
    """The bytes of a packet."""
    return _encoder.encode(packet)


def decode(data: bytes | bytearray | memoryview) -> Packet:
    """The packet in `data`.

    Raises:
        MalformedMessage: Too long, not MessagePack, an unknown kind, a missing field or a value out of bounds.
        UnsupportedVersion: A Hello or Welcome that shares no protocol version with us.
    """
    if len(data) > MAX_PACKET_NBYTES:
        raise MalformedMessage(f"a packet of {len(data)} bytes; at most {MAX_PACKET_NBYTES} are taken")
    try:
        packet = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(f"not a packet: {error}") from error
    if isinstance(packet, (Hello, Welcome)):
        negotiate(packet)
    return packet


def negotiate(theirs: Hello | Welcome, ours: tuple[int, int] = PROTOCOL) -> int:
    """The highest protocol version both sides speak.

    Raises:
        UnsupportedVersion: There is none.
    """
    version = min(ours[1], theirs.max_version)
    if version < max(ours[0], theirs.min_version):
        raise UnsupportedVersion(ours, (theirs.min_version, theirs.max_version))
    return version


def to_builtins(packet: Packet | Message) -> Any:
    """A packet or message as plain values, for traces."""
    return msgspec.to_builtins(packet)
