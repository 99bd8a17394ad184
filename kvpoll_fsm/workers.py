"""The threads that copy and hash.

Not a `ThreadPoolExecutor`: that one takes no more work as soon as the interpreter begins to end, and rooms may
still be drained then, in an exit handler.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

__all__ = ["Then", "Work", "Workers", "own_clock"]

log = logging.getLogger("kvpoll_fsm")
HUNG_S = 2.0
"""Threads that use no processor time for so long are taken to hang when they are to end."""
Work = Callable[[], object]
Then = Callable[[object], None]


def own_clock() -> int:
    """The number of the clock that counts this thread's processor time."""
    return time.pthread_getcpuclockid(threading.get_ident())


class Workers:
    """Threads that do one piece of work after the other, in the order in which they were given.

    They are daemons: a program that forgets to close its endpoint can still exit.
    """

    def __init__(self, threads: int) -> None:
        self._orders: queue.SimpleQueue[tuple[Work, Then] | None] = queue.SimpleQueue()
        self._clocks: dict[threading.Thread, int] = {}
        self._threads = [
            threading.Thread(target=self._run, name=f"kvpoll-worker-{number}", daemon=True) for number in range(threads)
        ]

    def start(self) -> None:
        """Start the threads.

        Raises:
            RuntimeError: The system has no thread left to give; those that were started have ended.
        """
        started = 0
        try:
            for thread in self._threads:
                thread.start()
                started += 1
        except RuntimeError:
            self._threads = self._threads[:started]
            self.close()
            raise

    def submit(self, work: Work, then: Then) -> None:
        """Do `work`, and call `then` in that thread with what it returned or raised."""
        self._orders.put((work, then))

    def used_s(self) -> dict[int, float]:
        """Processor time of each thread, by the number of its clock. Not after `close`."""
        return {clock: time.clock_gettime(clock) for clock in list(self._clocks.values())}

    def close(self) -> bool:
        """Finish what was given, and end the threads, however long that takes.

        Returns:
            False if they hang: they have not moved on for `HUNG_S`, and may still read and write what they were
            given, should they ever do.
        """
        for _ in self._threads:
            self._orders.put(None)
        used_s: dict[threading.Thread, float] = {}
        while alive := [thread for thread in self._threads if thread.is_alive()]:
            before, used_s = used_s, {thread: self._used_by(thread) for thread in alive}
            if used_s == before:
                return False
            ends_s = time.monotonic() + HUNG_S
            for thread in alive:
                thread.join(max(0.0, ends_s - time.monotonic()))
        return True

    def _used_by(self, thread: threading.Thread) -> float:
        clock = self._clocks.get(thread)
        try:
            return 0.0 if clock is None else time.clock_gettime(clock)
        except OSError:  # it has just ended
            return 0.0

    def _run(self) -> None:
        self._clocks[threading.current_thread()] = own_clock()
        while (order := self._orders.get()) is not None:
            work, then = order
            try:
                result = work()
            except BaseException as error:  # handed to whoever wanted the result
                result = error
            try:
                then(result)
            except Exception:  # the next ones must be served
                log.exception("a worker's result was not taken")
            del order, work, then, result  # an idle thread must not keep a room's arrays alive
