"""The simulator's short form, and that a run is decided by its seed alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from kvpoll_fsm import cli_simulate
from kvpoll_fsm.cli import command
from kvpoll_fsm.deadlines import Deadlines
from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.testing.sim_draw import PROBES, draw
from kvpoll_fsm.testing.sim_plan import Abort, Break, Crash, Event, Fault, Machine, Open, Plan, Rank
from kvpoll_fsm.testing.simulate import Violation, simulate

pytestmark = pytest.mark.timeout(300)
MODES = ("safety", "liveness")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 12))])
def test_every_law_holds(seed: int, mode: str) -> None:
    outcome = simulate(draw(seed, mode, rooms=30, hours=0.5))
    assert outcome.violation is None, outcome.violation
    if mode == "liveness":
        probes = sum(isinstance(event, Open) and event.must_succeed for event in outcome.plan.events)
        assert PROBES // 2 <= probes <= PROBES


def test_a_day_goes_by() -> None:
    """Where nobody has anything to say, time costs nothing."""
    outcome = simulate(draw(1, "safety", rooms=30, hours=48.0))
    assert outcome.violation is None, outcome.violation
    assert outcome.virtual_hours > 24


def calm(seed: int) -> Plan:
    """Forty rooms at once, each with a number of its own, of quick hosts that wait for nothing; no faults."""
    plan = draw(seed, "safety", rooms=40, hours=0.05)
    managed = {machine.name for machine in plan.machines if machine.managed}
    rooms: list[Open] = []
    for event in plan.events:
        ranks = [replace(rank, after_s=0.0) for rank in getattr(event, "ranks", ()) if rank.host in managed]
        if isinstance(event, Open) and any(rank.blocks for rank in ranks):
            prompt = replace(event, after_s=0.0, supply=((0.0, event.tokens),), must_succeed=True)
            rooms.append(replace(prompt, room=len(rooms) + 1, ranks=tuple(ranks)))
    machines = tuple(replace(machine, work_s=0.01) for machine in plan.machines)
    return replace(plan, machines=machines, events=tuple(rooms), deadlines=Deadlines())


@pytest.mark.parametrize("seed", [3, 4, 8, 14, 21, 28])
def test_without_faults_every_room_succeeds_however_small_the_pools(seed: int) -> None:
    plan = calm(seed)
    outcome = simulate(plan)
    assert plan.one_way
    assert plan.rooms > 20
    assert outcome.violation is None, outcome.violation
    assert outcome.outcomes["Success"] == sum(1 + len(event.ranks) for event in plan.events if isinstance(event, Open))


BREAKS = {
    "dies": Break(0.0, 1e5, "", "", "a"),
    "fails late": Break(0.0, 1e5, "", "", "a", late=1.0),
    "hangs": Break(0.0, 1e5, "", "", "a", late=0.5, hang=True),
    "fails collaterally": Break(0.0, 1e5, "", "", "a", collateral=True),
    "fails late, collaterally": Break(0.0, 1e5, "", "", "a", late=0.5, collateral=True),
    "cannot be reached": Break(0.0, 1e5, "", "", "a", port=True),
}


@pytest.mark.parametrize("how", BREAKS)
def test_a_transport_that_does_not_work_fails_no_room_that_has_another(how: str) -> None:
    plan = calm(14)
    pairs = [(a.name, b.name) for a in plan.machines for b in plan.machines if a is not b]
    breaks = tuple(replace(BREAKS[how], source=a, dest=b) for a, b in pairs)
    outcome = simulate(replace(plan, events=(*breaks, *plan.events), transports=("a", "b"), one_way=True))
    assert outcome.violation is None, outcome.violation
    rooms = [event for event in plan.events if isinstance(event, Open)]
    assert outcome.outcomes["Success"] == sum(1 + len(room.ranks) for room in rooms), outcome.failure_codes
    if how == "hangs":
        assert outcome.faults["hurried writes"] > 0
    elif how != "cannot be reached":
        assert outcome.faults["failed writes"] > 0


def test_plans_hold_faults_of_every_kind_and_rooms_of_every_sort() -> None:
    events = [event for seed in range(20) for event in draw(seed, "safety", rooms=40, hours=1.0).events]
    rooms = [event for event in events if isinstance(event, Open)]
    ranks = [rank for room in rooms for rank in room.ranks]
    assert {type(event) for event in events} == {*get_args(Fault), Open}
    assert {rank.resume for rank in ranks} == {"drain", "extend", "manual"}
    assert {len(room.ranks) for room in rooms} == {1, 2, 4}
    assert {room.staged for room in rooms} == {room.told for room in rooms} == {True, False}
    assert 0 in {rank.blocks for rank in ranks}


def test_writes_fail_and_land_late() -> None:
    """A host so slow that the write is under way when its transport breaks."""
    machines = (Machine("m0", 4, 1, work_s=1.0), MACHINES[1])
    breaks = Break(2.5, 20.0, "m0", "m1", "a", late=1.0)
    outcomes = [simulate(replace(plan_of(room_of(), breaks, machines=machines), noise=noise)) for noise in range(5)]
    assert {outcome.violation for outcome in outcomes} == {None}
    assert sum(outcome.faults["failed writes"] for outcome in outcomes) > 0
    assert sum(outcome.faults["late writes"] for outcome in outcomes) > 0
    assert {code for outcome in outcomes for code in outcome.failure_codes} == {"TransportFailed"}


def test_a_seed_decides_everything_whatever_the_hash_seed() -> None:
    script = (
        "from kvpoll_fsm.testing.sim_draw import draw; from kvpoll_fsm.testing.simulate import simulate;"
        "print([simulate(draw(seed, 'safety', 15, 0.2)).digest for seed in (2, 7)])"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
            timeout=50,
        ).stdout
        for seed in (1, 2, 3)
    }
    assert len(digests) == 1
    here = [simulate(draw(seed, "safety", 15, 0.2)).digest for seed in (2, 7)]
    assert digests == {f"{here}\n"}
    assert here[0] != here[1]


# Plans

MACHINES = (Machine("m0", 4, 1), Machine("m1", 4, 1))


def plan_of(*events: Event, machines: tuple[Machine, ...] = MACHINES) -> Plan:
    return Plan(seed=5, mode="safety", hours=0.1, noise=7, machines=machines, events=events)


def room_of(tokens: int = 9, *ranks: Rank, at_s: float = 1.0) -> Open:
    return Open(at_s, 1, "m0", tokens, ranks or (Rank("m1", 2),), ((0.0, tokens),))


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = draw(3, "liveness", rooms=20, hours=0.2)
    path = tmp_path / "plan.json"
    plan.write(path)
    assert Plan.read(path) == plan
    assert simulate(Plan.read(path)).digest == simulate(plan).digest


@pytest.mark.parametrize(
    ("found", "put"),
    [('"safety"', '"other"'), ('"m0"', '"elsewhere"'), ('"rooms"', '"rooms'), ('"noise"', '"nois"')],
)
def test_what_is_no_plan_is_refused(tmp_path: Path, found: str, put: str) -> None:
    path = tmp_path / "plan.json"
    plan_of(room_of()).write(path)
    text = path.read_text()
    path.write_text(text.replace(found, put) if found in text else "[")
    if put == '"elsewhere"':
        path.write_text(text.replace('"sender": "m0"', '"sender": "elsewhere"'))
    with pytest.raises(InvalidInput, match=r"plan\.json"):
        Plan.read(path)


@pytest.mark.parametrize("ranks", [(Rank("m1", 2),), (Rank("m1", 1, "extend"), Rank("m1", 2), Rank("m1", 0))])
def test_without_faults_a_room_succeeds_on_every_side(ranks: tuple[Rank, ...]) -> None:
    outcome = simulate(plan_of(room_of(9, *ranks)))
    assert outcome.violation is None, outcome.violation
    assert outcome.outcomes == {"Success": 1 + len(ranks)}


def test_an_engine_that_names_its_blocks() -> None:
    machines = (Machine("m0", 4, 2, managed=False), Machine("m1", 4, 1, managed=False))
    room = Open(1.0, 1, "m0", 9, (Rank("m1", 2, "manual", think_s=0.5),), ((0.0, 4), (1.0, 9)), staged=False)
    outcome = simulate(plan_of(room, machines=machines))
    assert outcome.violation is None, outcome.violation
    assert outcome.outcomes == {"Success": 2}


def test_an_abort_and_a_crash_are_carried_out() -> None:
    slow = (Machine("m0", 4, 1, work_s=1.0), MACHINES[1])
    outcome = simulate(plan_of(room_of(), Abort(2.0, "m0", 1), machines=slow))
    assert (outcome.failure_codes, outcome.violation) == ({"Aborted": 2}, None)
    outcome = simulate(plan_of(room_of(), Crash(2.0, 60.0, "m0"), machines=slow))
    assert (outcome.failure_codes, outcome.violation) == ({"PeerLost": 1}, None)
    outcome = simulate(plan_of(room_of(), Crash(2.0, 60.0, "m0", bye=True), machines=slow))
    assert (outcome.failure_codes, outcome.violation) == ({"Aborted": 2}, None)


# The command


def kvpoll(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(command(), ["simulate", *arguments])
    return result.exit_code, result.output


def test_the_command_prints_one_document() -> None:
    code, text = kvpoll("--seed", "4", "--rooms", "12", "--hours", "0.5", "--mode", "liveness", "--json")
    told = json.loads(text)
    assert code == 0
    assert (told["seed"], told["mode"], told["violations"]) == (4, "liveness", 0)
    assert told["rooms"] > 12
    assert told["events"] > 0
    assert told["virtual_hours"] > 0.5
    assert set(told["outcomes"]) == {"Success", "Failed"}
    assert sum(told["failure_codes"].values()) == told["outcomes"]["Failed"]
    assert isinstance(told["faults"], dict)


def test_several_seeds_are_summed_in_any_number_of_processes() -> None:
    arguments = ["--seed", "4", "--seeds", "3", "--rooms", "5", "--hours", "0.2", "--json"]
    alone, together = kvpoll(*arguments), kvpoll(*arguments, "--jobs", "2")
    assert alone == together
    assert json.loads(alone[1])["seeds"] == 3


def test_no_seed_begins_after_its_time() -> None:
    code, text = kvpoll("--seeds", "1000000", "--minutes", "0.0001", "--rooms", "3", "--hours", "0.1")
    assert code == 0
    assert len(text.splitlines()) == 1
    assert text.startswith("seed 0: 3 rooms, ")


def test_bad_usage(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    for arguments in (["--mode", "other"], ["--seed", "-1"], ["--replay", str(bad)], ["--replay", "nowhere.json"]):
        assert kvpoll(*arguments)[0] == 2


def test_a_broken_law_is_told_kept_and_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_it(run: object, until_s: float) -> None:
        raise AssertionError("the law of the test")

    monkeypatch.setattr("kvpoll_fsm.testing.simulate._Run.to_the_end", break_it)
    code, text = kvpoll("--seed", "6", "--rooms", "2", "--hours", "0.1", "--out", str(tmp_path))
    path = tmp_path / "simulation-safety-6.json"
    assert code == 1
    assert "broken: the law of the test" in text
    assert f"kvpoll simulate --replay {path}" in text
    code, text = kvpoll("--replay", str(path))
    assert code == 1
    assert "broken: the law of the test" in text
    monkeypatch.undo()
    assert kvpoll("--replay", str(path))[0] == 0


def test_a_law_is_known_by_where_it_is_checked() -> None:
    clock = cli_simulate.run_plan(plan_of(room_of()))
    assert clock.violation is None
    try:
        raise ValueError("odd")
    except ValueError as error:
        from kvpoll_fsm.testing.sim_clock import Clock

        found = Violation.of(error, Clock())
    assert found.law == "ValueError escaped: odd"
    assert "raise ValueError" in found.where
