"""What waits for sockets: a reactor, turned by the thread that owns it, and a thread that turns one of its own."""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import select
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Protocol

__all__ = ["Loop", "Reactor", "Watcher"]

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
        self._epoll: select.epoll | None = None
        self._watchers: dict[int, Watcher | None] = {}
        self._wake_fd = -1

    def open(self) -> None:
        """Take what is needed of the system.

        Raises:
            OSError: It has no file descriptor left to give.
        """
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._epoll = select.epoll()
        except OSError:
            os.close(self._wake_fd)
            raise
        self._epoll.register(self._wake_fd, select.EPOLLIN)

    def fileno(self) -> int | None:
        """Readable when a turn has something to do but for timers; None while it is not open."""
        return None if self._epoll is None else self._epoll.fileno()

    def close(self) -> None:
        """Give everything back; nothing is watched any more. May be called twice."""
        epoll, self._epoll = self._epoll, None
        if epoll is not None:
            epoll.close()
            os.close(self._wake_fd)
        self._watchers.clear()
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
        """Call the watcher, if there is one, when the file descriptor is ready (EPOLLIN, EPOLLOUT); replaces a mask."""
        if self._epoll is None:
            return
        if fd in self._watchers:
            self._epoll.modify(fd, mask)
        else:
            self._epoll.register(fd, mask)
        self._watchers[fd] = watcher

    def unwatch(self, fd: int) -> None:
        """Call nobody any more. Before the file descriptor is closed."""
        if self._epoll is not None and fd in self._watchers:
            del self._watchers[fd]
            self._epoll.unregister(fd)

    def turn(self, wait_s: float | None = 0) -> None:
        """Do what there is to do; wait for something so long at most."""
        if self._epoll is None:
            return
        ready = [(fd, mask, self._watchers.get(fd)) for fd, mask in self._epoll.poll(self._wait_s(wait_s))]
        for fd, mask, watcher in ready:
            if fd == self._wake_fd:
                os.eventfd_read(self._wake_fd)
            elif watcher is not None and self._watchers.get(fd) is watcher:
                watcher.ready(mask)  # and not one who has got the number of a file that was closed just now
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

    def __init__(self, transport: str) -> None:
        """Store what is needed.

        Args:
            transport: Its name, for the thread and the log.
        """
        self.reactor = Reactor()
        self.failure: BaseException | None = None
        self._transport = transport
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
        thread = threading.Thread(target=self._run, name=f"kvpoll-{self._transport}", daemon=True)
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
            running, self._running = self._running, False  # before it wakes, or it might sleep again
            if running:
                self.reactor.wake()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._running:
                self.reactor.turn(None)
                self._run_tasks()
            self._run_tasks()
        except BaseException as error:  # nobody may wait for a thread that has died silently
            log = logging.getLogger(f"kvpoll_{self._transport}")
            log.error("the %s transport's thread failed:\n%s", self._transport, traceback.format_exc())
            with self._lock:
                self._running = False
            self.failure = error

    def _run_tasks(self) -> None:
        while self._tasks:
            self._tasks.popleft()()
