"""Runs the suite on one transport and tells each result at once: `run.run` is the other end.

Run as `python -m kvpoll_fsm.testing.conformance.runner FD FACTORY OPTIONS`, where the rest is a `Spec`. One line of
JSON on FD for each thing that happens; what the transport prints goes elsewhere.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import pytest

from kvpoll_fsm.errors import KvpollError, TransportUnavailable
from kvpoll_fsm.testing.conformance.spec import Spec

__all__ = ["main"]

TESTS = """
from kvpoll_fsm.testing.conformance import Spec, TransportSuite


class TestTransport(TransportSuite):
    def spec(self):
        return Spec.parse(*{words!r})

    def make(self):
        return self.spec().make()
"""
SETTINGS = """
[pytest]
addopts = --import-mode=importlib -p no:cacheprovider
filterwarnings =
    error::pytest.PytestUnhandledThreadExceptionWarning
    error::pytest.PytestUnraisableExceptionWarning
"""


class Teller:
    """A plugin of pytest that tells what it does."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def tell(self, event: str, **words: Any) -> None:
        """One line."""
        self._out.write(json.dumps({"event": event, **words}) + "\n")
        self._out.flush()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """All tests, in their order."""
        self.tell("collected", tests=[_described(item) for item in session.items])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test begins."""
        self.tell("begun", id=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A phase of a test has ended: of those that passed the call alone is told."""
        if report.passed and report.when != "call":
            return
        outcome = "skipped" if report.skipped else "passed" if report.passed else "failed"
        detail = report.longreprtext if report.failed else ""
        self.tell(
            "ended", id=report.nodeid, outcome=outcome, reason=_reason(report), detail=detail, seconds=report.duration
        )


def _text(error: Exception) -> str:
    if isinstance(error, TransportUnavailable):
        return f"{error.problem}; {error.hint}" if error.hint else error.problem
    return str(error) if isinstance(error, KvpollError) else f"{type(error).__name__}: {error}"


def _described(item: pytest.Item) -> dict[str, str]:
    function = getattr(item, "function", None)
    theme = getattr(function, "__qualname__", "").partition(".")[0]
    promise = (getattr(function, "__doc__", None) or "").partition("\n")[0]
    name = item.name.removeprefix("test_").replace("_", " ")
    return {"id": item.nodeid, "theme": theme, "name": name, "promise": promise}


def _reason(report: pytest.TestReport) -> str:
    """Why it failed or was skipped, in a line or two."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:
        return report.longreprtext.strip().rpartition("\n")[2]
    where = f" ({Path(crash.path).name}:{crash.lineno})"
    return str(crash.message).partition("\n")[0].removeprefix("AssertionError: ")[:300] + where


def main(fd: str, factory: str, options: str) -> int:
    """Run all tests."""
    spec = Spec.parse(factory, options)
    with open(int(fd), "w") as out, tempfile.TemporaryDirectory(prefix="kvpoll-conformance-") as folder:
        teller = Teller(out)
        try:
            transport = spec.make()
            try:
                transport.start()
            finally:
                transport.close()
        except Exception as error:  # another party's code may raise anything
            teller.tell("unusable", reason=_text(error))
            return 2
        teller.tell("claims", capabilities=asdict(transport.capabilities))
        Path(folder, "pytest.ini").write_text(SETTINGS)
        Path(folder, "test_transport.py").write_text(TESTS.format(words=spec.words))
        os.chdir(folder)
        return int(pytest.main([folder], plugins=[teller]))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
