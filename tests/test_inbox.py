from __future__ import annotations

import os
import select
import threading

import pytest

from kvpoll_fsm.inbox import Inbox


def readable(fd: int) -> set[int]:
    return set(select.select([fd], [], [], 0)[0])


def test_tasks_in_their_order_and_a_sign_that_there_are_some() -> None:
    inbox, done = Inbox(), list[int]()
    fd = inbox.open()
    assert readable(fd) == set()
    for number in range(3):
        inbox.put(lambda number=number: done.append(number))  # type: ignore[misc]
    assert (len(inbox), readable(fd)) == (3, {fd})
    inbox.heard({fd})
    assert readable(fd) == set()
    inbox.heard(set())
    inbox.run()
    assert (done, len(inbox)) == ([0, 1, 2], 0)
    inbox.close()


def test_what_tasks_ask_for_comes_with_the_next_run() -> None:
    inbox, done = Inbox(), list[str]()
    inbox.put(lambda: inbox.put(lambda: done.append("second")))
    inbox.run()
    assert done == []
    inbox.abandon()
    assert done == ["second"]


def test_a_task_that_raises_keeps_no_other(caplog: pytest.LogCaptureFixture) -> None:
    inbox, done = Inbox(), list[int]()
    inbox.put(lambda: 1 // 0)  # type: ignore[arg-type]
    inbox.put(lambda: done.append(1))
    inbox.run()
    assert done == [1]
    assert [record.getMessage() for record in caplog.records] == ["request failed"]


def test_a_burst_is_done_in_turns() -> None:
    inbox, done = Inbox(), list[int]()
    for number in range(3):
        inbox.put(lambda number=number: done.append(number))  # type: ignore[misc]
    inbox.run(0)
    assert done == [0]
    inbox.run(0)
    assert done == [0, 1]
    inbox.run()
    assert done == [0, 1, 2]


def test_two_threads_share_what_is_left() -> None:
    inbox, done = Inbox(), list[int]()
    for number in range(2000):
        inbox.put(lambda number=number: done.append(number))  # type: ignore[misc]
    threads = [threading.Thread(target=inbox.abandon) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == list(range(2000))


def test_after_the_end_it_still_takes_tasks() -> None:
    inbox = Inbox()
    fd = inbox.open()
    inbox.close()
    inbox.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    inbox.put(lambda: None)
    assert len(inbox) == 1
