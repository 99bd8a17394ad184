"""One peer incarnation as this endpoint knows it: introduction, channel, signs of life.

A connection is opened by the endpoint that receives data (it says Hello); the sending endpoint accepts it.
Two endpoints that do both have two connections, each with its own channel. No clock in here: the driver
ticks, so a process that was paused does not take its own pause for the peer's silence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from kvpoll_fsm.channel import Channel
from kvpoll_fsm.deadlines import Deadlines
from kvpoll_fsm.errors import InvalidInput, LayoutError, MalformedMessage
from kvpoll_fsm.layout import Field, Layout
from kvpoll_fsm.messages import (
    MAX_SENT_NBYTES,
    PROTOCOL,
    BlockGrant,
    FieldSpec,
    Hello,
    Packet,
    TransportOffer,
    Welcome,
    decode,
    encode,
)
from kvpoll_fsm.news import News

__all__ = ["UNSEEN", "Connection", "Origin", "check_introduction", "introduction", "name_of"]

MAX_RESEND_TICKS = 8


def introduction(incarnation: bytes, layout: Layout, offers: tuple[TransportOffer, ...]) -> dict[str, Any]:
    """The fields that Hello and Welcome share."""
    return {
        "incarnation": incarnation,
        "min_version": PROTOCOL[0],
        "max_version": PROTOCOL[1],
        "fields": tuple(FieldSpec(f.name, f.dtype, f.shape_per_token, f.per_room) for f in layout.fields),
        "block_tokens": layout.block_tokens,
        "transports": offers,
    }


def check_introduction(incarnation: bytes, layout: Layout, offers: tuple[TransportOffer, ...]) -> None:
    """Refuse what peers would drop as malformed, before anybody waits for their answer.

    Raises:
        InvalidInput: Says what peers would not take.
    """
    packet = encode(Welcome(answers=bytes(16), **introduction(incarnation, layout, offers)))
    try:
        decode(packet)
    except MalformedMessage as error:
        raise InvalidInput(f"peers would not take what this endpoint says of itself: {error}") from error
    if len(packet) > MAX_SENT_NBYTES:
        problem = f"{len(packet)} bytes of fields, transports and regions, at most {MAX_SENT_NBYTES} are taken"
        raise InvalidInput(f"peers would not take what this endpoint says of itself: {problem}")


def name_of(incarnation: bytes, number: int) -> bytes:
    """The incarnation by which our connection `number` is known to the peer it was opened to.

    Every connection we open starts a channel of its own, though both processes may be the same as before; so
    it goes by a name of its own. The last 12 bytes stay, the first 4 tell the connections apart.
    """
    return (int.from_bytes(incarnation, "big") ^ number << 96).to_bytes(16, "big")


class Origin(NamedTuple):
    """Where a packet came from, as far as the sockets know.

    Attributes:
        conn: The connection that we opened and that it came by, or None if the peer came to us.
        key: The CURVE public key whose holder sent it; empty without keys.
        host: The peer's network address; empty if it was not looked at.
    """

    conn: int | None = None
    key: str = ""
    host: str = ""


UNSEEN = Origin()
"""A peer that came to us, of whom no more is known."""


class Connection:
    """One end of the acquaintance of two incarnations.

    Attributes:
        number: Names it on this endpoint.
        address: Where we connected to; None if the peer came to us.
        outgoing: We said Hello; we are the receiving side of its rooms.
        origin: Who came to us.
        channel: The ordered stream; messages may be pushed before the peer is known.
        offers: The transports the peer can be written through, by name.
        block_tokens: The peer's tokens per block.
        silent_ticks: Heartbeats since the peer was last heard.
        idle_ticks: Heartbeats since a room last used the connection.
        news: The rooms that the next heartbeat speaks of.
    """

    __slots__ = (
        "_acked_then",
        "_resend_wait",
        "_waited",
        "address",
        "block_tokens",
        "channel",
        "idle_ticks",
        "news",
        "number",
        "offers",
        "origin",
        "outgoing",
        "silent_ticks",
    )

    def __init__(self, number: int, channel: Channel, address: str | None, origin: Origin = UNSEEN) -> None:
        self.number = number
        self.address = address
        self.outgoing = address is not None
        self.origin = origin
        self.channel = channel
        self.offers: dict[str, TransportOffer] = {}
        self.block_tokens = 1
        self.silent_ticks = 0
        self.idle_ticks = 0
        self.news = News()
        self._acked_then = 0
        self._waited = 0
        self._resend_wait = 1

    @property
    def peer(self) -> bytes | None:
        """The peer's incarnation, or None until it has answered."""
        return self.channel.target

    @property
    def account(self) -> str:
        """Whom reservations are counted for: the holder of a key, or without keys the connection."""
        return self.origin.key or f"#{self.number}"

    @property
    def is_stranger(self) -> bool:
        """It came to us and has said nothing but Hello."""
        return not self.outgoing and not self.channel.received

    @property
    def must_hear(self) -> bool:
        """The peer has not acknowledged our last words yet. One that never said anything has no room here."""
        return bool(self.peer and self.channel.unacked) and not self.is_stranger

    def fits(self, origin: Origin) -> bool:
        """Whether the peer of this connection may have sent what came from there."""
        if self.outgoing or origin.conn is not None:
            return origin.conn == self.number
        return origin.key == self.origin.key

    def introduce(self, packet: Hello | Welcome) -> None:
        """Note who the peer is and what it offers."""
        self.channel.target = packet.incarnation
        self.offers = {offer.name: offer for offer in packet.transports}
        self.block_tokens = packet.block_tokens
        self.silent_ticks = 0
        self._waited, self._resend_wait = 0, 1

    def differences(self, layout: Layout, packet: Hello | Welcome) -> tuple[str, ...]:
        """How the peer's layout differs from ours, or nothing."""
        try:
            theirs = [Field(f.name, f.dtype, f.shape, f.per_room) for f in packet.fields]
        except LayoutError as error:  # a dtype, perhaps, of a later version
            return (f"the peer's layout is none here: {error}",)
        return layout.differences(theirs)

    def problem_of(self, grant: BlockGrant | None) -> str:
        """What is wrong with a grant that only knowledge of the peer's blocks shows, or nothing."""
        if grant is None or grant.tokens <= len(grant.blocks) * self.block_tokens:
            return ""
        blocks = f"{len(grant.blocks)} blocks of {self.block_tokens}"
        return f"a grant of {grant.tokens} tokens in {blocks} for part {grant.part}"

    def tick(self, deadlines: Deadlines, *, busy: bool) -> str:
        """A heartbeat's time has passed; returns why the connection is to end, or nothing.

        Args:
            deadlines: How long a peer may be silent, and a connection idle.
            busy: Some room uses the connection.
        """
        self.silent_ticks += 1
        self.idle_ticks = 0 if busy else self.idle_ticks + 1
        if self.peer is not None and self.silent_ticks * deadlines.heartbeat_s > deadlines.peer_lost_s:
            return f"the peer was not heard for {deadlines.peer_lost_s:g} s"
        idle = self.outgoing and self.idle_ticks * deadlines.heartbeat_s > deadlines.linger_s
        return "idle" if idle else ""

    def resend_tick(self) -> list[Packet]:
        """What to send again: everything unacknowledged if nothing was acknowledged since the last tick.

        Ticks without progress grow the wait between resends, up to `MAX_RESEND_TICKS`.
        """
        channel = self.channel
        if channel.target is None:
            return []
        if channel.acked != self._acked_then or not channel.unacked:
            self._acked_then, self._waited, self._resend_wait = channel.acked, 0, 1
            return []
        self._waited += 1
        if self._waited <= self._resend_wait:
            return []
        self._waited, self._resend_wait = 0, min(self._resend_wait * 2, MAX_RESEND_TICKS)
        return list(channel.resend())

    def hello_tick(self) -> bool:
        """Whether to say Hello again: soon, and then less and less often.

        Where nobody listens yet they pile up in the socket, and all arrive at once when somebody does.
        """
        self._waited += 1
        if self._waited < self._resend_wait:
            return False
        self._waited, self._resend_wait = 0, min(self._resend_wait * 2, MAX_RESEND_TICKS)
        return True

    def clone(self) -> Connection:
        """A copy that shares nothing mutable."""
        copy = Connection(self.number, self.channel.clone(), self.address, self.origin)
        copy.offers, copy.block_tokens = dict(self.offers), self.block_tokens
        copy.silent_ticks, copy.idle_ticks = self.silent_ticks, self.idle_ticks
        copy.news = self.news.clone()
        copy._acked_then, copy._waited, copy._resend_wait = self._acked_then, self._waited, self._resend_wait
        return copy

    def key(self) -> tuple[Any, ...]:
        """Canonical plain value of the state, tick counters apart."""
        return (self.number, self.address, self.channel.key(), tuple(sorted(self.offers)))
