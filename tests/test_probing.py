from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvpoll_fsm import __version__, probing, registry
from kvpoll_fsm.probing import Probe, probe_all


@pytest.fixture
def flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's transports, in a distribution of their own, for this process and those it starts."""
    info = tmp_path / "flock-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flock\nVersion: 1.0\n")
    names = ("Swift", "Dodo", "Penguin", "Heron", "Moa")
    points = "".join(f"{name.lower()} = flock_of_birds:{name}\n" for name in names)
    (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{points}")
    (tmp_path / "flock_of_birds.py").write_text(
        "import os\n"
        "from kvpoll_fsm.errors import TransportUnavailable\n"
        "from kvpoll_memory import MemoryTransport\n"
        "class Swift(MemoryTransport):\n"
        "    def close(self):\n"
        "        print('chirp')\n"
        "class Dodo(MemoryTransport):\n"
        "    def start(self):\n"
        "        raise TransportUnavailable('dodo', 'no longer flies', 'take swift')\n"
        "class Penguin(MemoryTransport):\n"
        "    def start(self):\n"
        "        os.write(2, b'cold feet')\n"
        "        os.abort()\n"
        "class Heron(MemoryTransport):\n"
        "    def start(self):\n"
        "        1 / 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(registry, "HINTS", {"phoenix": "wait"})


def test_each_is_tried_and_tells_of_itself(flock: None) -> None:
    found = {probe.name: probe for probe in probe_all(within_s=40.0)}
    for name in ("memory", "tcp", "shm"):
        assert found[name].usable, found[name]
        assert (found[name].distribution, found[name].version) == ("kvpoll-fsm", __version__)
    swift = found["swift"]
    assert swift.usable
    assert (swift.distribution, swift.version, swift.entry_point) == ("flock", "1.0", "flock_of_birds:Swift")
    assert swift.capabilities is not None
    assert swift.capabilities["one_process"] is True
    assert swift.capabilities["fence"] == "token"
    assert found["phoenix"] == Probe("phoenix", installed=False, problem="is not installed", hint="wait")
    problems = {name: probe.problem for name, probe in found.items() if probe.installed and not probe.usable}
    problems.pop("mooncake", None)  # its wheel is not for every machine
    assert problems.pop("moa").startswith("cannot be imported: AttributeError")
    assert problems == {
        "dodo": "no longer flies",
        "penguin": "its process ended with status -6: cold feet",
        "heron": "ZeroDivisionError: division by zero",
    }
    assert found["dodo"].hint == "take swift"
    assert found["dodo"].capabilities is not None


def test_one_that_takes_too_long_is_not_waited_for() -> None:
    assert probing._found_out("tcp", within_s=0.001) == {"problem": "has neither started nor failed within 0.001 s"}
