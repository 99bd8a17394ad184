"""Who carries out which command of a session, and who hears what of the transports.

What each command is answered by is listed in `commands`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from kvpoll_fsm import commands
from kvpoll_fsm.core import EndpointCore
from kvpoll_fsm.incoming import Incoming
from kvpoll_fsm.inputs import Crashed, Input, Preflighted
from kvpoll_fsm.links import Links
from kvpoll_fsm.outgoing import Outgoing
from kvpoll_fsm.session import RoomKey
from kvpoll_fsm.spi import Completion, Fenced, LinkDown, LinkUp
from kvpoll_fsm.timers import Timers

__all__ = ["Actions"]

log = logging.getLogger("kvpoll_fsm")


class Actions:
    """Used by the driver's thread alone."""

    def __init__(
        self,
        core: EndpointCore,
        timers: Timers,
        links: Links,
        outgoing: Outgoing,
        incoming: Incoming,
        feed: Callable[[RoomKey, Input], None],
    ) -> None:
        """Store who does what.

        Args:
            core: Decides.
            timers: The driver's.
            links: To the peers' data ports.
            outgoing: Parts on their way out.
            incoming: Blocks exposed, and what lands there.
            feed: Gives a room's session an answer.
        """
        self._core = core
        self._timers = timers
        self._links = links
        self._outgoing = outgoing
        self._incoming = incoming
        self._feed = feed
        self._ways: dict[type, Callable[[RoomKey, Any], None]] = {
            commands.Preflight: self._preflight,
            commands.StartPart: outgoing.start,
            commands.CancelPart: lambda key, command: outgoing.cancel(key),
            commands.CancelWrites: outgoing.hurry,
            commands.Expose: incoming.expose,
            commands.Release: lambda key, command: incoming.release(key, command.part),
            commands.Fence: incoming.fence,
            commands.Verify: incoming.verify,
            commands.CopyOut: incoming.copy_out,
        }

    def do(self, key: RoomKey | None, command: commands.Command) -> None:
        """Carry out one command; `key` is None for a timer of the endpoint itself."""
        if isinstance(command, commands.SetTimer):
            self._timers.set(command.name, command.after_s, command.epoch, key)
        elif isinstance(command, commands.CancelTimer):
            self._timers.cancel(command.name, key)
        elif key is not None:
            way = self._ways[type(command)]
            try:
                way(key, command)
            except Exception as error:
                self._crashed(key, error)

    def completed(self, name: str, completion: Completion) -> None:
        """Transport `name` tells something."""
        if isinstance(completion, (LinkUp, LinkDown)):
            self._links.completed(name, completion)
        elif isinstance(completion, Fenced):
            self._incoming.fenced(name, completion.fence)
        else:
            key = self._outgoing.room_of(name, completion.ticket)
            if key is not None:
                self.guarded(key, lambda: self._outgoing.completed(name, completion))

    def breakers(self, key: RoomKey) -> list[dict[str, Any]]:
        """The breakers that are not closed, of those to whom a sender's room goes."""
        found: list[dict[str, Any]] = []
        all_of = self._core.breakers
        for conn in self._core.sessions[key].conns if key.side == "sender" else ():
            for transport, breaker in all_of.of(conn).items():
                left_s = self._timers.left_s(all_of.timer_of(conn, transport)) or 0.0
                state = "half-open" if breaker.half_open else "open"
                told = {"state": state, "cause": breaker.cause, "left_s": round(left_s, 3)}
                found.append({"transport": transport, **told})
        return found

    def hang_up(self, conn: int) -> None:
        """A connection has ended for good."""
        self._links.hang_up(conn)
        self._outgoing.hang_up(conn)

    def lost(self, name: str, why: str) -> None:
        """A transport was closed: what it was to do has ended, and so has what others wait for."""
        self._links.lost(name, why)
        self._outgoing.lost(name, why)
        self._incoming.lost(name)

    def guarded(self, key: RoomKey, action: Callable[[], None]) -> None:
        """Act for one room; an exception fails this room and nothing else."""
        try:
            action()
        except Exception as error:
            self._crashed(key, error)

    def _crashed(self, key: RoomKey, error: Exception) -> None:
        """Whatever a transport or an array throws must stay in its room."""
        log.exception("room failed room=%d side=%s", key.room, key.side)
        self._feed(key, Crashed(f"{type(error).__name__}: {error}"))

    def _preflight(self, key: RoomKey, command: commands.Preflight) -> None:
        def answer(ok: bool, why: str) -> None:
            self._feed(key, Preflighted(command.rank, command.conn, command.transport, ok, why))

        connection = self._core.connections.get(command.conn)
        offer = connection.offers.get(command.transport) if connection else None
        self._links.reach(command.conn, offer, command.transport, answer)
