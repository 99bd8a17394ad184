"""What waits for sockets: a reactor, turned by the thread that owns it, and a thread that turns one of its own."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import selectors
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Protocol

__all__ = ["Loop", "Reactor", "Watcher"]

_log = logging.getLogger("kvpoll_shm")

Task = Callable[[], None]
Step = Callable[[], bool]
"""Does a piece of work; whether there is more."""


class Watcher(Protocol):
    """Whom a socket belongs to."""

    def ready(self, mask: int) -> None:
        """The socket can be read or written."""
        ...


class Reactor:
    """Sockets, timers and work in small steps, for one thread; only `wake` is for any."""

    def __init__(self, alarm: Callable[[float], object] | None = None) -> None:
        """Store what is needed.

        Args:
            alarm: Called with the delay of each timer, where somebody must be asked to wake us then.
        """
        self._alarm = alarm
        self._steps: deque[Step] = deque()
        self._clock: list[tuple[float, int, Task]] = []
        self._numbers = itertools.count()
        self._selector: selectors.EpollSelector | None = None
        self._wake_fd = -1

    def open(self) -> None:
        """Take what is needed of the system.

        Raises:
            OSError: It has no file descriptor left to give.
        """
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._selector = selectors.EpollSelector()
        except OSError:
            os.close(self._wake_fd)
            raise
        self._selector.register(self._wake_fd, selectors.EVENT_READ)

    def fileno(self) -> int | None:
        """Readable when a turn has something to do but for timers; None while it is not open."""
        return None if self._selector is None else self._selector.fileno()

    def close(self) -> None:
        """Give everything back; nothing is watched any more. May be called twice."""
        selector, self._selector = self._selector, None
        if selector is not None:
            selector.close()
            os.close(self._wake_fd)
        self._steps.clear()
        self._clock.clear()

    def wake(self) -> None:
        """Let the turn that waits end, or the next one. For any thread, while it is open."""
        os.eventfd_write(self._wake_fd, 1)

    def later(self, delay_s: float, task: Task) -> None:
        """Run `task` in so many seconds."""
        heapq.heappush(self._clock, (time.monotonic() + delay_s, next(self._numbers), task))
        if self._alarm is not None:
            self._alarm(delay_s)

    def work(self, step: Step) -> None:
        """Call `step` time and again, in turn with others, until it says that there is no more."""
        self._steps.append(step)

    def watch(self, fd: int, mask: int, watcher: Watcher | None) -> None:
        """Call the watcher, if there is one, when the file descriptor is ready; replaces an earlier mask."""
        if self._selector is None:
            return
        if fd in self._selector.get_map():
            self._selector.modify(fd, mask, watcher)
        else:
            self._selector.register(fd, mask, watcher)

    def unwatch(self, fd: int) -> None:
        """Call nobody any more."""
        if self._selector is not None:
            with contextlib.suppress(KeyError):  # it was not watched
                self._selector.unregister(fd)

    def turn(self, wait_s: float | None = 0) -> None:
        """Do what there is to do; wait for something so long at most."""
        if self._selector is None:
            return
        for key, mask in self._selector.select(self._wait_s(wait_s)):
            if key.data is not None:
                key.data.ready(mask)
            elif key.fd == self._wake_fd:
                os.eventfd_read(self._wake_fd)
        while self._clock and self._clock[0][0] <= time.monotonic():
            heapq.heappop(self._clock)[2]()
        for _ in range(len(self._steps)):
            step = self._steps.popleft()
            if step():
                self._steps.append(step)

    def _wait_s(self, wait_s: float | None) -> float | None:
        if self._steps or not self._clock:
            return 0 if self._steps else wait_s
        due_s = max(0.0, self._clock[0][0] - time.monotonic())
        return due_s if wait_s is None else min(due_s, wait_s)


class Loop:
    """A thread that turns a reactor, and runs on it what others post.

    Attributes:
        reactor: For tasks that run on the loop.
        failure: Why the thread ended before its time.
    """

    def __init__(self) -> None:
        self.reactor = Reactor()
        self.failure: BaseException | None = None
        self._lock = threading.Lock()
        self._tasks: deque[Task] = deque()
        self._thread: threading.Thread | None = None
        self._running = False

    def start(self) -> None:
        """Start the thread.

        Raises:
            OSError: The system has no file descriptor left to give.
            RuntimeError: It has no thread left to give.
        """
        self.reactor.open()
        # A daemon, so that a program that forgets to close the transport can exit; atexit closes it then.
        thread = threading.Thread(target=self._run, name="kvpoll-shm", daemon=True)
        self._running = True
        try:
            thread.start()
        except RuntimeError:
            self._running = False
            self.reactor.close()
            raise
        self._thread = thread

    def post(self, task: Task) -> bool:
        """Run `task` on the loop soon; False if it has ended. For any thread."""
        with self._lock:
            if not self._running:
                return False
            self._tasks.append(task)
            if len(self._tasks) == 1:
                self.reactor.wake()
        return True

    def stop(self) -> None:
        """End the thread once it has run what was posted, and wait for it. May be called twice."""
        with self._lock:
            if self._running:
                self.reactor.wake()
            self._running = False
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._running:
                self.reactor.turn(None)
                self._run_tasks()
            self._run_tasks()
        except BaseException as error:  # nobody may wait for a thread that has died silently
            _log.error("the shm transport's thread failed:\n%s", traceback.format_exc())
            with self._lock:
                self._running = False
            self.failure = error

    def _run_tasks(self) -> None:
        while True:
            with self._lock:
                if not self._tasks:
                    return
                task = self._tasks.popleft()
            task()
