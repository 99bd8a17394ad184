"""The connections that the driver attends to itself, and the one file descriptor that tells it to."""

from __future__ import annotations

import select
from collections.abc import Callable

__all__ = ["Watch"]


class Watch:
    """A set of file descriptors with somebody to call for each, and a file descriptor readable while one of them is."""

    def __init__(self) -> None:
        self._epoll: select.epoll | None = None
        self._calls: dict[int, Callable[[], None]] = {}

    def open(self) -> None:
        """Make the file descriptor.

        Raises:
            OSError: The system has none left to give.
        """
        self._epoll = select.epoll()

    def fileno(self) -> int | None:
        """The file descriptor, or None before `open` and after `close`."""
        return None if self._epoll is None else self._epoll.fileno()

    def add(self, fd: int, call: Callable[[], None] | None = None) -> None:
        """Watch one, and call somebody when it can be read. For any thread."""
        if self._epoll is not None:
            if call is not None:
                self._calls[fd] = call
            self._epoll.register(fd, select.EPOLLIN)

    def remove(self, fd: int) -> None:
        """Call no more. Before it is closed. For the thread that calls `turn`."""
        if self._epoll is not None and self._calls.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def turn(self) -> None:
        """Call everybody who has something to read."""
        if self._epoll is None:
            return
        for fd, _ in self._epoll.poll(0):
            call = self._calls.get(fd)
            if call is not None:
                call()

    def close(self) -> None:
        """Watch nothing any more. May be called twice."""
        epoll, self._epoll = self._epoll, None
        if epoll is not None:
            epoll.close()
        self._calls.clear()
