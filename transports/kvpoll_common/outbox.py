"""Completions on their way from the transport's threads to the one that asks for them."""

from __future__ import annotations

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
        self._taker = 0
        self._fd: int | None = None

    def open(self) -> int:
        """Make the file descriptor and return it."""
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        return self._fd

    def put(self, *items: Completion) -> None:
        """Append, and make the file descriptor readable."""
        if not items:
            return
        with self._lock:
            self._items.extend(items)
            if self._signalled or self._fd is None or self._taker == threading.get_ident():
                return
            self._signalled = True
            os.eventfd_write(self._fd, 1)

    def about_to_take(self) -> None:
        """The calling thread takes soon: what it puts before that need not wake anybody."""
        self._taker = threading.get_ident()

    def take(self) -> list[Completion]:
        """Everything put since the last call."""
        with self._lock:
            self._taker = 0
            if self._signalled and self._fd is not None:
                os.eventfd_read(self._fd)
            self._signalled = False
            items, self._items = self._items, []
        return items

    def fileno(self) -> int | None:
        """The file descriptor, or None before `open` and after `close`."""
        return self._fd

    def close(self) -> None:
        """Close the file descriptor; what is left can still be taken. Nobody may put any more."""
        with self._lock:
            fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)
