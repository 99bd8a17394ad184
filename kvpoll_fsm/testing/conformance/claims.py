"""What a transport says of itself is so."""

from __future__ import annotations

import select
from collections.abc import Callable

import pytest

from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.spi import (
    MAX_TICKET_NBYTES,
    Capabilities,
    CountsRefusals,
    Done,
    Failed,
    FenceKind,
    Gathers,
    Range,
    Write,
)
from kvpoll_fsm.testing.conformance.base import Base, Bench
from kvpoll_fsm.testing.conformance.fencing import first_byte
from kvpoll_fsm.testing.conformance.sides import HUGE, MIB, SIZES, Pair, same
from kvpoll_fsm.testing.conformance.spec import Spec

__all__ = ["Claims"]


class Claims(Base):
    """`Capabilities`, `fileno`, and the optional protocols."""

    def test_claims_are_possible(self) -> None:
        """At least one entry and one ticket; a name that policies can be written with."""
        transport = self.make()
        can = transport.capabilities
        assert isinstance(can, Capabilities)
        assert isinstance(can.fence, FenceKind)
        assert can.scatter_entries >= 1
        assert can.max_outstanding >= 1
        assert transport.name.replace("-", "_").isidentifier(), transport.name
        spec = self.spec()
        assert spec is None or ":" in spec.factory or spec.factory == transport.name, "found under another name"

    def test_scatter_entries_are_taken(self, bench: Bench) -> None:
        """As many as it claims."""
        most = bench.tx.transport.capabilities.scatter_entries
        writes = [Write(0, 16 * (n % 300_000), 16 * ((most - n) % 300_000), 5) for n in range(most)]
        bench.done(bench.link.submit(writes, bench.rx.grant()))
        same(writes, bench.tx, bench.rx)

    def test_more_scatter_entries_are_an_error(self, bench: Bench) -> None:
        """One more is not."""
        most = bench.tx.transport.capabilities.scatter_entries
        with pytest.raises(InvalidInput):
            bench.link.submit([Write(0, 0, 0, 1)] * (most + 1), bench.rx.grant())

    def test_max_outstanding_can_be_in_flight(self, bench: Bench) -> None:
        """As many as it claims, submitted at once, or 2,000 if it claims more."""
        most = min(bench.tx.transport.capabilities.max_outstanding, 2000)
        token = bench.rx.grant()
        bench.done(*[bench.link.submit([Write(0, n * 2000, n * 2000, 999)], token) for n in range(most)])
        same([Write(0, n * 2000, n * 2000, 999) for n in range(most)], bench.tx, bench.rx)

    def test_it_cancels_if_it_claims_to(self, bench: Bench) -> None:
        """Of large tickets cancelled at once some end early; without the claim none does, and all are done."""
        can = bench.tx.transport.capabilities
        early: list[Failed] = []
        for _ in range(5 if can.cancellable else 1):  # on a busy machine all may be done before they are cancelled
            token, most = bench.rx.grant(), min(8, can.max_outstanding)
            tickets = [bench.link.submit(HUGE[: can.scatter_entries], token) for _ in range(most)]
            for ticket in tickets:
                bench.link.cancel(ticket)
            early = [end for end in bench.calm(token, *tickets) if isinstance(end, Failed)]
            if early:
                break
        assert bool(early) is can.cancellable, early

    def test_a_mild_fence_is_one(self, request: pytest.FixtureRequest) -> None:
        """`FenceKind.token`: tickets of other tokens are done, on the same link and on another, and links stay up."""
        if not self.is_mild:
            pytest.skip("a fence costs a process: other tickets may end with it")
        pair: Pair = request.getfixturevalue("pair")
        link, second = pair.tx.connect(pair.rx), pair.tx.connect(pair.rx)
        pair.up(link)
        pair.up(second)
        token = pair.rx.grant(Range(0, 0, SIZES[0]))
        others = [pair.rx.grant(Range(1, 0, SIZES[1])) for _ in range(2)]
        can = pair.tx.transport.capabilities
        tickets = [link.submit(HUGE[: can.scatter_entries], token) for _ in range(min(3, can.max_outstanding - 1))]
        survivors = [
            each.submit([Write(1, 0, 1000 * n, 100)], other)
            for n, (each, other) in enumerate(zip((link, second), others, strict=True))
        ]
        if tickets:
            first_byte(pair)
        pair.fence(token)
        pair.done(*survivors)
        pair.ended(*tickets)
        assert pair.tx.links == {link.number: [True], second.number: [True]}

    def test_progress_is_reported_if_it_is_claimed(self, bench: Bench) -> None:
        """It grows, stays below the whole, and comes before the end; without the claim there is none."""
        can = bench.tx.transport.capabilities
        ticket = bench.link.submit(HUGE[: can.scatter_entries], bench.rx.grant())
        bench.done(ticket)
        assert bool(bench.tx.progress) is can.reports_progress, bench.tx.progress
        assert all(nbytes < MAX_TICKET_NBYTES for nbytes in bench.tx.progress.get(ticket, []))

    def test_fileno_is_readable_when_there_is_something(self, bench: Bench) -> None:
        """Whoever waits for the file descriptor alone misses nothing."""
        if bench.tx.transport.fileno() is None:
            pytest.skip("it has no file descriptor, and is asked at an interval")
        token = bench.rx.grant()
        for nbytes in [10] * 60 + [4 * MIB] * 10:  # the large ones are not over before anybody has looked
            ticket = bench.link.submit([Write(0, 0, 0, nbytes)], token)
            bench.pump()
            while ticket not in bench.tx.ends:
                assert self._is_readable(bench), f"no file descriptor was readable within {self.within_s:g} s"
                bench.pump()
            bench.done(ticket)

    def _is_readable(self, bench: Bench) -> bool:
        """Wait for the file descriptors of both sides alone."""
        poller = select.poll()
        for side in (bench.tx, bench.rx):
            poller.register(side.transport.fileno() or 0, select.POLLIN)
        return bool(poller.poll(self.within_s * 1000))

    def test_fileno_falls_silent(self, bench: Bench) -> None:
        """With nothing to tell it is not readable: who waits for it must not spin. It stays the same number."""
        fileno = bench.tx.transport.fileno()
        if fileno is None:
            pytest.skip("it has no file descriptor, and is asked at an interval")
        bench.done(bench.submit(Write(0, 0, 0, 10)))
        poller = select.poll()
        poller.register(fileno, select.POLLIN)
        for side in (bench.tx, bench.rx):
            assert side.transport.fileno() is not None
        bench.until(lambda: not poller.poll(20), "silence")
        assert bench.tx.transport.fileno() == fileno

    def test_flush_sends_what_was_gathered(self, bench: Bench) -> None:
        """`Gathers`: what was submitted goes with the next flush; an empty flush does nothing."""
        gathers = bench.tx.transport
        if not isinstance(gathers, Gathers):
            pytest.skip("it does not gather")
        token = bench.rx.grant()
        for _ in range(5):
            gathers.flush()
            tickets = [bench.link.submit([Write(0, n, n, 1)], token) for n in range(10)]
            gathers.flush()
            bench.done(*tickets)
        assert all(isinstance(end, Done) for end in bench.tx.ends.values())

    def test_it_takes_addresses_if_it_listens(self) -> None:
        """`listens`: it can be made with the settings `host` and `advertise`."""
        spec = self.spec()
        if spec is None or not self.claims.listens:
            pytest.skip("it does not claim to listen" if spec else "spec() does not say how it is made")
        Spec(spec.factory, {**spec.options, "host": "127.0.0.1", "advertise": "127.0.0.1"}).make().close()

    def test_refusals_are_counted(self, bench: Bench) -> None:
        """`CountsRefusals`: by reason, and they only grow."""
        counts = bench.rx.transport
        if not isinstance(counts, CountsRefusals):
            pytest.skip("it does not count whom it turns away")
        refused: Callable[[], dict[str, int]] = lambda: dict(counts.refused())  # noqa: E731
        before = refused()
        bench.calm(b"x" * 16, bench.link.submit([Write(0, 0, 0, 1)], b"x" * 16))
        after = refused()
        assert all(isinstance(reason, str) and number >= before.get(reason, 0) for reason, number in after.items())
        assert after.keys() >= before.keys()
