"""A host that forks: its children leave the transport alone."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

import pytest

from kvpoll_fsm.spi import Link, Write
from kvpoll_fsm.testing.conformance.base import Base
from kvpoll_fsm.testing.conformance.sides import Pair, until

__all__ = ["Forks"]

# Python warns of forks in programs with threads. Engines do it all the same.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


class Forks(Base):
    """Engines fork. The transport stays the parent's."""

    @forks
    def test_a_forked_child_that_closes_it_changes_nothing(self, pair: Pair, link: Link) -> None:
        """`close` in a forked child does nothing to the parent's links, threads and processes."""

        def close() -> None:
            pair.tx.transport.close()
            pair.rx.transport.close()

        with self._child(close) as child:
            until(lambda: _has_ended(child), "the child's end", self.within_s)
            pair.done(link.submit([Write(0, 0, 0, 10)], pair.rx.grant()))
        self.get_through(pair, Write(0, 0, 0, 10))

    @forks
    def test_a_forked_child_that_closes_a_link_changes_nothing(self, pair: Pair, link: Link) -> None:
        """`Link.close` in a forked child does nothing to the parent's connection: no news, and writes get through."""
        pair.done(link.submit([Write(0, 0, 0, 10)], pair.rx.grant()))
        with self._child(link.close) as child:
            until(lambda: _has_ended(child), "the child's end", self.within_s)
            pair.done(link.submit([Write(0, 0, 0, 10)], pair.rx.grant()))
        assert pair.tx.links[link.number] == [True]

    @forks
    def test_a_forked_child_keeps_no_connection_open(self, pair: Pair, link: Link) -> None:
        """The parent's peers see the end of a transport although a forked child lives on."""
        told, tell = os.pipe()

        def stay() -> None:
            os.read(told, 1)

        with self._child(stay):
            pair.rx.transport.close()
            ticket = link.submit([Write(0, 0, 0, 10)], b"t" * 16)
            pair.tx.until(lambda: pair.tx.links[link.number][-1] is False, "the end of the connection")
            pair.tx.until(lambda: ticket in pair.tx.ends, "the end of the ticket")
            os.write(tell, b"x")
        os.close(told)
        os.close(tell)

    @contextlib.contextmanager
    def _child(self, task: Callable[[], object]) -> Iterator[int]:
        """A forked child that does something and ends, and is ended if it does not."""
        child = os.fork()
        if child == 0:
            signal.setitimer(signal.ITIMER_REAL, 0)
            status = 1
            try:
                task()
                status = 0
            finally:
                os._exit(status)
        try:
            yield child
            until(lambda: _has_ended(child), "the child's end", self.within_s)
        except BaseException:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            raise


def _has_ended(child: int) -> bool:
    try:
        return os.waitpid(child, os.WNOHANG)[0] == child
    except ChildProcessError:  # waited for before
        return True
