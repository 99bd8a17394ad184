"""What other threads want done on the driver's thread."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable

__all__ = ["Inbox"]

log = logging.getLogger("kvpoll_fsm")
Task = Callable[[], None]


class Inbox:
    """Tasks in their order, and a file descriptor that is readable when one has come.

    `put` is for any thread, and for signal handlers.
    """

    def __init__(self) -> None:
        self._tasks: deque[Task] = deque()
        self._fd = -1
        self._woken = False
        self._lock = threading.RLock()  # reentrant: a signal handler may call us in the middle of our own call

    def __len__(self) -> int:
        return len(self._tasks)

    def open(self) -> int:
        """Make the file descriptor, and return it."""
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        return self._fd

    def put(self, task: Task) -> None:
        """Leave a task and wake who is to do it."""
        self._tasks.append(task)
        if self._woken:  # who is to do it has not looked yet, and will see this one too
            return
        with self._lock:
            if self._fd >= 0:
                self._woken = True
                os.eventfd_write(self._fd, 1)

    def heard(self, readable: set[int]) -> None:
        """Let the file descriptor be quiet until the next task comes."""
        if self._fd in readable:
            os.eventfd_read(self._fd)
            self._woken = False  # before the tasks are looked at: one that comes from now on wakes again

    def run(self, for_s: float = math.inf) -> None:
        """Do what is there now, for so long at most; a task that raises is logged and keeps no other."""
        ends_s = time.monotonic() + for_s
        for _ in range(len(self._tasks)):
            try:
                task = self._tasks.popleft()
            except IndexError:  # after the end, another thread was faster
                return
            try:
                task()
            except Exception:  # a host's request must not end the others' rooms
                log.exception("request failed")
            if time.monotonic() >= ends_s:
                return

    def abandon(self) -> None:
        """Run what is still asked, so that every future ends, if to no effect."""
        while self._tasks:
            self.run()

    def close(self) -> None:
        """Close the file descriptor. May be called twice."""
        with self._lock:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)
