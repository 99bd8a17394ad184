"""kvpoll conformance: reports what passed, failed and was skipped, also when the transport crashes or hangs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvpoll_fsm.cli import command
from kvpoll_fsm.errors import InvalidInput, TransportUnavailable
from kvpoll_fsm.testing.conformance import Spec, run


def kvpoll(*arguments: str) -> Result:
    return CliRunner().invoke(command(), ["conformance", *arguments])


@pytest.mark.timeout(300)
def test_as_json_and_with_options() -> None:
    done = kvpoll("memory", "--json", "--option", "steps=3", "--option", "step_nbytes=1048576")
    report = json.loads(done.stdout)
    assert (done.exit_code, report["ok"], report["failed"], report["not_run"]) == (0, True, 0, 0)
    assert report["options"] == {"steps": 3, "step_nbytes": 1 << 20}
    assert report["capabilities"]["reports_progress"]
    assert report["passed"] + report["skipped"] == len(report["tests"])
    assert all(test["reason"] for test in report["tests"] if test["outcome"] == "skipped")
    assert all(test["promise"] for test in report["tests"])


def test_what_cannot_be_tested_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    done = kvpoll("mmory")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "did you mean 'memory'?" in done.stderr
    assert "cannot listen" in kvpoll("tcp", "--option", "host=192.0.2.77").stderr
    assert "color" in kvpoll("memory", "--option", "color=blue").stderr
    assert kvpoll("memory", "--option", "steps").exit_code == 2
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'kvpoll-fsm[conformance]'" in kvpoll("memory").stderr


@pytest.mark.parametrize(("name", "word"), [("Crashing", "killed by SIGABRT"), ("Stuck", "killed by SIGKILL")])
def test_a_transport_that_takes_the_process_with_it(monkeypatch: pytest.MonkeyPatch, name: str, word: str) -> None:
    monkeypatch.setattr(run, "PATIENCE_S", 4.0)
    begun: list[str] = []
    report = run.run(Spec(f"tests.transports.broken:{name}"), lambda _, test: begun.append(test))
    assert not report.ok
    assert word in report.trouble
    (failed,) = [result for result in report.results.values() if result.outcome == "failed"]
    assert word in failed.reason
    assert begun[-1] == failed.name == "tokens are long and all different"
    assert report.count("not run") > 50
    assert not report.as_json()["ok"]


def test_what_fails_is_shown_with_its_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(spec: Spec, news: Callable[[run.Report, str], None]) -> run.Report:
        assert spec == Spec("mine")
        news(failing(), "many tickets")
        return failing()

    monkeypatch.setattr(run, "run", told)
    result = kvpoll("mine")
    assert result.exit_code == 1
    assert "mine claims: cuda=False" in result.output
    assert "failed: Crowds, many tickets: one has ended twice" in result.output
    assert "Each ends once." in result.output
    assert "skipped: Claims, 2 tests: not claimed" in result.output
    assert "mine does not conform" in result.output


def failing() -> run.Report:
    results = [
        run.Result("Crowds", "many tickets", "Each ends once.", "failed", "one has ended twice"),
        run.Result("Claims", "one", "It is so.", "skipped", "not claimed"),
        run.Result("Claims", "two", "It is so.", "skipped", "not claimed"),
        run.Result("Claims", "three", "It is so.", "passed"),
    ]
    return run.Report("mine", {}, {"cuda": False}, {str(n): result for n, result in enumerate(results)})


def test_nothing_but_skips_is_no_success() -> None:
    assert not run.Report("mine", {}, {}, {"a": run.Result("Claims", "a", "", "skipped", "why")}).ok


def test_the_spec_of_a_transport() -> None:
    spec = Spec.parse("memory", '{"steps": 3}')
    assert (Spec.parse(*spec.words), spec.make().name) == (spec, "memory")
    assert Spec.of(spec.make()).factory == "kvpoll_memory.transport:MemoryTransport"
    with pytest.raises(InvalidInput):
        Spec.parse("memory", "[]")
    with pytest.raises(TransportUnavailable):
        Spec("nobodys").make()


def test_the_library_does_not_import_pytest_and_the_kit_says_what_brings_it() -> None:
    program = """
import sys
import kvpoll_fsm, kvpoll_fsm.cli, kvpoll_fsm.testing.conformance as kit
from kvpoll_fsm.testing.conformance import Side, Spec
assert "pytest" not in sys.modules
assert "TransportSuite" in dir(kit)
sys.modules["pytest"] = None
try:
    kit.TransportSuite
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert (done.stdout, done.stderr) == (
        "the conformance kit needs pytest: pip install 'kvpoll-fsm[conformance]'\n",
        "",
    )


def test_the_asserts_of_the_kit_tell_what_was_compared(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        "from kvpoll_fsm.testing.conformance import TransportSuite\n"
        "from tests.transports.broken import SecretCancel\n"
        "class TestMine(TransportSuite):\n"
        "    def make(self): return SecretCancel()\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py", "-k", "it_cancels"]
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, cwd=tmp_path, env=here)
    assert "assert True is False" in done.stdout
    assert "where True = bool([Failed(" in done.stdout
