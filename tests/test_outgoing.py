from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

import kvpoll_fsm.outgoing
from kvpoll_fsm.arena import BlockPool
from kvpoll_fsm.commands import CancelWrites, StartPart, Target
from kvpoll_fsm.connection import Connection
from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.inputs import Input, PartWritten, Progress, RankQuiesced
from kvpoll_fsm.layout import Extent, Field, Layout
from kvpoll_fsm.links import Links
from kvpoll_fsm.messages import BlockGrant, TransportOffer
from kvpoll_fsm.outgoing import Outgoing
from kvpoll_fsm.session import RoomKey
from kvpoll_fsm.sources import EngineBlocks
from kvpoll_fsm.spi import Capabilities, Done, Failed, LinkDown, LinkUp, Quiesced, Transport, Write
from kvpoll_fsm.spi import Progress as TicketProgress
from kvpoll_fsm.staging import Source, checksum
from kvpoll_fsm.writings import batches

LAYOUT = Layout(4, [Field("ids", "int32"), Field("aux", "int64", (2,), per_room=True)])
ONE = RoomKey("sender", 1, 0, 1)
TWO = RoomKey("sender", 2, 0, 2)
CONN = 5


class FakeLink:
    def __init__(self, number: int, transport: FakeTransport) -> None:
        self.number = number
        self.transport = transport
        self.cancelled: list[int] = []
        self.closed = False

    def submit(self, writes: Sequence[Write], token: bytes) -> int:
        if self.transport.refusal is not None:
            raise self.transport.refusal
        self.transport.submitted.append((tuple(writes), token))
        return len(self.transport.submitted) - 1

    def cancel(self, ticket: int) -> None:
        self.cancelled.append(ticket)

    def close(self) -> None:
        self.closed = True


class FakeTransport:
    """Takes tickets; the test says how they end."""

    def __init__(self) -> None:
        self.capabilities = Capabilities(scatter_entries=8, max_outstanding=4)
        self.submitted: list[tuple[tuple[Write, ...], bytes]] = []
        self.links: list[FakeLink] = []
        self.refusal: Exception | None = None

    def connect(self, descriptor: bytes, regions: Sequence[bytes]) -> FakeLink:
        self.links.append(FakeLink(len(self.links), self))
        return self.links[-1]


class Peer:
    """What `Outgoing` looks at of a connection."""

    block_tokens = 4

    def __init__(self) -> None:
        self.offers = {"fake": TransportOffer("fake", b"", ())}


class Bench:
    """Outgoing over one fake transport, with the link up."""

    def __init__(self, *, hashes: bool = False, link_up: bool = True) -> None:
        self.pool = BlockPool(LAYOUT, 8)
        self.transport = FakeTransport()
        self.peers = {CONN: Peer()}
        self.fed: list[tuple[RoomKey, Input]] = []
        self.later: list[tuple[Callable[[], object], Callable[[object], None]]] | None = None
        self.transports = {"fake": cast("Transport", self.transport)}
        self.links = Links(self.transports)
        self.out = Outgoing(
            self.pool,
            self.transports,
            self.links,
            cast("dict[int, Connection]", self.peers),
            self._submit,
            lambda key, event: self.fed.append((key, event)),
            lambda transport: hashes,
        )
        if link_up:
            self.links.reach(CONN, self.peers[CONN].offers["fake"], "fake", lambda ok, why: None)
            self.links.completed("fake", LinkUp(0))

    def _submit(self, key: RoomKey, work: Callable[[], object], then: Callable[[object], None], nbytes: int) -> None:
        if self.later is not None:
            return self.later.append((work, then))
        try:
            result = work()
        except Exception as error:
            result = error
        then(result)

    def work(self) -> None:
        """Let the worker do what it was given."""
        jobs, self.later = self.later or [], None
        for work, then in jobs:
            then(work())

    def start(
        self,
        key: RoomKey = ONE,
        *,
        ranks: int = 1,
        tokens: int = 12,
        attempt: int = 0,
        blocks: Sequence[int] = (0, 2, 4),
    ) -> StartPart:
        self.out.sources.setdefault(key, Source.of(LAYOUT, data(12)))
        grant = BlockGrant(0, 12, tuple(blocks), (("fake", b"token"),))
        targets = tuple(Target(rank, CONN, "fake", grant) for rank in range(ranks))
        mine = (0, 1, 2) if key == ONE else (3, 4, 5)
        command = StartPart(0, 0, tokens, mine, targets, attempt)
        self.out.start(key, command)
        return command

    def forget_transport(self) -> None:
        """As the driver does with one that it has closed."""
        del self.transports["fake"]
        self.links.lost("fake", "given up")
        self.out.lost("fake", "given up")

    def end(self, ticket: int, **failed: Any) -> None:
        self.out.completed("fake", Failed(ticket, **failed) if failed else Done(ticket))

    def written(self, key: RoomKey = ONE) -> list[PartWritten]:
        return [event for other, event in self.fed if other == key and isinstance(event, PartWritten)]

    def progress(self, key: RoomKey = ONE) -> list[int]:
        return [event.bytes_done for other, event in self.fed if other == key and isinstance(event, Progress)]


def data(tokens: int) -> dict[str, Any]:
    return {"ids": np.arange(tokens, dtype=np.int32), "aux": np.array([7, 8], np.int64)}


@pytest.fixture
def bench() -> Bench:
    return Bench()


# Source blocks of the engine's own


def test_engine_blocks_are_one_row_of_tokens() -> None:
    blocks = EngineBlocks(4)
    blocks.add((5, 6, 1), 10)
    blocks.add((0,), 3)
    assert blocks.room_block == 5
    assert blocks.slots(0, 13) == [(20, 8), (4, 2), (0, 3)]
    assert blocks.slots(7, 4) == [(27, 1), (4, 2), (0, 1)]
    assert blocks.slots(0, 1) == [(20, 1)]


# Batches


def test_batches_keep_within_bytes_and_entries() -> None:
    extents = [Extent(0, 0, 100, 25), Extent(1, 50, 0, 3), Extent(1, 60, 3, 3), Extent(1, 70, 6, 3)]
    cut = list(batches(extents, 10, 3))
    assert [sum(write.nbytes for write in batch) for batch in cut] == [10, 10, 10, 4]
    assert all(len(batch) <= 3 for batch in cut)
    assert cut[1] == [Write(0, 10, 110, 10)]
    assert cut[2] == [Write(0, 20, 120, 5), Write(1, 50, 0, 3), Write(1, 60, 3, 2)]


def test_batches_of_many_small_writes_are_cut_by_their_number() -> None:
    extents = [Extent(0, at, at, 1) for at in range(7)]
    assert [len(batch) for batch in batches(extents, 100, 3)] == [3, 3, 1]
    assert list(batches([], 100, 3)) == []


# A part


def test_stages_writes_and_reports_once(bench: Bench) -> None:
    bench.start()
    assert bench.pool.view("ids")[:3].ravel().tolist() == list(range(12))
    [(writes, token)] = bench.transport.submitted
    assert token == b"token"
    # Tokens to blocks 0, 2, 4; the per-room value from the first block to the first block.
    assert writes == (Write(0, 0, 0, 16), Write(0, 16, 32, 16), Write(0, 32, 64, 16), Write(1, 0, 0, 16))
    assert bench.fed == []
    bench.end(0)
    assert bench.written() == [PartWritten(0, 0, "fake", ok=True)]
    assert bench.out.idle


def test_each_rank_has_its_report(bench: Bench) -> None:
    bench.start(ranks=2)
    bench.end(1, reason="cable", quiescent=True)
    bench.end(0)
    assert [(w.rank, w.ok, w.detail) for w in bench.written()] == [(1, False, "cable"), (0, True, "")]


def test_hashes_where_it_is_wanted() -> None:
    bench = Bench(hashes=True)
    bench.start()
    bench.end(0)
    assert bench.written()[0].checksum == checksum(bench.pool, (0, 1, 2), 12, first=True)


def test_every_ticket_that_lands_is_progress(bench: Bench) -> None:
    """Also where the transport reports none in between, or a long part would count as stalled."""
    bench.transport.capabilities = replace(bench.transport.capabilities, scatter_entries=1)
    bench.start()
    assert len(bench.transport.submitted) == 4
    bench.out.completed("fake", TicketProgress(0, 10))
    bench.end(0)
    bench.end(1)
    bench.out.completed("fake", TicketProgress(2, 4))
    bench.out.completed("fake", TicketProgress(2, 4))
    bench.end(2)
    bench.end(3)
    assert bench.progress() == [10, 16, 32, 36, 48, 64]


def test_a_second_attempt_does_not_stage_again(bench: Bench) -> None:
    bench.start()
    bench.end(0, reason="x", quiescent=True)
    bench.pool.view("ids")[:] = 0
    bench.start(attempt=1)
    assert not bench.pool.view("ids").any()
    bench.end(1)
    assert [w.attempt for w in bench.written()] == [0, 1]


# What goes wrong


def test_a_failed_ticket_that_may_land_still_is_not_quiescent(bench: Bench) -> None:
    bench.transport.capabilities = replace(bench.transport.capabilities, scatter_entries=2)
    bench.start()
    bench.end(0, reason="reset", quiescent=False, source_free=False)
    assert bench.written() == []  # the other ticket is in flight
    bench.end(1, reason="reset", quiescent=False)
    [written] = bench.written()
    assert (written.ok, written.quiescent, written.source_free, written.detail) == (False, False, False, "reset")
    bench.out.completed("fake", Quiesced(1))
    assert len(bench.written()) == 1
    bench.out.completed("fake", Quiesced(0))
    assert bench.fed[-1] == (ONE, RankQuiesced(0, 0))
    assert bench.out.idle


@pytest.mark.parametrize("ends", [(True, True), (True, False), (False, True), (True, None)])
def test_collateral_if_all_that_failed_was(bench: Bench, ends: tuple[bool, bool | None]) -> None:
    bench.transport.capabilities = replace(bench.transport.capabilities, scatter_entries=2)
    bench.start()
    for ticket, collateral in enumerate(ends):
        failed = {} if collateral is None else {"reason": "killed", "quiescent": True, "collateral": collateral}
        bench.end(ticket, **failed)
    [written] = bench.written()
    assert written.collateral is (False not in ends)


def test_quiescence_is_told_of_its_attempt(bench: Bench) -> None:
    bench.start(attempt=2)
    bench.end(0, reason="reset", quiescent=False)
    bench.out.completed("fake", Quiesced(0))
    assert bench.fed[-1] == (ONE, RankQuiesced(0, 0, 2))


@pytest.mark.parametrize("meant", [True, False])
def test_one_attempt_that_takes_too_long_is_cancelled(bench: Bench, meant: bool) -> None:
    bench.transport.capabilities = Capabilities(scatter_entries=1, max_outstanding=1)
    bench.start(attempt=1)
    bench.out.hurry(ONE, CancelWrites(0, 0, 1 if meant else 0, "no bytes landed for 4 s"))
    assert bench.transport.links[0].cancelled == ([0] if meant else [])
    bench.out.hurry(ONE, CancelWrites(1, 0, 1, "of a rank that is not there"))
    if meant:
        bench.end(0, reason="cancelled", quiescent=True)
        assert [(w.ok, w.detail, w.collateral) for w in bench.written()] == [(False, "no bytes landed for 4 s", False)]


def test_an_attempt_that_is_being_staged_is_not_cancelled(bench: Bench) -> None:
    bench.later = []
    bench.start()
    bench.out.hurry(ONE, CancelWrites(0, 0, 0, "no bytes landed for 4 s"))
    bench.work()
    bench.end(0)
    assert [w.ok for w in bench.written()] == [True]


def test_what_a_breaker_keeps_out_is_staged_and_not_written(bench: Bench) -> None:
    bench.out.sources[ONE] = Source.of(LAYOUT, data(12))
    grant = BlockGrant(0, 12, (0, 2, 4), (("fake", b"token"),))
    bench.out.start(ONE, StartPart(0, 0, 12, (0, 1, 2), (Target(0, CONN, "fake", grant, shut="failed lately"),), 0))
    [written] = bench.written()
    assert (written.ok, written.shut, written.quiescent, written.detail) == (False, True, True, "failed lately")
    assert bench.transport.submitted == []
    bench.start(attempt=1)
    bench.end(0)
    assert bench.written()[1].ok
    assert bench.pool.view("ids")[0].tolist() == data(12)["ids"][:4].tolist()


def test_what_fails_here_is_not_put_down_to_the_transport(bench: Bench) -> None:
    bench.start(blocks=(0,))
    bench.out.sources[TWO] = Source.of(LAYOUT, data(3))
    bench.start(TWO)
    assert [w.ours for key in (ONE, TWO) for w in bench.written(key)] == [True, True]


def test_each_transport_has_its_own_mind_about_checksums(bench: Bench) -> None:
    """The first wants none and fails; the next wants one."""
    bench.start()
    bench.end(0, reason="reset", quiescent=True)
    bench.out._hashes = lambda transport: True
    bench.start(attempt=1)
    bench.end(1)
    assert [w.checksum for w in bench.written()] == [None, checksum(bench.pool, (0, 1, 2), 12, first=True)]


def test_no_further_batch_after_one_failed(bench: Bench) -> None:
    bench.transport.capabilities = Capabilities(scatter_entries=1, max_outstanding=1)
    bench.start()
    bench.end(0, reason="reset", quiescent=True)
    assert len(bench.transport.submitted) == 1
    assert [w.ok for w in bench.written()] == [False]


def test_staging_that_fails_is_reported(bench: Bench) -> None:
    bench.out.sources[ONE] = Source.of(LAYOUT, data(3))
    bench.start()
    [written] = bench.written()
    assert not written.ok
    assert "staging failed" in written.detail
    assert "3" in written.detail
    assert bench.out.idle


def test_a_grant_that_is_too_small_is_reported(bench: Bench) -> None:
    bench.start(blocks=(0,))
    [written] = bench.written()
    assert not written.ok
    assert written.quiescent
    assert "hold less than 12 tokens" in written.detail
    assert bench.out.idle


def test_without_a_connection_it_is_reported(bench: Bench) -> None:
    del bench.peers[CONN]
    bench.start()
    assert [w.detail for w in bench.written()] == ["the connection has ended"]


@pytest.mark.parametrize("error", [InvalidInput("no such region"), RuntimeError("native crash")])
def test_a_submit_that_raises_fails_its_own_room_only(bench: Bench, error: Exception) -> None:
    bench.transport.capabilities = Capabilities(scatter_entries=8, max_outstanding=1)
    bench.start(ONE)
    bench.start(TWO)
    bench.transport.refusal = error
    bench.end(0)  # makes room for the other, whose submit raises
    assert [w.ok for w in bench.written(ONE)] == [True]
    [written] = bench.written(TWO)
    assert not written.ok
    assert str(error) in written.detail
    assert bench.out.idle


def test_a_link_that_goes_down_ends_what_waits_for_it(bench: Bench) -> None:
    bench.transport.capabilities = Capabilities(scatter_entries=8, max_outstanding=1)
    bench.start(ONE)
    bench.start(TWO)
    bench.links.completed("fake", LinkDown(0, "reset"))
    bench.end(0, reason="reset", quiescent=True)
    assert [w.detail for w in bench.written(ONE)] == ["reset"]
    assert [w.detail for w in bench.written(TWO)] == ["the link went down"]
    assert bench.out.idle


def test_a_link_that_is_down_is_made_anew_first() -> None:
    bench = Bench(link_up=False)
    bench.start()
    assert bench.transport.submitted == []
    bench.links.completed("fake", LinkUp(0))
    bench.end(0)
    assert [w.ok for w in bench.written()] == [True]


def test_a_link_that_cannot_be_made_is_reported() -> None:
    bench = Bench(link_up=False)
    bench.start()
    bench.links.completed("fake", LinkDown(0, "no route"))
    assert [w.detail for w in bench.written()] == ["no route"]


def test_what_is_unknown_is_ignored(bench: Bench) -> None:
    for completion in (Done(9), Failed(9, "x", quiescent=False), Quiesced(9), TicketProgress(9, 1)):
        bench.out.completed("fake", completion)
    assert bench.fed == []
    assert bench.out.room_of("fake", 9) is None


def test_of_a_peer_that_is_gone_nobody_waits_for_quiescence(bench: Bench) -> None:
    """Its own fence keeps it safe; our tickets may never be heard of again."""
    bench.transport.capabilities = replace(bench.transport.capabilities, scatter_entries=2)
    bench.start()
    bench.end(0, reason="reset", quiescent=False)
    bench.end(1, reason="reset", quiescent=False)
    assert [w.quiescent for w in bench.written()] == [False]
    bench.out.hang_up(CONN + 1)
    assert len(bench.fed) == 1
    bench.out.hang_up(CONN)
    assert bench.fed[1:] == [(ONE, RankQuiesced(0, 0))]
    assert bench.out.idle


def test_a_ticket_that_fails_after_its_peer_has_gone_is_quiescent(bench: Bench) -> None:
    bench.start()
    del bench.peers[CONN]
    bench.end(0, reason="reset", quiescent=False)
    assert [w.quiescent for w in bench.written()] == [True]
    assert bench.out.idle


def test_a_source_that_may_be_read_outlives_the_peer(bench: Bench) -> None:
    """The peer's fence keeps the peer safe; what is read here is ours to keep."""
    bench.start()
    bench.end(0, reason="reset", quiescent=False, source_free=False)
    bench.out.hang_up(CONN)
    assert [(w.quiescent, w.source_free) for w in bench.written()] == [(False, False)]
    assert len(bench.fed) == 1
    assert not bench.out.idle
    bench.out.completed("fake", Quiesced(0))
    assert bench.fed[1:] == [(ONE, RankQuiesced(0, 0))]
    assert bench.out.idle


def test_a_source_that_may_be_read_after_the_peer_has_gone(bench: Bench) -> None:
    bench.start()
    del bench.peers[CONN]
    bench.end(0, reason="reset", quiescent=False, source_free=False)
    assert [(w.quiescent, w.source_free) for w in bench.written()] == [(True, False)]
    bench.out.completed("fake", Quiesced(0))
    assert bench.fed[1:] == [(ONE, RankQuiesced(0, 0))]
    assert bench.out.idle


# A transport that was given up


def test_the_tickets_of_a_transport_that_was_closed_have_ended(bench: Bench) -> None:
    bench.transport.capabilities = Capabilities(scatter_entries=8, max_outstanding=1)
    bench.start(ONE)
    bench.start(TWO)  # waits for its turn
    bench.forget_transport()
    for key, detail in ((ONE, "given up"), (TWO, "the link went down")):
        assert [(w.detail, w.ok, w.quiescent, w.source_free) for w in bench.written(key)] == [
            (detail, False, key == TWO, True)
        ]
    bench.out.completed("fake", Quiesced(0))  # a last word is not needed, and does no harm
    assert bench.fed[-1] == (ONE, RankQuiesced(0, 0))
    assert bench.out.idle


def test_a_transport_that_was_closed_reads_no_source(bench: Bench) -> None:
    bench.start()
    bench.end(0, reason="reset", quiescent=False, source_free=False)
    bench.out.hang_up(CONN)
    bench.forget_transport()
    assert bench.fed[1:] == [(ONE, RankQuiesced(0, 0))]
    assert bench.out.idle


def test_a_part_that_was_staged_for_a_transport_that_is_gone(bench: Bench) -> None:
    bench.later = []
    bench.start()
    bench.forget_transport()
    bench.work()
    assert [w.detail for w in bench.written()] == ["the transport was given up"]


# Whatever raises

POINTS = ("jobs", "stage", "checksum_runs", "runs", "plan_runs", "batches", "hashes", "peer", "connect")
POINTS_OF_LINKS = ("submit", "cancel", "close")


class Trap:
    """Raises at its nth call, or ever after."""

    def __init__(self, nth: int, error: BaseException, *, lasting: bool) -> None:
        self.left, self.error, self.lasting = nth, error, lasting

    def spring(self) -> None:
        self.left -= 1
        if self.left == -1 or (self.left < -1 and self.lasting):
            raise self.error

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def trapped(*args: Any, **more: Any) -> Any:
            self.spring()
            return function(*args, **more)

        return trapped


def set_trap(trap: Trap, point: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    if point == "jobs":
        bench.out._submit = trap.around(bench.out._submit)
    elif point == "hashes":
        bench.out._hashes = trap.around(bench.out._hashes)
    elif point == "peer":
        look_up = trap.around(bench.peers.get)
        bench.out._peers = cast("Any", type("Peers", (), {"get": staticmethod(look_up)})())
    elif point == "connect":
        monkeypatch.setattr(FakeTransport, point, trap.around(FakeTransport.connect))
    elif point in POINTS_OF_LINKS:
        monkeypatch.setattr(FakeLink, point, trap.around(getattr(FakeLink, point)))
    else:
        monkeypatch.setattr(kvpoll_fsm.outgoing, point, trap.around(getattr(kvpoll_fsm.outgoing, point)))


@pytest.mark.parametrize("cancel", [False, True], ids=["", "cancelled"])
@pytest.mark.parametrize("nth", range(4))
@pytest.mark.parametrize("point", [*POINTS, *POINTS_OF_LINKS])
def test_pain_13_every_target_is_answered_once_whatever_raises(
    point: str, nth: int, cancel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three targets in two rooms; the driver guards each call, as here."""

    def guarded(action: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):
            action()

    for lasting in (False, True):
        with monkeypatch.context() as patch:
            bench = Bench(hashes=True, link_up=False)
            bench.transport.capabilities = Capabilities(scatter_entries=1, max_outstanding=1)
            set_trap(Trap(nth, RuntimeError("native crash"), lasting=lasting), point, bench, patch)
            guarded(lambda: bench.start(ONE, ranks=2))  # noqa: B023
            guarded(lambda: bench.start(TWO))  # noqa: B023
            guarded(lambda: bench.links.completed("fake", LinkUp(0)))  # noqa: B023
            if cancel:
                guarded(lambda: bench.out.cancel(ONE))  # noqa: B023
            for number in range(30):
                guarded(lambda: bench.end(number))  # noqa: B023
            guarded(lambda: bench.links.completed("fake", LinkDown(0, "reset")))  # noqa: B023
            answered = [(key.room, event.rank) for key, event in bench.fed if isinstance(event, PartWritten)]
            assert sorted(answered) == [(1, 0), (1, 1), (2, 0)]
            assert bench.out.idle


@pytest.mark.parametrize("error", [SystemExit(), KeyboardInterrupt(), MemoryError()])
def test_a_worker_that_is_shot_answers(bench: Bench, error: BaseException) -> None:
    bench.later = []
    bench.start()
    [(_, then)] = bench.later
    then(error)
    assert [w.detail for w in bench.written()] == [f"staging failed: {error!r}"]


# Cancelling


def test_cancel_asks_every_ticket_and_reports_when_they_have_ended(bench: Bench) -> None:
    bench.transport.capabilities = replace(bench.transport.capabilities, scatter_entries=2)
    bench.start()
    bench.out.cancel(ONE)
    assert bench.transport.links[0].cancelled == [0, 1]
    bench.end(0, reason="cancelled", quiescent=True)
    assert bench.written() == []
    bench.end(1)  # too late to stop it
    assert [(w.ok, w.detail) for w in bench.written()] == [(False, "cancelled")]


def test_cancel_waits_for_the_worker_that_reads_the_source(bench: Bench) -> None:
    bench.later = []
    bench.start()
    bench.out.cancel(ONE)
    assert bench.written() == []
    bench.work()
    assert [w.detail for w in bench.written()] == ["cancelled"]
    assert bench.transport.submitted == []


def test_cancel_ends_what_waits_behind_another_room(bench: Bench) -> None:
    bench.transport.capabilities = Capabilities(scatter_entries=8, max_outstanding=1)
    bench.start(ONE)
    bench.start(TWO)
    bench.out.cancel(TWO)
    assert [w.detail for w in bench.written(TWO)] == ["cancelled"]
    bench.end(0)
    assert [w.ok for w in bench.written(ONE)] == [True]
    assert bench.out.idle
    assert len(bench.transport.submitted) == 1


def test_a_ticket_that_cannot_be_cancelled_keeps_no_other(bench: Bench) -> None:
    bench.transport.capabilities = replace(bench.transport.capabilities, scatter_entries=2)
    bench.start()
    link = bench.transport.links[0]

    def cancel(ticket: int) -> None:
        link.cancelled.append(ticket)
        raise RuntimeError("native crash")

    link.cancel = cancel  # type: ignore[method-assign]
    bench.out.cancel(ONE)
    assert link.cancelled == [0, 1]
    bench.end(0)
    bench.end(1)
    assert [w.detail for w in bench.written()] == ["cancelled"]


def test_cancel_without_anything_under_way_is_harmless(bench: Bench) -> None:
    bench.out.cancel(ONE)
    assert bench.fed == []


# Sharing a link


def test_rooms_take_turns_within_what_may_be_outstanding(bench: Bench) -> None:
    bench.transport.capabilities = Capabilities(scatter_entries=1, max_outstanding=2)
    bench.start(ONE)
    bench.start(TWO)
    for ticket in range(8):
        assert len(bench.transport.submitted) == min(ticket + 2, 8)
        bench.end(ticket)
    rooms = [1 if writes[0].src_offset < 48 and writes[0].region == 0 else 2 for writes, _ in bench.transport.submitted]
    assert set(rooms[2:6]) == {1, 2}
    assert [w.ok for w in (*bench.written(ONE), *bench.written(TWO))] == [True, True]
    assert bench.out.idle


def test_forget_lets_go_of_the_source(bench: Bench) -> None:
    bench.start()
    bench.end(0)
    bench.out.forget(ONE)
    assert bench.out.sources == {}
    assert bench.out._landed == {}
