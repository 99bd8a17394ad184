"""Counting who was turned away, with a log that no flood can fill."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvpoll_fsm.refusals import Refusals

LOG = logging.getLogger("kvpoll_fsm")


@pytest.fixture
def refusals() -> Refusals:
    return Refusals("control", LOG)


def test_counts_by_reason_and_logs_ever_more_rarely(refusals: Refusals, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(1000):
        refusals.add("too late", f"from={number}")
    refusals.add("too early", "from=me", logging.DEBUG)
    assert refusals.counts() == {"too late": 1000, "too early": 1}
    assert (refusals.count("too late"), refusals.count("never")) == (1000, 0)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 10
    assert lines[1] == "refused plane=control count=2 reason=too late from=1"


def test_follows_counts_that_are_kept_elsewhere(refusals: Refusals, caplog: pytest.LogCaptureFixture) -> None:
    for counts in ({}, {"a": 1}, {"a": 1}, {"a": 700, "b": 1}):
        refusals.follow(counts)
    assert refusals.counts() == {"a": 700, "b": 1}
    assert [record.getMessage().split()[2:] for record in caplog.records] == [
        ["count=1", "reason=a"],
        ["count=700", "reason=a"],
        ["count=1", "reason=b"],
    ]


def test_what_is_returned_is_a_copy(refusals: Refusals) -> None:
    refusals.add("x")
    refusals.counts()["x"] = 9
    assert refusals.count("x") == 1


def test_threads_lose_no_count(refusals: Refusals) -> None:
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: refusals.add("x"), range(4000)))
    assert refusals.count("x") == 4000
