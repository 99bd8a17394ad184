"""What a subclass says about its transport, and the pairs of sides that the tests use."""

from __future__ import annotations

import abc
import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import ClassVar

import pytest

from kvpoll_fsm.spi import Capabilities, Done, FenceKind, Link, Range, Transport, Write
from kvpoll_fsm.testing.conformance.sides import Pair, Side
from kvpoll_fsm.testing.conformance.spec import Spec

__all__ = ["Base", "Bench"]


class Bench(Pair):
    """A pair whose link is up, for tests that leave it as it was."""

    def __init__(self, tx: Side, rx: Side) -> None:
        super().__init__(tx, rx)
        self.link = tx.connect(rx)
        self.up(self.link)

    def submit(self, *writes: Write) -> int:
        """Write under a token for exactly these."""
        return self.link.submit(writes, _admitting(self, writes))

    @property
    def is_spent(self) -> bool:
        """The link has gone down meanwhile."""
        return False in self.tx.links.get(self.link.number, [])

    def reset(self) -> None:
        """Memory and records as at first."""
        self.tx.fill()
        self.rx.paint(b"\0")
        self.tx.forget()
        self.rx.forget()


class Base(abc.ABC):
    """The settings of a suite. Only `make` must be given.

    Attributes:
        needs_fd: Memory can be sent from only if it is shared memory (`Region.fd`). None finds out which it is.
        refuses_whole: Of a ticket with one write that is not admitted nothing lands, which is more than is promised:
            without this what is admitted may.
        is_patient: What is promised within the transport's own time limits is waited for, which may take seconds.
            Without this one test does with less.
        within_s: How long one condition is waited for. Far more than it should take: the machine may be busy.
        test_s: How long one test may take; then whatever call it hangs in is ended by an exception.
    """

    needs_fd: ClassVar[bool | None] = None
    refuses_whole: ClassVar[bool] = False
    is_patient: ClassVar[bool] = True
    within_s: ClassVar[float] = 20.0
    test_s: ClassVar[float] = 55.0

    _benches: ClassVar[dict[type, Bench]] = {}

    @abc.abstractmethod
    def make(self) -> Transport:
        """A transport that is not started yet."""

    def spec(self) -> Spec | None:
        """How the tests with a peer in another process make that peer's transport.

        By default: the class that `make` makes one of, without settings. With None these tests are skipped.
        """
        return Spec.of(self.make())

    def side(self, *, filled: bool = False, shared: bool = True) -> Side:
        """A started transport with memory, used as the driver uses it."""
        return Side(self.make(), filled=filled, within_s=self.within_s, flushes=True, shared=shared)

    def new_bench(self) -> Bench:
        """Two sides and a link that is up."""
        return Bench(self.side(filled=True), self.side())

    @property
    def claims(self) -> Capabilities:
        """The capabilities of the transport."""
        return self.make().capabilities

    def few(self, number: int) -> range:
        """So many tickets, or as many as may be in flight on a link."""
        return range(min(number, self.claims.max_outstanding))

    @property
    def is_mild(self) -> bool:
        """Whether a fence concerns its token alone."""
        return self.claims.fence is FenceKind.token

    @pytest.fixture(autouse=True)
    def deadline(self) -> Iterator[None]:
        """End a test that hangs, by an exception in whatever call it hangs in."""
        with _alarm(self.test_s):
            yield

    @pytest.fixture
    def pair(self) -> Iterator[Pair]:
        """Two sides that nothing was done with."""
        pair = Pair(self.side(filled=True), self.side())
        yield pair
        pair.close()

    @pytest.fixture
    def link(self, pair: Pair) -> Link:
        """A link between them that is up."""
        link = pair.tx.connect(pair.rx)
        pair.up(link)
        return link

    @pytest.fixture
    def bench(self, request: pytest.FixtureRequest) -> Iterator[Bench]:
        """A pair and a link, as new; the next test gets the same one, as starting may take a second or more."""
        bench = self._kept() or self.new_bench()
        bench.reset()
        failed = request.session.testsfailed
        yield bench
        if request.session.testsfailed == failed and not bench.is_spent:
            self._benches[type(self)] = bench
        else:
            bench.close()

    def _kept(self) -> Bench | None:
        """What an earlier test has left, if its link is still up."""
        bench = self._benches.pop(type(self), None)
        if bench is None:
            return None
        bench.pump()
        if not bench.is_spent:
            return bench
        bench.close()
        return None

    @classmethod
    def teardown_class(cls) -> None:
        """Close what was kept for the next test."""
        bench = cls._benches.pop(cls, None)
        if bench is not None:
            bench.close()

    def goes_on(self, pair: Pair, link: Link, *writes: Write) -> None:
        """See that the link still carries writes; where a fence costs a process, that a new link does."""
        if not self.is_mild:
            return self.get_through(pair, *writes)
        pair.done(link.submit(writes, _admitting(pair, writes)))
        return None

    def get_through(self, pair: Pair, *writes: Write) -> None:
        """Write over a new link; where a fence may have cost a process, try again until there is another one."""
        deadline = time.monotonic() + self.within_s
        while True:
            link, token = pair.tx.connect(pair.rx), _admitting(pair, writes)
            (end,) = pair.calm(token, link.submit(writes, token))
            link.close()
            if isinstance(end, Done):
                return
            assert not self.is_mild, f"{end}, over a new link"
            assert time.monotonic() < deadline, f"not within {self.within_s:g} s: a write over a new link; {end}"


def _admitting(pair: Pair, writes: Sequence[Write]) -> bytes:
    return pair.rx.grant(*(Range(write.region, write.dst_offset, write.nbytes) for write in writes))


@contextlib.contextmanager
def _alarm(after_s: float) -> Iterator[None]:
    """Raise in the main thread when the time is up, unless somebody else has set its alarm."""
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"not done within {after_s:g} s: it hangs in the call below")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, after_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
