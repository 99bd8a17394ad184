"""Many tickets at once, each of which ends exactly once."""

from __future__ import annotations

from kvpoll_fsm.spi import Done, Link, Range, Write
from kvpoll_fsm.testing.conformance.base import Base, Bench
from kvpoll_fsm.testing.conformance.fencing import first_byte, unharmed
from kvpoll_fsm.testing.conformance.sides import CANARY, SIZES, Pair, painted, same

__all__ = ["Crowds"]


class Crowds(Base):
    """A thousand tickets; as many in flight as there may be."""

    def test_1000_tickets_end_exactly_once_each(self, bench: Bench) -> None:
        """As many at once as `max_outstanding` allows."""
        writes = [Write(0, n * 5000, n * 5000, 4001) for n in range(1000)]
        tickets = bench.stream(bench.link, [[each] for each in writes], bench.rx.grant())
        assert len(set(tickets)) == 1000
        bench.done(*tickets)
        same(writes, bench.tx, bench.rx)
        bench.done(bench.submit(Write(0, 0, 0, 1)))  # a second end of one of them would have come before this
        assert len(bench.tx.ends) == 1001

    def test_1000_tokens_at_once(self, bench: Bench) -> None:
        """The first is as good as the last, whatever becomes of others."""
        tokens = [bench.rx.grant(Range(0, n * 1000, 1000)) for n in range(1000)]
        for token in tokens[1::2]:
            bench.rx.transport.revoke(token)
        chosen = range(0, 1000, 50)
        writes = [Write(0, n, n * 1000, 1000) for n in chosen]
        for n, write in zip(chosen, writes, strict=True):
            bench.done(bench.link.submit([write], tokens[n]))
        same(writes, bench.tx, bench.rx)

    def test_large_and_small_tickets_in_turn(self, bench: Bench) -> None:
        """Small ones do not get lost between large ones."""
        writes = [Write(0, 0, 0, 4 << 20) if n % 20 == 0 else Write(1, n * 100, n * 300, 77) for n in range(200)]
        bench.done(*bench.stream(bench.link, [[each] for each in writes], bench.rx.grant()))
        same(writes, bench.tx, bench.rx)

    def test_tickets_of_several_links_have_different_numbers(self, bench: Bench) -> None:
        """A ticket's number is unique in its transport."""
        links = [bench.link, *(bench.tx.connect(bench.rx) for _ in range(3))]
        both = [(link, bench.rx.grant()) for link in links]
        tickets = [link.submit([Write(0, n, n, 1)], token) for n in self.few(20) for link, token in both]
        assert len(set(tickets)) == len(self.few(20)) * len(links)
        bench.done(*tickets)
        for link in links[1:]:
            link.close()

    def test_a_fence_with_as_many_tickets_out_as_there_may_be(self, pair: Pair, link: Link) -> None:
        """All of the token's tickets end, each once, and not a byte lands; those of another token are not harmed."""
        most = min(pair.tx.transport.capabilities.max_outstanding, 1024)
        token, other = pair.rx.grant(Range(0, 0, SIZES[0])), pair.rx.grant(Range(1, 0, SIZES[1]))
        tickets, survivors = [], []
        for number in range(most):
            if number % 50 == 49:
                survivors.append(link.submit([Write(1, number, number, 1)], other))
            else:
                tickets.append(link.submit([Write(0, number * 4096, number * 4096, 4096)], token))
        first_byte(pair)
        pair.fence(token)
        pair.rx.arenas[0][:] = CANARY * SIZES[0]
        pair.ended(*tickets, *survivors)
        assert len(pair.tx.ends) == most
        unharmed(self.is_mild, *pair.ended(*survivors))
        self.get_through(pair, Write(1, 0, 0, 1))
        painted(pair.rx)
        if self.is_mild:
            assert pair.tx.links[link.number] == [True]

    def test_three_receivers_at_once(self, bench: Bench) -> None:
        """Each gets its own bytes."""
        others = [Pair(bench.tx, self.side()) for _ in range(2)]
        pairs = [bench, *others]
        links = [bench.link, *(bench.tx.connect(other.rx) for other in others)]
        tickets = [
            link.submit([Write(0, n * 1000, n * 2000, 777)], each.rx.grant())
            for n, (link, each) in enumerate(zip(links, pairs, strict=True))
        ]

        def all_ended() -> bool:
            for other in others:
                other.rx.pump()
            return bench.tx.ends.keys() >= set(tickets)

        bench.until(all_ended, "the ends")
        assert all(isinstance(bench.tx.ends[ticket], Done) for ticket in tickets)
        for n, each in enumerate(pairs):
            same([Write(0, n * 1000, n * 2000, 777)], bench.tx, each.rx)
        for link, other in zip(links[1:], others, strict=True):
            link.close()
            other.rx.close()
