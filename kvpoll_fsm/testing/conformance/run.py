"""Runs the suite on an installed transport, in a process of its own that may crash or hang."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import IO, Any

from kvpoll_fsm.errors import InvalidInput, TransportUnavailable
from kvpoll_fsm.testing.conformance import HINT
from kvpoll_fsm.testing.conformance.spec import Spec, environment

__all__ = ["Report", "Result", "run"]

PATIENCE_S = 120.0
"""How long nothing may be heard; a test ends by itself long before."""
MOST_WORDS_NBYTES = 2000


@dataclass
class Result:
    """One test.

    Attributes:
        theme: What it is about: Writing, Refusing, ...
        name: The test's.
        promise: What it holds the transport to.
        outcome: passed, failed or skipped; "not run" if the run ended before.
        reason: Of what failed or was skipped.
        detail: All that pytest says of what failed.
        seconds: How long it took.
    """

    theme: str
    name: str
    promise: str
    outcome: str = "not run"
    reason: str = ""
    detail: str = ""
    seconds: float = 0.0


@dataclass
class Report:
    """What came of a run."""

    transport: str
    options: dict[str, Any]
    capabilities: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    seconds: float = 0.0
    trouble: str = ""

    @property
    def ok(self) -> bool:
        """Every test passed or was skipped for a reason."""
        done = {result.outcome for result in self.results.values()}
        return not self.trouble and "passed" in done and done <= {"passed", "skipped"}

    def count(self, outcome: str) -> int:
        """How many tests ended so."""
        return sum(result.outcome == outcome for result in self.results.values())

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {
            "transport": self.transport,
            "options": self.options,
            "capabilities": self.capabilities,
            "ok": self.ok,
            "trouble": self.trouble,
            **{outcome: self.count(outcome) for outcome in ("passed", "failed", "skipped")},
            "not_run": self.count("not run"),
            "seconds": round(self.seconds, 3),
            "tests": [asdict(result) for result in self.results.values()],
        }


def run(spec: Spec, news: Callable[[Report, str], None] = lambda report, name: None) -> Report:
    """Run all tests.

    Args:
        spec: Which transport.
        news: Called with the report so far and the test that begins.

    Raises:
        InvalidInput: pytest is not installed.
        TransportUnavailable: The transport is not installed, cannot be made or cannot start here.
    """
    if importlib.util.find_spec("pytest") is None:
        raise InvalidInput(HINT)
    report, started_s = Report(spec.factory, dict(spec.options)), time.monotonic()
    with tempfile.TemporaryFile("w+") as words, _started(spec, words) as process:
        running = _follow(process, report, news)
        status = process.wait()
        if running or status not in (0, 1) or not report.results:
            report.trouble = _trouble(status, words)
        if running:
            report.results[running].outcome = "failed"
            report.results[running].reason = report.trouble
    report.seconds = time.monotonic() - started_s
    return report


class _Process(subprocess.Popen[bytes]):
    """The runner, and the end of the pipe on which it tells."""

    lines: IO[bytes]

    def __exit__(self, *details: Any) -> None:
        _end(self)
        self.lines.close()
        super().__exit__(*details)


def _started(spec: Spec, words: IO[str]) -> _Process:
    ours, theirs = os.pipe()
    keep = {name: value for name, value in environment().items() if not name.startswith("PYTEST")}
    try:
        process = _Process(
            [sys.executable, "-m", f"{__package__}.runner", str(theirs), *spec.words],
            pass_fds=[theirs],
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=subprocess.STDOUT,
            env={**keep, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            start_new_session=True,
        )
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    process.lines = os.fdopen(ours, "rb", buffering=0)
    return process


def _follow(process: _Process, report: Report, news: Callable[[Report, str], None]) -> str:
    """Take what the runner tells; returns the test that was running when it ended, if one was."""
    running = ""
    for words in _told(process):
        match words.pop("event"):
            case "unusable":
                raise TransportUnavailable(report.transport, words["reason"])
            case "claims":
                report.capabilities = words["capabilities"]
            case "collected":
                report.results = {test.pop("id"): Result(**test) for test in words["tests"]}
            case "begun":
                running = words["id"]
                news(report, report.results[running].name)
            case "ended":
                running = ""
                _note(report.results[words.pop("id")], **words)
    return running


def _note(result: Result, outcome: str, reason: str, detail: str, seconds: float) -> None:
    """A test passes if nothing of it failed: what fails as it is cleared away comes after the test itself."""
    result.seconds += seconds
    if result.outcome != "failed":
        result.outcome, result.reason, result.detail = outcome, reason, detail


def _told(process: _Process) -> Iterator[dict[str, Any]]:
    """What the runner tells, until it ends; it is ended if nothing is heard for long."""
    rest = b""
    while True:
        heard, _, _ = select.select([process.lines], [], [], PATIENCE_S)
        data = os.read(process.lines.fileno(), 1 << 16) if heard else b""
        if not data:
            return _end(process) if not heard else None
        *lines, rest = (rest + data).split(b"\n")
        yield from map(json.loads, lines)


def _end(process: _Process) -> None:
    """End what is left of the runner, with all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _trouble(status: int, words: IO[str]) -> str:
    how = f"exit status {status}"
    if status < 0:  # a real-time signal has no name
        how = f"killed by {signal.Signals(-status).name if -status in set(signal.Signals) else f'signal {-status}'}"
    words.seek(max(0, words.seek(0, os.SEEK_END) - MOST_WORDS_NBYTES))
    return f"the process that ran the tests ended early, {how}; its last words: {words.read().strip()[-600:]}"
