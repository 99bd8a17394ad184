"""Carries out what the core decides: on the wire, in the transports, and in what hosts see of their rooms."""

from __future__ import annotations

import logging

from kvpoll_fsm.actions import Actions
from kvpoll_fsm.carriers import Carriers
from kvpoll_fsm.control import Control
from kvpoll_fsm.core import Changed, Do, EndpointCore, Transmit
from kvpoll_fsm.display import Display
from kvpoll_fsm.effects import BreakerMoved, Hangup
from kvpoll_fsm.incoming import Incoming
from kvpoll_fsm.metering import COUNTED, Meter
from kvpoll_fsm.outgoing import Outgoing
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.recorder import Recorder
from kvpoll_fsm.session import RoomKey, Session

__all__ = ["Performer"]

log = logging.getLogger("kvpoll_fsm")


class Performer:
    """Used by the driver's thread alone."""

    def __init__(
        self,
        core: EndpointCore,
        control: Control,
        carriers: Carriers,
        actions: Actions,
        incoming: Incoming,
        outgoing: Outgoing,
        display: Display,
        recorder: Recorder,
        meter: Meter,
    ) -> None:
        """Store what is needed.

        Args:
            core: Whose effects they are.
            control: Sends packets.
            carriers: Send what they have gathered when all is carried out.
            actions: Carries out what sessions command.
            incoming: Lets go of receivers' rooms that are over.
            outgoing: Lets go of senders' rooms that nothing is written for any more.
            display: Shows rooms.
            recorder: Keeps the trace.
            meter: Counts how rooms fare.
        """
        self._core = core
        self._control = control
        self._carriers = carriers
        self._actions = actions
        self._incoming = incoming
        self._outgoing = outgoing
        self._display = display
        self._recorder = recorder
        self._meter = meter

    def carry_out(self) -> None:
        """Carry out effects until there are none left."""
        self._carriers.flush()  # what was submitted when a worker or a link answered, with nothing left to decide
        self._perform()
        self._core.flush()
        while self._perform():
            self._core.flush()

    def _perform(self) -> bool:
        """Carry out what there is now, if anything.

        Writes are sent before rooms are looked at: the bytes move meanwhile. What peers are told goes out last,
        whenever it was put on its way: our own host sees it before theirs do.
        """
        said: list[Transmit] = []
        some = False
        while effects := self._core.drain():
            some = True
            for effect in effects:
                if isinstance(effect, Do):
                    self._do(effect)
                elif isinstance(effect, Transmit):
                    said.append(effect)
                elif isinstance(effect, Changed):
                    self._look(effect.key)
                else:
                    self._seldom(effect, said)
            self._carriers.flush()
        self._say(said)
        return some

    def _say(self, said: list[Transmit]) -> None:
        if said:
            self._display.tell()
        for each in said:
            self._recorder.frame("out", each.packet)
            self._control.send(each.conn, each.packet)
        said.clear()

    def clear(self, key: RoomKey) -> None:
        """The host drops its handle."""
        session = self._core.sessions.get(key)
        self._core.clear(key)
        if session is not None:
            self._show(key, session)

    def _do(self, effect: Do) -> None:
        key, command = effect.key, effect.command
        if key is not None and isinstance(command, COUNTED):
            self._meter.commanded(key, command)
        self._actions.do(key, command)

    def _look(self, key: RoomKey) -> None:
        """Bring a room's view up to date; one that is over is let go of."""
        session = self._core.sessions.get(key)
        if session is None:
            self._over(key)
        else:
            self._show(key, session)

    def _seldom(self, effect: BreakerMoved | Hangup, said: list[Transmit]) -> None:
        if isinstance(effect, BreakerMoved):
            return self._log(effect)
        self._say(said)
        self._control.hang_up(effect.conn)
        self._actions.hang_up(effect.conn)

    def _log(self, moved: BreakerMoved) -> None:
        """Log it; what repeats itself for as long as a transport does not work is for those who look for it."""
        repeats = moved.state == "half-open" or moved.again
        connection = self._core.connections.get(moved.conn)
        peer = connection.peer.hex() if connection and connection.peer else ""
        alarming = moved.state == "open" and not moved.port
        level = logging.DEBUG if repeats else logging.WARNING if alarming else logging.INFO
        text = "breaker %s transport=%s peer=%s wait_s=%g cause=%s"
        log.log(level, text, moved.state, moved.transport, peer, moved.wait_s, moved.cause)

    def _show(self, key: RoomKey, session: Session) -> None:
        if session.quiescent:
            self._outgoing.forget(key)
            if session.state is KVPoll.Failed:
                self._incoming.forget(key)
        if self._display.show(key, session):
            self._meter.ended(key, session)

    def _over(self, key: RoomKey) -> None:
        """A room that was cleared has ended for good."""
        self._display.forget(key)
        self._outgoing.forget(key)
        self._incoming.forget(key)
        self._meter.forget(key)
