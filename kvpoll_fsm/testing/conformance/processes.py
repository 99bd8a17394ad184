"""Peers in processes of their own: killed, stopped, started again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest

from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.spi import Done, Failed, Link, Range, Write
from kvpoll_fsm.testing.conformance.base import Base, Bench
from kvpoll_fsm.testing.conformance.fencing import first_byte
from kvpoll_fsm.testing.conformance.remote import Peer
from kvpoll_fsm.testing.conformance.sides import CANARY, HUGE, SIZES, Pair, Side, painted, same, until
from kvpoll_fsm.testing.conformance.spec import Spec

__all__ = ["Processes"]

Starts = Callable[..., Peer]
WATCH_S = 0.3
"""How long a stopped peer is watched for what must not happen."""


class Away(Pair):
    """A writing side here, a receiving one in another process."""

    def __init__(self, tx: Side, peer: Peer) -> None:
        super().__init__(tx, peer)
        self.peer = peer


class Processes(Base):
    """What a process does to its peers when it dies, stops, or comes again."""

    @pytest.fixture
    def starts(self) -> Iterator[Starts]:
        """Starts peers in other processes, and ends them."""
        if self.claims.one_process:
            pytest.skip("it claims one_process: there are no peers in other processes")
        spec = self._spec()
        with contextlib.ExitStack() as closing:

            def start(filled: bool = False) -> Peer:
                peer = Peer(spec, filled, within_s=self.within_s)
                closing.callback(peer.close)
                return peer

            yield start

    @pytest.fixture
    def away(self, starts: Starts, bench: Bench) -> Away:
        """A side here that writes to one in another process."""
        return Away(bench.tx, starts())

    def test_writes_to_another_process(self, away: Away) -> None:
        """At the moment of Done the bytes are there, in the other process's memory."""
        link = self._up(away)
        token = away.rx.grant()
        for round_ in range(20):
            write = Write(0, round_ * 1000, 0, 70_000)
            away.done(link.submit([write], token))
            assert away.rx.arenas[0][:70_000] == away.tx.arenas[0][write.src_offset : write.src_offset + 70_000]
        away.done(link.submit([Write(1, 0, 0, SIZES[1])], token))
        same([Write(0, 19_000, 0, 70_000), Write(1, 0, 0, SIZES[1])], away.tx, away.rx)
        link.close()

    def test_another_process_writes_to_us(self, starts: Starts, bench: Bench) -> None:
        """The other way round; and what is not granted does not land."""
        pair = Pair(starts(filled=True), bench.rx)
        link = self._up(pair)
        token = pair.rx.grant(Range(0, 0, 1000))
        (end,) = pair.calm(token, link.submit([Write(0, 0, 0, 1001)], token))
        assert isinstance(end, Failed), end
        pair.rx.arenas[0][:1000] = bytes(1000)
        self.goes_on(pair, link, Write(0, 3, 5, 100_000))
        same([Write(0, 3, 5, 100_000)], pair.tx, pair.rx)

    def test_a_receiver_killed_before(self, away: Away, bench: Bench) -> None:
        """The link goes down, what is submitted fails; and the peer's helper processes have ended with it."""
        descriptor, token = away.rx.transport.descriptor(), away.rx.grant()
        away.peer.kill()
        link = away.tx.transport.connect(descriptor, away.rx.regions)
        away.until(lambda: link.number in away.tx.links, "the news")
        assert not any(away.tx.links[link.number])
        assert isinstance(away.ended(link.submit([Write(0, 0, 0, 10)], token))[0], Failed)
        link.close()
        self.goes_on(bench, bench.link, Write(0, 0, 0, 10))

    def test_a_receiver_killed_while_bytes_come_and_its_successor(self, away: Away, starts: Starts) -> None:
        """All tickets end, the late one fails; the successor gets nothing that was meant for the dead one."""
        link = self._up(away)
        token = away.rx.grant()
        tickets = [link.submit(HUGE[:1], token) for _ in self.few(4)]
        first_byte(away)
        away.peer.kill()
        again = Pair(away.tx, starts())
        again.ended(*tickets)
        assert isinstance(again.ended(link.submit(HUGE[:1], token))[0], Failed)
        again.until(lambda: not away.tx.links[link.number][-1], "the news")
        same([], again.tx, again.rx)
        self.get_through(again, Write(0, 3, 5, 1000))
        same([Write(0, 3, 5, 1000)], again.tx, again.rx)
        link.close()

    def test_a_receiver_killed_after(self, away: Away, bench: Bench) -> None:
        """What was done stays done; the next ticket fails, and links to others work."""
        link = self._up(away)
        token = away.rx.grant()
        away.done(link.submit([Write(0, 0, 0, 1000)], token))
        away.peer.kill()
        same([Write(0, 0, 0, 1000)], away.tx, away.rx)
        assert isinstance(away.ended(link.submit([Write(0, 0, 5000, 1000)], token))[0], Failed)
        link.close()
        self.goes_on(bench, bench.link, Write(0, 0, 0, 10))

    def test_a_stopped_receiver_gives_no_false_done(self, away: Away) -> None:
        """Bytes that are on their way, or with the kernel, are not in memory."""
        link = self._up(away)
        away.done(link.submit([Write(0, 0, 0, 1)], away.rx.grant(Range(0, 0, 1))))
        token = away.rx.grant(Range(0, 0, 200_000))
        away.peer.stop()
        ticket = link.submit([Write(0, 7, 0, 100_000)], token)
        expected = away.tx.arenas[0][7:100_007]

        def honest() -> bool:
            away.tx.pump()
            return not isinstance(away.tx.ends.get(ticket), Done) or away.rx.arenas[0][:100_000] == expected

        _watch(honest, "Done although the bytes are not there")
        away.peer.go()
        (end,) = away.calm(token, ticket)
        assert honest(), "Done although the bytes are not there"
        assert isinstance(end, (Done, Failed))
        link.close()

    def test_a_stopped_receiver_holds_up_nobody_else(self, away: Away, bench: Bench, starts: Starts) -> None:
        """Calls return, other peers are written to, and a closed link's tickets end while it stands still."""
        link = self._up(away)
        token = away.rx.grant()
        away.peer.stop()
        tickets = [link.submit(HUGE[:1], token) for _ in self.few(3)]
        bench.done(bench.submit(Write(0, 0, 0, 100_000)))
        second = starts()
        other = Pair(away.tx, second)
        other_link = self._up(other)
        other.done(other_link.submit([Write(0, 0, 0, 100_000)], second.grant()))
        link.close()
        bench.ended(*tickets)
        other_link.close()
        same([Write(0, 0, 0, 100_000)], bench.tx, bench.rx)

    def test_a_peer_that_is_stopped_before_the_first_contact(self, away: Away, bench: Bench) -> None:
        """`connect` returns, others are written to, and a link that does not come up by itself goes down."""
        descriptor, token = away.rx.transport.descriptor(), away.rx.grant()
        away.peer.stop()
        link = away.tx.transport.connect(descriptor, away.rx.regions)
        ticket = link.submit([Write(0, 0, 0, 10)], token)
        bench.done(bench.submit(Write(0, 0, 0, 100_000)))
        if self.is_patient:
            away.until(lambda: link.number in away.tx.links, "LinkUp or LinkDown")
        link.close()
        assert isinstance(away.ended(ticket)[0], (Done, Failed))

    def test_a_stopped_receiver_and_a_cancel(self, away: Away) -> None:
        """Cancelled tickets end although the receiver stands still; what lands later, lands before a fence."""
        if not away.tx.transport.capabilities.cancellable:
            pytest.skip("it does not claim to be cancellable")
        link = self._up(away)
        token = away.rx.grant()
        away.done(link.submit([Write(0, 0, 0, 1)], token))
        away.peer.stop()
        tickets = [link.submit(HUGE[:1], token) for _ in self.few(3)]
        for ticket in tickets:
            link.cancel(ticket)
        away.ended(*tickets)
        away.peer.go()
        away.fence(token)
        away.rx.arenas[0][:] = CANARY * SIZES[0]
        self.get_through(away, Write(1, 0, 0, 100))
        painted(away.rx)
        link.close()

    def test_close_is_not_held_up_by_a_stopped_receiver(self, starts: Starts) -> None:
        """All that was under way ends with it."""
        away = Away(self.side(filled=True), starts())
        link = self._up(away)
        token = away.rx.grant()
        away.peer.stop()
        tickets = [link.submit(HUGE[:1], token) for _ in self.few(3)]
        away.tx.close()
        assert away.tx.ends.keys() >= set(tickets)

    @pytest.mark.parametrize("how", ["stopped", "killed"])
    def test_a_writer_that_is_gone_writes_nothing_behind_a_fence(self, starts: Starts, bench: Bench, how: str) -> None:
        """The fence ends although the writer says nothing; and when it goes on, its tickets end, and nothing lands."""
        rx = self.side()
        writer = starts(filled=True)
        pair = Pair(writer, rx)
        link = self._up(pair)
        token = rx.grant()
        tickets = [link.submit(HUGE[:1], token) for _ in self.few(6)]
        first_byte(pair)
        if how == "stopped":
            writer.stop()
        else:
            writer.kill()
        pair.fence(token)
        rx.arenas[0][:] = CANARY * SIZES[0]
        if how == "stopped":
            writer.go()
            pair.ended(*tickets)
        self.get_through(Pair(bench.tx, rx), Write(1, 0, 0, 100))
        painted(rx)
        rx.close()

    def test_a_process_may_end_without_close(self, starts: Starts, bench: Bench) -> None:
        """Its end is not held up by what the transport runs, and it leaves no process behind."""
        writer = starts(filled=True)
        pair = Pair(writer, bench.rx)
        pair.done(self._up(pair).submit([Write(0, 0, 0, 10)], bench.rx.grant()))
        assert writer.remote.abandon() == 0
        until(lambda: not writer.group(), "the end of its processes", self.within_s)

    def test_one_process_alone_means_that(self, bench: Bench) -> None:
        """`one_process`: a peer in another process is told apart, and its link goes down."""
        if not self.claims.one_process:
            pytest.skip("it does not claim one_process")
        peer = Peer(self._spec(), within_s=self.within_s)
        try:
            link: Link | None = bench.tx.connect(peer)
        except InvalidInput:
            link = None
        if link is not None:
            bench.until(lambda: link.number in bench.tx.links, "the news")
            assert not any(bench.tx.links[link.number])
            link.close()
        peer.close()

    def _spec(self) -> Spec:
        spec = self.spec()
        if spec is None:
            pytest.skip("spec() says that it cannot be made in another process")
        return spec

    def _up(self, pair: Pair) -> Link:
        link = pair.tx.connect(pair.rx)
        pair.up(link)
        return link


def _watch(holds: Callable[[], bool], what: str) -> None:
    """See that something stays true for a while."""
    end = time.monotonic() + WATCH_S
    while time.monotonic() < end:
        assert holds(), what
        time.sleep(0.002)
