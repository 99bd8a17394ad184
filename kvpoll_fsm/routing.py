"""Brings what peers say to the rooms it is for, and what rooms say to their peers.

In place of a room that is not open here it answers itself. What it feeds to rooms is queued: its caller has them
take it.
"""

from __future__ import annotations

from typing import Any

from kvpoll_fsm import inputs, messages
from kvpoll_fsm.commands import Send
from kvpoll_fsm.connection import Connection
from kvpoll_fsm.effects import Outbox
from kvpoll_fsm.errors import FailureCode
from kvpoll_fsm.limits import Limits
from kvpoll_fsm.messages import Message
from kvpoll_fsm.parking import Parking, Told, refusal
from kvpoll_fsm.peers import Peers
from kvpoll_fsm.rooms import Rooms
from kvpoll_fsm.sender_session import SenderSession
from kvpoll_fsm.session import RoomKey

__all__ = ["Router"]


class Router:
    """Knows open rooms, and reservations that no open room could take.

    Attributes:
        parking: Those reservations.
        ignored: Messages for rooms that are not here (any more).
        refused: How often something of a peer was refused, by reason.
    """

    __slots__ = ("_limits", "_out", "_peers", "_rooms", "ignored", "parking", "refused")

    def __init__(self, rooms: Rooms, peers: Peers, limits: Limits, out: Outbox) -> None:
        self._rooms = rooms
        self._peers = peers
        self._limits = limits
        self._out = out
        self.parking = Parking(limits)
        self.ignored = 0
        self.refused: dict[str, int] = {}

    def route(self, connection: Connection, message: Any) -> None:
        """Give a message to its room, or answer it if the room is not here."""
        if isinstance(message, messages.Abort) and not connection.outgoing:
            self.parking.gave_up(connection.number, message)
        key = self._rooms.find(connection, message)
        if key is not None:
            self._give(key, connection.number, message)
            return
        self.ignored += 1
        answer = None if connection.outgoing else self.parking.answer(connection.number, message)
        if answer is not None:
            self._peers.push(connection.number, answer)

    def reserve(self, conn: int, message: messages.Reserve) -> None:
        """A receiver is here: give it to the open room it fits, or keep it for the next opening."""
        if self.parking.is_dismissed(conn, message):
            self.ignored += 1
            return
        session = self._rooms.open_sender(message.room)
        if session is not None and session.admits(conn, message):
            self._enter(session.room_key, conn, message)
        else:
            self.turn_away(self.parking.park(conn, message, self._peers.connections[conn].account))

    def turn_away(self, receivers: list[Told]) -> None:
        """Tell receivers that their reservations are void."""
        for conn, abort in receivers:
            if abort.failure.code is FailureCode.LimitReached:
                self.refuse(abort.failure.detail)
            self.parking.dismiss(conn, abort)
            self._peers.push(conn, abort)

    def send(self, key: RoomKey, command: Send) -> None:
        """Queue what a room has to say; the reservation of a rank that it ends without having let it in is void."""
        if isinstance(command.message, messages.Abort) and command.conn in self._peers.connections:
            session = self._rooms.sessions[key]
            if isinstance(session, SenderSession) and not session.was_opened:
                self.parking.dismiss(command.conn, command.message)
        self._peers.push(command.conn, command.message)

    def refuse(self, reason: str) -> None:
        """Count something that a peer was refused."""
        self.refused[reason] = self.refused.get(reason, 0) + 1

    def clone(self, rooms: Rooms, peers: Peers, out: Outbox) -> Router:
        """A copy for copies of what it works on."""
        copy = Router(rooms, peers, self._limits, out)
        copy.parking, copy.ignored, copy.refused = self.parking.clone(), self.ignored, dict(self.refused)
        return copy

    def _enter(self, key: RoomKey, conn: int, message: messages.Reserve) -> None:
        rooms, limit = self._rooms.by_conn[conn], self._limits.rooms_per_peer
        if key not in rooms and len(rooms) >= limit:
            return self.turn_away([(conn, refusal(message, "rooms_per_peer", limit))])
        if key not in rooms:
            self._rooms.join(self._rooms.sessions[key], conn)
        self._give(key, conn, message)

    def _give(self, key: RoomKey, conn: int, message: Message) -> None:
        if isinstance(message, (messages.Reserve, messages.Resume)):
            connection = self._peers.connections[conn]
            connection.news.add(key)  # a new grant: it asks anew how things stand
            problem = connection.problem_of(message.grant)
            if problem and (isinstance(message, messages.Reserve) or self._is_bound(key, conn, message)):
                self._out.feed(key, inputs.AbortRoom(problem, FailureCode.ProtocolError))
                return
        self._out.feed(key, inputs.MessageReceived(conn, message))

    def _is_bound(self, key: RoomKey, conn: int, message: messages.Resume) -> bool:
        return self._rooms.sessions[key].binds(conn, message.rank, message.receiver_generation)
