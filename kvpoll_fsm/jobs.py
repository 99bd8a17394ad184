"""What the workers do for rooms: whose work is not answered yet, and whether it moves on."""

from __future__ import annotations

from collections.abc import Callable

from kvpoll_fsm.session import RoomKey
from kvpoll_fsm.workers import Then, Work, Workers, own_clock

__all__ = ["SMALL_NBYTES", "Jobs"]

SMALL_NBYTES = 64 << 10
"""The driver copies and hashes so much by itself: some 20 us, where a hand-over and an answer take more."""


class _Job:
    """Work for a room, from its order to its answer; `clock` is that of the thread that does it."""

    __slots__ = ("clock", "key")

    def __init__(self, key: RoomKey) -> None:
        self.key = key
        self.clock: int | None = None


class Jobs:
    """Gives rooms' work to the workers. Used by the driver's thread alone."""

    def __init__(self, workers: Workers, answer: Callable[[RoomKey, Callable[[], None]], None]) -> None:
        """Store what is needed.

        Args:
            workers: Who does it.
            answer: Called in a worker: runs an action for a room on the driver's thread.
        """
        self._workers = workers
        self._answer = answer
        self._open: set[_Job] = set()
        self._used_s: dict[int, float] = {}

    def submit(self, key: RoomKey, work: Work, then: Then, nbytes: int) -> None:
        """Run `work`, which concerns so many bytes, and give its result, or the exception it ended with, to `then`.

        A worker does it, unless handing it over would take longer than the work, and the room waits for no worker.
        """
        if nbytes <= SMALL_NBYTES and all(job.key != key for job in self._open):
            return then(_outcome(work))
        job = _Job(key)

        def noted() -> object:
            job.clock = own_clock()
            return work()

        def answered(result: object) -> None:
            self._open.discard(job)
            then(result)

        self._workers.submit(noted, lambda result: self._answer(key, lambda: answered(result)))
        self._open.add(job)

    def moving(self) -> frozenset[RoomKey]:
        """Rooms whose work has moved on since the last call: its thread, or any while it is queued, was busy.

        The measure is the threads' processor time. Counting finished work instead would take one long copy for a
        standstill; and a thread that hangs, on a lock or on memory that does not come, uses none.
        """
        before, self._used_s = self._used_s, self._workers.used_s()
        busy = {clock for clock, used_s in self._used_s.items() if used_s != before.get(clock)}
        return frozenset(job.key for job in self._open if (busy if job.clock is None else job.clock in busy))


def _outcome(work: Work) -> object:
    """What work returns, or the exception it ends with."""
    try:
        return work()
    except Exception as error:  # handed to whoever wanted the result
        return error
