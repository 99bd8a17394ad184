"""The endpoint without I/O: connections, rooms, parked reservations and blocks.

Everything that decides is in here and is pure, so the driver, the simulator and the explorer host the same
code. Calls take what happened; `drain()` returns what is to be done about it, in order:

- `Transmit(conn, packet)`: put a packet on the wire;
- `Do(key, command)`: carry out a session's command (or, with `key` None, set a timer of the core);
- `Changed(key)`: the room's state, gate or parts may have changed;
- `Hangup(conn)`: the connection has ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kvpoll_fsm import inputs, messages
from kvpoll_fsm.blocks import BlockAccounts, BlockLoad
from kvpoll_fsm.channel import Channel
from kvpoll_fsm.commands import Command, Expose, Fence, Grant, Regrant, Release, Send, SetTimer
from kvpoll_fsm.connection import Connection, introduction
from kvpoll_fsm.deadlines import Deadlines, Gate
from kvpoll_fsm.errors import (
    ChannelOverflow,
    DuplicateRoom,
    Failure,
    FailureCode,
    KvpollError,
    RequestTooLarge,
)
from kvpoll_fsm.layout import Layout
from kvpoll_fsm.messages import MAX_BEATS_PER_FRAME, Beat, Frame, Hello, Message, Packet, Stranger, Welcome
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.receiver_session import ReceiverOptions, ReceiverSession
from kvpoll_fsm.sender_session import SenderOptions, SenderSession
from kvpoll_fsm.session import RoomKey, Session
from kvpoll_fsm.spi import LeaseId

__all__ = ["Changed", "CoreOptions", "Do", "Effect", "EndpointCore", "Hangup", "Transmit"]

WITHDRAW_TIMER = "withdraw"
MAX_PARKED = 1 << 16


@dataclass(frozen=True, slots=True)
class CoreOptions:
    """What an endpoint is.

    Attributes:
        incarnation: 16 random bytes, new with every start.
        layout: Fields, and tokens per block of its own pool.
        offers: The transports peers can write to us through.
        blocks: Blocks in the pool.
        managed: We choose blocks; otherwise the engine names them.
    """

    incarnation: bytes
    layout: Layout
    offers: tuple[messages.TransportOffer, ...]
    blocks: int
    managed: bool = True
    deadlines: Deadlines = field(default_factory=Deadlines)


@dataclass(frozen=True, slots=True)
class Transmit:
    """Put a packet on the wire of a connection."""

    conn: int
    packet: Packet


@dataclass(frozen=True, slots=True)
class Do:
    """Carry out a command of a room, or of the core itself (`key` None)."""

    key: RoomKey | None
    command: Command


@dataclass(frozen=True, slots=True)
class Changed:
    """Look at this room again."""

    key: RoomKey


@dataclass(frozen=True, slots=True)
class Hangup:
    """The connection has ended; its sockets and links can go."""

    conn: int


Effect = Transmit | Do | Changed | Hangup


class EndpointCore:
    """All the state of one endpoint that decides anything.

    Attributes:
        options: What the endpoint is.
        accounts: Who holds which block.
        connections: Peers by connection number.
        sessions: Every life of a room that is not over, by key.
        ignored: Messages for rooms that are not here (any more).
    """

    def __init__(self, options: CoreOptions) -> None:
        self.options = options
        self.accounts = BlockAccounts(options.blocks, options.managed)
        self.connections: dict[int, Connection] = {}
        self.sessions: dict[RoomKey, Session] = {}
        self.ignored = 0
        self._open: dict[tuple[str, int, int], RoomKey] = {}
        self._rooms_of: dict[int, dict[RoomKey, None]] = {}
        self._parked: dict[int, dict[int, tuple[int, messages.Reserve]]] = {}
        self._counters = {"generation": 0, "conn": 0, "withdraw": 0}
        self._queue: deque[tuple[RoomKey, inputs.Input]] = deque()
        self._effects: list[Effect] = []
        self._unflushed: dict[int, None] = {}

    # Rooms, for the host

    def open_sender(self, room: int, options: SenderOptions) -> RoomKey:
        """Open the sender's side of a room and give it the reservations that came before.

        Raises:
            DuplicateRoom: It is open here and was not cleared.
        """
        key = self._new_key("sender", room, 0)
        self._add(key, SenderSession(key, self.options.deadlines, options))
        for conn, reserve in self._parked.pop(room, {}).values():
            self._reserve(conn, reserve)
        return key

    def open_receiver(self, room: int, rank: int, options: ReceiverOptions) -> RoomKey:
        """Open one receiver rank of a room.

        Raises:
            DuplicateRoom: It is open here and was not cleared.
            RequestTooLarge: The pool could never grant as many blocks.
            ForeignBlock: Blocks the engine named are not free.
        """
        if not (options.dummy or options.exact):
            self.accounts.check(options.blocks)
        key = self._new_key("receiver", room, rank)
        if options.exact:
            self.accounts.take_exact(self._lease(key, 0), options.exact)
        self._rooms_of[options.conn][key] = None
        self._add(key, ReceiverSession(key, self.options.deadlines, options))
        return key

    def feed(self, key: RoomKey, event: inputs.Input) -> None:
        """Give one input to a room; a room that is over ignores it."""
        if isinstance(event, inputs.Granted) and not self.accounts.holds(self._lease(key, event.part)):
            return
        self._queue.append((key, event))
        self._run()

    def clear(self, key: RoomKey) -> None:
        """The host drops its handle. What must still be said and awaited lives on until it is over."""
        place = (key.side, key.room, key.rank)
        if self._open.get(place) == key:
            del self._open[place]
        self.feed(key, inputs.ClearRoom())

    def load(self) -> BlockLoad:
        """How the pool's blocks are used."""
        return self.accounts.load()

    def drain(self) -> list[Effect]:
        """What is to be done, in order; each effect is returned once."""
        effects, self._effects = self._effects, []
        return effects

    # Peers

    def connect(self, address: str) -> int:
        """The connection to the endpoint at `address`; says Hello if there is none yet."""
        for connection in self.connections.values():
            if connection.address == address:
                connection.idle_ticks = 0
                return connection.number
        connection = self._add_connection(None, address)
        self._effects.append(Transmit(connection.number, self._hello()))
        return connection.number

    def hello(self, packet: Hello) -> int:
        """A peer introduces itself; returns its connection, to which the Welcome goes.

        The route for replies to that connection is wherever this came from.
        """
        connection = self._by_peer(packet.incarnation, outgoing=False)
        if connection is None:
            connection = self._add_connection(packet.incarnation, None)
        connection.introduce(packet)
        fields = introduction(self.options.incarnation, self.options.layout, self.options.offers)
        self._effects.append(Transmit(connection.number, Welcome(answers=packet.incarnation, **fields)))
        return connection.number

    def welcome(self, conn: int, packet: Welcome) -> None:
        """The endpoint we connected to has answered."""
        connection = self.connections.get(conn)
        if connection is None or packet.answers != self.options.incarnation:
            return
        if connection.peer not in (None, packet.incarnation):
            self.end(conn, "the peer was restarted")
            return
        differences = connection.differences(self.options.layout, packet)
        known = connection.peer is not None
        connection.introduce(packet)
        if differences:
            self.end(conn, "the layouts differ: " + "; ".join(differences), FailureCode.LayoutMismatch)
        elif not known:
            self._unflushed[conn] = None

    def frame(self, packet: Frame) -> int | None:
        """A frame of a peer; returns its connection, or None if there is none (the caller says Stranger)."""
        connection = self._by_peer(packet.source, outgoing=not packet.outgoing)
        if packet.target != self.options.incarnation or connection is None:
            return None
        connection.silent_ticks = 0
        for message in connection.channel.accept(packet):
            self._deliver(connection, message)
        for beat in packet.beats:
            self._beat(connection, beat)
        if connection.channel.owes_ack:
            self._unflushed[connection.number] = None
        self._run()
        return connection.number

    def stranger(self, conn: int, packet: Stranger) -> None:
        """The endpoint at the other end does not know the incarnation we spoke to."""
        connection = self.connections.get(conn)
        if connection is not None and connection.peer == packet.target != packet.source:
            self.end(conn, "the peer was restarted")

    def end(self, conn: int, detail: str, code: FailureCode = FailureCode.PeerLost) -> None:
        """A connection ends for good; its rooms are told."""
        connection = self.connections.get(conn)
        if connection is None:
            return
        rooms = self._rooms_of.pop(conn)
        for key in rooms:
            self._queue.append((key, inputs.PeerGone(conn, detail, code)))
        self._run()
        self._transmit_all(connection, ack_now=True)
        del self.connections[conn]
        self._unflushed.pop(conn, None)
        for parked in self._parked.values():
            for rank in [rank for rank, (other, _) in parked.items() if other == conn]:
                del parked[rank]
        self._effects.append(Hangup(conn))

    def say_bye(self) -> None:
        """Tell every peer that this incarnation ends."""
        for connection in self.connections.values():
            self._push(connection, messages.Bye())

    # Time

    def timer(self, key: RoomKey | None, name: str, epoch: int, host_alive: bool) -> None:
        """A timer fired."""
        if key is not None:
            self.feed(key, inputs.TimerFired(name, epoch, host_alive))
        elif name == WITHDRAW_TIMER and epoch == self._counters["withdraw"]:
            self._ask_back()

    def heartbeat_tick(self, host_alive: bool) -> None:
        """`heartbeat_s` has passed: tell peers that we live, find those that do not."""
        deadlines = self.options.deadlines
        for connection in list(self.connections.values()):
            self._transmit_beats(connection, host_alive)
            connection.silent_ticks += 1
            connection.idle_ticks = 0 if self._rooms_of[connection.number] else connection.idle_ticks + 1
            if connection.peer is not None and connection.silent_ticks * deadlines.heartbeat_s > deadlines.peer_lost_s:
                self.end(connection.number, f"the peer was not heard for {deadlines.peer_lost_s:g} s")
            elif connection.outgoing and connection.idle_ticks * deadlines.heartbeat_s > deadlines.linger_s:
                self._push(connection, messages.Bye())
                self.end(connection.number, "idle")

    def resend_tick(self) -> None:
        """`RESEND_AFTER_S` has passed: send again what is not acknowledged, say Hello again."""
        for connection in self.connections.values():
            packets = [self._hello()] if connection.peer is None else connection.resend_tick()
            self._effects += [Transmit(connection.number, packet) for packet in packets]

    def flush(self, *, ack_now: bool = False) -> None:
        """Transmit the messages that were pushed since, and the acknowledgements that are owed."""
        for conn in list(self._unflushed):
            connection = self.connections.get(conn)
            if connection is not None:
                self._transmit_all(connection, ack_now)
            if connection is None or not connection.channel.owes_ack:
                del self._unflushed[conn]

    @property
    def unacked(self) -> int:
        """Messages some peer has not acknowledged yet."""
        return sum(len(c.channel.unacked) for c in self.connections.values() if c.peer is not None)

    @property
    def owes_ack(self) -> bool:
        """Some acknowledgement waits for company."""
        return bool(self._unflushed)

    def clone(self) -> EndpointCore:
        """A copy that shares nothing mutable. Only between calls, when nothing waits to be drained."""
        copy = EndpointCore(self.options)
        copy.accounts = self.accounts.clone()
        copy.connections = {number: connection.clone() for number, connection in self.connections.items()}
        copy.sessions = {key: session.clone() for key, session in self.sessions.items()}
        copy.ignored = self.ignored
        copy._open = dict(self._open)
        copy._rooms_of = {number: dict(rooms) for number, rooms in self._rooms_of.items()}
        copy._parked = {room: dict(ranks) for room, ranks in self._parked.items()}
        copy._counters = dict(self._counters)
        copy._unflushed = dict(self._unflushed)
        return copy

    def key(self) -> tuple[Any, ...]:
        """Canonical plain value of the state; equal keys behave alike."""
        return (
            self.options.incarnation,
            self.accounts.key(),
            tuple(connection.key() for connection in self.connections.values()),
            tuple(session.key() for session in self.sessions.values()),
            frozenset(self._open.items()),
            tuple((room, tuple(sorted(ranks.items()))) for room, ranks in sorted(self._parked.items())),
            self._counters["generation"],
        )

    # Inside: rooms

    def _new_key(self, side: str, room: int, rank: int) -> RoomKey:
        if (side, room, rank) in self._open:
            raise DuplicateRoom(side, room, rank)
        self._counters["generation"] += 1
        return RoomKey(side, room, rank, self._counters["generation"])

    def _add(self, key: RoomKey, session: Session) -> None:
        self.sessions[key] = session
        self._open[key.side, key.room, key.rank] = key
        self.feed(key, inputs.Start())

    def _run(self) -> None:
        """Feed queued inputs until none is left; the commands of one may queue the next."""
        while self._queue:
            key, event = self._queue.popleft()
            session = self.sessions.get(key)
            if session is None:
                continue
            for command in self._feed_safely(session, event):
                self._carry_out(key, command)
            self._effects.append(Changed(key))
            if session.finished:
                self._forget(key)

    def _feed_safely(self, session: Session, event: inputs.Input) -> list[Command]:
        """Feed one input; an exception fails this room and nothing else."""
        try:
            return session.feed(event)
        except Exception as error:  # any bug in a session must stay in its room
            if isinstance(event, inputs.Crashed):
                raise
            return session.feed(inputs.Crashed(f"{type(error).__name__} at {type(event).__name__}: {error}"))

    def _forget(self, key: RoomKey) -> None:
        del self.sessions[key]
        for rooms in self._rooms_of.values():
            rooms.pop(key, None)

    def _carry_out(self, key: RoomKey, command: Command) -> None:
        if isinstance(command, Send):
            connection = self.connections.get(command.conn)
            if connection is not None:
                self._push(connection, command.message)
        elif isinstance(command, Grant):
            self._grant(key, command)
        elif isinstance(command, Regrant):
            old, new = self._lease(key, command.old_part), self._lease(key, command.part)
            blocks = self.accounts.relabel(old, new, command.blocks)
            self._effects.append(Do(key, Release(command.old_part)))
            self._leased(key, command.part, blocks)
            self._serve()
        elif isinstance(command, Release):
            self._release(key, command)
        else:
            if isinstance(command, Fence) and not command.force:
                self.accounts.quarantine(self._lease(key, command.part))
            self._effects.append(Do(key, command))

    # Inside: blocks

    @staticmethod
    def _lease(key: RoomKey, part: int) -> LeaseId:
        return LeaseId(key.side, key.room, key.rank, key.generation, part)

    def _grant(self, key: RoomKey, command: Grant) -> None:
        lease = self._lease(key, command.part)
        try:
            blocks: tuple[int, ...] | None = self.accounts.blocks_of(lease)
            if not blocks and command.exact:
                blocks = self.accounts.take_exact(lease, command.exact)
            elif not blocks:
                blocks = self.accounts.take(lease, command.blocks)
        except KvpollError as error:
            code = FailureCode.RequestTooLarge if isinstance(error, RequestTooLarge) else FailureCode.ProtocolError
            failure = Failure.of(code, str(error), state=self.sessions[key].state)
            self._queue.append((key, inputs.GrantRefused(command.part, failure)))
            return
        if blocks is not None:
            self._leased(key, command.part, blocks)
        elif command.or_refuse:
            self._queue.append((key, inputs.GrantRefused(command.part)))
        else:
            self.accounts.wait(lease, command.blocks)
            self._queue.append((key, inputs.GrantQueued(command.part)))
            self._arm_withdraw()

    def _leased(self, key: RoomKey, part: int, blocks: tuple[int, ...]) -> None:
        if key.side == "receiver":
            self._effects.append(Do(key, Expose(part, blocks)))
        else:
            tokens = len(blocks) * self.options.layout.block_tokens
            self._queue.append((key, inputs.Granted(part, blocks, tokens)))

    def _release(self, key: RoomKey, command: Release) -> None:
        lease = self._lease(key, command.part)
        if self.accounts.holds(lease):
            self.accounts.release(lease)
            self._effects.append(Do(key, command))
        else:
            self.accounts.forget(lease)
        self._serve()

    def _serve(self) -> None:
        for lease, blocks in self.accounts.serve():
            key = RoomKey(lease.side, lease.room, lease.rank, lease.generation)
            self._leased(key, lease.part, blocks)

    def _arm_withdraw(self) -> None:
        self._counters["withdraw"] += 1
        after_s = self.options.deadlines.withdraw_s
        self._effects.append(Do(None, SetTimer(WITHDRAW_TIMER, after_s, self._counters["withdraw"])))

    def _ask_back(self) -> None:
        """An earlier room has waited: ask later rooms for grants they have not used."""
        first = self.accounts.first_waiting
        if first is None:
            return
        for lease in self.accounts.leases():
            if (lease.room, lease.rank) > (first.room, first.rank):
                key = RoomKey(lease.side, lease.room, lease.rank, lease.generation)
                self._queue.append((key, inputs.RevokeGrant()))
        self._run()
        self._arm_withdraw()

    # Inside: messages

    def _add_connection(self, peer: bytes | None, address: str | None) -> Connection:
        self._counters["conn"] += 1
        number = self._counters["conn"]
        channel = Channel(self.options.incarnation, peer, outgoing=address is not None)
        self.connections[number] = Connection(number, channel, address)
        self._rooms_of[number] = {}
        return self.connections[number]

    def _by_peer(self, incarnation: bytes, *, outgoing: bool) -> Connection | None:
        for connection in self.connections.values():
            if connection.peer == incarnation and connection.outgoing is outgoing:
                return connection
        return None

    def _hello(self) -> Hello:
        return Hello(**introduction(self.options.incarnation, self.options.layout, self.options.offers))

    def _push(self, connection: Connection, message: Message) -> None:
        try:
            connection.channel.push(message)
        except ChannelOverflow as error:
            self.end(connection.number, str(error))
        else:
            self._unflushed[connection.number] = None

    def _transmit_all(self, connection: Connection, ack_now: bool) -> None:
        frames = connection.channel.flush(ack_now=ack_now)
        self._effects += [Transmit(connection.number, frame) for frame in frames]

    def _deliver(self, connection: Connection, message: Message) -> None:
        if isinstance(message, messages.Bye):
            self.end(connection.number, "the peer said bye")
        elif isinstance(message, messages.Reserve):
            self._reserve(connection.number, message)
        else:
            self._route(connection, message)

    def _reserve(self, conn: int, message: messages.Reserve) -> None:
        """A receiver is here: give it to the open room it fits, or keep it for the next opening."""
        key = self._open.get(("sender", message.room, 0))
        session = self.sessions.get(key) if key else None
        if key and isinstance(session, SenderSession) and session.admits(conn, message):
            self._rooms_of[conn][key] = None
            self._queue.append((key, inputs.MessageReceived(conn, message)))
            self._run()
            return
        self._parked.setdefault(message.room, {})[message.rank] = (conn, message)
        if len(self._parked) > MAX_PARKED:
            self._parked.pop(next(iter(self._parked)))

    def _route(self, connection: Connection, message: Any) -> None:
        key = self._key_of(connection, message)
        if key is not None:
            self._queue.append((key, inputs.MessageReceived(connection.number, message)))
            self._run()
            return
        self.ignored += 1
        if isinstance(message, messages.Abort) and not connection.outgoing:
            self._abort_unknown(connection, message)

    def _key_of(self, connection: Connection, message: Any) -> RoomKey | None:
        """The life of a room that a message or beat is for, or None if it is not here."""
        if connection.outgoing:
            key = RoomKey("receiver", message.room, message.rank, message.receiver_generation)
            return key if key in self.sessions else None
        if message.sender_generation:
            key = RoomKey("sender", message.room, 0, message.sender_generation)
            return key if key in self.sessions else None
        found = self._open.get(("sender", message.room, 0))
        session = self.sessions.get(found) if found else None
        lives = isinstance(session, SenderSession)
        generation = message.receiver_generation
        if lives and session.binds(connection.number, message.rank, generation):  # type: ignore[union-attr]
            return found
        return None

    def _abort_unknown(self, connection: Connection, message: messages.Abort) -> None:
        """A receiver gave up a room that is not open here: nothing is in flight, and it need not be kept."""
        parked = self._parked.get(message.room, {})
        if message.rank in parked:
            conn, reserve = parked[message.rank]
            if (conn, reserve.receiver_generation) == (connection.number, message.receiver_generation):
                del parked[message.rank]
        if not parked:
            self._parked.pop(message.room, None)
        ids = {name: getattr(message, name) for name in ("room", "rank", "sender_generation", "receiver_generation")}
        self._push(connection, messages.Quiesced(**ids))

    # Inside: heartbeats

    def _beat(self, connection: Connection, beat: Beat) -> None:
        key = self._key_of(connection, beat) if beat.to_sender is not connection.outgoing else None
        if key is not None and beat.gate in Gate.__members__:
            event = inputs.BeatReceived(beat.rank, Gate(beat.gate), beat.bytes_done, beat.host_alive)
            self._queue.append((key, event))

    def _transmit_beats(self, connection: Connection, host_alive: bool) -> None:
        if connection.peer is None:
            return
        beats = list(self._beats(connection, host_alive))
        for at in range(0, max(1, len(beats)), MAX_BEATS_PER_FRAME):
            frame = connection.channel.heartbeat(tuple(beats[at : at + MAX_BEATS_PER_FRAME]))
            self._effects.append(Transmit(connection.number, frame))

    def _beats(self, connection: Connection, host_alive: bool) -> Iterator[Beat]:
        for key in self._rooms_of[connection.number]:
            session = self.sessions[key]
            if session.state is KVPoll.Success or session.state is KVPoll.Failed:
                continue
            gate, done = session.told_gate.value, session.bytes_done
            if isinstance(session, ReceiverSession):
                generations = (session.sender_generation, key.generation)
                yield Beat(True, key.room, key.rank, *generations, gate, done, host_alive)
            elif isinstance(session, SenderSession):
                for rank, slot in session.slots.items():
                    if slot.conn == connection.number:
                        generations = (key.generation, slot.generation)
                        yield Beat(False, key.room, rank, *generations, gate, done, host_alive)
