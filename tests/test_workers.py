from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from queue import SimpleQueue

import pytest

from kvpoll_fsm.workers import Workers, own_clock

WAIT_S = 10.0


@pytest.fixture
def results() -> SimpleQueue[object]:
    return SimpleQueue()


def test_results_and_errors_are_handed_over_in_the_worker(results: SimpleQueue[object]) -> None:
    workers = Workers(1)
    workers.start()
    error = ValueError("no")

    def fail() -> object:
        raise error

    workers.submit(lambda: 1 + 1, results.put)
    workers.submit(fail, results.put)
    workers.submit(threading.current_thread, results.put)
    assert results.get(timeout=WAIT_S) == 2
    assert results.get(timeout=WAIT_S) is error
    assert results.get(timeout=WAIT_S) is not threading.current_thread()
    workers.close()


def test_threads_work_at_the_same_time(results: SimpleQueue[object]) -> None:
    workers, barrier = Workers(3), threading.Barrier(3)
    workers.start()
    for _ in range(3):
        workers.submit(lambda: barrier.wait(WAIT_S), results.put)
    assert sorted(int(str(results.get(timeout=WAIT_S))) for _ in range(3)) == [0, 1, 2]
    workers.close()


def test_close_finishes_what_was_given_and_ends_the_threads(results: SimpleQueue[object]) -> None:
    before = threading.active_count()
    workers = Workers(2)
    workers.start()
    for number in range(100):
        workers.submit(lambda number=number: number, results.put)  # type: ignore[misc]
    workers.close()
    assert threading.active_count() == before
    assert sorted(int(str(results.get_nowait())) for _ in range(100)) == list(range(100))


def test_an_idle_thread_keeps_nothing_alive() -> None:
    class Array:
        pass

    workers, done = Workers(1), threading.Event()
    workers.start()
    array = Array()
    gone = weakref.ref(array)
    workers.submit(lambda array=array: array, lambda result: None)  # type: ignore[misc]
    del array
    workers.submit(lambda: None, lambda result: done.set())
    assert done.wait(WAIT_S)
    gc.collect()
    assert gone() is None
    workers.close()


def test_a_thread_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpoll_fsm.workers.HUNG_S", 0.1)
    workers, go_on = Workers(2), threading.Event()
    workers.start()
    workers.submit(go_on.wait, lambda result: None)
    assert not workers.close()
    go_on.set()
    assert workers.close()


def test_a_thread_that_works_is_waited_for(monkeypatch: pytest.MonkeyPatch, results: SimpleQueue[object]) -> None:
    monkeypatch.setattr("kvpoll_fsm.workers.HUNG_S", 0.4)

    def work() -> object:
        while time.thread_time() < 0.9:
            pass
        return "done"

    workers = Workers(1)
    workers.start()
    workers.submit(work, results.put)
    assert workers.close()
    assert results.get_nowait() == "done"


def test_without_threads_to_give_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    before, real = threading.active_count(), threading.Thread.start
    started: list[threading.Thread] = []

    def start(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start"):
        Workers(4).start()
    assert threading.active_count() == before


def test_a_result_that_nobody_takes_ends_no_thread(
    results: SimpleQueue[object], caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(result: object) -> None:
        raise RuntimeError("nobody is here")

    workers = Workers(1)
    workers.start()
    workers.submit(lambda: 1, refuse)
    workers.submit(lambda: 2, results.put)
    assert results.get(timeout=WAIT_S) == 2
    assert [record.getMessage() for record in caplog.records] == ["a worker's result was not taken"]
    workers.close()


def test_processor_time_grows_with_work_and_not_with_waiting(results: SimpleQueue[object]) -> None:
    workers, go_on = Workers(1), threading.Event()
    workers.start()
    workers.submit(own_clock, results.put)
    clock = int(str(results.get(timeout=WAIT_S)))
    workers.submit(lambda: (results.put("at it"), go_on.wait(WAIT_S)), results.put)
    assert results.get(timeout=WAIT_S) == "at it"
    waiting_s = settled(lambda: workers.used_s()[clock])
    threading.Event().wait(0.05)
    assert workers.used_s() == {clock: waiting_s}
    go_on.set()
    results.get(timeout=WAIT_S)
    workers.submit(lambda: sum(range(200_000)), results.put)
    results.get(timeout=WAIT_S)
    assert workers.used_s()[clock] > waiting_s
    workers.close()


def settled(look: Callable[[], float]) -> float:
    """A value once it is the same twice: the thread has come to rest."""
    ends_s = time.monotonic() + WAIT_S
    while (before := look()) != (threading.Event().wait(0.01), look())[1]:
        assert time.monotonic() < ends_s
    return before
