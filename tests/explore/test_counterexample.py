"""A broken law leaves a file, and the file shows the broken law again."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvpoll_fsm.channel import Channel
from kvpoll_fsm.cli import command
from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.ledger import Ledger
from kvpoll_fsm.testing.counterexample import Counterexample
from kvpoll_fsm.testing.explore import NO_END, explore
from kvpoll_fsm.testing.scene import Budget, Scene

SCENE = Scene("two parts", parts=2)
pytestmark = pytest.mark.timeout(300)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command(), list(arguments))


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Every part counts as the last."""
    right = Ledger.commit
    monkeypatch.setattr(Ledger, "commit", lambda self, offset, tokens: right(self, offset, tokens) or True)
    return monkeypatch


@pytest.fixture
def file(broken: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    broken.setattr("kvpoll_fsm.testing.scenes.QUICK", (SCENE,))
    result = run("explore", "--quick", "--jobs", "1", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert str(tmp_path / "counterexample-two-parts.json") in result.output
    return tmp_path / "counterexample-two-parts.json"


def test_the_file_shows_the_broken_law_again(file: Path) -> None:
    found = Counterexample.read(file)
    assert found.scene == SCENE
    assert len(found.text) == len(found.run)
    result = run("explore", "--replay", str(file))
    assert result.exit_code == 1
    assert f"broken: {found.law}" in result.output
    assert found.text[-1] in result.output


def test_once_mended_the_run_breaks_nothing(file: Path, broken: pytest.MonkeyPatch) -> None:
    broken.undo()
    found = Counterexample.read(file)
    law, steps = Counterexample(found.scene, found.law, found.run[:-1]).replay()
    assert not law
    assert len(steps) == len(found.run) - 1
    lost = Counterexample(found.scene, found.law, (*found.run[:-1], 99))
    with pytest.raises(InvalidInput, match="not possible any more"):
        lost.replay()


def test_a_state_without_an_end_is_shown_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Channel, "resend", lambda self: [])
    scene = Scene("a loss", faults=Budget(lose=1))
    (finding,) = explore(scene).findings
    assert finding.law == NO_END
    again = Counterexample.of(scene, finding)
    assert again.replay()[0] == NO_END
    monkeypatch.undo()
    assert again.replay()[0] == ""


def test_what_is_no_counterexample_is_refused(tmp_path: Path) -> None:
    scene = '{"name": "m", "ranks": %d}'
    texts = [f'{{"scene": {scene % ranks}, "law": "", "run": [{step}]}}' for ranks, step in ((65, 0), (1, -1))]
    deep = '{"scene": ' + "[" * 100_000
    for number, text in enumerate(("{", "{}", '{"scene": {"name": 3}, "law": "", "run": []}', "\udcff", deep, *texts)):
        path = tmp_path / f"{number}.json"
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        result = run("explore", "--replay", str(path))
        assert result.exit_code == 2
        assert "not a counterexample" in result.output
