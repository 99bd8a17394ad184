"""The chaos run in its short form, and that its judge can say no."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import pytest

from tests.chaos.conduct import surplus
from tests.chaos.data import digest, make_arrays
from tests.chaos.judge import Room, Side, judged
from tests.chaos.plan import RECEIVERS, SENDERS, SURVIVORS, Plan, Rank, RoomPlan
from tests.chaos.run import GROWTH_NBYTES, grown, run
from tests.faults.relay import missing


@pytest.mark.timeout(180)  # it ends by itself; a room that hangs is given up after a minute, and then it can say so
@pytest.mark.skipif(bool(missing()), reason=missing() or "it can be made")
def test_rooms_under_random_faults() -> None:
    """As `make chaos`, with fewer rooms. Pains 1 to 5, 7, 8, 11, 14, 25."""
    summary = run(seed=11, rooms=90, rooms_per_s=8.0, calm_rooms=20)
    assert summary["violations"] == [], json.dumps(summary, indent=1)
    assert sum(summary["faults"].values()) >= 10
    assert summary["ends"]["healthy, senders"] == {"Success": 20}
    assert len(summary["ends"]["faults, senders"]) >= 3


# The plan


def test_a_plan_follows_from_its_seed() -> None:
    def drawn(seed: int) -> Any:
        plan = Plan(seed)
        rooms = [plan.room(number, calm=False) for number in (5, 0, 3)]
        return plan.layouts, rooms, list(islice(plan.faults(), 50)), plan.endpoints("r1")

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_a_plan_has_everything_in_it() -> None:
    plan = Plan(1)
    rooms = [plan.room(number, calm=False) for number in range(300)]
    faults = list(islice(plan.faults(), 300))
    assert {len(room.ranks) for room in rooms} == {1, 2, 4}
    assert {rank.resume for room in rooms for rank in room.ranks} == {"drain", "extend", "manual"}
    assert {step.do for room in rooms for step in room.steps} == {"open", "supply", "abort", "clear"}
    assert {fault.kind for fault in faults} == {"kill", "leave", "stop", "weather", "unplug"}
    assert {fault.target for fault in faults if fault.kind == "stop"} == {*SENDERS, *RECEIVERS}
    assert not {fault.target for fault in faults if fault.kind in ("kill", "leave")} & {*SURVIVORS}
    assert all(step.do in ("open", "supply") for step in plan.room(7, calm=True).steps)


def test_later_lives_of_a_room_have_the_same_data_at_other_places() -> None:
    plan = Plan(1)
    lives = [plan.room(7, calm=False, life=life) for life in range(3)]
    assert len({(life.sender, len(life.ranks), life.layout, life.tokens) for life in lives}) == 1
    assert len({life.ranks for life in lives}) == 3
    assert len({life.steps for life in lives}) == 3
    assert not lives[-1].again


def test_data_differs_from_room_to_room_and_in_every_byte() -> None:
    fields = [{"name": "a", "dtype": "bfloat16", "shape": [3], "per_room": False}]
    arrays = make_arrays(fields, 1, 1, 4)
    assert digest(fields, make_arrays(fields, 1, 1, 4)) == digest(fields, arrays)
    assert digest(fields, make_arrays(fields, 1, 2, 4)) != digest(fields, arrays)
    changed = {"a": arrays["a"].copy()}
    changed["a"][3, 2] ^= 1
    assert digest(fields, changed) != digest(fields, arrays)


# The judge


class Process:
    alive = True


def ended(side: str, rank: int = 0, **changes: Any) -> dict[str, Any]:
    """A report of a side that succeeded, with changes."""
    good = {
        "side": side,
        "rank": rank,
        "state": "Success",
        "history": ["Bootstrapping", "WaitingForInput", "Success"],
        "parts": [[0, 10, True]],
        "digest": "right" if side == "receiver" else "",
        "touched": False,
        "cleared": False,
        "code": None,
        "cause_rank": None,
        "detail": None,
    }
    return {**good, **changes}


def failed(side: str, rank: int = 0, code: str = "PeerLost", **changes: Any) -> dict[str, Any]:
    lost = {"state": "Failed", "history": ["Bootstrapping", "Failed"], "parts": [], "digest": "", "code": code}
    return ended(side, rank, **{**lost, "cause_rank": 0, "detail": "why", **changes})


def verdict(*reports: dict[str, Any], must_succeed: bool = False, ranks: int = 1) -> list[str]:
    plan = RoomPlan(1, 0, 0, "s0", (Rank("r0", 8, "drain"),) * ranks, True, 10, (), False)
    room = Room(plan, "right", must_succeed, 0.0, 0)
    for report in reports:
        room.sides[report["side"], report["rank"]] = Side(Process(), report)
    return judged(room)


TX, RX = ended("sender"), ended("receiver")
ALLOWED = {
    "success": (TX, RX),
    "failure": (failed("sender"), failed("receiver", code="DeadlinePassed")),
    "nobody told the receiver": (TX, failed("receiver", code="OutcomeUnknown", cause_rank=0)),
    "the receiver's host gave it up": (TX, failed("receiver", code="Aborted", touched=True)),
    "only one side was left": (RX,),
}
FORBIDDEN: dict[str, tuple[Any, ...]] = {
    "wrong bytes": ("wrong bytes", TX, ended("receiver", digest="wrong")),
    "no data": ("without data", TX, ended("receiver", digest="")),
    "no reason": ("without a good reason", failed("sender", code=None), failed("receiver")),
    "no detail": ("without a good reason", failed("sender", detail=""), failed("receiver")),
    "a bug of ours": ("without a good reason", failed("sender", code="ProtocolError"), failed("receiver")),
    "a rank that is none": ("without a good reason", failed("sender", cause_rank=7), failed("receiver")),
    "success of the receiver alone": ("the sender did not", failed("sender"), RX),
    "failure of the receiver alone": ("no reason of its own", TX, failed("receiver", code="DeadlinePassed")),
    "a move after the end": (
        "went on after its end",
        ended("sender", history=["Bootstrapping", "Failed", "Success"]),
        RX,
    ),
    "not ended": (
        "has not ended",
        ended("sender", state="Transferring", history=["Bootstrapping", "Transferring"]),
        RX,
    ),
    "a gap between parts": ("do not join", ended("sender", parts=[[0, 4, False], [5, 5, True]]), RX),
    "a last part that is not": ("do not join", ended("sender", parts=[[0, 4, True], [4, 6, True]]), RX),
    "tokens are missing": ("with 4 of 10 tokens", ended("sender", parts=[[0, 4, False]]), RX),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_what_may_be(case: str) -> None:
    assert verdict(*ALLOWED[case]) == []


@pytest.mark.parametrize("case", FORBIDDEN)
def test_what_must_not_be(case: str) -> None:
    phrase, *reports = FORBIDDEN[case]
    assert any(phrase in text for text in verdict(*reports))


def test_success_needs_every_rank() -> None:
    assert verdict(TX, RX, ranks=2) == ["room 1, life 0: the sender succeeded without [('receiver', 1)]"]


def test_a_room_in_calm_must_succeed() -> None:
    assert verdict(TX, RX, must_succeed=True) == []
    assert len(verdict(failed("sender"), failed("receiver"), must_succeed=True)) == 2
    assert any("('receiver', 0) should have succeeded" in text for text in verdict(TX, must_succeed=True))


def test_a_room_is_over_when_every_living_side_has_ended() -> None:
    plan = RoomPlan(1, 0, 0, "s0", (Rank("r0", 8, "drain"),), True, 10, (), False)
    room, dead = Room(plan, "right", False, 0.0, 1), Process()
    room.sides["sender", 0] = Side(Process(), TX)
    assert not room.is_over
    room.steps_left = 0
    assert room.is_over
    room.sides["receiver", 0] = Side(dead)
    assert not room.is_over
    dead.alive = False
    assert room.is_over


def test_memory_that_grows_is_found() -> None:
    assert grown({"s0": [100, 300, 100 + GROWTH_NBYTES]}) == []
    assert len(grown({"s0": [100, 300, 101 + GROWTH_NBYTES], "r0": [100, 100, 100]})) == 1


def test_what_is_left_over_is_found() -> None:
    assert surplus({"rooms": 0, "fds": 9}, {"rooms": 0, "fds": 8, "Table.of": 0}) == {}
    assert surplus({"rooms": 0, "fds": 9}, {"rooms": 1, "fds": 9, "Table.of": 2}) == {
        "rooms": [0, 1],
        "Table.of": [0, 2],
    }
