"""docs/write-a-transport.md is a transport: built from the page, installed by itself, held to every promise, used."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "write-a-transport.md"
BLOCK = re.compile(r"^```\w+\n# ([\w.]+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
KVPOLL = Path(sys.executable).with_name("kvpoll")
PACKAGE = ("pyproject.toml", "kvpoll_courier.py")


def files() -> dict[str, str]:
    """The files of the page: blocks of one name follow on each other."""
    found: dict[str, str] = {}
    for name, text in BLOCK.findall(PAGE.read_text()):
        found[name] = found.get(name, "") + ("\n\n" if name in found else "") + text
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """With the package built and installed, in a folder of its own, from what is on this machine."""
    place = tmp_path_factory.mktemp("courier")
    source, target = place / "source", place / "target"
    source.mkdir()
    for name in PACKAGE:
        (source / name).write_text(files()[name])
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "install", "--no-index"]
    command = [*pip, "--no-build-isolation", "--no-deps", "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stdout + done.stderr
    return {**os.environ, "PYTHONPATH": str(target)}


def conformance(environment: dict[str, str], cwd: Path) -> dict[str, object]:
    command = [str(KVPOLL), "conformance", "courier", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, cwd=cwd)
    report: dict[str, object] = json.loads(ran.stdout or json.dumps({"stderr": ran.stderr}))
    assert ran.returncode == (0 if report.get("ok") else 1), report
    return report


@pytest.mark.timeout(300)
def test_the_transport_of_the_page_conforms(environment: dict[str, str], tmp_path: Path) -> None:
    report = conformance(environment, tmp_path)
    tests = report["tests"]
    assert isinstance(tests, list)
    assert [(test["name"], test["reason"]) for test in tests if test["outcome"] not in ("passed", "skipped")] == []
    assert report["ok"]
    assert {test["theme"] for test in tests if test["outcome"] == "passed"} >= {"Fencing", "Processes", "Leaks"}
    capabilities = report["capabilities"]
    assert isinstance(capabilities, dict)
    assert (capabilities["scatter_entries"], capabilities["cancellable"]) == (256, False)


def test_a_room_goes_over_the_transport_of_the_page(environment: dict[str, str], tmp_path: Path) -> None:
    said = re.search(r"# use\.py\n.*?^```\n\n```text\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert said is not None
    program = [sys.executable, "-W", "error", "-c", files()["use.py"]]
    ran = subprocess.run(program, capture_output=True, text=True, timeout=50, env=environment, cwd=tmp_path)
    assert (ran.stdout, ran.stderr) == (said[1], "")


@pytest.mark.parametrize(
    ("change", "test", "reason"),
    [
        (
            ("answer = read(connection, 1)", "answer = LANDED"),
            "test_a_stopped_receiver_gives_no_false_done",
            "Done although the bytes are not there",
        ),
        (
            ("if token not in self._grants:", "if not token:"),
            "test_nothing_lands_after_a_fence",
            "something landed behind the fence",
        ),
    ],
)
def test_the_kit_notices_what_the_page_says_it_does(
    tmp_path: Path, change: tuple[str, str], test: str, reason: str
) -> None:
    text = files()["kvpoll_courier.py"]
    assert text.count(change[0]) == 1
    (tmp_path / "kvpoll_courier.py").write_text(text.replace(*change))
    (tmp_path / "test_courier.py").write_text(files()["test_courier.py"])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"test_courier.py::TestCourier::{test}"]
    here = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=55, env=here, cwd=tmp_path)
    assert ran.returncode == 1, ran.stdout
    assert reason in ran.stdout
