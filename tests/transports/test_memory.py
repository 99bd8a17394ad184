from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvpoll_fsm.spi import Done, Failed, LinkDown, LinkUp, Progress, Quiesced, Write
from kvpoll_fsm.testing.conformance import TransportSuite
from kvpoll_fsm.testing.conformance.sides import MIB, Pair, Side, same, untouched
from kvpoll_memory import Faults, MemoryTransport


class TestMemory(TransportSuite):
    needs_fd = False
    refuses_whole = True

    def make(self) -> MemoryTransport:
        return MemoryTransport()


class TestMemoryInSteps(TransportSuite):
    needs_fd = False
    refuses_whole = True

    def make(self) -> MemoryTransport:
        return MemoryTransport(steps=3, step_nbytes=MIB)


WRITES = [Write(0, 0, 0, 1000), Write(1, 0, 5, 50)]


class Bench(Pair):
    """A pair with faults on the writing side and a link that is up."""

    def __init__(self, **settings: int) -> None:
        self.faults = Faults()
        super().__init__(Side(MemoryTransport(faults=self.faults, **settings), filled=True), Side(MemoryTransport()))
        self.token = self.rx.grant()
        self.link = self.tx.connect(self.rx)
        self.pump()

    def submit(self) -> int:
        return self.link.submit(WRITES, self.token)

    def step(self) -> list[object]:
        return list(self.tx.transport.completions())


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def test_nothing_moves_before_completions_is_called(bench: Bench) -> None:
    ticket = bench.submit()
    untouched(bench.rx)
    assert bench.step() == [Done(ticket)]
    assert bench.step() == []


def test_one_step_per_call() -> None:
    bench = Bench(steps=1, step_nbytes=600)
    first, second = bench.submit(), bench.submit()
    assert bench.step() == [Progress(first, 600)]
    assert bench.step() == [Done(first)]
    assert bench.step() == [Progress(second, 600)]
    bench.close()


def test_held_tickets_hang_until_released(bench: Bench) -> None:
    bench.faults.hold()
    first, second = bench.submit(), bench.submit()
    assert bench.step() == []
    bench.faults.release()
    bench.faults.hold(1)
    assert bench.step() == [Done(first)]
    bench.faults.release(1)
    assert bench.step() == [Done(second)]


def test_a_held_ticket_can_be_cancelled_or_fenced(bench: Bench) -> None:
    bench.faults.hold()
    first, second = bench.submit(), bench.submit()
    bench.link.cancel(first)
    assert bench.step() == [Failed(first, "cancelled", quiescent=True)]
    bench.fence(bench.token)
    bench.faults.release()
    (failed,) = bench.step()
    assert isinstance(failed, Failed)
    assert (failed.ticket, failed.quiescent) == (second, True)
    untouched(bench.rx)


def test_the_nth_ticket_fails(bench: Bench) -> None:
    bench.faults.fail(1, "out of luck", after_nbytes=10)
    assert bench.faults.submitted == 0
    first, second = bench.submit(), bench.submit()
    assert bench.faults.submitted == 2
    assert bench.step() == [Done(first), Failed(second, "out of luck", quiescent=True)]


def test_a_partial_write(bench: Bench) -> None:
    bench.faults.fail(0, after_nbytes=1010)
    bench.submit()
    bench.step()
    same([WRITES[0], Write(1, 0, 5, 10)], bench.tx, bench.rx)


def test_bytes_land_late_and_then_it_is_quiet(bench: Bench) -> None:
    bench.faults.fail_late(0, after_nbytes=300)
    ticket = bench.submit()
    assert bench.step() == [Failed(ticket, "injected", quiescent=False)]
    before = [bytes(arena[:]) for arena in bench.tx.arenas]
    for arena in bench.tx.arenas:
        arena[:] = bytes(len(arena))  # the source is free
    assert bench.step() == []
    bench.faults.land(0)
    assert bench.step() == [Quiesced(ticket)]
    assert bench.step() == []
    for arena, data in zip(bench.tx.arenas, before, strict=True):
        arena[:] = data
    same(WRITES, bench.tx, bench.rx)


def test_a_source_that_is_read_late_is_not_free(bench: Bench) -> None:
    bench.faults.fail_late(0, after_nbytes=10, reading=True)
    ticket = bench.submit()
    assert bench.failed(ticket) == Failed(ticket, "injected", quiescent=False, source_free=False)
    bench.tx.arenas[0][:1000] = b"z" * 1000  # which one must not
    bench.faults.land(0)
    bench.until(lambda: ticket in bench.tx.quiesced, "the end of it")
    assert bench.rx.arenas[0][10:1000] == b"z" * 990


def test_late_bytes_do_not_land_behind_a_fence(bench: Bench) -> None:
    bench.faults.fail_late(0)
    ticket = bench.submit()
    bench.step()
    bench.fence(bench.token)
    bench.faults.land(0)
    assert bench.step() == [Quiesced(ticket)]
    untouched(bench.rx)


def test_late_bytes_never_land_once_the_link_is_closed(bench: Bench) -> None:
    bench.faults.fail_late(0)
    ticket = bench.submit()
    bench.step()
    bench.link.close()
    assert bench.step() == [Quiesced(ticket)]


@pytest.mark.parametrize("at", [0, 999, 1000, 1049])
def test_a_flipped_byte(bench: Bench, at: int) -> None:
    bench.faults.flip(0, at)
    ticket = bench.submit()
    assert bench.step() == [Done(ticket)]
    arena, offset = (bench.rx.arenas[0], at) if at < 1000 else (bench.rx.arenas[1], at - 1000 + 5)
    arena[offset] ^= 1
    same(WRITES, bench.tx, bench.rx)


def test_refused_links(bench: Bench) -> None:
    bench.faults.refuse_links("no entry")
    assert bench.step() == [LinkDown(0, "no entry")]
    ticket = bench.submit()
    assert bench.step() == [LinkDown(0, "no entry"), Failed(ticket, "no entry", quiescent=True)]
    assert bench.step() == []
    bench.faults.accept_links()
    assert bench.step() == []
    ticket = bench.submit()
    assert bench.step() == [LinkUp(0), Done(ticket)]


def test_broken_links(bench: Bench) -> None:
    ticket = bench.submit()
    bench.faults.break_links()
    assert bench.step() == [LinkDown(0, "broken"), Failed(ticket, "broken", quiescent=True)]
    ticket = bench.submit()
    assert bench.step() == [LinkUp(0), Done(ticket)]


def test_held_fences() -> None:
    faults = Faults()
    pair = Pair(Side(MemoryTransport(), filled=True), Side(MemoryTransport(faults=faults)))
    faults.hold_fences()
    fence = pair.rx.transport.fence(pair.rx.grant())
    pair.pump()
    assert pair.rx.fenced == []
    faults.release_fences()
    pair.pump()
    assert pair.rx.fenced == [fence]
    pair.close()
