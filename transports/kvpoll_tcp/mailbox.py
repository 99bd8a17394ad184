"""How the driver gives a connection's thread something to do, and the thread lends it the connection meanwhile."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Mailbox"]

OrderT = TypeVar("OrderT")


class Mailbox(Generic[OrderT]):
    """Orders for one thread, which sleeps here until one comes or its socket becomes readable.

    A thread that has nothing to do may lend what it owns to the one that posts; any order takes it back.

    Attributes:
        is_lent: What the thread owns is the poster's until he posts. Only he may rely on True.
    """

    def __init__(self) -> None:
        self.is_lent = False
        self._lock = threading.Lock()
        self._orders: list[OrderT] = []
        self._take_back: Callable[[], None] | None = None
        self._asleep = False
        self._is_open = False
        self._fd = -1

    def open(self) -> None:
        """Begin to take orders."""
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._is_open = True

    def post(self, order: OrderT) -> bool:
        """Leave an order; False if nobody will read it any more. For one thread only where the owner ever lends."""
        with self._lock:
            if not self._is_open:
                return False
            if self.is_lent and self._take_back is not None:
                self._take_back()
            self.is_lent = False
            self._orders.append(order)
            if self._asleep:
                self._asleep = False
                os.eventfd_write(self._fd, 1)
            return True

    def lend(self, give: Callable[[], None], take_back: Callable[[], None]) -> None:
        """Lend, unless an order is here already: `give` is called now, `take_back` by whoever posts the next order."""
        with self._lock:
            if not self._orders:
                self.is_lent, self._take_back = True, take_back
                give()

    def take(self) -> list[OrderT]:
        """The orders since the last call."""
        if not self._orders:  # the usual case between two frames; one that comes now is taken next time
            return []
        with self._lock:
            orders, self._orders = self._orders, []
        return orders

    def wait(self, readable_fd: int | None, timeout_s: float | None) -> bool:
        """Sleep until an order is here, `readable_fd` can be read or the time is up; True for the second."""
        with self._lock:
            if self._orders:
                return False
            self._asleep = True
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        if readable_fd is not None:
            poller.register(readable_fd, select.POLLIN)
        ready = {fd for fd, _ in poller.poll(None if timeout_s is None else max(1, timeout_s * 1000))}
        with self._lock:
            self._asleep = False
        if self._fd in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._fd)
        return readable_fd in ready

    def close(self) -> list[OrderT]:
        """Take no more; returns the orders nobody will carry out."""
        with self._lock:
            self._is_open = False
            orders, self._orders = self._orders, []
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        return orders
