from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from kvpoll_fsm import registry
from kvpoll_fsm.errors import TransportUnavailable
from kvpoll_fsm.spi import Transport


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Somebody else's distribution on the path: a module and its entry points."""
    info = tmp_path / "carrier_pigeon-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: carrier-pigeon\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[kvpoll_fsm.transports]\n"
        "pigeon = carrier_pigeon:Pigeon\n"
        "stone = carrier_pigeon:Stone\n"
        "feather = carrier_pigeon:feather\n"
        "egg = carrier_pigeon:Egg\n"
        "lost = carrier_pigeon.nowhere:Pigeon\n"
        "ill = ill_pigeon:Pigeon\n"
    )
    (tmp_path / "carrier_pigeon.py").write_text(
        "from kvpoll_memory import MemoryTransport\n"
        "class Pigeon(MemoryTransport):\n    name = 'pigeon'\n"
        "class Stone:\n    def start(self): ...\n"
        "feather = Pigeon()\n"
    )
    (tmp_path / "ill_pigeon.py").write_text("raise OSError('libcoo.so: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_our_transports_are_found_and_follow_the_protocol() -> None:
    assert {"memory", "tcp", "shm"} <= registry.available().keys()
    for name in ("memory", "tcp", "shm"):
        transport = registry.load(name)
        assert transport.name == name
        assert isinstance(transport(), Transport)


def test_a_third_partys_transport_is_found_in_the_same_way(third_party: Path) -> None:
    entry = registry.available()["pigeon"]
    assert entry.value == "carrier_pigeon:Pigeon"
    assert registry.load("pigeon").name == "pigeon"


def test_of_two_with_one_name_the_first_found_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [metadata.EntryPoint("tcp", value, registry.GROUP) for value in ("first:T", "second:T")]
    monkeypatch.setattr(metadata, "entry_points", lambda **_: entries)
    assert registry.available() == {"tcp": entries[0]}


def test_what_ships_later_says_so() -> None:
    name = "nixl"
    with pytest.raises(TransportUnavailable) as caught:
        registry.load(name)
    assert caught.value.hint == registry.HINTS[name]
    assert caught.value.name == name


def test_a_name_that_is_nearly_right_gets_the_right_one() -> None:
    with pytest.raises(TransportUnavailable, match="did you mean 'tcp'"):
        registry.load("tpc")


def test_a_name_like_no_other_gets_the_list() -> None:
    with pytest.raises(TransportUnavailable, match=r"installed: .*memory.*tcp"):
        registry.load("quantum-entanglement")


def test_without_any_transport_the_list_says_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda **_: [])
    with pytest.raises(TransportUnavailable, match="installed: none"):
        registry.load("quantum-entanglement")
    with pytest.raises(TransportUnavailable, match="install the package again"):
        registry.load("tcp")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("lost", "cannot be imported: ModuleNotFoundError"),
        ("egg", "cannot be imported: AttributeError"),
        ("ill", "libcoo.so"),
        ("stone", "no transport class, it lacks descriptor, register"),
        ("feather", "no transport class"),
    ],
)
def test_what_cannot_be_loaded_is_unavailable(third_party: Path, name: str, problem: str) -> None:
    with pytest.raises(TransportUnavailable, match=problem):
        registry.load(name)


def test_looking_imports_no_transport() -> None:
    program = (
        "import sys; from kvpoll_fsm import registry; registry.available()\n"
        "print([name for name in sys.modules if name.startswith(('kvpoll_tcp', 'kvpoll_memory'))])"
    )
    seen = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert seen.stdout == "[]\n"
