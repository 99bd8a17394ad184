"""Shows hosts their rooms, and tells the trace and the log how rooms fared."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from kvpoll_fsm.connection import Connection
from kvpoll_fsm.errors import Failure, FailureCode
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
        logs: bool = True,
    ) -> None:
        """Store what is needed.

        Args:
            recorder: Keeps the trace.
            connections: The peers by number.
            take_result: Gives what a receiver's room that ended Success has brought, once.
            logs: Log how rooms end. A mover's host does that itself.
        """
        self.views: dict[RoomKey, RoomView] = {}
        self._recorder = recorder
        self._connections = connections
        self._take_result = take_result
        self._logs = logs

    def show(self, key: RoomKey, session: Session) -> None:
        """Bring a room's view, and the trace, up to date."""
        self._recorder.room(key, session, self._peer_of(session))
        view = self.views.get(key)
        if view is None:
            return
        before = view.state
        if session.state is KVPoll.Success and view.data is None:
            view.data = self._take_result(key)
        view.update(session)
        if self._logs and session.state.is_terminal and not before.is_terminal:
            log_end(view)

    def forget(self, key: RoomKey) -> None:
        """A room that was cleared has ended for good."""
        self._recorder.forget(key)
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
