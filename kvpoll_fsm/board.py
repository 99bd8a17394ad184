"""The status of many rooms, for engines that keep their own transfer code.

A board does what a hand-written `request_status` dict is meant to do: it runs the machine of
`kvpoll_fsm.lifecycle` for each room, under one lock, and keeps the first cause of a failure. Every opening
of a room is a generation of its own, so what a worker of an earlier life reports cannot touch the next one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from kvpoll_fsm.errors import DuplicateRoom, Failure, FailureCode, InvalidInput, UnknownRoom
from kvpoll_fsm.events import Aborted, DeadlinePassed, LifecycleEvent, PartDone, PeerLost, ProtocolError
from kvpoll_fsm.lifecycle import Lifecycle, outcome
from kvpoll_fsm.poll import KVPoll

__all__ = ["StatusBoard"]

_CODES: dict[type, FailureCode] = {
    Aborted: FailureCode.Aborted,
    PeerLost: FailureCode.PeerLost,
    DeadlinePassed: FailureCode.DeadlinePassed,
    ProtocolError: FailureCode.ProtocolError,
    PartDone: FailureCode.TransportFailed,
}
"""The code of a failure whose cause the caller did not give."""


@dataclass(slots=True)
class _Life:
    generation: int
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    failure: Failure | None = None


class StatusBoard:
    """Room to state, safe to use from any number of threads.

    No method waits for anything but the board's own lock, which is held for a table lookup. What is kept
    grows with the rooms that are open and with nothing else: `clear()` each room when its end is known.

    Example:
        >>> from kvpoll_fsm.board import StatusBoard
        >>> from kvpoll_fsm.events import Bootstrapped, PeerLost, Resumed
        >>> board = StatusBoard()
        >>> generation = board.open(42)
        >>> board.advance(42, Bootstrapped())
        <KVPoll.WaitingForInput: 2>
        >>> board.part_done(42, is_last=False, polls=[True, True])  # 1,024 of 2,000 tokens, two ranks
        <KVPoll.Transferring: 3>
        >>> board.advance(42, Resumed())
        <KVPoll.Transferring: 3>
        >>> board.part_done(42, is_last=True, polls=[True, True])
        <KVPoll.Success: 4>
        >>> board.advance(42, PeerLost(), generation=generation)  # too late: counted, nothing changes
        <KVPoll.Success: 4>
        >>> board.clear(42)
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lives: dict[int, _Life] = {}
        self._last_generation = 0
        self._late_events = 0

    def open(self, room: int) -> int:
        """Begin a life of a room, in Bootstrapping. A room that has ended may be opened again as it is.

        Returns:
            The generation of this life; higher than any this board gave before, to whichever room. Hand it
            to the workers that will report on the room.

        Raises:
            DuplicateRoom: The room is open and has not ended. It goes on as it was.
        """
        with self._lock:
            life = self._lives.get(room)
            if life is not None and not life.lifecycle.state.is_terminal:
                raise DuplicateRoom("status", room, 0)
            self._last_generation += 1
            self._lives[room] = _Life(self._last_generation)
            return self._last_generation

    def advance(
        self,
        room: int,
        event: LifecycleEvent,
        *,
        generation: int | None = None,
        failure: Failure | None = None,
    ) -> KVPoll:
        """Apply one event and return the state the room is in then.

        An event that comes after the end, or from an earlier generation, is counted and changes nothing.

        Args:
            room: An open room.
            event: What happened.
            generation: The life it happened to, as `open()` gave it; None means the present one.
            failure: Why, if this event ends the room as Failed. The first one stays; by default it is made
                from the event.

        Raises:
            IllegalTransition: The event is not possible in this state, which is unchanged.
            UnknownRoom: The room is not open. A worker that outlives its room sees this after `clear()`.
            InvalidInput: The room never had that generation.
        """
        return self._advance(room, event, generation, lambda state: failure or _failure_of(event, state))

    def part_done(
        self,
        room: int,
        *,
        is_last: bool,
        polls: Iterable[bool],
        generation: int | None = None,
        failure: Failure | None = None,
    ) -> KVPoll:
        """Apply the outcome of one part over its ranks: Success, Transferring (more to come) or Failed.

        Args:
            room: An open room.
            is_last: This part completes the room.
            polls: One bool for each required rank, rank 0 first: the part arrived there whole.
            generation: As in `advance`.
            failure: As in `advance`; by default it names the ranks the part did not arrive on.

        Raises:
            ValueError: `polls` is empty.
            IllegalTransition: The room is still Bootstrapping.
            UnknownRoom: As in `advance`.
            InvalidInput: As in `advance`.
        """
        ranks = tuple(polls)
        outcome(is_last, ranks)
        missed = [rank for rank, arrived in enumerate(ranks) if not arrived]

        def cause(state: KVPoll) -> Failure:
            detail = f"the part did not arrive whole on ranks {missed}"
            return failure or Failure.of(FailureCode.TransportFailed, detail, state=state, rank=missed[0])

        return self._advance(room, PartDone(is_last=bool(is_last), all_ok=not missed), generation, cause)

    def poll(self, room: int) -> KVPoll:
        """The state of a room. Changes nothing.

        Raises:
            UnknownRoom: The room is not open.
        """
        with self._lock:
            return self._life(room).lifecycle.state

    def failure(self, room: int) -> Failure | None:
        """The first cause of the room's end: always there in Failed, None in any other state.

        Raises:
            UnknownRoom: The room is not open.
        """
        with self._lock:
            return self._life(room).failure

    def clear(self, room: int) -> None:
        """Forget a room, whatever state it is in; nothing happens if it is not open.

        Only its number is free again. Its generation is never given twice, so late reports stay harmless.
        """
        with self._lock:
            self._lives.pop(room, None)

    @property
    def late_events(self) -> int:
        """How many events came after the end of their room's life, over the life of the board."""
        return self._late_events

    def __len__(self) -> int:
        return len(self._lives)

    def _advance(
        self, room: int, event: LifecycleEvent, generation: int | None, cause: Callable[[KVPoll], Failure]
    ) -> KVPoll:
        with self._lock:
            stale = generation is not None and self._is_stale(room, generation)
            self._late_events += stale
            life = self._life(room)
            before = life.lifecycle.state
            if stale:
                return before
            after = life.lifecycle.apply(event)
            self._late_events += before.is_terminal
            if after is KVPoll.Failed and not before.is_terminal:
                life.failure = cause(before)
            return after

    def _is_stale(self, room: int, generation: int) -> bool:
        life = self._lives.get(room)
        newest = self._last_generation if life is None else life.generation
        if not 0 < generation <= newest:
            raise InvalidInput(f"room {room} has no generation {generation}; pass what open() returned for it")
        return life is None or generation < newest

    def _life(self, room: int) -> _Life:
        life = self._lives.get(room)
        if life is None:
            raise UnknownRoom(room)
        return life


def _failure_of(event: LifecycleEvent, state: KVPoll) -> Failure:
    return Failure.of(_CODES[type(event)], f"{event!r} without further cause", state=state)
