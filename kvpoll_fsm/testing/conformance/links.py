"""Peers that are gone, links that are closed, and the end of a transport."""

from __future__ import annotations

from kvpoll_fsm.spi import Done, Failed, Link, Range, Write
from kvpoll_fsm.testing.conformance.base import Base, Bench
from kvpoll_fsm.testing.conformance.fencing import first_byte
from kvpoll_fsm.testing.conformance.sides import CANARY, HUGE, SIZES, Pair, painted, same

__all__ = ["Links"]


class Links(Base):
    """Links up and down, restarts, close."""

    def test_a_peer_that_is_gone_is_reported(self, bench: Bench) -> None:
        """Gone before: LinkDown, and what is submitted fails, having written nothing."""
        gone = self.side()
        descriptor, regions = gone.transport.descriptor(), gone.regions
        gone.close()
        link = bench.tx.transport.connect(descriptor, regions)
        bench.until(lambda: link.number in bench.tx.links, "the news")
        assert bench.failed(link.submit([Write(0, 0, 0, 10)], b"t" * 16)).quiescent
        assert not any(bench.tx.links[link.number])
        link.close()
        self.goes_on(bench, bench.link, Write(0, 0, 0, 10))

    def test_a_peer_that_goes_fails_its_tickets(self, bench: Bench) -> None:
        """Gone in between: LinkDown, all tickets fail, and links to others work."""
        other = Pair(bench.tx, self.side())
        second = bench.tx.connect(other.rx)
        other.up(second)
        other.rx.close()
        tickets = [second.submit(HUGE[:1], b"t" * 16) for _ in self.few(3)]
        assert all(isinstance(end, Failed) for end in bench.ended(*tickets))
        bench.until(lambda: bench.tx.links[second.number][-1] is False, "the news")
        second.close()
        self.goes_on(bench, bench.link, Write(0, 0, 0, 10))

    def test_a_peer_that_goes_while_bytes_come(self, bench: Bench) -> None:
        """Gone during: every ticket ends, and the last ones cannot have been done."""
        other = Pair(bench.tx, self.side())
        second = bench.tx.connect(other.rx)
        other.up(second)
        token = other.rx.grant()
        tickets = [second.submit(HUGE[:1], token) for _ in self.few(4)]
        first_byte(other)
        other.rx.close()
        bench.ended(*tickets)
        assert isinstance(bench.ended(second.submit(HUGE[:1], token))[0], Failed)
        second.close()
        self.goes_on(bench, bench.link, Write(0, 0, 0, 10))

    def test_a_new_incarnation_is_another_peer(self, bench: Bench) -> None:
        """One that starts again gets nothing that was meant for the one before, and is reached by its own words."""
        before = self.side()
        link = bench.tx.connect(before)
        bench.up(link)
        token = before.grant()
        before.close()
        again = Pair(bench.tx, self.side())
        late = link.submit([Write(0, 0, 0, 100)], token)
        assert isinstance(again.ended(late)[0], Failed)
        same([], bench.tx, again.rx)
        self.get_through(again, Write(0, 3, 5, 1000))
        same([Write(0, 3, 5, 1000)], bench.tx, again.rx)
        link.close()
        again.rx.close()

    def test_a_closed_link_fails_its_tickets(self, pair: Pair, link: Link) -> None:
        """Those in flight, and those that are submitted later; behind their ends nothing lands. Another can be made."""
        token = pair.rx.grant()
        tickets = [link.submit(HUGE[:1], token) for _ in self.few(6)]
        link.close()
        link.close()
        tickets.append(link.submit([Write(0, 0, 0, 1)], token))
        link.cancel(tickets[0])
        assert isinstance(pair.calm(token, *tickets)[-1], Failed)
        pair.rx.arenas[0][:] = CANARY * SIZES[0]
        self.get_through(pair, Write(1, 0, 0, 1))
        painted(pair.rx)

    def test_many_links_one_after_another(self, bench: Bench) -> None:
        """Links come and go; their numbers differ."""
        numbers = set()
        for round_ in range(5):
            link = bench.tx.connect(bench.rx)
            bench.up(link)
            bench.done(link.submit([Write(0, round_, round_, 1)], bench.rx.grant(Range(0, round_, 1))))
            numbers.add(link.number)
            link.close()
        assert len(numbers) == 5
        same([Write(0, 0, 0, 5)], bench.tx, bench.rx)

    def test_close_ends_all_that_is_under_way(self) -> None:
        """Tickets and fences are reported as ended, and the memory is let go of."""
        pair = Pair(self.side(filled=True), self.side())
        link, idle = pair.tx.connect(pair.rx), pair.tx.connect(pair.rx)
        pair.up(link)
        token = pair.rx.grant()
        tickets = [link.submit(HUGE[:1], token) for _ in self.few(6)]
        first_byte(pair)
        fence = pair.rx.transport.fence(token)
        pair.close()
        assert pair.tx.ends.keys() == set(tickets)
        assert fence in pair.rx.fenced
        assert idle.number != link.number

    def test_nothing_is_written_once_it_is_closed(self) -> None:
        """The receiver has closed: its memory stays as it is, whatever a writer still does."""
        pair = Pair(self.side(filled=True), self.side())
        link = pair.tx.connect(pair.rx)
        pair.up(link)
        token = pair.rx.grant()
        tickets = [link.submit(HUGE[:1], token) for _ in self.few(4)]
        first_byte(pair)
        arena = pair.rx.arenas[0]
        pair.rx.transport.close()
        before = arena[:]
        pair.tx.until(lambda: pair.tx.ends.keys() >= set(tickets), "the end of the tickets")
        assert arena[:] == before
        pair.close()

    def test_close_without_start(self) -> None:
        """It may be closed although it was never started, or could not be."""
        transport = self.make()
        transport.close()
        assert transport.completions() == []
        assert transport.fileno() is None
        transport.close()

    def test_close_twice(self, pair: Pair, link: Link) -> None:
        """Closing again, and closing links of a closed transport, does nothing."""
        ticket = link.submit([Write(0, 0, 0, 1)], pair.rx.grant())
        pair.done(ticket)
        pair.tx.transport.close()
        link.close()
        pair.tx.transport.close()
        assert pair.tx.transport.fileno() is None
        assert isinstance(pair.tx.ends[ticket], Done)
