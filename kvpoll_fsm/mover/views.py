"""The two sides of what a host sees of a room whose driver is in a mover."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvpoll_fsm.arrays import Kind
from kvpoll_fsm.deadlines import Gate
from kvpoll_fsm.layout import Layout
from kvpoll_fsm.mover.frames import Changed
from kvpoll_fsm.mover.results import arrays
from kvpoll_fsm.mover.table import GATES, HISTORIES, STATES, StatusTable
from kvpoll_fsm.outgoing import RoomSource
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.view import RoomView

__all__ = ["HostView", "MoverView"]

_GATE_NUMBERS = {gate: number for number, gate in enumerate(GATES)}
_BY_NUMBER = {int(state): state for state in KVPoll}
CATCH_UP_S = 30.0
"""Longest wait for word that is on its way."""


class HostView(RoomView):
    """The host's side: the state comes from the table, the rest by `Changed`, which is sent before a final state.

    Attributes:
        number: Its place in the table.
        told: Everything that comes with the final state is here.
        source: The arrays of a sender's room, kept until nobody reads them any more.
    """

    __slots__ = ("_give_back", "_make", "_states", "_table", "number", "source", "told")

    def __init__(
        self, table: StatusTable, number: int, give_back: Callable[[int], None], room: int, rank: int, tag: str
    ) -> None:
        """Begin anew with a place in the table; `give_back` gets its number when nobody needs it any more."""
        table.clear(number)
        super().__init__(room, rank, tag)
        self.number = number
        self.source: RoomSource | None = None
        self._table = table
        self._states = table.states
        self._give_back = give_back
        self.told = False
        self._make: tuple[Layout, int, Any, Kind] | None = None

    @property
    def state(self) -> KVPoll:
        """Where the room stands: one byte read."""
        return STATES[self._states[self.number]]

    def catch_up(self) -> None:
        """Wait for what was sent before the final state was written; as good as there."""
        if not self.told and self.state.is_terminal:
            self.wait_until(lambda: self.told, CATCH_UP_S)

    def refresh(self) -> None:
        """Read the table."""
        number = self.number
        self.history = HISTORIES[self._states[number]]
        self.gate = GATES[self._table.gates[number]]
        self.bytes_done = self._table.bytes_done[number]

    def show(self, state: KVPoll, *, wake: bool = False) -> None:
        """The host's own word: the room failed because its mover did."""
        self._states[self.number] |= 1 << state
        if state.is_terminal:
            self._table.gates[self.number] = _GATE_NUMBERS[Gate.closed]
            self.told = True
        self.wake()

    def hear(self, change: Changed, data: Any, kind: Kind, layout: Layout) -> None:
        """Take what the mover tells; `data` is the memory of a result. Listener's thread."""
        state = _BY_NUMBER[change.state]
        self.failure = self.failure or change.failure
        self.parts += change.parts
        self.quiescent = self.quiescent or change.quiescent
        self.over = self.over or change.over
        if self.quiescent:
            self.source = None
        if data is not None:
            self._make = (layout, change.total_tokens, data, kind)
        if state.is_terminal:
            self._states[self.number] |= 1 << state
            self.told = True
        self.wake()

    def result(self) -> dict[str, Any]:
        """The arrays, made when they are asked for."""
        if self._make is not None and self.data is None:
            self.data = arrays(*self._make)
            self._make = None
        return dict(self.data or {})

    def __del__(self) -> None:
        self._give_back(self.number)


class MoverView(RoomView):
    """The mover's side: writes the table, and notes that there is something to tell."""

    __slots__ = ("_seen", "_table", "number", "parts_told", "sent")

    def __init__(
        self, table: StatusTable, number: int, seen: Callable[[MoverView], None], room: int, rank: int, tag: str
    ) -> None:
        super().__init__(room, rank, tag)
        self.number = number
        self.parts_told = 0
        self.sent: tuple[KVPoll, bool, bool] = (KVPoll.Bootstrapping, False, False)
        self._table = table
        self._seen = seen

    def show(self, state: KVPoll, *, wake: bool = False) -> None:
        """Write what may be read at once; a final state only once all that belongs to it is on its way."""
        self._state = state
        number, table = self.number, self._table
        table.gates[number] = _GATE_NUMBERS[self.gate]
        table.bytes_done[number] = self.bytes_done
        if not state.is_terminal:
            table.states[number] |= 1 << state
        self._seen(self)

    def write_state(self) -> None:
        """Write the state, whatever it is."""
        self._table.states[self.number] |= 1 << self._state
