"""Circuit breakers: which transport to which peer is not to be tried just now, and which part tries it first again.

| breaker | who may use the transport | what comes next |
|---|---|---|
| closed | everybody | open, when a part fails there, or its port cannot be reached |
| open | who has nothing else left | half-open, when its time is over |
| half-open | one room to reach the port, then one part | closed, if that part gets through; else open, twice as long |

What ends for somebody else's sake (collateral, a room that was given up) does not count. A breaker only orders what
else there is: it never stands in the way of the last transport that is left.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from msgspec import structs

from kvpoll_fsm.commands import Preflight, SetTimer, StartPart, Target
from kvpoll_fsm.deadlines import Deadlines
from kvpoll_fsm.effects import BreakerMoved, Outbox
from kvpoll_fsm.errors import FailureCode
from kvpoll_fsm.inputs import PartWritten, Preflighted, Probing, Reconsider
from kvpoll_fsm.rooms import Rooms
from kvpoll_fsm.sender_session import SenderSession
from kvpoll_fsm.session import RoomKey, Session

__all__ = ["BREAKER_TIMER", "Breaker", "Breakers"]

BREAKER_TIMER = "breaker"
Place = tuple[int, str]
"""A connection, and the transport to the peer at its other end."""
Attempt = tuple[RoomKey, int, int, int]
"""A room, a rank of it, a part, and which attempt at that."""
_OWN_FAULT = (FailureCode.TransportFailed, FailureCode.DeadlinePassed)
"""What a room ends with when it was its transports that failed."""


@dataclass(slots=True)
class Breaker:
    """One that is not closed.

    Attributes:
        cause: Why it opened.
        wait_s: How long it stays open, or has stayed.
        epoch: Of its timer.
        half_open: That time is over.
        caller: The one rank of a room that may reach for the port then; the others do not wait for it together.
        probe: The one attempt that may try the transport then.
        blamed: The room whose failure opened it, until it is certain that its receiver had not just given it up.
    """

    cause: str
    wait_s: float
    epoch: int
    half_open: bool = False
    caller: tuple[RoomKey, int] | None = None
    probe: Attempt | None = None
    blamed: RoomKey | None = None

    @property
    def refusal(self) -> str:
        """Why the transport is not to be tried, or nothing."""
        if not self.half_open:
            return f"not tried, as it failed lately: {self.cause}"
        return f"not tried before another part got through: {self.cause}" if self.probe or self.caller else ""


class Breakers:
    """Those of one endpoint that are not closed; the rest are not kept."""

    __slots__ = ("_by_place", "_deadlines", "_epoch", "_out", "_rooms")

    def __init__(self, rooms: Rooms, deadlines: Deadlines, out: Outbox) -> None:
        self._rooms = rooms
        self._deadlines = deadlines
        self._out = out
        self._epoch = 0
        self._by_place: dict[Place, Breaker] = {}

    def __len__(self) -> int:
        return len(self._by_place)

    @staticmethod
    def timer_of(conn: int, transport: str) -> str:
        """The timer that ends the time for which a breaker is open."""
        return f"{BREAKER_TIMER} {conn} {transport}"

    def of(self, conn: int) -> dict[str, Breaker]:
        """Those of a connection, by transport."""
        return {name: breaker for (number, name), breaker in self._by_place.items() if number == conn}

    # What rooms want

    def asked(self, key: RoomKey, command: Preflight | StartPart) -> None:
        """Pass on what a room wants of a transport, unless a breaker is in the way."""
        if isinstance(command, Preflight):
            self._preflight(key, command)
        else:
            self._start(key, command)

    def _preflight(self, key: RoomKey, command: Preflight) -> None:
        breaker = self._by_place.get((command.conn, command.transport))
        refusal = "" if command.insist or breaker is None else breaker.refusal
        if breaker is not None and breaker.half_open and not refusal and not command.insist:
            breaker.caller = (key, command.rank)
        if refusal:
            self._out.feed(key, Preflighted(command.rank, command.conn, command.transport, False, refusal, True))
        else:
            self._out.do(key, command)

    def _start(self, key: RoomKey, command: StartPart) -> None:
        if self._by_place:
            targets = tuple(self._admitted(key, command, target) for target in command.targets)
            command = structs.replace(command, targets=targets)
        self._out.do(key, command)

    def _admitted(self, key: RoomKey, command: StartPart, target: Target) -> Target:
        breaker = self._by_place.get((target.conn, target.transport))
        if breaker is None:
            return target
        if breaker.half_open and breaker.probe is None:
            breaker.probe = (key, target.rank, command.part, command.attempt)
            self._out.feed(key, Probing(target.rank, command.part, command.attempt))
            return target
        return target if target.insist else structs.replace(target, shut=breaker.refusal)

    # How it went

    def heard(self, key: RoomKey, session: Session | None, event: PartWritten | Preflighted) -> None:
        """A port was reached, a part was written, or not."""
        if isinstance(event, Preflighted):
            return self._reached((event.conn, event.transport), (key, event.rank), event)
        slot = session.slots.get(event.rank) if isinstance(session, SenderSession) else None
        if slot is None or session is None or event.shut:
            return
        place, attempt = (slot.conn, event.transport), (key, event.rank, event.part, event.attempt)
        blameless = event.collateral or event.ours
        counts = not blameless and (slot.hurried or not session.state.is_terminal)
        if event.ok:
            self._got_through(place, attempt)
        else:
            self._failed(place, attempt, event.detail, counts=counts)

    def ended(self, key: RoomKey, session: Session) -> None:
        """A room is over: one that its receiver gave up says nothing against a transport."""
        if session.failure is None or session.failure.code in _OWN_FAULT:
            return
        for place, breaker in list(self._by_place.items()):
            if breaker.blamed == key:
                self._close(place, breaker)

    def closing(self, session: Session) -> None:
        """A room ends: what it gave up, and what has not ended by now, counts against its transport."""
        if not isinstance(session, SenderSession) or session.failure is None or session.failure.code not in _OWN_FAULT:
            return
        for rank, slot in session.slots.items():
            if slot.hurried and slot.writing:
                attempt = (session.room_key, rank, session.part, slot.attempt)
                cause = f"writes that were cancelled did not end: {session.failure.detail}"
                self._failed((slot.conn, slot.transports[0]), attempt, cause, counts=True)

    def _reached(self, place: Place, caller: tuple[RoomKey, int], event: Preflighted) -> None:
        breaker = self._by_place.get(place)
        if breaker is not None and breaker.caller == caller:
            breaker.caller = None
        if not event.ok and (breaker is None or (breaker.half_open and breaker.probe is None)):
            self._open(place, event.detail, breaker)

    def _got_through(self, place: Place, attempt: Attempt) -> None:
        for other, breaker in list(self._by_place.items()):
            if breaker.blamed == attempt[0] and other != place:
                breaker.blamed = None  # the receiver took the part by another transport
            if other == place and breaker.probe == attempt:
                self._close(place, breaker)

    def _failed(self, place: Place, attempt: Attempt, cause: str, *, counts: bool) -> None:
        breaker = self._by_place.get(place)
        if breaker is None:
            if counts:
                self._open(place, cause, blamed=attempt[0])
        elif breaker.probe == attempt:
            if counts:
                self._open(place, cause, breaker)
            else:
                breaker.probe = None

    # Moving

    def timer(self, name: str, epoch: int) -> None:
        """A breaker has been open for its time."""
        kind, _, place_name = name.partition(" ")
        conn, _, transport = place_name.partition(" ")
        place = (int(conn), transport) if kind == BREAKER_TIMER else (0, "")
        breaker = self._by_place.get(place)
        if breaker is None or breaker.epoch != epoch or breaker.half_open:
            return
        breaker.half_open = True
        self._tell(place, breaker, "half-open")
        self._spread(place)

    def forget(self, conn: int) -> None:
        """The connection has ended; whoever comes next is another peer."""
        for place in [place for place in self._by_place if place[0] == conn]:
            del self._by_place[place]

    def _open(self, place: Place, cause: str, before: Breaker | None = None, blamed: RoomKey | None = None) -> None:
        if place[0] not in self._rooms.by_conn:  # the connection has ended
            return
        least, most = self._deadlines.breaker_s, self._deadlines.breaker_max_s
        wait_s = min(least if before is None else 2 * before.wait_s, most)
        self._epoch += 1
        breaker = self._by_place[place] = Breaker(cause, wait_s, self._epoch, blamed=blamed)
        self._out.timer(None, SetTimer(self.timer_of(*place), wait_s, self._epoch))
        self._tell(place, breaker, "open", again=before is not None)

    def _close(self, place: Place, breaker: Breaker) -> None:
        del self._by_place[place]
        self._tell(place, breaker, "closed")
        self._spread(place)

    def _tell(self, place: Place, breaker: Breaker, state: str, *, again: bool = False) -> None:
        self._out.emit(BreakerMoved(*place, state, breaker.cause, breaker.wait_s, again, breaker.blamed is None))

    def _spread(self, place: Place) -> None:
        """Rooms under way may have the transport back with their next part."""
        for key in self._rooms.by_conn.get(place[0], ()):
            if key.side == "sender":
                self._out.feed(key, Reconsider(place[0]))

    # Copies

    def clone(self, rooms: Rooms, out: Outbox) -> Breakers:
        """A copy for copies of what it works on."""
        copy = Breakers(rooms, self._deadlines, out)
        copy._epoch = self._epoch
        copy._by_place = {place: replace(breaker) for place, breaker in self._by_place.items()}
        return copy

    def key(self) -> tuple[Any, ...]:
        """Canonical plain value of the state, reasons and waits apart."""
        breakers = sorted(self._by_place.items(), key=lambda item: item[0])
        return tuple((place, each.half_open, each.caller, each.probe, each.blamed) for place, each in breakers)
