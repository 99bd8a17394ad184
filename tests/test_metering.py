from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvpoll_fsm import Failure, FailureCode, KVPoll, PartRecord
from kvpoll_fsm.commands import Preflight, StartPart
from kvpoll_fsm.inputs import Input, PartWritten, Preflighted, Progress
from kvpoll_fsm.metering import Histogram, Meter
from kvpoll_fsm.session import RoomKey, Session
from tests.helpers import LAYOUT, ROOM_NBYTES, TOKEN_NBYTES

# Durations


@pytest.mark.parametrize("seed", range(5))
def test_percentiles_are_right_to_5_percent(seed: int) -> None:
    drawn = random.Random(seed)
    values = sorted(10 ** drawn.uniform(-4.9, 3.9) for _ in range(drawn.randrange(1, 3000)))
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    for share in (0.01, 0.5, 0.9, 0.99, 1.0):
        exact = values[-(-len(values) * round(share * 100) // 100) - 1]
        assert histogram.percentile(share) == pytest.approx(exact, rel=0.05)
    assert histogram.most_s == values[-1]


def test_durations_beyond_the_buckets_count_in_the_last_and_the_first() -> None:
    histogram = Histogram()
    for seconds in (0.0, -1.0, 1e-9, 1e9):
        histogram.add(seconds)
    assert histogram.count == 4
    assert histogram.percentile(0.5) == pytest.approx(1e-5, rel=0.1)
    assert histogram.percentile(1.0) == pytest.approx(1e4, rel=0.1)


def test_without_durations_there_are_no_percentiles() -> None:
    assert Histogram().percentile(0.5) is None
    assert Histogram().shown() == {"p50": None, "p90": None, "p99": None, "max": None, "count": 0}


def test_what_is_kept_does_not_grow() -> None:
    histogram = Histogram()
    for _ in range(10_000):
        histogram.add(1.0)
    assert len(histogram._buckets) == Histogram.BUCKETS


# Rooms


class Bench:
    """A meter, and rooms that fare as they are told to."""

    def __init__(self) -> None:
        self.time_s = 0.0
        self.meter = Meter(LAYOUT, ("shm", "tcp"), lambda: self.time_s)
        self.fed: list[Input] = []
        self.feed = self.meter.feeding(lambda key, event: self.fed.append(event))

    def sender(self, room: int = 1) -> RoomKey:
        key = RoomKey("sender", room, 0, 1)
        self.meter.opened()
        return key

    def reach(self, key: RoomKey, name: str, ok: bool = True, rank: int = 0) -> None:
        self.meter.commanded(key, Preflight(rank, 1, name))
        self.feed(key, Preflighted(rank, 1, name, ok))

    def start(
        self, key: RoomKey, *names: str, part: int = 0, tokens: int = 10, attempt: int = 0, shut: str = ""
    ) -> None:
        targets = tuple(
            cast("Any", SimpleNamespace(rank=rank, transport=name, shut=name if name == shut else ""))
            for rank, name in enumerate(names)
        )
        self.meter.commanded(key, StartPart(part, 0, tokens, (), targets, attempt))

    def written(self, key: RoomKey, name: str, ok: bool = True, rank: int = 0, **more: Any) -> None:
        self.feed(key, PartWritten(rank=rank, part=0, transport=name, ok=ok, **more))

    def end(self, key: RoomKey, code: FailureCode | None = None, parts: tuple[PartRecord, ...] = ()) -> None:
        state = KVPoll.Failed if code else KVPoll.Success
        failure = Failure.of(code, "", state=state) if code else None
        self.meter.ended(key, cast("Session", SimpleNamespace(state=state, failure=failure, parts=parts)))

    def row(self, name: str, side: str = "sent") -> dict[str, Any]:
        found: dict[str, Any] = self.meter.report()[side][name]
        return found


def counts(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["rooms"], row["succeeded"], row["failures"], row["parts"], row["reissued"]


def test_a_room_that_one_transport_carries() -> None:
    bench = Bench()
    key = bench.sender()
    bench.reach(key, "shm")
    bench.time_s = 5.0
    bench.meter.supplied(key)
    bench.start(key, "shm", tokens=10)
    bench.written(key, "shm")
    bench.time_s = 6.0
    bench.meter.supplied(key)
    bench.start(key, "shm", part=1, tokens=6)
    bench.written(key, "shm")
    assert bench.meter.report()["live"] == 1
    bench.time_s = 7.0
    bench.end(key)
    row = bench.row("shm")
    assert counts(row) == (1, 1, {}, 2, 0)
    assert row["success_share"] == 1.0
    assert row["nbytes"] == 16 * TOKEN_NBYTES + ROOM_NBYTES
    assert (row["latency_s"]["max"], row["latency_s"]["count"]) == (2.0, 1)
    assert [row["latency_s"][point] for point in ("p50", "p90", "p99")] == [pytest.approx(2.0, rel=0.05)] * 3
    assert bench.meter.report() == {"seconds": 7.0, "live": 0, "sent": {"shm": row}, "received": {}}


def test_all_that_a_session_is_told_reaches_it() -> None:
    bench = Bench()
    key = bench.sender()
    told: list[Input] = [Progress(0, 5), PartWritten(0, 0, "shm", True), Preflighted(0, 1, "shm", False)]
    for event in told:
        bench.feed(key, event)
        bench.feed(RoomKey("sender", 9, 0, 1), event)  # one that nobody counts
    assert bench.fed == [event for event in told for _ in range(2)]


def test_a_room_that_falls_back_is_no_success_of_the_first() -> None:
    bench = Bench()
    key = bench.sender()
    bench.meter.supplied(key)
    bench.reach(key, "shm")
    bench.start(key, "shm")
    bench.written(key, "shm", ok=False)
    bench.reach(key, "tcp")
    bench.start(key, "tcp", attempt=1)
    bench.written(key, "tcp")
    bench.time_s = 3.0
    bench.end(key)
    assert counts(bench.row("shm")) == (1, 0, {"TransportFailed": 1}, 0, 1)
    assert counts(bench.row("tcp")) == (1, 1, {}, 1, 0)
    assert bench.row("shm")["latency_s"]["count"] == 1, "what it cost counts where it began"
    assert bench.row("tcp")["latency_s"]["count"] == 0


def test_a_transport_that_cannot_be_reached() -> None:
    bench = Bench()
    key = bench.sender()
    bench.reach(key, "shm", ok=False)
    bench.reach(key, "tcp")
    bench.start(key, "tcp")
    bench.written(key, "tcp")
    bench.end(key)
    assert counts(bench.row("shm")) == (1, 0, {"TransportUnavailable": 1}, 0, 0)
    assert counts(bench.row("tcp")) == (1, 1, {}, 1, 0)


def test_anothers_trouble_does_not_count_against_it() -> None:
    bench = Bench()
    key = bench.sender()
    bench.reach(key, "shm")
    bench.start(key, "shm")
    bench.written(key, "shm", ok=False, collateral=True)
    bench.start(key, "shm", attempt=1)
    bench.written(key, "shm")
    bench.end(key)
    assert counts(bench.row("shm")) == (1, 1, {}, 1, 1)


def test_a_transport_that_a_breaker_keeps_rooms_from_was_not_tried() -> None:
    bench = Bench()
    key = bench.sender()
    bench.feed(key, Preflighted(0, 1, "memory", False, shut=True))
    bench.start(key, "shm", shut="shm")
    bench.written(key, "shm", ok=False, shut=True)
    bench.start(key, "tcp", attempt=1)
    bench.written(key, "tcp")
    bench.end(key)
    assert bench.meter.report()["sent"].keys() == {"tcp"}
    assert counts(bench.row("tcp")) == (1, 1, {}, 1, 0)


def test_our_own_fault_is_not_the_transports() -> None:
    bench = Bench()
    key = bench.sender()
    bench.start(key, "shm")
    bench.written(key, "shm", ok=False, ours=True)
    bench.end(key, FailureCode.InternalError)
    assert counts(bench.row("shm")) == (1, 0, {"InternalError": 1}, 0, 0)


def test_a_room_that_fails_counts_its_cause_where_it_was_last() -> None:
    bench = Bench()
    key = bench.sender()
    bench.reach(key, "shm", ok=False)
    bench.reach(key, "tcp")
    bench.start(key, "tcp")
    bench.end(key, FailureCode.DeadlinePassed)
    assert counts(bench.row("shm")) == (1, 0, {"TransportUnavailable": 1}, 0, 0)
    assert counts(bench.row("tcp")) == (1, 0, {"DeadlinePassed": 1}, 0, 0)
    assert bench.row("tcp")["latency_s"]["count"] == 0


def test_a_room_that_tried_none() -> None:
    bench = Bench()
    bench.end(bench.sender(), FailureCode.Aborted)
    assert counts(bench.row("none")) == (1, 0, {"Aborted": 1}, 0, 0)


def test_every_rank_has_its_part() -> None:
    bench = Bench()
    key = bench.sender()
    bench.start(key, "shm", "tcp", tokens=4)
    bench.written(key, "shm", rank=0)
    bench.written(key, "tcp", rank=1)
    bench.end(key)
    for name in ("shm", "tcp"):
        assert counts(bench.row(name)) == (1, 1, {}, 1, 0)
        assert bench.row(name)["nbytes"] == 4 * TOKEN_NBYTES + ROOM_NBYTES


def test_a_part_is_not_issued_again_by_the_next_one() -> None:
    bench = Bench()
    key = bench.sender()
    bench.start(key, "tcp", part=0)
    bench.written(key, "tcp", ok=False)
    bench.start(key, "shm", part=0, attempt=1)
    bench.written(key, "shm")
    bench.start(key, "shm", part=1)
    bench.written(key, "shm")
    bench.end(key)
    assert bench.row("tcp")["reissued"] == 1
    assert bench.row("shm")["reissued"] == 0


def record(part: int, transport: str, tokens: int = 4) -> PartRecord:
    return PartRecord(part, 0, tokens, False, transport)


def test_what_is_received() -> None:
    bench = Bench()
    for room, code, parts in [
        (1, None, (record(0, "shm"), record(1, "shm"))),
        (2, FailureCode.PeerLost, (record(0, "tcp"), record(1, "invented by the peer"))),
        (3, FailureCode.PeerLost, ()),
        (4, None, (record(0, "tcp", tokens=0),)),  # a rank without data
    ]:
        key = RoomKey("receiver", room, 0, 1)
        bench.meter.opened()
        bench.end(key, code, parts)
    report = bench.meter.report()
    assert report["sent"] == {}
    rows = {
        name: (row["rooms"], row["succeeded"], row["parts"], row["nbytes"]) for name, row in report["received"].items()
    }
    assert rows == {
        "shm": (1, 1, 2, 8 * TOKEN_NBYTES + ROOM_NBYTES),
        "tcp": (2, 1, 2, 4 * TOKEN_NBYTES + ROOM_NBYTES),
        "other": (1, 0, 1, 4 * TOKEN_NBYTES),
        "none": (1, 0, 0, 0),
    }


def test_rooms_that_have_ended_are_forgotten() -> None:
    bench = Bench()
    for room in range(1000):
        key = bench.sender(room)
        bench.reach(key, "shm")
        bench.end(key)
    assert not bench.meter._live
    assert len(bench.meter._tallies) == 1
