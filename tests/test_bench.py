"""The benchmarks measure something real, say what is missing, and end whatever hangs. No figure is held to a limit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import figures, report
from benchmarks.peers import peers
from benchmarks.peers.bare_copy import Receiver as CopyReceiver
from benchmarks.peers.bare_copy import Sender as CopySender
from benchmarks.peers.base import Peer, Side
from benchmarks.plane import Plan, Plane
from benchmarks.results import Results, Series
from kvpoll_fsm import cli_bench

ROOT = Path(__file__).resolve().parent.parent
WITHIN_S = 40.0
RATIOS = {
    "shm_vs_memmove_64MiB",
    "tcp_vs_iperf3_64MiB",
    "tcp_vs_gloo_8MiB",
    "tcp_vs_mooncake_64MiB",
    "busy_shm_vs_bare_64MiB",
    "busy_tcp_vs_bare_64MiB",
    "poll_vs_dict_method",
    "transition_vs_transitions",
}


class Stuck(Side):
    """Answers nothing any more once it is to transfer."""

    def transfer(self) -> None:
        while True:
            time.sleep(60)


class Liar(CopySender):
    """Says it is done without having copied."""

    def transfer(self) -> None:
        pass


PEERS = [
    Peer("stuck", "other", Stuck, Side, settings="none"),
    Peer("liar", "other", Liar, CopyReceiver, settings="none"),
    Peer("absent", "other", Side, Side, settings="none", needs=("no_such_module",), install="nothing brings it"),
]
"""Found by name in this module by the processes that are started for them."""


def run(*keys: tuple[str, str, str], turn_s: float = WITHIN_S) -> Results:
    results = Results()
    known = {**peers(), **{peer.name: peer for peer in PEERS}}
    plan = Plan(keys=keys, rounds=1, sample_s=0.01, turn_s=turn_s)
    Plane(plan, results, time.monotonic() + WITHIN_S, print, known).run()
    return results


def test_transfers_are_measured_and_compared() -> None:
    keys = [(name, "64KiB", loop) for name, loop in (("memmove", "alone"), ("tcp", "alone"), ("tcp", "busy"))]
    results = run(*keys)
    assert results.missing == {}
    assert set(results.plane) == set(keys)
    for series in results.plane.values():
        assert series.gb_per_s > 0
        assert series.moved_nbytes == 65_536 * len(series.values)
        assert series.cpu_s > 0
    assert figures.faster(keys[0], keys[1]).value(results) > 0
    assert set(results.memory) == {"memmove", "tcp"}


def test_a_peer_that_hangs_is_ended_and_named() -> None:
    results = run(("stuck", "64KiB", "alone"), turn_s=2.0)
    assert results.plane == {}
    assert list(results.missing.values()) == ["sender: no answer in time, killed"]
    assert all(name.startswith("stuck") for name in results.missing)


def test_a_peer_that_moves_nothing_is_found_out() -> None:
    assert run(("liar", "64x128KiB", "alone")).missing == {
        "liar 64x128KiB alone": "64x128KiB: what arrived is not what was sent"
    }


def test_a_missing_peer_makes_its_figure_null_with_the_reason() -> None:
    results = run(("absent", "64KiB", "alone"))
    assert results.missing == {"absent": "no_such_module is not installed: nothing brings it"}
    results.missing["torch gloo"] = "torch is not installed"
    results.calls = {name: Series({0: [1e-6], 1: [2e-6]}) for name in ("poll", "dict method")}
    found = figures.summary(results)
    assert json.loads(json.dumps(found)) == found
    assert list(found) == ["ratios", "rooms_per_s", "bytes_per_room", "missing"]
    assert set(found["ratios"]) == RATIOS
    assert found["ratios"].pop("poll_vs_dict_method") == 1.0
    assert set(found["ratios"].values()) == {None}
    assert found["missing"]["tcp_vs_gloo_8MiB"] == "tcp 8MiB alone was not measured"
    assert found["missing"].keys() == RATIOS - {"poll_vs_dict_method"} | {"rooms_per_s", "bytes_per_room"}
    results.plane["tcp", "8MiB", "alone"] = Series({0: [1.0]}, 1)
    assert figures.summary(results)["missing"]["tcp_vs_gloo_8MiB"] == "torch gloo: torch is not installed"


def test_ratios_are_taken_within_rounds() -> None:
    slow_machine, quick_machine = [4.0, 4.0, 9.0], [1.0]
    one = Series({0: slow_machine, 1: quick_machine, 2: quick_machine})
    other = Series({0: [8.0], 1: [2.0], 3: [0.001]})
    assert one.faster_than(other) == 2.0
    assert one.faster_than(Series({7: [1.0]})) is None


def test_calls_take_time_and_the_whole_suite_has_its_names() -> None:
    results = Results()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.task", json.dumps({"task": "calls", "rounds": 1, "call_s": 0.001})],
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["calls"]
    assert {"poll", "poll, peer stopped", "dict method", "transition", "transitions"} <= found.keys()
    assert all(values[0] > 0 for _, rounds in found.values() for values in rounds.values())
    for peer, _, _ in figures.needed():
        assert peer in peers() or peer.endswith(" process")
    assert results.missing == {}


def test_the_page_keeps_what_people_wrote() -> None:
    page = report.into_page("# Benchmarks\n\nby hand\n", "first")
    again = report.into_page(page + "\nbehind\n", report.markdown(Results(), ["benchmarks/x.png"]))
    assert again.startswith("# Benchmarks\n\nby hand\n")
    assert again.endswith(f"{report.END}\n\nbehind\n") or again.endswith(f"{report.END}\nbehind\n")
    assert "first" not in again
    assert len(re.findall(r"\| not measured \|", again)) == len(figures.AIMS)


def test_without_the_source_tree_the_command_says_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_bench, "ROOT", tmp_path)
    done = CliRunner().invoke(cli_bench.bench, ["--quick", "--json"])
    assert done.exit_code == 1
    assert f"there is no {tmp_path / 'benchmarks'}" in done.output
    assert "make bench" in done.output


def test_the_command_runs_the_suite_of_its_source_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    suite = tmp_path / "benchmarks" / "__main__.py"
    suite.parent.mkdir()
    (suite.parent / "__init__.py").touch()
    suite.write_text("import sys; print(sys.argv[1:]); sys.exit(3)")
    monkeypatch.setattr(cli_bench, "ROOT", tmp_path)
    done = CliRunner().invoke(cli_bench.bench, ["--quick", "--json", "--out", str(tmp_path / "here")])
    assert done.exit_code == 3
    assert capfd.readouterr().out == f"{['--quick', '--json', '--out', str(tmp_path / 'here')]}\n"
