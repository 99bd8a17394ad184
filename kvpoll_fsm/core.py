"""The endpoint without I/O: connections, rooms, parked reservations and blocks.

Everything that decides is in here and is pure, so the driver, the simulator and the explorer host the same
code. Calls take what happened; `drain()` returns what is to be done about it, in order, as the values of
`kvpoll_fsm.effects`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

from kvpoll_fsm import commands, inputs, messages
from kvpoll_fsm.blocks import BlockAccounts, BlockLoad
from kvpoll_fsm.breaker import Breakers
from kvpoll_fsm.connection import UNSEEN, Connection, Origin
from kvpoll_fsm.effects import Changed, Do, Effect, Hangup, Outbox, Transmit
from kvpoll_fsm.errors import FailureCode, LimitReached
from kvpoll_fsm.heartbeats import Heartbeats
from kvpoll_fsm.lessor import WITHDRAW_TIMER, Lessor
from kvpoll_fsm.messages import Frame, Hello, Message, Stranger, Welcome
from kvpoll_fsm.options import CoreOptions
from kvpoll_fsm.parking import Parking
from kvpoll_fsm.peers import Peers
from kvpoll_fsm.receiver_session import ReceiverOptions, ReceiverSession
from kvpoll_fsm.rooms import Rooms
from kvpoll_fsm.routing import Router
from kvpoll_fsm.sender_session import SenderOptions, SenderSession
from kvpoll_fsm.session import RoomKey, Session

__all__ = ["Changed", "CoreOptions", "Do", "Effect", "EndpointCore", "Hangup", "Transmit"]

UNKNOWN_THERE = "the peer does not know this connection any more: it was restarted, or took us for lost"


_FOR_THE_HOST = (commands.CancelPart, commands.CancelWrites, commands.Verify, commands.CopyOut)


class EndpointCore:
    """All the state of one endpoint that decides anything.

    Attributes:
        options: What the endpoint is.
        sessions: Every life of a room that is not over, by key.
        connections: Peers by connection number.
        accounts: Who holds which block.
        breakers: Which transports to which peers are not to be tried just now.
    """

    def __init__(self, options: CoreOptions) -> None:
        self.options = options
        self._rooms = Rooms()
        self._out = Outbox()
        self._peers = Peers(options.incarnation, options.layout, options.offers, self._out, options.limits)
        accounts = BlockAccounts(options.blocks, options.managed)
        self._lessor = Lessor(accounts, options.layout.block_tokens, options.deadlines.withdraw_s, self._out)
        self._router = Router(self._rooms, self._peers, options.limits, self._out)
        self._heartbeats = Heartbeats(self._rooms, self._peers, options.deadlines, self._out)
        self.breakers = Breakers(self._rooms, options.deadlines, self._out)
        self._bind()

    def _bind(self) -> None:
        """Note where the parts keep what is asked for all the time, and which of them carries out which command."""
        self.sessions: dict[RoomKey, Session] = self._rooms.sessions
        self.connections: dict[int, Connection] = self._peers.connections
        self.accounts: BlockAccounts = self._lessor.accounts
        self._ways: dict[type, Callable[[RoomKey, Any], None]] = {
            commands.Send: self._router.send,
            commands.Grant: self._grant,
            commands.Regrant: self._lessor.regrant,
            commands.Release: self._lessor.release,
            commands.Fence: self._fence,
            **dict.fromkeys((commands.SetTimer, commands.CancelTimer), self._out.timer),
            **dict.fromkeys((commands.Preflight, commands.StartPart), self.breakers.asked),
            **dict.fromkeys(_FOR_THE_HOST, self._out.do),
        }

    @property
    def parking(self) -> Parking:
        """Reservations that no open room could take."""
        return self._router.parking

    @property
    def ignored(self) -> int:
        """Messages for rooms that are not here (any more)."""
        return self._router.ignored

    @property
    def refused(self) -> dict[str, int]:
        """How often something of a peer was refused, by reason."""
        return self._router.refused

    # Rooms, for the host

    def open_sender(self, room: int, options: SenderOptions) -> RoomKey:
        """Open the sender's side of a room and give it the reservations that came before.

        Raises:
            DuplicateRoom: It is open here and was not cleared.
        """
        key = self._rooms.new_key("sender", room, 0)
        self._add(key, SenderSession(key, self.options.deadlines, options))
        for parked in self.parking.adopt(room):
            self._router.reserve(parked.conn, parked.reserve)
            if self._out.inputs:
                self._run()
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
        self._rooms.join(session, options.conn)
        self._add(key, session)
        return key

    def feed(self, key: RoomKey, event: inputs.Input) -> None:
        """Give one input to a room; a room that is over ignores it, and so does one the grant is not for any more."""
        if isinstance(event, inputs.Granted) and not self._lessor.holds(key, event.part):
            return
        if isinstance(event, (inputs.PartWritten, inputs.Preflighted)):
            self.breakers.heard(key, self.sessions.get(key), event)
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
            self._rooms.by_conn[connection.number] = {}
        connection.idle_ticks = 0
        return connection.number

    def hello(self, packet: Hello, origin: Origin = UNSEEN) -> int | None:
        """A peer introduces itself; returns its connection, to which the Welcome goes, or None if it is refused.

        The route for replies to that connection is wherever this came from.
        """
        known = self._peers.caller(packet.incarnation)
        if known is not None and not known.fits(origin):
            self._router.refuse("an incarnation that belongs to another key")
            return None
        if known is None and not self._make_place(origin):
            return None
        number = self._peers.answer(packet, origin).number
        self._rooms.by_conn.setdefault(number, {})
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
            self._router.refuse("a frame in another peer's name")
            return None
        if connection is None:
            return None
        connection.silent_ticks = 0
        for message in connection.channel.accept(packet):
            if connection.number in self.connections:  # the one before may have ended it
                self._deliver(connection, message)
        connection.news.confirmed(packet.heard)
        for beat in connection.channel.beats(packet):
            self._heartbeats.hear(connection, beat)
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
        rooms = self._rooms.by_conn.pop(conn, None)
        if rooms is None:  # gone, or ending at this moment
            return
        for key in rooms:
            self._out.feed(key, inputs.PeerGone(conn, detail, code))
        self._run()
        self._peers.push(conn, messages.Bye())
        self._peers.remove(conn)
        self.breakers.forget(conn)
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
            return
        if name == WITHDRAW_TIMER:
            self._lessor.timer_fired(epoch)
        else:
            self.breakers.timer(name, epoch)
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
        for session in [self.sessions[key] for key in working if key in self.sessions]:
            self._heartbeats.spread(session)
        for conn, reason in self._heartbeats.tick(host_alive, working):
            self.end(conn, reason)
        after = math.ceil(self.options.limits.orphan_s / self.options.deadlines.heartbeat_s)
        self._router.turn_away(self.parking.expire(after))

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
        copy._rooms = self._rooms.clone()
        copy._peers = self._peers.clone(copy._out)
        copy._lessor = self._lessor.clone(copy._out)
        copy._router = self._router.clone(copy._rooms, copy._peers, copy._out)
        copy._heartbeats = self._heartbeats.clone(copy._rooms, copy._peers, copy._out)
        copy.breakers = self.breakers.clone(copy._rooms, copy._out)
        copy._bind()
        return copy

    def key(self) -> tuple[Any, ...]:
        """Canonical plain value of the state; cores with equal keys behave alike, ticks apart."""
        return (
            self.options.incarnation,
            self._peers.key(),
            self._lessor.key(),
            self.parking.key(),
            self._rooms.key(),
            self.breakers.key(),
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
            was_over = session.state.is_terminal
            try:
                asked = session.feed(event)
            except Exception as error:  # any bug in a session must stay in its room
                asked = session.crash(event, error)
            for command in asked:
                self._ways[type(command)](key, command)
            self._out.changed(key)
            if session.news:
                session.news = False
                self._heartbeats.spread(session)
            if session.state.is_terminal:
                self._ended(key, session, was_over)
        while self._peers.overflowed:
            self.end(*self._peers.overflowed.popitem())

    def _ended(self, key: RoomKey, session: Session, was_over: bool) -> None:
        if not was_over:
            self.breakers.closing(session)
        self.breakers.ended(key, session)
        if session.finished:
            self._rooms.forget(key)

    def _grant(self, key: RoomKey, command: commands.Grant) -> None:
        self._lessor.grant(key, self.sessions[key].state, command)

    def _fence(self, key: RoomKey, command: commands.Fence) -> None:
        if not command.force:
            self._lessor.quarantine(key, command.part)
        self._out.do(key, command)

    # Inside: messages

    def _deliver(self, connection: Connection, message: Message) -> None:
        if isinstance(message, messages.Bye):
            self.end(connection.number, "the peer said bye")
        elif not isinstance(message, messages.Reserve):
            self._router.route(connection, message)
        elif connection.outgoing:
            self._router.ignored += 1  # only those who said Hello reserve
        else:
            self._router.reserve(connection.number, message)
        if self._out.inputs:
            self._run()

    def _make_place(self, origin: Origin) -> bool:
        """Whether one more peer may come."""
        try:
            stranger = self._peers.place_for(origin)
        except LimitReached as error:
            self._router.refuse(str(error))
            return False
        if stranger is not None:
            self._router.refuse("a peer that said nothing but Hello: another took its place")
            self.end(stranger.number, "other peers need the place")
        return True
