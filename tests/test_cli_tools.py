"""kvpoll keygen, check-trace, explore."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from kvpoll_fsm import BlockPool, Endpoint, Field, Layout
from kvpoll_fsm.cli import command
from kvpoll_fsm.security import Keys
from kvpoll_fsm.testing.scenes import FULL, QUICK


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command(), list(arguments))


def test_keygen_makes_keys_that_load(tmp_path: Path) -> None:
    result = run("keygen", "tx", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert Keys.load(tmp_path / "tx.key_secret", tmp_path).public
    assert run("keygen", "tx", "--out", str(tmp_path)).exit_code == 2


@pytest.fixture
def traces(tmp_path: Path) -> list[str]:
    """Traces of both ends of a room of three parts."""
    layout = Layout(8, [Field("x", "float32", (4,))])
    names = [str(tmp_path / "tx.jsonl"), str(tmp_path / "rx.jsonl")]
    with (
        Endpoint(pool=BlockPool(layout, 4), trace=names[0]) as tx,
        Endpoint(pool=BlockPool(layout, 2), trace=names[1]) as rx,
    ):
        sender, receiver = tx.sender(1), rx.receiver(1, peer=str(tx.address), tokens=16)
        sender.send({"x": np.ones((40, 4), np.float32)})
        assert len(receiver.result(10)["x"]) == 40
        assert {type(record).__name__ for record in rx.trace()} >= {"StateRecord", "PartEntry", "MessageRecord"}
    return names


def test_check_trace_finds_nothing_in_a_good_transfer(traces: list[str]) -> None:
    result = run("check-trace", *traces)
    assert result.exit_code == 0, result.output
    assert "of 2 endpoints: 0 problems" in result.output


def test_check_trace_finds_a_move_that_no_row_allows(traces: list[str]) -> None:
    lines = Path(traces[1]).read_text().splitlines()
    success = next(line for line in lines if '"Success"' in line and '"kind":"state"' in line)
    Path(traces[1]).write_text("\n".join([*lines, success.replace('"Success"', '"Transferring"')]))
    result = run("check-trace", *traces)
    assert result.exit_code == 1
    assert "Transferring after Success, which nothing leaves" in result.output


def test_check_trace_says_which_line_is_no_record(traces: list[str]) -> None:
    with Path(traces[0]).open("a") as file:
        file.write("{}\n")
    result = run("check-trace", *traces)
    assert result.exit_code == 2
    assert "tx.jsonl, line" in result.output


@pytest.mark.timeout(300)
def test_explore_prints_one_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make explore` runs all quick scenes; here the first three tell whether the command does."""
    monkeypatch.setattr("kvpoll_fsm.testing.scenes.QUICK", QUICK[:3])
    result = run("explore", "--quick", "--json", "--jobs", "1")
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert set(report) == {"configurations", "states", "transitions", "violations", "complete"}
    assert report["complete"] is True
    assert report["violations"] == 0
    assert [scene["name"] for scene in report["configurations"]] == [scene.name for scene in QUICK[:3]]


@pytest.mark.timeout(300)
def test_explore_says_that_it_is_not_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpoll_fsm.testing.scenes.QUICK", QUICK[:1])
    result = run("explore", "--quick", "--limit", "10", "--jobs", "2")
    assert result.exit_code == 1
    assert "NOT complete" in result.output


def test_scenes_have_names_of_their_own() -> None:
    assert len({scene.name for scene in FULL}) == len(FULL)
    assert set(QUICK) < set(FULL)
