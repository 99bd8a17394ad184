"""Bytes arrive where they belong, and Done is not said before."""

from __future__ import annotations

import random

import pytest

from kvpoll_fsm.errors import TransportUnavailable
from kvpoll_fsm.spi import Done, Failed, Link, Range, Transport, Write
from kvpoll_fsm.testing.conformance.base import Base, Bench
from kvpoll_fsm.testing.conformance.sides import HUGE, MIB, SIZES, Pair, Side, same

__all__ = ["Writing"]


class Writing(Base):
    """Register, grant, connect, write."""

    def test_follows_the_protocols(self, bench: Bench) -> None:
        """Transport and link have all methods; descriptors and tokens are of the sizes allowed."""
        assert isinstance(bench.tx.transport, Transport)
        assert isinstance(bench.link, Link)
        assert len(bench.tx.transport.descriptor()) <= 1 << 16
        assert all(len(region) <= 1 << 16 for region in bench.tx.regions)

    def test_tokens_are_long_and_all_different(self, bench: Bench) -> None:
        """A token has 16 bytes to 1 KiB, and nobody has had it before."""
        tokens = [bench.rx.grant(Range(0, 0, 1)) for _ in range(100)]
        assert len(set(tokens)) == 100
        assert all(16 <= len(token) <= 1 << 10 for token in tokens)

    def test_a_descriptor_stays_as_it_is(self, bench: Bench) -> None:
        """It travels once, and peers that got it long ago connect by it."""
        before = bench.rx.transport.descriptor()
        bench.done(bench.submit(Write(0, 0, 0, 100)))
        assert bench.rx.transport.descriptor() == before

    def test_writes_what_was_asked_and_nothing_else(self, bench: Bench) -> None:
        """Of any size, from and to any offset."""
        for nbytes in (1, 7, 4095, 65_537, 4 * MIB, 4 * MIB + 1):
            bench.reset()
            bench.done(bench.submit(Write(0, 3, 5, nbytes)))
            same([Write(0, 3, 5, nbytes)], bench.tx, bench.rx)

    def test_the_last_byte_of_a_region(self, bench: Bench) -> None:
        """Neither the source nor the destination ends one byte early."""
        writes = [Write(number, 0, size - 1, 1) for number, size in enumerate(SIZES)]
        writes += [Write(number, size - 1, 0, 1) for number, size in enumerate(SIZES)]
        for each in writes:
            bench.done(bench.submit(each))
        same(writes, bench.tx, bench.rx)

    def test_scatters_over_regions_in_any_order(self, bench: Bench) -> None:
        """1,000 writes of odd sizes, unordered, under as few tickets as entries allow."""
        rng = random.Random(1)
        writes = []
        for region, room in ((0, 10_000), (1, 90)):
            for slot in range(500):
                nbytes = rng.randrange(1, room)
                src = rng.randrange(0, SIZES[region] - nbytes)
                writes.append(Write(region, src, slot * (SIZES[region] // 500), nbytes))
        rng.shuffle(writes)
        most = bench.tx.transport.capabilities.scatter_entries
        token = bench.rx.grant(*(Range(write.region, write.dst_offset, write.nbytes) for write in writes))
        batches = [writes[at : at + most] for at in range(0, len(writes), most)]
        bench.done(*bench.stream(bench.link, batches, token))
        same(writes, bench.tx, bench.rx)

    def test_tickets_of_many_shapes(self, bench: Bench) -> None:
        """Few writes and many, small ones before, between and after large ones, of odd and even sizes."""
        rng, at = random.Random(2), 0
        tickets: list[list[Write]] = []
        most = bench.tx.transport.capabilities.scatter_entries
        for number in range(24):
            sizes = [rng.choice([1, 2, 4095, 65_537]) + number % 2 for _ in range(1 + number % 4)]
            if number % 8 == 3:
                sizes[0] = MIB + number % 3
            ticket = []
            for nbytes in sizes[:most]:
                ticket.append(Write(0, rng.randrange(MIB), at, nbytes))
                at += nbytes + number % 3
            tickets.append(ticket)
        bench.done(*bench.stream(bench.link, tickets, bench.rx.grant(Range(0, 0, at + 1))))
        same([write for ticket in tickets for write in ticket], bench.tx, bench.rx)

    def test_takes_as_many_bytes_as_there_may_be(self, bench: Bench) -> None:
        """`MAX_TICKET_NBYTES`, under as few tickets as entries allow."""
        most = bench.tx.transport.capabilities.scatter_entries
        token = bench.rx.grant()
        bench.done(*bench.stream(bench.link, [HUGE[at : at + most] for at in range(0, len(HUGE), most)], token))
        same(HUGE[:1], bench.tx, bench.rx)

    def test_a_write_may_span_neighbouring_ranges(self, bench: Bench) -> None:
        """Ranges that touch or overlap admit what one range would."""
        token = bench.rx.grant(Range(0, 100, 50), Range(0, 150, 50), Range(0, 50, 60))
        bench.done(bench.link.submit([Write(0, 0, 50, 150)], token))
        same([Write(0, 0, 50, 150)], bench.tx, bench.rx)

    def test_done_means_in_memory(self, bench: Bench) -> None:
        """At the moment of Done the bytes are there."""
        token = bench.rx.grant()
        for round_ in range(30):
            src, nbytes = round_ * 1000, 3 * MIB if round_ % 3 else 70_000
            bench.done(bench.link.submit([Write(0, src, 0, nbytes)], token))
            assert bench.rx.arenas[0][:nbytes].find(bench.tx.arenas[0][src : src + nbytes]) == 0, "Done too early"

    def test_a_source_may_change_once_its_ticket_is_done(self, bench: Bench) -> None:
        """What is written there later is not sent."""
        token = bench.rx.grant()
        for value in range(20):
            bench.tx.arenas[0][: 2 * MIB] = bytes([value]) * 2 * MIB
            bench.done(bench.link.submit([Write(0, 0, 0, 2 * MIB)], token))
            bench.tx.arenas[0][: 2 * MIB] = b"\xff" * 2 * MIB
            bench.pump()
            assert bench.rx.arenas[0][: 2 * MIB] == bytes([value]) * 2 * MIB

    def test_both_ways_at_once(self, bench: Bench) -> None:
        """Each side writes to the other while the other writes to it."""
        back = bench.rx.connect(bench.tx)
        bench.rx.arenas[0][:MIB] = b"\x11" * MIB
        there = bench.link.submit([Write(0, 0, 2 * MIB, MIB)], bench.rx.grant())
        number = back.submit([Write(0, 0, 3 * MIB, MIB)], bench.tx.grant())
        bench.done(there)
        bench.until(lambda: number in bench.rx.ends, "the way back")
        assert isinstance(bench.rx.ends[number], Done)
        assert bench.tx.arenas[0][3 * MIB : 4 * MIB] == b"\x11" * MIB
        assert bench.rx.arenas[0][2 * MIB : 3 * MIB] == bench.tx.arenas[0][:MIB]
        back.close()

    def test_two_writers(self, bench: Bench) -> None:
        """A second writer to the same receiver, which comes and goes."""
        other = Pair(self.side(filled=True), bench.rx)
        second = other.tx.connect(bench.rx)
        token = bench.rx.grant()
        ticket = second.submit([Write(0, 0, MIB, MIB)], bench.rx.grant())  # a token may be bound to its first writer
        bench.done(bench.link.submit([Write(0, 0, 0, MIB)], token))
        other.done(ticket)
        other.tx.close()
        bench.done(bench.link.submit([Write(0, 2 * MIB, 2 * MIB, 1)], token))
        same([Write(0, 0, 0, MIB), Write(0, 0, MIB, MIB), Write(0, 2 * MIB, 2 * MIB, 1)], bench.tx, bench.rx)

    def test_memory_that_is_not_shared_is_received_into(self, bench: Bench) -> None:
        """A region without a file; `register` says so by `TransportUnavailable` where that cannot be."""
        private = self._private_side(filled=False)
        pair = Pair(bench.tx, private)
        into = bench.tx.connect(private)
        pair.done(into.submit([Write(0, 5, 7, 1000)], private.grant()))
        same([Write(0, 5, 7, 1000)], bench.tx, private)
        into.close()
        private.close()

    def test_memory_that_is_not_shared_is_sent_from(self, bench: Bench) -> None:
        """Or it cannot be: then the link goes down and says why."""
        private = self._private_side(filled=True)
        pair = Pair(private, bench.rx)
        out = private.connect(bench.rx)
        (end,) = pair.ended(out.submit([Write(0, 5, 7, 1000)], bench.rx.grant()))
        cannot = isinstance(end, Failed)
        assert cannot is (cannot if self.needs_fd is None else self.needs_fd), end
        assert (False in private.links[out.number]) is cannot, private.seen
        same([] if cannot else [Write(0, 5, 7, 1000)], private, bench.rx)
        out.close()
        private.close()

    def _private_side(self, *, filled: bool) -> Side:
        """A side whose memory no other process can be given."""
        try:
            return self.side(filled=filled, shared=False)
        except TransportUnavailable as error:
            if self.needs_fd is False:
                raise
            pytest.skip(f"memory without a file cannot be registered: {error}")
