"""Heartbeats: what endpoints tell each other unasked, that they live and where the rooms between them stand."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from kvpoll_fsm import inputs
from kvpoll_fsm.connection import Connection
from kvpoll_fsm.deadlines import Deadlines, Gate
from kvpoll_fsm.effects import Outbox
from kvpoll_fsm.messages import Beat
from kvpoll_fsm.peers import Peers
from kvpoll_fsm.receiver_session import ReceiverSession
from kvpoll_fsm.rooms import Rooms
from kvpoll_fsm.session import RoomKey, Session

__all__ = ["Heartbeats"]


class Heartbeats:
    """Speaks of the rooms that have something new to say, and hears what peers say of theirs."""

    __slots__ = ("_deadlines", "_host_alive", "_out", "_peers", "_rooms")

    def __init__(self, rooms: Rooms, peers: Peers, deadlines: Deadlines, out: Outbox) -> None:
        self._rooms = rooms
        self._peers = peers
        self._deadlines = deadlines
        self._out = out
        self._host_alive = True

    def spread(self, session: Session) -> None:
        """Have the next heartbeats speak of a room."""
        for conn in session.conns:
            connection = self._peers.connections.get(conn)
            if connection is not None:
                connection.news.add(session.room_key)

    def hear(self, connection: Connection, beat: Beat) -> None:
        """A peer says where a room stands; what is of another life of the room is not heard."""
        key = self._rooms.find(connection, beat) if beat.to_sender is not connection.outgoing else None
        if key is None or beat.gate not in Gate.__members__:
            return
        session = self._rooms.sessions[key]
        if isinstance(session, ReceiverSession) and session.sender_generation not in (0, beat.sender_generation):
            return  # of another life of the sender's room
        if session.binds(connection.number, beat.rank, beat.receiver_generation):
            if session.gate is Gate.waiting_blocks:  # perhaps the sender was not there yet when it was said
                connection.news.add(key)
            said = (beat.bytes_done, beat.host_alive, beat.working, beat.tries)
            self._out.feed(key, inputs.BeatReceived(beat.rank, Gate(beat.gate), *said))

    def tick(self, host_alive: bool, working: Collection[RoomKey]) -> Iterator[tuple[int, str]]:
        """Speak to each peer in turn; yields each connection that is to be ended before the next one's turn, and why.

        Args:
            host_alive: The host has called its endpoint lately.
            working: Rooms that wait for a worker while the workers move on.
        """
        stirred, self._host_alive = host_alive is not self._host_alive, host_alive
        for connection in list(self._peers.connections.values()):
            rooms = self._rooms.by_conn.get(connection.number)
            if rooms is None:  # ended with another
                continue
            if stirred:
                connection.news.add_all(rooms)
            if connection.peer is not None:
                self._peers.heartbeat(connection, list(self._beats(connection, working)))
            reason = connection.tick(self._deadlines, busy=bool(rooms))
            if reason:
                yield connection.number, reason

    def clone(self, rooms: Rooms, peers: Peers, out: Outbox) -> Heartbeats:
        """A copy for copies of what it works on."""
        copy = Heartbeats(rooms, peers, self._deadlines, out)
        copy._host_alive = self._host_alive
        return copy

    def _beats(self, connection: Connection, working: Collection[RoomKey]) -> Iterator[tuple[RoomKey, Beat]]:
        """What is to be said through a connection, and of which rooms."""
        for key in connection.news.take():
            session = self._rooms.sessions.get(key)
            if session is not None and not session.state.is_terminal:
                for beat in session.beats(connection.number, self._host_alive, key in working):
                    yield key, beat
