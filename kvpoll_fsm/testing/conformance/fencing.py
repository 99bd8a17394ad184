"""Behind a fence nothing lands, and a cancelled ticket ends."""

from __future__ import annotations

import pytest

from kvpoll_fsm.spi import Done, Failed, Link, Range, Write
from kvpoll_fsm.testing.conformance.base import Base, Bench
from kvpoll_fsm.testing.conformance.sides import CANARY, HUGE, SIZES, Pair, painted, same, untouched

__all__ = ["Fencing", "first_byte", "unharmed"]


class Fencing(Base):
    """Fences before, while and after bytes come; cancels."""

    def test_a_fence_always_ends(self, bench: Bench) -> None:
        """Of a token that was never used, of one fenced before, and of one that is unknown."""
        token = bench.rx.grant()
        for _ in range(3):
            bench.fence(token)
        bench.fence(b"unknown")
        assert len(bench.rx.fenced) == 4

    def test_a_fence_of_a_token_that_was_never_used(self, bench: Bench) -> None:
        """It admits nothing any more."""
        token = bench.rx.grant()
        bench.fence(token)
        (end,) = bench.calm(token, bench.link.submit([Write(0, 0, 0, 100)], token))
        assert isinstance(end, Failed), end
        untouched(bench.rx)

    def test_nothing_lands_after_a_fence(self, pair: Pair, link: Link) -> None:
        """Neither what was on its way nor what is submitted later; other tokens are not harmed by a mild fence."""
        token, other = pair.rx.grant(), pair.rx.grant(Range(1, 0, 100))
        room = len(self.few(6))  # 4 of the token, 1 of another, 1 that is late
        tickets = [link.submit(each, token) for each in _huge(pair, max(1, room - 2))]
        survivors = [link.submit([Write(1, 0, 0, 100)], other)] if room > len(tickets) else []
        first_byte(pair)
        pair.fence(token)
        pair.rx.arenas[0][:] = CANARY * SIZES[0]
        pair.rx.grant()  # of the same bytes: that does not bring back what was on its way
        if room < 3:
            pair.ended(*tickets, *survivors)
        late = link.submit([Write(0, 0, 0, 100)], token)
        assert isinstance(pair.ended(*tickets, late)[-1], Failed)
        unharmed(self.is_mild, *pair.ended(*survivors))
        self.get_through(pair, Write(1, 200, 200, 1))
        painted(pair.rx)
        if self.is_mild:
            assert pair.tx.links[link.number] == [True]

    def test_what_was_fenced_can_be_granted_again(self, bench: Bench) -> None:
        """To the same holder: another token admits what the fenced one did, which stays dead."""
        token = bench.rx.grant(Range(0, 0, 1000))
        bench.fence(token)
        again = bench.rx.grant(Range(0, 0, 1000))
        assert again != token
        (end,) = bench.calm(token, bench.link.submit([Write(0, 0, 0, 1000)], token))
        assert isinstance(end, Failed), end
        untouched(bench.rx)
        self.get_through(bench, Write(0, 0, 0, 1000))
        same([Write(0, 0, 0, 1000)], bench.tx, bench.rx)

    def test_a_token_is_fenced_twice_while_bytes_come(self, pair: Pair, link: Link) -> None:
        """Each call is answered; and a third when all is over."""
        token = pair.rx.grant()
        tickets = [link.submit(each, token) for each in _huge(pair, 4)]
        first_byte(pair)
        fences = [pair.rx.transport.fence(token) for _ in range(2)]
        pair.until(lambda: len(pair.rx.fenced) == 2, "the fences")
        pair.rx.arenas[0][:] = CANARY * SIZES[0]
        pair.ended(*tickets)
        fences.append(pair.rx.transport.fence(token))
        pair.until(lambda: sorted(pair.rx.fenced) == sorted(set(fences)), "the last one")
        painted(pair.rx)

    @pytest.mark.parametrize("gone", ["link", "writer"])
    def test_a_fence_when_the_connection_is_dead(self, pair: Pair, gone: str) -> None:
        """What the writer left behind lands before the fence holds, or never."""
        other = Pair(self.side(filled=True), pair.rx)
        link = other.tx.connect(pair.rx)
        other.up(link)
        token = pair.rx.grant()
        tickets = [link.submit(each, token) for each in _huge(pair, 4)]
        first_byte(other)
        if gone == "link":
            link.close()
            other.ended(*tickets)
        else:
            other.tx.close()
        pair.fence(token)
        pair.rx.arenas[0][:] = CANARY * SIZES[0]
        if gone == "link":
            other.tx.close()
        self.get_through(pair, Write(1, 0, 0, 100))
        painted(pair.rx)

    def test_a_revoked_token_ends_its_writer(self, pair: Pair, link: Link) -> None:
        """A token is revoked although its writer has not ended: the ticket ends, and behind a fence nothing lands."""
        token = pair.rx.grant()
        tickets = [link.submit(each, token) for each in _huge(pair, 4)]
        first_byte(pair)
        pair.rx.transport.revoke(token)
        pair.calm(token, *tickets)
        pair.fence(token)
        pair.rx.arenas[0][:] = CANARY * SIZES[0]
        self.get_through(pair, Write(1, 0, 0, 100))
        painted(pair.rx)

    def test_a_cancelled_ticket_ends(self, pair: Pair, link: Link) -> None:
        """Once, as does the one that was not cancelled; behind the ends nothing lands. What is unknown is ignored."""
        token = pair.rx.grant()
        tickets = [link.submit(each, token) for each in _huge(pair, 6)]
        for ticket in (*tickets[1:], 123_456):
            link.cancel(ticket)
        first = pair.calm(token, *tickets)[0]
        unharmed(self.is_mild, first)
        pair.rx.arenas[0][:] = CANARY * SIZES[0]
        link.cancel(tickets[0])
        self.goes_on(pair, link, Write(1, 0, 0, 9))
        painted(pair.rx)
        assert pair.tx.ends.keys() >= set(tickets)


def first_byte(pair: Pair) -> None:
    """Wait until the writer's first byte has landed."""
    pair.until(lambda: pair.rx.arenas[0][0] == pair.tx.arenas[0][0], "the first byte")


def unharmed(is_mild: bool, *ends: Done | Failed) -> None:
    """A fence of another token has done nothing to these; where it costs a process, they say that it was that."""
    for end in ends:
        assert isinstance(end, Done) or (not is_mild and end.collateral), f"{end}: ended by a fence of another token"


def _huge(pair: Pair, times: int) -> list[tuple[Write, ...]]:
    """Large tickets, as many as may be in flight, with as many entries as are taken."""
    can = pair.tx.transport.capabilities
    return [HUGE[: can.scatter_entries]] * min(times, can.max_outstanding)
