"""The two sides of what a host sees of a room whose driver is in a mover."""

from __future__ import annotations

from typing import Any, Protocol

from kvpoll_fsm.arrays import Kind
from kvpoll_fsm.display import log_end
from kvpoll_fsm.errors import Failure, FailureCode
from kvpoll_fsm.layout import Layout
from kvpoll_fsm.mover.frames import Changed
from kvpoll_fsm.mover.results import arrays
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.sources import RoomSource
from kvpoll_fsm.status import GATE_NUMBERS, GATES, HISTORIES, STATES, Places, StatusTable
from kvpoll_fsm.view import RoomView

__all__ = ["HostView", "MoverView", "fail_all"]

CATCH_UP_S = 30.0
"""Longest wait for word that is on its way."""
_UNTOLD: tuple[KVPoll, bool, bool] = (KVPoll.Bootstrapping, False, False)


class HostView(RoomView):
    """The host's side: the state comes from the table, the rest by `Changed`, which is sent before a final state.

    Attributes:
        source: The arrays of a sender's room, kept until nobody reads them any more.
        told: Everything that comes with the final state is here.
    """

    __slots__ = ("_make", "source", "told")

    def __init__(self, table: StatusTable, places: Places, room: int, rank: int, tag: str) -> None:
        super().__init__(table, places, room, rank, tag)
        self.source: RoomSource | None = None
        self.told = False
        self._make: tuple[Layout, int, Any, Kind] | None = None

    @property
    def state(self) -> KVPoll:
        """Where the room stands: one byte read."""
        return STATES[self.table.states[self.number]]

    def catch_up(self) -> None:
        """Wait for what was sent before the table was written; as good as there."""
        if not self._is_told():
            self.wait_until(self._is_told, CATCH_UP_S)

    def _is_told(self) -> bool:
        return self.told or (len(self.parts) >= self.table.parts[self.number] and not self.state.is_terminal)

    def refresh(self) -> None:
        """Read the table."""
        number, table = self.number, self.table
        self.history = HISTORIES[table.states[number]]
        self.gate = GATES[table.gates[number]]
        self.bytes_done = table.bytes_done[number]

    def show(self, state: KVPoll, *, wake: bool = False) -> None:
        """The host's own word: the room failed because its mover did."""
        self.table.states[self.number] |= 1 << state
        self.table.gates[self.number] = GATE_NUMBERS[self.gate]
        self.told = self.told or state.is_terminal
        self.wake()

    def hear(self, change: Changed, data: Any, kind: Kind, layout: Layout) -> None:
        """Take what the mover tells; `data` is the memory of a result. Listener's thread."""
        self.failure = self.failure or change.failure
        self.parts += change.parts
        self.quiescent = self.quiescent or change.quiescent
        self.over = self.over or change.over
        if self.quiescent:
            self.source = None
        if data is not None:
            self._make = (layout, change.total_tokens, data, kind)
        if STATES[change.states].is_terminal:
            self.table.states[self.number] |= change.states
            self.told = True
        self.wake()

    def result(self) -> dict[str, Any]:
        """The arrays, made when they are asked for."""
        make = self._make  # another thread may be here too
        if make is not None and self.data is None:
            self.data = arrays(*make)
            self._make = None
        return dict(self.data or {})

    def fail(self, failure: Failure) -> None:
        """The room ends with its mover. If the table shows another end, what belongs to that has not come."""
        if self.state is KVPoll.Failed or (self.state is KVPoll.Success and self.side == "receiver"):
            self.failure = self.failure or failure
        super().fail(failure)


def fail_all(views: dict[int, HostView], code: FailureCode, detail: str) -> None:
    """Nobody will write to, or read from, their memory any more."""
    for view in views.values():
        if not view.told:
            rank = view.rank if view.side == "receiver" else None
            view.fail(Failure.of(code, detail, state=view.state, rank=rank))
            log_end(view)
        view.source = None
        view.settle()


class Teller(Protocol):
    """Who tells the host."""

    def seen(self, view: MoverView) -> None:
        """A view has changed."""
        ...


class MoverView(RoomView):
    """The mover's side: writes the table, and notes that there is something to tell.

    Attributes:
        sent: State, quiescence and end, as last told.
        parts_told: How many parts the host has heard of.
    """

    __slots__ = ("_teller", "parts_told", "sent")

    def __init__(self, table: StatusTable, number: int, teller: Teller, room: int, rank: int, tag: str) -> None:
        super().__init__(table, number, room, rank, tag)
        self.parts_told = 0
        self.sent = _UNTOLD
        self._teller = teller

    def show(self, state: KVPoll, *, wake: bool = False) -> None:
        """Write what nothing else belongs to; for the rest, see `write`."""
        self._state = state
        number, table = self.number, self.table
        table.gates[number] = GATE_NUMBERS[self.gate]
        table.bytes_done[number] = self.bytes_done
        if state is KVPoll.WaitingForInput:
            table.states[number] |= 1 << state
        self._teller.seen(self)

    @property
    def states(self) -> int:
        """One bit for each state the room has gone through, however fast."""
        return sum(1 << state for state in self.history)

    def write(self, states: int, parts: int) -> None:
        """Write the states, and how many parts have an outcome; the host has been sent all that belongs to them."""
        self.table.parts[self.number] = parts
        self.table.states[self.number] |= states
