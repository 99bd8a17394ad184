"""Completions on their way from the transport's threads to the one that asks for them."""

from __future__ import annotations

import contextlib
import os
import threading

from kvpoll_fsm.spi import Completion

__all__ = ["Outbox"]


class Outbox:
    """A list that any thread appends to, and a file descriptor that is readable while it is not empty."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._items: list[Completion] = []
        self._signalled = False
        self._fd: int | None = None

    def open(self) -> None:
        """Make the file descriptor."""
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def put(self, *items: Completion) -> None:
        """Append, and make the file descriptor readable."""
        if not items:
            return
        with self._lock:
            self._items.extend(items)
            wake = not self._signalled and self._fd is not None
            self._signalled = True
        if wake:
            self._signal()

    def take(self) -> list[Completion]:
        """Everything put since the last call. The file descriptor may stay readable once too often."""
        if self._fd is not None:
            with contextlib.suppress(BlockingIOError):  # nothing new
                os.eventfd_read(self._fd)
        with self._lock:
            # Only now: whoever put something before this line is served by this very call.
            self._signalled = False
            items, self._items = self._items, []
        return items

    def fileno(self) -> int | None:
        """The file descriptor, or None before `open` and after `close`."""
        return self._fd

    def close(self) -> None:
        """Close the file descriptor; what is left can still be taken. Nobody may put any more."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _signal(self) -> None:
        fd = self._fd
        if fd is not None:
            os.eventfd_write(fd, 1)
