from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from kvpoll_fsm import InvalidInput
from kvpoll_fsm.local import places


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's runtime folder."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


def listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def test_the_folder_is_the_users_own(runtime: Path) -> None:
    path = places.new_socket()
    assert path.parent == places.folder() == runtime / "kvpoll"
    assert path.name.startswith(f"{os.getpid()}-")
    assert path.suffix == places.SUFFIX
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert places.new_socket() != path


def test_without_a_runtime_folder_it_is_in_the_temporary_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "none"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert places._folders()[-1] == tmp_path / f"kvpoll-{os.geteuid()}"


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o777, 0o701])
def test_a_folder_that_others_can_enter_is_refused(runtime: Path, mode: int) -> None:
    home = runtime / "kvpoll"
    home.mkdir()
    home.chmod(mode)
    with pytest.raises(InvalidInput, match=r"must be yours alone.*chmod 700"):
        places.new_socket()
    with pytest.raises(InvalidInput, match="must be yours alone"):
        places.sockets()


def test_a_link_or_a_file_in_its_place_is_refused(runtime: Path, tmp_path: Path) -> None:
    home, elsewhere = runtime / "kvpoll", tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    home.symlink_to(elsewhere)
    with pytest.raises(InvalidInput, match="is no folder"):
        places.new_socket()
    home.unlink()
    home.write_text("")
    with pytest.raises(InvalidInput, match="give a path"):
        places.new_socket()


def test_a_folder_of_somebody_else_is_refused(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = runtime / "kvpoll"
    home.mkdir(mode=0o700)
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    with pytest.raises(InvalidInput, match="must be yours alone"):
        places._check(home)


def test_sockets_of_the_dead_are_swept_and_those_of_the_living_stay(runtime: Path) -> None:
    home = places.new_socket().parent
    assert places.sockets() == []
    living, dead, text, young, old = (home / name for name in ("1.sock", "2.sock", "3.txt", "4.sock~", "5.sock~"))
    text.write_text("")
    listening(dead).close()
    listening(young).close()
    listening(old).close()
    os.utime(old, (0, 0))
    with listening(living):
        assert places.sockets() == [living, dead]
        assert places.is_dead(dead)
        assert not places.is_dead(living)
        assert not places.is_dead(text)
        places.sweep()
        assert sorted(home.iterdir()) == [living, text, young]


def test_without_a_folder_there_are_none(runtime: Path) -> None:
    assert not [path for path in places.sockets() if path.is_relative_to(runtime)]
