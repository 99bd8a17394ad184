"""The explorer itself: what it counts, what it tells, and that a run can be replayed."""

from __future__ import annotations

import pytest

from kvpoll_fsm.testing.explore import explore, replay, tell
from kvpoll_fsm.testing.laws import broken_law, is_end
from kvpoll_fsm.testing.scene import Budget, Scene
from kvpoll_fsm.testing.universe import Universe

SCENE = Scene("two parts", parts=2)
pytestmark = pytest.mark.timeout(300)


def test_a_scene_without_faults_ends_in_one_way() -> None:
    report = explore(SCENE)
    assert report.complete
    assert not report.findings
    assert report.ends == 1
    assert report.states < report.transitions


def test_two_explorations_find_the_same() -> None:
    scene = Scene("a crash", parts=2, faults=Budget(crash=1))
    first, second = explore(scene), explore(scene)
    assert (first.states, first.transitions, first.ends) == (second.states, second.transitions, second.ends)


def test_a_budget_adds_states() -> None:
    assert explore(Scene("a loss", parts=2, faults=Budget(lose=1))).states > explore(SCENE).states


def test_an_exploration_that_met_its_limit_is_not_complete() -> None:
    assert not explore(SCENE, limit=3).complete


def test_a_run_is_replayed_to_the_same_state() -> None:
    universe, run = Universe.begin(SCENE), []
    while not is_end(universe):
        run.append(0)
        universe = universe.step(universe.actions()[0])
        assert broken_law(universe) == ""
    assert replay(SCENE, run).key() == universe.key()
    lines = tell(SCENE, run)
    assert len(lines) == len(run)
    assert any("PartOutcome" in line and "Success" in line for line in lines)


def test_a_step_leaves_the_state_before_it_unchanged() -> None:
    universe = Universe.begin(SCENE)
    before = universe.key()
    for action in universe.actions():
        universe.step(action)
    assert universe.key() == before


@pytest.mark.parametrize("dummy", [0, 1])
def test_a_dummy_rank_takes_part(dummy: int) -> None:
    report = explore(Scene("dummy", ranks=2, parts=2, dummies=(dummy,)))
    assert report.complete
    assert not report.findings
