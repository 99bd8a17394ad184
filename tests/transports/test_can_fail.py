"""The conformance kit can fail: each transport of `broken.py` breaks a promise, and the test of that notices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.transports.broken import BROKEN

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("broken.py")


@pytest.mark.timeout(300)
def test_every_broken_transport_is_noticed_by_the_test_of_what_it_breaks(tmp_path: Path) -> None:
    results = tmp_path / "results.xml"
    ids = [f"{FILE}::Test{made.__name__}::{test}" for made, (test, _) in BROKEN.items()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", f"--junitxml={results}", *ids]
    keep = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    ran = subprocess.run(command, cwd=ROOT, env=keep, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    messages: dict[str, str] = {}
    for case in ElementTree.parse(results).iter("testcase"):
        name = (case.get("classname") or "").rpartition(".")[2].removeprefix("Test")
        failures = (failure.get("message") or "" for failure in case.findall("failure"))
        messages[name] = messages.get(name, "") + "".join(failures)
    assert messages.keys() >= {made.__name__ for made in BROKEN}
    unnoticed = {
        made.__name__: messages[made.__name__]
        for made, (_, word) in BROKEN.items()
        if not messages[made.__name__] or word not in messages[made.__name__]
    }
    assert not unnoticed
