"""The connections of one endpoint: made, found, spoken through, forgotten."""

from __future__ import annotations

from typing import Any

from kvpoll_fsm.channel import Channel
from kvpoll_fsm.connection import UNSEEN, Connection, Origin, introduction, name_of
from kvpoll_fsm.effects import Outbox, Transmit
from kvpoll_fsm.errors import ChannelOverflow, LimitReached
from kvpoll_fsm.layout import Layout
from kvpoll_fsm.limits import DEFAULT, Limits
from kvpoll_fsm.messages import MAX_BEATS_PER_FRAME, Beat, Hello, Message, Packet, TransportOffer, Welcome
from kvpoll_fsm.session import RoomKey

__all__ = ["Peers"]


class Peers:
    """Connections by number, and what waits to be said through them.

    Attributes:
        connections: By number.
        overflowed: Why a connection can take no more messages, by number; it is to be ended.
    """

    __slots__ = (
        "_incarnation",
        "_layout",
        "_limits",
        "_made",
        "_names",
        "_offers",
        "_out",
        "_unflushed",
        "connections",
        "overflowed",
    )

    def __init__(
        self,
        incarnation: bytes,
        layout: Layout,
        offers: tuple[TransportOffer, ...],
        out: Outbox,
        limits: Limits = DEFAULT,
    ) -> None:
        self._incarnation = incarnation
        self._layout = layout
        self._limits = limits
        self._offers = offers
        self._out = out
        self._made = 0
        self._names: dict[tuple[bool, bytes], Connection] = {}
        self._unflushed: dict[int, None] = {}
        self.connections: dict[int, Connection] = {}
        self.overflowed: dict[int, str] = {}

    def connected_to(self, address: str) -> Connection | None:
        """The connection we opened to this address, if there is one."""
        return next((c for c in self.connections.values() if c.address == address), None)

    def find(self, source: bytes, target: bytes, *, outgoing: bool) -> Connection | None:
        """The connection between these two names, ours first, if it is open here."""
        connection = self._names.get((outgoing, source if outgoing else target))
        channel = connection.channel if connection else None
        return connection if channel and (channel.source, channel.target) == (source, target) else None

    def caller(self, incarnation: bytes) -> Connection | None:
        """The connection that this peer has opened to us, if it is open."""
        return self._names.get((False, incarnation))

    def place_for(self, origin: Origin) -> Connection | None:
        """See that one more peer may come; returns a connection that is to make place for it, if any.

        Raises:
            LimitReached: All places are taken by peers that have said more than Hello.
        """
        callers = [c for c in self.connections.values() if not c.outgoing]
        ours = [c for c in callers if (c.origin.key or c.origin.host) == (origin.key or origin.host)]
        for name, crowd in (("callers_per_peer", ours), ("callers", callers)):
            limit = getattr(self._limits, name)
            if len(crowd) >= limit:
                stranger = next((c for c in crowd if c.is_stranger), None)
                if stranger is None:
                    raise LimitReached(name, limit)
                return stranger
        return None

    def call(self, address: str) -> Connection:
        """Open a connection to an address: says Hello.

        Raises:
            LimitReached: There are as many as there may be.
        """
        if sum(c.outgoing for c in self.connections.values()) >= self._limits.callees:
            raise LimitReached("callees", self._limits.callees)
        self._made += 1
        connection = self._add(Channel(name_of(self._incarnation, self._made), None, outgoing=True), address)
        self._out.emit(Transmit(connection.number, self._hello(connection)))
        return connection

    def answer(self, packet: Hello, origin: Origin = UNSEEN) -> Connection:
        """The connection of a peer that said Hello, made if it is new: says Welcome."""
        connection = self.caller(packet.incarnation)
        if connection is None:
            self._made += 1
            connection = self._add(Channel(self._incarnation, packet.incarnation, outgoing=False), None, origin)
        connection.introduce(packet)
        fields = introduction(self._incarnation, self._layout, self._offers)
        self._out.emit(Transmit(connection.number, Welcome(answers=packet.incarnation, **fields)))
        return connection

    def push(self, conn: int, message: Message) -> None:
        """Queue a message; the next `flush()` sends it. Nothing happens if the connection has ended."""
        connection = self.connections.get(conn)
        if connection is None:
            return
        try:
            connection.channel.push(message)
        except ChannelOverflow as error:
            self.overflowed[conn] = str(error)
        else:
            self._unflushed[conn] = None

    def must_flush(self, conn: int) -> None:
        """The connection has something to send, if only an acknowledgement."""
        self._unflushed[conn] = None

    def flush(self, *, ack_now: bool) -> None:
        """Transmit the messages that were pushed since, and the acknowledgements that are owed."""
        for conn in list(self._unflushed):
            channel = self.connections[conn].channel
            for frame in channel.flush(ack_now=ack_now):
                self._out.emit(Transmit(conn, frame))
            if not channel.owes_ack:
                del self._unflushed[conn]

    def heartbeat(self, connection: Connection, beats: list[tuple[RoomKey, Beat]]) -> None:
        """Say to a peer that we live, and where these rooms stand; first of all what was to be said before that.

        A beat holds until it is replaced, so none may come before the message that it follows on.
        """
        for frame in connection.channel.flush():
            self._out.emit(Transmit(connection.number, frame))
        for at in range(0, max(1, len(beats)), MAX_BEATS_PER_FRAME):
            some = beats[at : at + MAX_BEATS_PER_FRAME]
            serial = connection.news.said([key for key, _ in some])
            frame = connection.channel.heartbeat(tuple([beat for _, beat in some]), serial)
            self._out.emit(Transmit(connection.number, frame))

    def resend_tick(self) -> None:
        """`RESEND_AFTER_S` has passed: send again what is not acknowledged, say Hello again."""
        for connection in self.connections.values():
            packets: list[Packet] = connection.resend_tick()
            if connection.peer is None and connection.hello_tick():
                packets = [self._hello(connection)]
            for packet in packets:
                self._out.emit(Transmit(connection.number, packet))

    def remove(self, conn: int) -> None:
        """Forget a connection, having sent what it still had to say."""
        connection = self.connections.pop(conn)
        del self._names[_name(connection)]
        for frame in connection.channel.flush(ack_now=True):
            self._out.emit(Transmit(conn, frame))
        self._unflushed.pop(conn, None)
        self.overflowed.pop(conn, None)

    @property
    def unacked(self) -> int:
        """Messages some peer has not acknowledged yet."""
        return sum(len(c.channel.unacked) for c in self.connections.values() if c.peer is not None)

    @property
    def owes_ack(self) -> bool:
        """Some acknowledgement waits for company."""
        return bool(self._unflushed)

    def clone(self, out: Outbox) -> Peers:
        """A copy that shares nothing mutable and speaks through `out`."""
        copy = Peers(self._incarnation, self._layout, self._offers, out, self._limits)
        copy._made = self._made
        copy._unflushed, copy.overflowed = dict(self._unflushed), dict(self.overflowed)
        copy.connections = {number: connection.clone() for number, connection in self.connections.items()}
        copy._names = {_name(connection): connection for connection in copy.connections.values()}
        return copy

    def key(self) -> tuple[Any, ...]:
        """Canonical plain value of the state."""
        connections = tuple(connection.key() for connection in self.connections.values())
        return (self._made, connections, tuple(self._unflushed), tuple(self.overflowed))

    def _add(self, channel: Channel, address: str | None, origin: Origin = UNSEEN) -> Connection:
        connection = self.connections[self._made] = Connection(self._made, channel, address, origin)
        self._names[_name(connection)] = connection
        return connection

    def _hello(self, connection: Connection) -> Hello:
        return Hello(**introduction(connection.channel.source, self._layout, self._offers))


def _name(connection: Connection) -> tuple[bool, bytes]:
    """What tells a connection from all others: our name for what we opened, the peer's for what it did."""
    channel = connection.channel
    return channel.outgoing, channel.source if channel.outgoing or channel.target is None else channel.target
