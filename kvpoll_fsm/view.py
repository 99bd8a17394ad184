"""What the host sees of a room: written by the driver, read by the host without a lock.

Each attribute is replaced, never changed in place, and `state` is written last: who sees Success or Failed
sees everything that belongs to it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from kvpoll_fsm.deadlines import Gate
from kvpoll_fsm.errors import Failure
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.session import PartRecord, RoomKey, Session
from kvpoll_fsm.status import Places, StatusTable

__all__ = ["RoomView"]


class RoomView:
    """One life of a room, as last seen.

    Attributes:
        key: Which life of which room; None until the driver has opened it.
        side: "sender" or "receiver", once it is being opened.
        tag: The host's own name for the room, for logs.
        failure: The first cause, once Failed.
        history: The states gone through.
        parts: The parts that have an outcome.
        gate: What the room waits for.
        gate_since_s: Monotonic time since which it has waited there, for this part.
        bytes_done: Bytes that have landed.
        table: Where the state is written for `poll()`.
        number: The room's place in the table.
        quiescent: No write can land or read its source any more.
        over: Nothing will happen to the room any more: it is forgotten, or its endpoint has ended.
        data: A receiver's arrays, once Success.
        opened_s: Monotonic time of the opening.
    """

    __slots__ = (
        "_bells",
        "_callbacks",
        "_places",
        "_state",
        "bytes_done",
        "data",
        "failure",
        "gate",
        "gate_since_s",
        "history",
        "key",
        "number",
        "opened_s",
        "over",
        "parts",
        "quiescent",
        "rank",
        "room",
        "side",
        "table",
        "tag",
    )

    def __init__(self, table: StatusTable, places: Places | int, room: int, rank: int, tag: str) -> None:
        """Take a place in the table, which is given back when nobody uses the view any more.

        Args:
            table: Where the state is written.
            places: Where to take a number from; or the number, if another process has taken it.
            room: The room's number.
            rank: The receiver's rank, 0 for a sender.
            tag: The host's own name for the room.

        Raises:
            LimitReached: There is no place left.
        """
        self._places = None if isinstance(places, int) else places
        self.number = places if isinstance(places, int) else places.take()
        self.table = table
        if not isinstance(places, int):
            table.begin(self.number)
        self.room = room
        self.rank = rank
        self.tag = tag
        self.side = ""
        self.key: RoomKey | None = None
        self._state = KVPoll.Bootstrapping
        self.failure: Failure | None = None
        self.history: tuple[KVPoll, ...] = _FIRST
        self.parts: tuple[PartRecord, ...] = ()
        self.gate = Gate.waiting_ranks
        self.bytes_done = 0
        self.quiescent = self.over = False
        self.data: Any = None
        self.opened_s = self.gate_since_s = time.monotonic()
        self._bells: list[threading.Lock] | None = None
        self._callbacks: deque[Callable[[], None]] | None = None

    @property
    def state(self) -> KVPoll:
        """Where the room stands."""
        return self._state

    def catch_up(self) -> None:
        """Wait until everything that belongs to `state` is here; it is, where the driver writes it in this order."""

    def result(self) -> dict[str, Any]:
        """A receiver's arrays; none before Success, or for a dummy rank."""
        return dict(self.data or {})

    def refresh(self) -> None:
        """Bring `history`, `gate` and `bytes_done` up to date; they are, where the driver writes them."""

    def update(self, session: Session) -> None:
        """Show what the session says. Driver's thread."""
        gate, quiescent = session.gate, session.quiescent
        if gate is not self.gate or self.parts is not session.parts:
            self.gate_since_s = time.monotonic()
        self.failure, self.history, self.parts = session.failure, session.history, session.parts
        self.gate, self.bytes_done = gate, session.bytes_done
        before, self.quiescent = self.quiescent, quiescent
        self.show(session.state, wake=before is not quiescent)

    def fail(self, failure: Failure) -> None:
        """The room ends because its driver does, or because it could not be opened."""
        if not self.state.is_terminal:
            self.failure = failure
            self.history = (*self.history, KVPoll.Failed)
            self.gate = Gate.closed
            self.show(KVPoll.Failed)

    def settle(self, *, quiescent: bool = True) -> None:
        """Nothing will happen to the room again; if not `quiescent`, what could be known of its memory is known."""
        self.quiescent = self.quiescent or quiescent
        self.over = True
        self.show(self.state, wake=True)

    def show(self, state: KVPoll, *, wake: bool = False) -> None:
        """Set the state, and wake those who wait for it."""
        wake = wake or state is not self._state
        self._state = state
        self.table.states[self.number] |= 1 << state
        if wake:
            self.wake()

    def wake(self) -> None:
        """Let all who wait look again; once the room has ended, call back those who asked for that."""
        for bell in self._bells[:] if self._bells else ():
            with contextlib.suppress(RuntimeError):  # it rings already
                bell.release()
        if self._callbacks and self.state.is_terminal:
            _call_back(self._callbacks)

    def __del__(self) -> None:
        places = getattr(self, "_places", None)  # unset if there was no place left
        if places is not None:
            places.give_back(self.number)

    def wait_until(self, condition: Callable[[], bool], timeout_s: float | None) -> bool:
        """Wait until `condition` holds; False if the time passed first.

        No lock is held meanwhile, so that a signal handler may wait for the same room in the middle of a wait: each
        has a bell of its own, hung up before the condition is looked at, and rung after what it is about has changed.
        """
        if condition():
            return True
        bell, bells = threading.Lock(), self._all_bells()
        bell.acquire()
        bells.append(bell)
        try:
            return _await(bell, condition, timeout_s)
        finally:
            bells.remove(bell)

    def call_when_ended(self, callback: Callable[[], None]) -> None:
        """Call back once when the room is terminal, from the thread that shows the end; at once if it is."""
        with _making:
            callbacks = self._callbacks = deque() if self._callbacks is None else self._callbacks
        callbacks.append(callback)
        if self.state.is_terminal:  # seen by one of the two: the end is shown before callbacks are looked for
            _call_back(callbacks)

    def call_no_more(self, callback: Callable[[], None]) -> None:
        """Forget a callback; unknown ones are ignored."""
        with contextlib.suppress(ValueError):
            if self._callbacks is not None:
                self._callbacks.remove(callback)

    def _all_bells(self) -> list[threading.Lock]:
        """Made for the first who waits."""
        with _making:
            self._bells = [] if self._bells is None else self._bells
            return self._bells


def _call_back(callbacks: deque[Callable[[], None]]) -> None:
    """Whoever takes one out calls it."""
    while callbacks:
        try:
            callback = callbacks.popleft()
        except IndexError:  # another thread was faster
            return
        callback()


def _await(bell: threading.Lock, condition: Callable[[], bool], timeout_s: float | None) -> bool:
    ends_s = None if timeout_s is None else time.monotonic() + timeout_s
    while not condition():
        left_s = threading.TIMEOUT_MAX if ends_s is None else max(0.0, ends_s - time.monotonic())
        if not bell.acquire(timeout=min(left_s, threading.TIMEOUT_MAX)):
            return condition()
    return True


_FIRST = (KVPoll.Bootstrapping,)
_making = threading.RLock()  # reentrant: a signal handler may call us in the middle of our own call
