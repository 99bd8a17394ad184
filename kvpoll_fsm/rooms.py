"""The lives of rooms on one endpoint: which are open, which were cleared and are not over yet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvpoll_fsm.connection import Connection
from kvpoll_fsm.errors import DuplicateRoom
from kvpoll_fsm.receiver_session import ReceiverSession
from kvpoll_fsm.sender_session import SenderSession
from kvpoll_fsm.session import RoomKey, Session

__all__ = ["Rooms"]


_Place = int | tuple[int, int]


def _place(side: str, room: int, rank: int) -> _Place:
    """What tells the open lives apart: a sender's number alone, so that there is no more to keep for it."""
    return room if side == "sender" else (room, rank)


class Rooms:
    """Sessions by key, and the keys by room.

    Attributes:
        sessions: Every life of a room that is not over.
        by_conn: Those that use a connection, by its number; ended connections are not listed.
    """

    __slots__ = ("_cleared", "_generation", "_open", "by_conn", "sessions")

    def __init__(self) -> None:
        self.sessions: dict[RoomKey, Session] = {}
        self.by_conn: dict[int, dict[RoomKey, None]] = {}
        self._open: dict[_Place, RoomKey] = {}
        self._cleared: dict[int, dict[RoomKey, None]] = {}  # by room: earlier lives that are not over
        self._generation = 0

    def new_key(self, side: str, room: int, rank: int) -> RoomKey:
        """The key of a new life of a room.

        Raises:
            DuplicateRoom: It is open and was not cleared.
        """
        if _place(side, room, rank) in self._open:
            raise DuplicateRoom(side, room, rank)
        self._generation += 1
        return RoomKey(side, room, rank, self._generation)

    def add(self, key: RoomKey, session: Session) -> None:
        """A life begins."""
        self.sessions[key] = session
        self._open[_place(key.side, key.room, key.rank)] = key

    def clear(self, key: RoomKey) -> None:
        """The number may be used again; the life goes on until it is over."""
        if self.is_open(key):
            del self._open[_place(key.side, key.room, key.rank)]
            self._cleared.setdefault(key.room, {})[key] = None

    def join(self, session: Session, conn: int) -> None:
        """A room is one of the connection's from now on."""
        self.by_conn[conn][session.room_key] = None
        session.conns = (*session.conns, conn)

    def forget(self, key: RoomKey) -> None:
        """A life that was cleared is over."""
        for conn in self.sessions.pop(key).conns:
            self.by_conn.get(conn, {}).pop(key, None)
        lives = self._cleared[key.room]
        del lives[key]
        if not lives:
            del self._cleared[key.room]

    def is_open(self, key: RoomKey) -> bool:
        """Whether this life of the room is the open one: not cleared, not opened again."""
        return self._open.get(_place(key.side, key.room, key.rank)) == key

    def open_sender(self, room: int) -> SenderSession | None:
        """The sender's side of a room, if it is open here."""
        key = self._open.get(room)
        session = self.sessions.get(key) if key else None
        return session if isinstance(session, SenderSession) else None

    def open_receivers(self, room: int, ranks: int) -> Iterator[ReceiverSession]:
        """The receivers of a room that are open and live here."""
        for rank in range(ranks):
            key = self._open.get((room, rank))
            session = self.sessions.get(key) if key else None
            if isinstance(session, ReceiverSession) and not session.state.is_terminal:
                yield session

    def find(self, connection: Connection, message: Any) -> RoomKey | None:
        """The life of a room that a message or beat of a peer is for, or None if it is not here."""
        if connection.outgoing:
            return self.to_receiver(message)
        return self.to_sender(connection.number, message)

    def to_receiver(self, message: Any) -> RoomKey | None:
        """The receiver's life that a message or beat of its sender is for, or None if it is not here."""
        key = RoomKey("receiver", message.room, message.rank, message.receiver_generation)
        return key if key in self.sessions else None

    def to_sender(self, conn: int, message: Any) -> RoomKey | None:
        """The sender's life that a message or beat of a receiver is for, or None if it is not here.

        A receiver that has not been answered yet cannot name the life: then it is the one that binds it, be it
        cleared or not.
        """
        if message.sender_generation:
            key = RoomKey("sender", message.room, 0, message.sender_generation)
            return key if key in self.sessions else None
        newest = self._open.get(message.room)
        candidates: tuple[RoomKey | None, ...] = (newest, *self._cleared.get(message.room, ()))
        for candidate in candidates:
            if candidate is None or candidate.side != "sender":
                continue
            if self.sessions[candidate].binds(conn, message.rank, message.receiver_generation):
                return candidate
        return None

    def clone(self) -> Rooms:
        """A copy that shares nothing mutable."""
        copy = Rooms()
        copy.by_conn = {conn: dict(keys) for conn, keys in self.by_conn.items()}
        copy.sessions = {key: session.clone() for key, session in self.sessions.items()}
        copy._open = dict(self._open)
        copy._cleared = {room: dict(lives) for room, lives in self._cleared.items()}
        copy._generation = self._generation
        return copy

    def key(self) -> tuple[Any, ...]:
        """Canonical plain value of the state."""
        sessions = tuple(session.key() for session in self.sessions.values())
        cleared = tuple(key for lives in self._cleared.values() for key in lives)
        by_conn = tuple((conn, tuple(keys)) for conn, keys in self.by_conn.items())
        return (self._generation, sessions, tuple(self._open.values()), cleared, by_conn)
