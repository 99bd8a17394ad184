"""What every transport must do, whatever it is made of. Subclass, say how to make one, and pytest runs it."""

from __future__ import annotations

import abc
import random
from collections.abc import Iterator

import pytest

from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.spi import MAX_TICKET_NBYTES, Done, Failed, FenceKind, Link, Range, Region, Transport, Write
from tests.transports.harness import HUGE, MIB, SIZES, Pair, Side, footprint, lease, same, untouched

CANARY = b"\xc5"


class TransportSuite(abc.ABC):
    """The tests; `make` gives a transport that is not started yet.

    Attributes:
        in_steps: A ticket as large as may be is not done in one go, so that what happens meanwhile can be seen.
    """

    in_steps = True

    @abc.abstractmethod
    def make(self) -> Transport: ...

    @pytest.fixture
    def pair(self) -> Iterator[Pair]:
        pair = Pair(Side(self.make(), filled=True), Side(self.make()))
        yield pair
        pair.close()

    @pytest.fixture
    def link(self, pair: Pair) -> Link:
        link = pair.tx.connect(pair.rx)
        pair.up(link)
        return link

    # Writing

    def test_follows_the_protocols(self, pair: Pair, link: Link) -> None:
        assert isinstance(pair.tx.transport, Transport)
        assert isinstance(link, Link)
        assert len(pair.tx.transport.descriptor()) <= 1 << 16
        assert all(len(region) <= 1 << 16 for region in pair.tx.regions)
        assert 16 <= len(pair.rx.grant()) <= 1 << 10

    @pytest.mark.parametrize("nbytes", [1, 7, 4095, 65_537, 4 * MIB, 4 * MIB + 1])
    def test_writes_what_was_asked_and_nothing_else(self, pair: Pair, link: Link, nbytes: int) -> None:
        writes = [Write(0, 3, 5, nbytes)]
        pair.done(link.submit(writes, pair.rx.grant(Range(0, 5, nbytes))))
        same(writes, pair.tx, pair.rx)

    def test_scatters_over_regions_in_any_order(self, pair: Pair, link: Link) -> None:
        rng = random.Random(1)
        writes = []
        for region, room in ((0, 10_000), (1, 90)):
            for slot in range(500):
                nbytes = rng.randrange(1, room)
                src = rng.randrange(0, SIZES[region] - nbytes)
                writes.append(Write(region, src, slot * (SIZES[region] // 500), nbytes))
        rng.shuffle(writes)
        ranges = [Range(write.region, write.dst_offset, write.nbytes) for write in writes]
        pair.done(link.submit(writes, pair.rx.grant(*ranges)))
        same(writes, pair.tx, pair.rx)

    def test_takes_as_many_entries_as_it_claims(self, pair: Pair, link: Link) -> None:
        most = pair.tx.transport.capabilities.scatter_entries
        writes = [Write(0, 16 * n, 16 * (most - n), 5) for n in range(most)]
        pair.done(link.submit(writes, pair.rx.grant()))
        same(writes, pair.tx, pair.rx)

    def test_takes_as_many_bytes_as_there_may_be(self, pair: Pair, link: Link) -> None:
        pair.done(link.submit(HUGE, pair.rx.grant()))
        same(HUGE[:1], pair.tx, pair.rx)

    def test_a_write_may_span_neighbouring_ranges(self, pair: Pair, link: Link) -> None:
        token = pair.rx.grant(Range(0, 100, 50), Range(0, 150, 50), Range(0, 50, 60))
        writes = [Write(0, 0, 50, 150)]
        pair.done(link.submit(writes, token))
        same(writes, pair.tx, pair.rx)

    def test_done_means_in_memory(self, pair: Pair, link: Link) -> None:
        token = pair.rx.grant()
        for round_ in range(30):
            write = Write(0, round_ * 1000, 0, 70_000)
            pair.done(link.submit([write], token))
            assert pair.rx.arenas[0][:70_000] == pair.tx.arenas[0][write.src_offset : write.src_offset + 70_000]

    def test_200_tickets_end_exactly_once_each(self, pair: Pair, link: Link) -> None:
        token = pair.rx.grant()
        writes = [[Write(0, n * 25_000, n * 25_000, 20_001), Write(1, n * 100, n * 300, 77)] for n in range(200)]
        tickets = [link.submit(each, token) for each in writes]
        assert len(set(tickets)) == 200
        pair.done(*tickets)
        same([write for each in writes for write in each], pair.tx, pair.rx)
        assert len(pair.tx.ends) == 200

    def test_progress_grows_up_to_the_end(self, pair: Pair, link: Link) -> None:
        ticket = link.submit(HUGE, pair.rx.grant())
        pair.done(ticket)
        claimed = pair.tx.transport.capabilities.reports_progress
        assert bool(pair.tx.progress) is (claimed and self.in_steps)
        assert all(nbytes < MAX_TICKET_NBYTES for nbytes in pair.tx.progress.get(ticket, []))

    def test_both_ways_at_once(self, pair: Pair, link: Link) -> None:
        back = pair.rx.connect(pair.tx)
        pair.rx.arenas[0][:MIB] = b"\x11" * MIB
        there = link.submit([Write(0, 0, 2 * MIB, MIB)], pair.rx.grant())
        number = back.submit([Write(0, 0, 3 * MIB, MIB)], pair.tx.grant())
        pair.done(there)
        pair.until(lambda: number in pair.rx.ends, "the way back")
        assert isinstance(pair.rx.ends[number], Done)
        assert pair.tx.arenas[0][3 * MIB : 4 * MIB] == b"\x11" * MIB
        assert pair.rx.arenas[0][2 * MIB : 3 * MIB] == pair.tx.arenas[0][:MIB]

    def test_two_writers(self, pair: Pair, link: Link) -> None:
        other = Pair(Side(self.make(), filled=True), pair.rx)
        second = other.tx.connect(pair.rx)
        token = pair.rx.grant()
        ticket = second.submit([Write(0, 0, MIB, MIB)], pair.rx.grant())  # a token may be bound to its first writer
        pair.done(link.submit([Write(0, 0, 0, MIB)], token))
        other.done(ticket)
        other.tx.close()
        pair.done(link.submit([Write(0, 2 * MIB, 2 * MIB, 1)], token))
        same([Write(0, 0, 0, MIB), Write(0, 0, MIB, MIB), Write(0, 2 * MIB, 2 * MIB, 1)], pair.tx, pair.rx)

    # Refusing

    @pytest.mark.parametrize(
        "writes",
        [
            [],
            [Write(0, 0, 0, 0)],
            [Write(0, 0, 0, 8), Write(0, 0, 8, 0)],
            [Write(0, 0, 0, -1)],
            [Write(0, SIZES[0] - 7, 0, 8)],
            [Write(0, -1, 0, 8)],
            [Write(1, SIZES[1], 0, 1)],
            [Write(0, 0, -1, 8)],
            [Write(2, 0, 0, 8)],
            [*HUGE, Write(1, 0, 0, 1)],
        ],
    )
    def test_impossible_writes_are_errors(self, pair: Pair, link: Link, writes: list[Write]) -> None:
        with pytest.raises(InvalidInput):
            link.submit(writes, pair.rx.grant())
        pair.done(link.submit([Write(0, 0, 9, 1)], pair.rx.grant()))
        same([Write(0, 0, 9, 1)], pair.tx, pair.rx)

    def test_too_many_entries_are_an_error(self, pair: Pair, link: Link) -> None:
        most = pair.tx.transport.capabilities.scatter_entries
        with pytest.raises(InvalidInput):
            link.submit([Write(0, n, n, 1) for n in range(most + 1)], pair.rx.grant())

    @pytest.mark.parametrize(
        "wrong",
        [
            Write(0, 0, 999, 10),
            Write(0, 0, 2990, 11),
            Write(0, 0, 2000, 1),
            Write(0, 0, 0, 10_000),
            Write(1, 0, 1000, 10),
            Write(0, 0, SIZES[0] - 5, 10),
            Write(0, 0, 1 << 40, 10),
            Write(0, 0, (1 << 63) - 11, 10),
        ],
    )
    def test_what_is_not_granted_is_refused_before_a_byte_lands(self, pair: Pair, link: Link, wrong: Write) -> None:
        token = pair.rx.grant(Range(0, 1000, 1000), Range(0, 2500, 500), Range(1, 0, 100))
        failed = pair.failed(link.submit([Write(0, 0, 1000, 10), wrong, Write(1, 0, 0, 10)], token))
        assert failed.quiescent
        assert failed.source_free
        untouched(pair.rx)
        pair.done(link.submit([Write(0, 0, 1000, 10)], token))

    @pytest.mark.parametrize("token", [b"", b"x" * 16, b"x" * 32, b"x" * 1024])
    def test_a_foreign_token_writes_nothing(self, pair: Pair, link: Link, token: bytes) -> None:
        pair.rx.grant()
        assert pair.failed(link.submit([Write(0, 0, 0, 100)], token)).quiescent
        untouched(pair.rx)

    def test_a_token_of_another_receiver_writes_nothing(self, pair: Pair, link: Link) -> None:
        assert pair.failed(link.submit([Write(0, 0, 0, 100)], pair.tx.grant())).quiescent
        untouched(pair.rx)

    def test_a_revoked_token_writes_nothing(self, pair: Pair, link: Link) -> None:
        token, other = pair.rx.grant(), pair.rx.grant()
        pair.rx.transport.revoke(token)
        pair.rx.transport.revoke(token)
        pair.rx.transport.revoke(b"unknown")
        assert pair.failed(link.submit([Write(0, 0, 0, 100)], token)).quiescent
        untouched(pair.rx)
        pair.done(link.submit([Write(0, 0, 0, 100)], other))

    @pytest.mark.parametrize(
        "wrong", [Range(0, -1, 5), Range(0, SIZES[0], 1), Range(1, 0, SIZES[1] + 1), Range(2, 0, 1)]
    )
    def test_a_grant_outside_the_regions_is_an_error(self, pair: Pair, wrong: Range) -> None:
        with pytest.raises(InvalidInput):
            pair.rx.transport.grant(lease(), [Range(0, 0, 1), wrong])

    def test_a_region_that_cannot_be_written_is_an_error(self, pair: Pair) -> None:
        with pytest.raises(InvalidInput):
            pair.rx.transport.register(Region(2, memoryview(b"read only")))
        with pytest.raises(InvalidInput):
            pair.rx.transport.register(Region(2, memoryview(bytearray(8))[::2]))
        with pytest.raises(InvalidInput):
            pair.rx.transport.register(Region(0, memoryview(bytearray(8))))

    @pytest.mark.parametrize("garbage", [b"", b"garbage", b"\x80", b"\xff" * 64])
    def test_a_descriptor_that_is_none_is_an_error(self, pair: Pair, garbage: bytes) -> None:
        with pytest.raises(InvalidInput):
            pair.tx.transport.connect(garbage, pair.rx.regions)
        with pytest.raises(InvalidInput):
            pair.tx.transport.connect(pair.rx.transport.descriptor(), [garbage])

    # Fences and cancels

    def test_a_fence_always_ends(self, pair: Pair) -> None:
        token = pair.rx.grant()
        for _ in range(3):
            pair.fence(token)
        pair.fence(b"unknown")
        assert len(pair.rx.fenced) == 4

    def test_pain_01_nothing_lands_after_a_fence(self, pair: Pair, link: Link) -> None:
        token, other = pair.rx.grant(), pair.rx.grant(Range(1, 0, 100))
        tickets = [link.submit(HUGE, token) for _ in range(4)]
        survivor = link.submit([Write(1, 0, 0, 100)], other)
        pair.until(lambda: pair.rx.arenas[0][0] == pair.tx.arenas[0][0], "the first byte")
        pair.fence(token)
        pair.rx.arenas[0][:] = CANARY * SIZES[0]
        late = link.submit([Write(0, 0, 0, 100)], token)
        assert isinstance(pair.ended(*tickets, late)[-1], Failed)
        assert pair.rx.arenas[0][:] == CANARY * SIZES[0]
        pair.done(survivor)
        assert pair.tx.links[link.number] == [True]

    def test_a_cancelled_ticket_ends(self, pair: Pair, link: Link) -> None:
        token = pair.rx.grant()
        tickets = [link.submit(HUGE, token) for _ in range(6)]
        for ticket in (*tickets[1:], 123_456):
            link.cancel(ticket)
        for end in pair.ended(*tickets)[1:]:
            assert isinstance(end, Done) or end.quiescent
        link.cancel(tickets[0])
        pair.done(link.submit([Write(1, 0, 0, 9)], token))
        assert len(pair.tx.ends) == 7

    def test_it_cancels_if_it_claims_to(self, pair: Pair, link: Link) -> None:
        token = pair.rx.grant()
        tickets = [link.submit(HUGE, token) for _ in range(8)]
        for ticket in tickets:
            link.cancel(ticket)
        early = [end for end in pair.ended(*tickets) if isinstance(end, Failed)]
        assert bool(early) is pair.tx.transport.capabilities.cancellable

    def test_a_fence_of_a_token_that_was_never_used(self, pair: Pair, link: Link) -> None:
        token = pair.rx.grant()
        pair.fence(token)
        assert pair.failed(link.submit([Write(0, 0, 0, 100)], token)).quiescent
        untouched(pair.rx)

    def test_a_token_is_fenced_twice_while_bytes_come(self, pair: Pair, link: Link) -> None:
        """Each call is answered; and a third when all is over."""
        token = pair.rx.grant()
        tickets = [link.submit(HUGE, token) for _ in range(4)]
        pair.until(lambda: pair.rx.arenas[0][0] == pair.tx.arenas[0][0], "the first byte")
        fences = [pair.rx.transport.fence(token) for _ in range(2)]
        pair.until(lambda: len(pair.rx.fenced) == 2, "the fences")
        pair.rx.arenas[0][:] = CANARY * SIZES[0]
        pair.ended(*tickets)
        fences.append(pair.rx.transport.fence(token))
        pair.until(lambda: sorted(pair.rx.fenced) == sorted(set(fences)), "the last one")
        assert pair.rx.arenas[0][:] == CANARY * SIZES[0]

    @pytest.mark.parametrize("gone", ["link", "writer"])
    def test_a_fence_when_the_connection_is_dead(self, pair: Pair, gone: str) -> None:
        """What the writer left behind lands before the fence holds, or never."""
        other = Pair(Side(self.make(), filled=True), pair.rx)
        link = other.tx.connect(pair.rx)
        other.up(link)
        token = pair.rx.grant()
        tickets = [link.submit(HUGE, token) for _ in range(4)]
        other.until(lambda: pair.rx.arenas[0][0] == other.tx.arenas[0][0], "the first byte")
        if gone == "link":
            link.close()
            other.ended(*tickets)
        else:
            other.tx.close()
        pair.fence(token)
        pair.rx.arenas[0][:] = CANARY * SIZES[0]
        if gone == "link":
            other.tx.close()
        again = pair.tx.connect(pair.rx)
        pair.done(again.submit([Write(1, 0, 0, 100)], pair.rx.grant()))
        assert pair.rx.arenas[0][:] == CANARY * SIZES[0]

    def test_a_fence_with_as_many_tickets_out_as_there_may_be(self, pair: Pair, link: Link) -> None:
        """All of the token's tickets end, each once, and not a byte lands; those of another token are not harmed."""
        most = pair.tx.transport.capabilities.max_outstanding
        token, other = pair.rx.grant(Range(0, 0, SIZES[0])), pair.rx.grant(Range(1, 0, SIZES[1]))
        tickets, survivors = [], []
        for number in range(most):
            if number % 50 == 49:
                survivors.append(link.submit([Write(1, number, number, 1)], other))
            else:
                tickets.append(link.submit([Write(0, number * 4096, number * 4096, 4096)], token))
        pair.until(lambda: pair.rx.arenas[0][0] == pair.tx.arenas[0][0], "the first byte")
        pair.fence(token)
        pair.rx.arenas[0][:] = CANARY * SIZES[0]
        pair.ended(*tickets, *survivors)
        assert len(pair.tx.ends) == most
        assert pair.rx.arenas[0][:] == CANARY * SIZES[0]
        if pair.rx.transport.capabilities.fence is FenceKind.token:
            pair.done(*survivors)
            assert pair.tx.links[link.number] == [True]

    # Links and the end

    def test_a_peer_that_is_gone_is_reported(self, pair: Pair) -> None:
        gone = Side(self.make())
        descriptor = gone.transport.descriptor()
        gone.close()
        link = pair.tx.transport.connect(descriptor, pair.rx.regions)
        pair.until(lambda: link.number in pair.tx.links, "the news")
        ticket = link.submit([Write(0, 0, 0, 10)], b"t" * 16)
        assert pair.failed(ticket).quiescent
        pair.until(lambda: len(pair.tx.links[link.number]) >= 2, "the news again")
        assert not any(pair.tx.links[link.number])

    def test_a_peer_that_goes_fails_its_tickets(self, pair: Pair, link: Link) -> None:
        other = Pair(pair.tx, Side(self.make()))
        second = pair.tx.connect(other.rx)
        other.up(second)
        other.rx.close()
        tickets = [second.submit(HUGE, b"t" * 16) for _ in range(3)]
        assert all(isinstance(end, Failed) for end in pair.ended(*tickets))
        pair.until(lambda: pair.tx.links[second.number][-1] is False, "the news")
        pair.done(link.submit([Write(0, 0, 0, 10)], pair.rx.grant()))

    def test_a_closed_link_fails_its_tickets(self, pair: Pair, link: Link) -> None:
        token = pair.rx.grant()
        tickets = [link.submit(HUGE, token) for _ in range(6)]
        link.close()
        link.close()
        tickets.append(link.submit([Write(0, 0, 0, 1)], token))
        link.cancel(tickets[0])
        assert isinstance(pair.ended(*tickets)[-1], Failed)
        again = pair.tx.connect(pair.rx)
        pair.done(again.submit([Write(0, 0, 0, 1)], token))

    def test_fileno_is_readable_when_there_is_something(self, pair: Pair, link: Link) -> None:
        fileno = pair.tx.transport.fileno()
        if fileno is None:
            return
        token = pair.rx.grant()
        for _ in range(100):
            ticket = link.submit([Write(0, 0, 0, 10)], token)
            pair.done(ticket)  # waits for the file descriptor alone

    def test_close_ends_everything_and_leaves_nothing_behind(self) -> None:
        before = footprint()
        pair = Pair(Side(self.make(), filled=True), Side(self.make()))
        link, idle = pair.tx.connect(pair.rx), pair.tx.connect(pair.rx)
        pair.up(link)
        token = pair.rx.grant()
        tickets = [link.submit(HUGE, token) for _ in range(6)]
        pair.until(lambda: pair.rx.arenas[0][0] == pair.tx.arenas[0][0], "the first byte")
        fence = pair.rx.transport.fence(token)
        pair.close()
        assert pair.tx.ends.keys() == set(tickets)
        assert fence in pair.rx.fenced
        assert idle.number != link.number
        assert footprint() == before

    def test_close_without_start(self) -> None:
        transport = self.make()
        transport.close()
        assert transport.completions() == []
        assert transport.fileno() is None
