"""Takes what arrives on the control plane to the core, and answers those whom the core does not know."""

from __future__ import annotations

from kvpoll_fsm.connection import Origin, introduction
from kvpoll_fsm.control import Control
from kvpoll_fsm.core import EndpointCore
from kvpoll_fsm.errors import FailureCode, UnsupportedVersion
from kvpoll_fsm.messages import Frame, Hello, Packet, Stranger, Welcome
from kvpoll_fsm.recorder import Recorder

__all__ = ["Reception"]


class Reception:
    """Used by the driver's thread alone."""

    def __init__(self, core: EndpointCore, control: Control, recorder: Recorder) -> None:
        self._core = core
        self._control = control
        self._recorder = recorder

    def take(self, origin: Origin, identity: bytes, packet: Packet | UnsupportedVersion) -> None:
        """Take one packet; what came to our own port has a ROUTER identity, by which it is answered."""
        conn = origin.conn
        if isinstance(packet, UnsupportedVersion):
            self._refuse_version(conn, identity, packet)
        elif isinstance(packet, Hello):
            number = self._core.hello(packet, origin) if conn is None else None
            if number is not None:
                self._control.route(number, identity)
        elif isinstance(packet, Frame):
            self._frame(origin, identity, packet)
        elif conn is not None and isinstance(packet, Welcome):
            self._core.welcome(conn, packet)
        elif conn is not None and isinstance(packet, Stranger):
            self._core.stranger(conn, packet)

    def _frame(self, origin: Origin, identity: bytes, packet: Frame) -> None:
        conn = origin.conn
        if packet.outgoing is not (conn is None):  # only who said Hello comes to our port: this is a replay
            return
        self._recorder.frame("in", packet)
        found = self._core.frame(packet, origin)
        if found is not None and conn is None:
            self._control.route(found, identity)
        elif conn is None:
            self._control.reply(identity, Stranger(self._core.options.incarnation, packet.target))

    def _refuse_version(self, conn: int | None, identity: bytes, error: UnsupportedVersion) -> None:
        if conn is not None:
            self._core.end(conn, str(error), FailureCode.UnsupportedVersion)
        else:
            options = self._core.options
            ours = introduction(options.incarnation, options.layout, ())
            self._control.reply(identity, Welcome(answers=bytes(16), **ours))
