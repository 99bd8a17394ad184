"""The transport's threads, none of which outlives it."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["Crew"]


class Crew:
    """Starts threads and joins them all in the end.

    They are daemons so that a program that forgets to close the transport can still exit; `atexit` closes it
    then, while threads still run.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()

    def start(self, name: str, work: Callable[[], None]) -> None:
        """Run `work` in a thread of its own.

        Raises:
            RuntimeError: The system has no thread left to give.
        """
        thread = threading.Thread(target=work, name=f"kvpoll-tcp-{name}", daemon=True)
        with self._lock:
            # Ended ones are let go here; started within the lock, so that none is taken for ended too early.
            self._threads = {other for other in self._threads if other.is_alive()}
            thread.start()
            self._threads.add(thread)

    def join(self) -> None:
        """Wait for all to end; the caller has told them to. For any thread but one of the crew."""
        while self._threads:
            with self._lock:
                threads, self._threads = self._threads, set()
            for thread in threads:
                thread.join()
