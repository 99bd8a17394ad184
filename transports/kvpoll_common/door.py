"""The socket that peers connect to, and all who did: strangers at first, known once they have proved themselves."""

from __future__ import annotations

import errno
import logging
import select
import socket
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from kvpoll_common.loop import Reactor
from kvpoll_fsm.errors import MalformedMessage
from kvpoll_fsm.refusals import Refusals

__all__ = ["UNFINISHED", "Door", "Refused", "Visitor", "note_stranger"]

_PAUSE_S = 0.1
UNFINISHED = "left, or took too long, before the handshake was over"


class Refused(Exception):
    """The other side is not to be dealt with; `reason` is one of a few phrases."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


class Visitor(Protocol):
    """One connection. Tells the door when it has ended."""

    def turn_away(self, error: Exception) -> None:
        """End it: he is not to be dealt with."""
        ...

    def close(self) -> None:
        """End it."""
        ...


V = TypeVar("V", bound=Visitor)


class Door(Generic[V]):
    """Accepts, and counts who is there. Used by the reactor's thread alone.

    Attributes:
        refusals: Whom and what was turned away.
        known: Those who have proved themselves.
    """

    def __init__(
        self,
        reactor: Reactor,
        refusals: Refusals,
        welcome: Callable[[socket.socket, Any], V | None],
        *,
        max_strangers: int,
        max_known: int,
    ) -> None:
        """Store what is needed.

        Args:
            reactor: The thread's.
            refusals: Counts whom we turn away.
            welcome: Takes a connection, which is its own from then on, and its address; None if it wants none of it.
            max_strangers: Most of those who have not proved themselves; the oldest makes room.
            max_known: Most of those who have.
        """
        self.refusals = refusals
        self.known: set[V] = set()
        self._reactor = reactor
        self._welcome = welcome
        self._max_strangers = max_strangers
        self._max_known = max_known
        self._strangers: dict[V, None] = {}  # in order of arrival
        self._listening: socket.socket | None = None

    def open(self, listening: socket.socket) -> None:
        """Begin to accept; the socket is ours from here on."""
        listening.setblocking(False)
        self._listening = listening
        self._reactor.watch(listening.fileno(), select.EPOLLIN, self)

    def close(self) -> None:
        """End the socket and all connections."""
        listening, self._listening = self._listening, None
        if listening is not None:
            self._reactor.unwatch(listening.fileno())
            listening.close()
        for visitor in [*self._strangers, *self.known]:
            visitor.close()

    def ready(self, mask: int) -> None:
        """Somebody wants to connect."""
        if self._listening is None:
            return
        try:
            sock, address = self._listening.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno == errno.ECONNABORTED:
                return
            # Out of file descriptors, as a rule: some will come free.
            self.refusals.add("a connection cannot be accepted", str(error))
            self._reactor.unwatch(self._listening.fileno())
            self._reactor.later(_PAUSE_S, self._resume)
            return
        sock.setblocking(False)
        visitor = self._welcome(sock, address)
        if visitor is not None:
            self._let_in(visitor)

    def admit(self, visitor: V) -> None:
        """A stranger has proved himself.

        Raises:
            Refused: There are too many already.
        """
        if len(self.known) >= self._max_known:
            raise Refused("too many connections", f"{len(self.known)} are open")
        self._strangers.pop(visitor, None)
        self.known.add(visitor)

    def forget(self, visitor: V) -> None:
        """A connection has ended."""
        self._strangers.pop(visitor, None)
        self.known.discard(visitor)

    def _let_in(self, visitor: V) -> None:
        if len(self._strangers) >= self._max_strangers:
            next(iter(self._strangers)).turn_away(Refused("too many that have not proved themselves"))
        self._strangers[visitor] = None

    def _resume(self) -> None:
        if self._listening is not None:
            self._reactor.watch(self._listening.fileno(), select.EPOLLIN, self)


def note_stranger(refusals: Refusals, error: Exception, who: str = "") -> None:
    """Count one who has ended, or was turned away, before he had proved himself."""
    reason = error.reason if isinstance(error, Refused) else UNFINISHED
    if isinstance(error, MalformedMessage):
        reason = "does not speak our protocol"
    level = logging.INFO if reason == UNFINISHED else logging.WARNING
    refusals.add(reason, f"{who}: {error}" if who else str(error), level)
