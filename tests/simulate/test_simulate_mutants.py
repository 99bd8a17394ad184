"""The simulator can fail: bugs put into the production code are found, shrunk to a short plan, and replayed."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpoll_fsm.testing.sim_draw import draw
from kvpoll_fsm.testing.sim_plan import Plan
from kvpoll_fsm.testing.sim_shrink import shrink
from kvpoll_fsm.testing.simulate import Outcome, simulate
from tests.explore.test_mutants import MUTANTS, Mutant

pytestmark = pytest.mark.timeout(300)
SEEDS = 10
MOST_EVENTS = 8
FOUND = {
    "is_last ignored": "",
    "receiver succeeds on its own coverage": "has Success, its sender is",
    "blocks freed at abort": "LeaseId(side='receiver'",
    "resume resets the state": "moved from Transferring to WaitingForInput",
    "next transport before the first is quiescent": "",
    "ack dropped": "",
    "no stall deadline in WaitingForInput": "has timers",
}
"""Those the simulator finds within a few seeds, and a word of the law that breaks."""


def first_broken(seeds: int) -> Outcome:
    for seed in range(seeds):
        for mode in ("safety", "liveness"):
            outcome = simulate(draw(seed, mode, rooms=20, hours=0.3))
            if outcome.violation is not None:
                return outcome
    raise AssertionError(f"not found in {seeds} seeds")


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.name in FOUND], ids=lambda mutant: mutant.name)
def test_a_mutant_is_found_shrunk_and_replayed(mutant: Mutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.infect(monkeypatch)
    outcome = first_broken(SEEDS)
    assert outcome.violation is not None
    assert FOUND[mutant.name] in outcome.violation.law
    assert 0 < len(outcome.violation.recent) <= 25
    small = shrink(outcome.plan, outcome.violation, runs=60)
    assert len(small.events) <= MOST_EVENTS, small.events
    small.write(tmp_path / "plan.json")
    again = simulate(Plan.read(tmp_path / "plan.json"))
    assert again.violation is not None
    assert again.violation.where == outcome.violation.where
    monkeypatch.undo()
    assert simulate(small).violation is None


def test_every_named_mutant_is_there() -> None:
    assert {mutant.name for mutant in MUTANTS} >= FOUND.keys()
