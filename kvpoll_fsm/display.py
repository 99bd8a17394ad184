"""Shows hosts their rooms, and tells the trace and the log how rooms fared."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from kvpoll_fsm.connection import Connection
from kvpoll_fsm.errors import Failure, FailureCode
from kvpoll_fsm.guest import Guest
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.receiver_session import ReceiverSession
from kvpoll_fsm.recorder import Recorder
from kvpoll_fsm.session import RoomKey, Session
from kvpoll_fsm.view import RoomView

__all__ = ["Display"]

log = logging.getLogger("kvpoll_fsm")


class Display:
    """Written by the driver's thread alone; the views are read by hosts.

    Attributes:
        views: What hosts see of their rooms, by key.
    """

    def __init__(
        self,
        recorder: Recorder,
        connections: Mapping[int, Connection],
        take_result: Callable[[RoomKey], Any],
        guest: Guest | None = None,
    ) -> None:
        """Store what is needed.

        Args:
            recorder: Keeps the trace.
            connections: The peers by number.
            take_result: Gives what a receiver's room that ended Success has brought, once.
            guest: Tells the host, which then logs by itself how rooms end. None: the views are all that it needs.
        """
        self.views: dict[RoomKey, RoomView] = {}
        self._recorder = recorder
        self._connections = connections
        self._take_result = take_result
        self._guest = guest

    def open(self, view: RoomView, session: Session) -> None:
        """Show a room that was opened, and record what it has gone through by now."""
        key = session.room_key
        self.views[key] = view
        self._recorder.room(key, session, 0, 0, self._peer_of)
        view.history, view.parts = session.history, session.parts

    def show(self, key: RoomKey, session: Session) -> bool:
        """Bring a room's view, and the trace, up to date; returns whether the room has come to its end by that."""
        view = self.views.get(key)
        if view is None:
            return False
        if session.history is not view.history or session.parts is not view.parts:
            self._recorder.room(key, session, len(view.history), len(view.parts), self._peer_of)
        ends = session.state.is_terminal and not view.state.is_terminal
        if ends and session.state is KVPoll.Success:
            view.data = self._take_result(key)
        view.update(session)
        if ends and self._guest is None:
            log_end(view)
        return ends

    def tell(self) -> None:
        """See that the host is told, if somebody has to, what has been shown."""
        if self._guest is not None:
            self._guest.tell()

    def forget(self, key: RoomKey) -> None:
        """A room that was cleared has ended for good."""
        view = self.views.pop(key, None)
        if view is not None:
            view.settle()

    def fail_all(self, cause: str) -> None:
        """The driver has ended, and with it every room that is live."""
        code = FailureCode.Aborted if cause == "closed" else FailureCode.InternalError
        for view in list(self.views.values()):
            view.fail(Failure.of(code, cause, state=view.state))

    def settle_all(self, *, quiescent: bool) -> None:
        """Nothing will happen to any room again; `quiescent`: no write can land, or read its source, any more."""
        for view in list(self.views.values()):
            view.settle(quiescent=quiescent)

    def _peer_of(self, session: Session) -> bytes | None:
        if not isinstance(session, ReceiverSession):
            return None
        connection = self._connections.get(session.options.conn)
        return connection.peer if connection else None


def log_end(view: RoomView) -> None:
    """One structured line for a room that ended."""
    seconds = time.monotonic() - view.opened_s
    tokens = sum(part.tokens for part in view.parts)
    text = "room ended side=%s room=%d rank=%d tag=%s state=%s parts=%d tokens=%d seconds=%.3f cause=%s"
    level = logging.INFO if view.failure is None else logging.WARNING
    place = (view.side, view.room, view.rank, view.tag)
    try:
        log.log(level, text, *place, view.state, len(view.parts), tokens, seconds, view.failure)
    except Exception:  # a handler of the host's that raises must end nobody's rooms
        traceback.print_exc()
