from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

import pytest

from kvpoll_fsm.jobs import SMALL_NBYTES, Jobs
from kvpoll_fsm.session import RoomKey
from kvpoll_fsm.workers import Workers
from tests.helpers import until

WAIT_S = 10.0
ONE, TWO, THREE = (RoomKey("sender", room, 0, 1) for room in (1, 2, 3))


class FakeWorkers:
    """Keeps what it is given; the test says who works, and what each thread's clock shows."""

    def __init__(self) -> None:
        self.given: list[tuple[Callable[[], object], Callable[[object], None]]] = []
        self.clocks = {1: 0.0, 2: 0.0}
        self.refusal: Exception | None = None

    def submit(self, work: Callable[[], object], then: Callable[[object], None]) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.given.append((work, then))

    def used_s(self) -> dict[int, float]:
        return dict(self.clocks)


class Bench:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.workers = FakeWorkers()
        self.answers: list[tuple[RoomKey, Callable[[], None]]] = []
        self.results: list[object] = []
        self.clock = 1
        monkeypatch.setattr("kvpoll_fsm.jobs.own_clock", lambda: self.clock)
        self.jobs = Jobs(self.workers, lambda key, action: self.answers.append((key, action)))  # type: ignore[arg-type]

    def submit(self, key: RoomKey, result: object = None) -> None:
        self.jobs.submit(key, lambda: result, self.results.append, SMALL_NBYTES + 1)

    def begin(self, clock: int) -> object:
        """The thread with that clock takes the next work and is at it."""
        self.clock = clock
        return self.workers.given[0][0]()

    def end(self) -> None:
        work, then = self.workers.given.pop(0)
        then(work())


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def test_a_result_is_given_once_and_on_the_drivers_thread(bench: Bench) -> None:
    bench.submit(ONE, 42)
    bench.end()
    assert bench.results == []
    [(key, action)] = bench.answers
    action()
    assert (key, bench.results) == (ONE, [42])


def test_who_waits_for_its_turn_moves_while_any_thread_works(bench: Bench) -> None:
    bench.submit(ONE)
    assert bench.jobs.moving() == {ONE}  # the threads' first appearance
    assert bench.jobs.moving() == frozenset()
    bench.workers.clocks[2] += 0.1
    assert bench.jobs.moving() == {ONE}
    assert bench.jobs.moving() == frozenset()


def test_who_is_at_work_moves_with_its_own_thread(bench: Bench) -> None:
    """One that hangs is not excused by the others' work."""
    bench.submit(ONE)
    bench.begin(clock=1)
    bench.submit(TWO)
    bench.jobs.moving()
    bench.workers.clocks[2] += 0.1
    assert bench.jobs.moving() == {TWO}
    bench.workers.clocks[1] += 0.1
    assert bench.jobs.moving() == {ONE, TWO}


def test_what_is_answered_moves_no_more(bench: Bench) -> None:
    bench.submit(ONE)
    bench.submit(TWO)
    bench.jobs.moving()
    bench.end()
    bench.answers[0][1]()
    bench.workers.clocks[1] += 0.1
    assert bench.jobs.moving() == {TWO}


def test_what_was_not_taken_is_not_waited_for(bench: Bench) -> None:
    bench.workers.refusal = RuntimeError("no memory for one more")
    with pytest.raises(RuntimeError):
        bench.submit(ONE)
    assert bench.jobs.moving() == frozenset()


def test_real_threads() -> None:
    """One hangs, one is busy."""
    workers, reached, go_on = Workers(2), threading.Event(), threading.Event()
    answers: SimpleQueue[Callable[[], None]] = SimpleQueue()
    jobs = Jobs(workers, lambda key, action: answers.put(action))
    workers.start()

    def hang() -> None:
        reached.set()
        go_on.wait(WAIT_S)

    def toil() -> None:
        while not go_on.is_set():
            sum(range(1000))

    jobs.submit(ONE, hang, lambda result: None, SMALL_NBYTES + 1)
    assert reached.wait(WAIT_S)
    until(lambda: not jobs.moving(), "it hangs")
    jobs.submit(TWO, toil, lambda result: None, SMALL_NBYTES + 1)
    jobs.submit(THREE, hang, lambda result: None, SMALL_NBYTES + 1)  # behind the two
    seen: set[RoomKey] = set()
    until(lambda: (seen.update(found := jobs.moving()), found >= {TWO, THREE})[1], "the busy one, and who waits for it")
    assert ONE not in seen
    go_on.set()
    for _ in range(3):
        answers.get(timeout=WAIT_S)()
    assert jobs.moving() == frozenset()
    workers.close()


def test_a_little_work_is_done_at_once(bench: Bench) -> None:
    bench.jobs.submit(ONE, lambda: "small", bench.results.append, SMALL_NBYTES)
    assert bench.results == ["small"]
    assert not bench.workers.given


def test_a_little_work_does_not_overtake_more_of_its_room(bench: Bench) -> None:
    bench.submit(ONE, "large")
    bench.jobs.submit(ONE, lambda: "small", bench.results.append, 1)
    bench.jobs.submit(TWO, lambda: "of another room", bench.results.append, 1)
    assert bench.results == ["of another room"]
    bench.end()
    bench.end()
    for _, action in bench.answers:
        action()
    assert bench.results == ["of another room", "large", "small"]


def test_what_a_little_work_raises_is_its_result(bench: Bench) -> None:
    error = RuntimeError("native crash")

    def work() -> object:
        raise error

    bench.jobs.submit(ONE, work, bench.results.append, 1)
    assert bench.results == [error]
