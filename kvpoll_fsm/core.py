"""The endpoint without I/O: connections, rooms, parked reservations and blocks.

Everything that decides is in here and is pure, so the driver, the simulator and the explorer host the same
code. Calls take what happened; `drain()` returns what is to be done about it, in order, as the values of
`kvpoll_fsm.effects`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from kvpoll_fsm import inputs, messages
from kvpoll_fsm.blocks import BlockAccounts, BlockLoad
from kvpoll_fsm.commands import CancelTimer, Command, Fence, Grant, Regrant, Release, Send, SetTimer
from kvpoll_fsm.connection import UNSEEN, Connection, Origin
from kvpoll_fsm.deadlines import Deadlines, Gate
from kvpoll_fsm.effects import Changed, Do, Effect, Hangup, Outbox, Transmit
from kvpoll_fsm.errors import FailureCode, LimitReached
from kvpoll_fsm.layout import Layout
from kvpoll_fsm.lessor import WITHDRAW_TIMER, Lessor
from kvpoll_fsm.limits import Limits
from kvpoll_fsm.messages import Beat, Frame, Hello, Message, Stranger, Welcome
from kvpoll_fsm.parking import Parking, Told, refusal
from kvpoll_fsm.peers import Peers
from kvpoll_fsm.receiver_session import ReceiverOptions, ReceiverSession
from kvpoll_fsm.rooms import Rooms
from kvpoll_fsm.sender_session import SenderOptions, SenderSession
from kvpoll_fsm.session import RoomKey, Session

__all__ = ["Changed", "CoreOptions", "Do", "Effect", "EndpointCore", "Hangup", "Transmit"]

UNKNOWN_THERE = "the peer does not know this connection any more: it was restarted, or took us for lost"


@dataclass(frozen=True, slots=True)
class CoreOptions:
    """What an endpoint is.

    Attributes:
        incarnation: 16 random bytes, new with every start.
        layout: Fields, and tokens per block of its own pool.
        offers: The transports peers can write to us through.
        blocks: Blocks in the pool.
        managed: We choose blocks; otherwise the engine names them.
        limits: How much peers may take.
    """

    incarnation: bytes
    layout: Layout
    offers: tuple[messages.TransportOffer, ...]
    blocks: int
    managed: bool = True
    deadlines: Deadlines = field(default_factory=Deadlines)
    limits: Limits = field(default_factory=Limits)


class EndpointCore:
    """All the state of one endpoint that decides anything.

    Attributes:
        options: What the endpoint is.
        parking: Reservations that no open room could take.
        ignored: Messages for rooms that are not here (any more).
        refused: How often something of a peer was refused, by reason.
    """

    def __init__(self, options: CoreOptions) -> None:
        self.options = options
        self._rooms = Rooms()
        self.parking = Parking(options.limits)
        self.ignored = 0
        self.refused: dict[str, int] = {}
        self._out = Outbox()
        self._peers = Peers(options.incarnation, options.layout, options.offers, self._out, options.limits)
        accounts = BlockAccounts(options.blocks, options.managed)
        self._lessor = Lessor(accounts, options.layout.block_tokens, options.deadlines.withdraw_s, self._out)
        self._rooms_of: dict[int, dict[RoomKey, None]] = {}
        self._host_alive = True

    @property
    def accounts(self) -> BlockAccounts:
        """Who holds which block."""
        return self._lessor.accounts

    @property
    def sessions(self) -> dict[RoomKey, Session]:
        """Every life of a room that is not over, by key."""
        return self._rooms.sessions

    @property
    def connections(self) -> dict[int, Connection]:
        """Peers by connection number."""
        return self._peers.connections

    # Rooms, for the host

    def open_sender(self, room: int, options: SenderOptions) -> RoomKey:
        """Open the sender's side of a room and give it the reservations that came before.

        Raises:
            DuplicateRoom: It is open here and was not cleared.
        """
        key = self._rooms.new_key("sender", room, 0)
        self._add(key, SenderSession(key, self.options.deadlines, options))
        for parked in self.parking.adopt(room):
            self._reserve(parked.conn, parked.reserve)
        return key

    def open_receiver(self, room: int, rank: int, options: ReceiverOptions) -> RoomKey:
        """Open one receiver rank of a room.

        Raises:
            DuplicateRoom: It is open here and was not cleared.
            RequestTooLarge: The pool could never grant as many blocks, to all ranks of the room that are open here.
            ForeignBlock: Blocks the engine named are not free.
        """
        key = self._rooms.new_key("receiver", room, rank)
        if not (options.dummy or options.exact):
            siblings = self._rooms.open_receivers(room, options.ranks)
            beside = sum(session.options.blocks for session in siblings if session.options.conn == options.conn)
            self.accounts.check(options.blocks + beside)
        if options.exact:
            self._lessor.take_exact(key, options.exact)
        session = ReceiverSession(key, self.options.deadlines, options)
        self._join(session, options.conn)
        self._add(key, session)
        return key

    def feed(self, key: RoomKey, event: inputs.Input) -> None:
        """Give one input to a room; a room that is over ignores it, and so does one the grant is not for any more."""
        if isinstance(event, inputs.Granted) and not self._lessor.holds(key, event.part):
            return
        self._out.feed(key, event)
        self._run()

    def resume(self, key: RoomKey, blocks: tuple[int, ...]) -> None:
        """The engine grants these blocks of its own for the next part of a room.

        Raises:
            ForeignBlock: They are not free; the room goes on waiting.
        """
        self.accounts.check_exact(blocks)
        self.feed(key, inputs.ResumeWith(blocks))

    def clear(self, key: RoomKey) -> None:
        """The host drops its handle. What must still be said and awaited lives on until it is over."""
        self._rooms.clear(key)
        self.feed(key, inputs.ClearRoom())

    def is_open(self, key: RoomKey) -> bool:
        """Whether this life of the room is the open one: not cleared, not opened again."""
        return self._rooms.is_open(key)

    def load(self) -> BlockLoad:
        """How the pool's blocks are used."""
        return self.accounts.load()

    def drain(self) -> list[Effect]:
        """What is to be done, in order; each effect is returned once. To be called until nothing is left."""
        return self._out.drain()

    # Peers

    def connect(self, address: str) -> int:
        """The connection to the endpoint at `address`; says Hello if there is none yet.

        Raises:
            LimitReached: There are as many as there may be.
        """
        connection = self._peers.connected_to(address)
        if connection is None:
            connection = self._peers.call(address)
            self._rooms_of[connection.number] = {}
        connection.idle_ticks = 0
        return connection.number

    def hello(self, packet: Hello, origin: Origin = UNSEEN) -> int | None:
        """A peer introduces itself; returns its connection, to which the Welcome goes, or None if it is refused.

        The route for replies to that connection is wherever this came from.
        """
        known = self._peers.caller(packet.incarnation)
        if known is not None and not known.fits(origin):
            self._refuse("an incarnation that belongs to another key")
            return None
        if known is None and not self._make_place(origin):
            return None
        number = self._peers.answer(packet, origin).number
        self._rooms_of.setdefault(number, {})
        return number

    def welcome(self, conn: int, packet: Welcome) -> None:
        """The endpoint we connected to has answered."""
        connection = self.connections.get(conn)
        if connection is None or packet.answers != connection.channel.source:
            return
        if connection.peer not in (None, packet.incarnation):
            self.end(conn, UNKNOWN_THERE)
            return
        differences = connection.differences(self.options.layout, packet)
        known = connection.peer is not None
        connection.introduce(packet)
        if differences:
            self.end(conn, "the layouts differ: " + "; ".join(differences), FailureCode.LayoutMismatch)
        elif not known:
            self._peers.must_flush(conn)

    def frame(self, packet: Frame, origin: Origin | None = None) -> int | None:
        """A frame of a peer; returns its connection, or None if there is none (the caller says Stranger).

        Args:
            packet: The frame.
            origin: Where it came from. None if that is known to be the connection that the frame names.
        """
        connection = self._peers.find(packet.target, packet.source, outgoing=not packet.outgoing)
        if connection is not None and origin is not None and not connection.fits(origin):
            self._refuse("a frame in another peer's name")
            return None
        if connection is None:
            return None
        connection.silent_ticks = 0
        for message in connection.channel.accept(packet):
            if connection.number in self.connections:  # the one before may have ended it
                self._deliver(connection, message)
        connection.news.confirmed(packet.heard)
        for beat in connection.channel.beats(packet):
            self._beat(connection, beat)
        if connection.channel.owes_ack and connection.number in self.connections:
            self._peers.must_flush(connection.number)
        self._run()
        return connection.number

    def stranger(self, conn: int, packet: Stranger) -> None:
        """The endpoint at the other end does not know the incarnation we spoke to."""
        connection = self.connections.get(conn)
        if connection is not None and connection.peer == packet.target:
            self.end(conn, UNKNOWN_THERE)

    def end(self, conn: int, detail: str, code: FailureCode = FailureCode.PeerLost) -> None:
        """A connection ends for good; its rooms are told, and the peer, in case it hears us."""
        rooms = self._rooms_of.pop(conn, None)
        if rooms is None:  # gone, or ending at this moment
            return
        for key in rooms:
            self._out.feed(key, inputs.PeerGone(conn, detail, code))
        self._run()
        self._peers.push(conn, messages.Bye())
        self._peers.remove(conn)
        self.parking.hang_up(conn)
        self._out.emit(Hangup(conn))

    def say_bye(self) -> None:
        """Tell every peer that this incarnation ends."""
        for conn in self.connections:
            self._peers.push(conn, messages.Bye())
        self._run()

    # Time

    def timer(self, key: RoomKey | None, name: str, epoch: int, host_alive: bool) -> None:
        """A timer fired."""
        if key is not None:
            self.feed(key, inputs.TimerFired(name, epoch, host_alive))
        elif name == WITHDRAW_TIMER:
            self._lessor.timer_fired(epoch)
            self._run()

    def heartbeat_tick(self, host_alive: bool, working: Collection[RoomKey] = frozenset()) -> None:
        """`heartbeat_s` has passed: tell peers that we live, find those that do not.

        Takes as long as there are peers, and rooms of which there is something new to say.

        Args:
            host_alive: The host has called its endpoint lately.
            working: Rooms that wait for a worker while the workers move on.
        """
        for key in working:
            self._out.feed(key, inputs.Worked())
        self._run()
        for key in working:
            self._spread(key)
        stirred, self._host_alive = host_alive is not self._host_alive, host_alive
        for connection in list(self.connections.values()):
            rooms = self._rooms_of.get(connection.number)
            if rooms is None:  # ended with another
                continue
            if stirred:
                connection.news.add_all(rooms)
            if connection.peer is not None:
                self._peers.heartbeat(connection, list(self._beats(connection, working)))
            reason = connection.tick(self.options.deadlines, busy=bool(rooms))
            if reason:
                self.end(connection.number, reason)
        after = math.ceil(self.options.limits.orphan_s / self.options.deadlines.heartbeat_s)
        self._turn_away(self.parking.expire(after))

    def resend_tick(self) -> None:
        """`RESEND_AFTER_S` has passed: send again what is not acknowledged, say Hello again."""
        self._peers.resend_tick()

    def flush(self, *, ack_now: bool = False) -> None:
        """Transmit the messages that were pushed since, and the acknowledgements that are owed."""
        self._peers.flush(ack_now=ack_now)

    @property
    def unacked(self) -> int:
        """Messages some peer has not acknowledged yet."""
        return self._peers.unacked

    @property
    def owes_ack(self) -> bool:
        """Some acknowledgement waits for company."""
        return self._peers.owes_ack

    # Copies

    def clone(self) -> EndpointCore:
        """A copy that shares nothing mutable."""
        copy = EndpointCore(self.options)
        copy._out = self._out.clone()
        copy._peers = self._peers.clone(copy._out)
        copy._lessor = self._lessor.clone(copy._out)
        copy.parking, copy.ignored, copy.refused = self.parking.clone(), self.ignored, dict(self.refused)
        copy._rooms = self._rooms.clone()
        copy._rooms_of = {conn: dict(rooms) for conn, rooms in self._rooms_of.items()}
        copy._host_alive = self._host_alive
        return copy

    def key(self) -> tuple[Any, ...]:
        """Canonical plain value of the state; cores with equal keys behave alike, ticks apart."""
        return (
            self.options.incarnation,
            self._peers.key(),
            self._lessor.key(),
            self.parking.key(),
            self._rooms.key(),
            tuple((conn, tuple(rooms)) for conn, rooms in self._rooms_of.items()),
            (*self._out.effects, *self._out.last.values()),
        )

    # Inside: rooms

    def _add(self, key: RoomKey, session: Session) -> None:
        self._rooms.add(key, session)
        self.feed(key, inputs.Start())

    def _run(self) -> None:
        """Feed queued inputs until none is left; the commands of one may queue the next."""
        while self._out.inputs:
            key, event = self._out.inputs.popleft()
            session = self.sessions.get(key)
            if session is None:
                continue
            for command in self._feed_safely(session, event):
                self._carry_out(key, session, command)
            self._out.changed(key)
            if session.news:
                session.news = False
                self._spread(key)
            if session.finished:
                self._forget(key)
        while self._peers.overflowed:
            self.end(*self._peers.overflowed.popitem())

    def _feed_safely(self, session: Session, event: inputs.Input) -> list[Command]:
        """Feed one input; an exception fails this room and nothing else."""
        try:
            return session.feed(event)
        except Exception as error:  # any bug in a session must stay in its room
            if isinstance(event, inputs.Crashed):
                raise
            return session.feed(inputs.Crashed(f"{type(error).__name__} at {type(event).__name__}: {error}"))

    def _forget(self, key: RoomKey) -> None:
        for conn in self.sessions[key].conns:
            self._rooms_of.get(conn, {}).pop(key, None)
        self._rooms.forget(key)

    def _join(self, session: Session, conn: int) -> None:
        """The room is one of the connection's."""
        self._rooms_of[conn][session.room_key] = None
        session.conns = (*session.conns, conn)

    def _carry_out(self, key: RoomKey, session: Session, command: Command) -> None:
        if isinstance(command, Send):
            self._send(session, command)
        elif isinstance(command, (SetTimer, CancelTimer)):
            self._out.timer(key, command)
        elif isinstance(command, Grant):
            self._lessor.grant(key, session.state, command)
        elif isinstance(command, Regrant):
            self._lessor.regrant(key, command)
        elif isinstance(command, Release):
            self._lessor.release(key, command)
        else:
            if isinstance(command, Fence) and not command.force:
                self._lessor.quarantine(key, command.part)
            self._out.emit(Do(key, command))

    def _send(self, session: Session, command: Send) -> None:
        never_opened = isinstance(session, SenderSession) and not session.was_opened
        if never_opened and isinstance(command.message, messages.Abort) and command.conn in self.connections:
            self.parking.dismiss(command.conn, command.message)
        self._peers.push(command.conn, command.message)

    # Inside: messages

    def _deliver(self, connection: Connection, message: Message) -> None:
        if isinstance(message, messages.Bye):
            self.end(connection.number, "the peer said bye")
        elif not isinstance(message, messages.Reserve):
            self._route(connection, message)
        elif connection.outgoing:
            self.ignored += 1  # only those who said Hello reserve
        else:
            self._reserve(connection.number, message)

    def _reserve(self, conn: int, message: messages.Reserve) -> None:
        """A receiver is here: give it to the open room it fits, or keep it for the next opening."""
        if self.parking.is_dismissed(conn, message):
            self.ignored += 1
            return
        session = self._rooms.open_sender(message.room)
        if session is not None and session.admits(conn, message):
            self._enter(session.room_key, conn, message)
        else:
            self._turn_away(self.parking.park(conn, message, self.connections[conn].account))

    def _enter(self, key: RoomKey, conn: int, message: messages.Reserve) -> None:
        rooms, limit = self._rooms_of[conn], self.options.limits.rooms_per_peer
        if key not in rooms and len(rooms) >= limit:
            return self._turn_away([(conn, refusal(message, "rooms_per_peer", limit))])
        if key not in rooms:
            self._join(self.sessions[key], conn)
        self._give(key, conn, message)

    def _turn_away(self, receivers: list[Told]) -> None:
        """Tell receivers that their reservations are void."""
        for conn, abort in receivers:
            if abort.failure.code is FailureCode.LimitReached:
                self._refuse(abort.failure.detail)
            self.parking.dismiss(conn, abort)
            self._peers.push(conn, abort)

    def _make_place(self, origin: Origin) -> bool:
        """Whether one more peer may come."""
        try:
            stranger = self._peers.place_for(origin)
        except LimitReached as error:
            self._refuse(str(error))
            return False
        if stranger is not None:
            self._refuse("a peer that said nothing but Hello: another took its place")
            self.end(stranger.number, "other peers need the place")
        return True

    def _refuse(self, reason: str) -> None:
        self.refused[reason] = self.refused.get(reason, 0) + 1

    def _route(self, connection: Connection, message: Any) -> None:
        if isinstance(message, messages.Abort) and not connection.outgoing:
            self.parking.gave_up(connection.number, message)
        key = self._key_of(connection, message)
        if key is not None:
            self._give(key, connection.number, message)
            return
        self.ignored += 1
        answer = None if connection.outgoing else self.parking.answer(connection.number, message)
        if answer is not None:
            self._peers.push(connection.number, answer)

    def _give(self, key: RoomKey, conn: int, message: Message) -> None:
        if isinstance(message, (messages.Reserve, messages.Resume)):  # a new grant: it asks anew how things stand
            self.connections[conn].news.add(key)
        problem = self.connections[conn].problem_of(message)
        of_room = self.sessions[key].binds
        stranger = isinstance(message, messages.Resume) and not of_room(conn, message.rank, message.receiver_generation)
        if problem and not stranger:
            self._out.feed(key, inputs.AbortRoom(problem, FailureCode.ProtocolError))
        else:
            self._out.feed(key, inputs.MessageReceived(conn, message))
        self._run()

    def _key_of(self, connection: Connection, message: Any) -> RoomKey | None:
        """The life of a room that a message or beat is for, or None if it is not here."""
        if connection.outgoing:
            return self._rooms.to_receiver(message)
        return self._rooms.to_sender(connection.number, message)

    # Inside: heartbeats

    def _beat(self, connection: Connection, beat: Beat) -> None:
        key = self._key_of(connection, beat) if beat.to_sender is not connection.outgoing else None
        if key is None or beat.gate not in Gate.__members__:
            return
        session = self.sessions[key]
        if isinstance(session, ReceiverSession) and session.sender_generation not in (0, beat.sender_generation):
            return  # of another life of the sender's room
        if session.binds(connection.number, beat.rank, beat.receiver_generation):
            if session.gate is Gate.waiting_blocks:  # perhaps the sender was not there yet when it was said
                connection.news.add(key)
            said = (beat.bytes_done, beat.host_alive, beat.working)
            self._out.feed(key, inputs.BeatReceived(beat.rank, Gate(beat.gate), *said))

    def _spread(self, key: RoomKey) -> None:
        """Have the next heartbeats speak of a room."""
        session = self.sessions.get(key)
        for conn in session.conns if session else ():
            if conn in self.connections:
                self.connections[conn].news.add(key)

    def _beats(self, connection: Connection, working: Collection[RoomKey]) -> Iterator[tuple[RoomKey, Beat]]:
        """What is to be said through a connection, and of which rooms."""
        for key in connection.news.take():
            session = self.sessions.get(key)
            if session is not None and not session.state.is_terminal:
                for beat in session.beats(connection.number, self._host_alive, key in working):
                    yield key, beat
