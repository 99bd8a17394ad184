"""The endpoint's end of a control socket, with callers that behave in every way."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvpoll_fsm import InvalidInput
from kvpoll_fsm.local import server
from kvpoll_fsm.local.server import MAX_CALLERS, ControlSocket
from kvpoll_fsm.local.words import MAX_REQUEST_NBYTES

BIG = 8 << 20


class Loop:
    """The driver's loop, turn by turn."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[bytes] = []
        self.answer = b"answer\n"
        self.poll = select.poll()
        self.watched: set[int] = set()
        self.socket = ControlSocket(path, self._answer)
        self.socket.open(self)

    def _answer(self, line: bytes) -> bytes:
        self.lines.append(line)
        return self.answer

    def watch(self, fd: int, *, writable: bool = False) -> None:
        self.watched.add(fd)
        self.poll.register(fd, select.POLLIN | (select.POLLOUT if writable else 0))

    def unwatch(self, fd: int) -> None:
        self.watched.remove(fd)
        self.poll.unregister(fd)

    def turns(self, most: int = 100) -> int:
        """Turn until nothing is up any more; returns how often that was."""
        for count in range(most):
            ready = {fd for fd, _ in self.poll.poll(0)}
            if not ready:
                return count
            self.socket.take_turn(ready)
        raise AssertionError("it does not come to rest")

    def caller(self, said: bytes = b"") -> socket.socket:
        caller = socket.socket(socket.AF_UNIX)
        caller.settimeout(5)
        caller.connect(str(self.path))
        caller.sendall(said)
        return caller


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    loop = Loop(tmp_path / "socket")
    yield loop
    loop.socket.close()


def test_a_line_is_answered_and_the_connection_ends(loop: Loop) -> None:
    with loop.caller(b"hello\n") as caller:
        loop.turns()
        assert caller.recv(100) == b"answer\n"
        assert caller.recv(100) == b""
    assert loop.lines == [b"hello"]
    assert len(loop.watched) == 1


def test_only_the_owner_can_reach_it(loop: Loop) -> None:
    found = loop.path.lstat()
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert list(loop.path.parent.iterdir()) == [loop.path], "nothing else is left"


def test_another_user_is_turned_away(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Strange:
        size = server._CREDENTIALS.size

        @staticmethod
        def unpack(data: bytes) -> tuple[int, int, int]:
            return (1, os.geteuid() + 4711, 1)

    monkeypatch.setattr(server, "_CREDENTIALS", Strange)
    with loop.caller(b"hello\n") as caller:
        loop.turns()
        with contextlib.suppress(ConnectionResetError):
            assert caller.recv(100) == b""
    assert loop.lines == []
    assert "was turned away" in caplog.text


def test_a_line_may_come_in_pieces(loop: Loop) -> None:
    with loop.caller(b"he") as caller:
        loop.turns()
        assert loop.lines == []
        caller.sendall(b"llo\nmore")
        loop.turns()
        assert caller.recv(100) == b"answer\n"
    assert loop.lines == [b"hello"]


@pytest.mark.parametrize("said", [b"x" * (MAX_REQUEST_NBYTES + 1), b"x" * (MAX_REQUEST_NBYTES + 1) + b"\n"])
def test_a_line_without_an_end_is_not_listened_to(loop: Loop, said: bytes) -> None:
    with loop.caller(said):
        loop.turns()
    assert loop.lines == []
    assert len(loop.watched) == 1


def test_a_caller_who_goes_away_leaves_nothing(loop: Loop) -> None:
    loop.answer = bytes(BIG)
    for said in (b"", b"hel", b"hello\n"):
        caller = loop.caller(said)
        loop.turns()
        caller.close()
        loop.turns()
        assert len(loop.watched) == 1


def test_a_caller_who_does_not_read_keeps_nobody_waiting(loop: Loop) -> None:
    loop.answer = bytes(BIG)
    with loop.caller(b"hello\n") as slow:
        assert loop.turns() < 20, "nothing is up while he does not read"
        loop.answer = b"answer\n"
        with loop.caller(b"quick\n") as quick:
            loop.turns()
            assert quick.recv(100) == b"answer\n"
        nbytes = 0
        while data := slow.recv(1 << 20):
            nbytes += len(data)
            loop.turns()
        assert nbytes == BIG


def test_silent_callers_make_room_the_oldest_first(loop: Loop) -> None:
    callers = []
    for _ in range(MAX_CALLERS + 3):
        callers.append(loop.caller())
        loop.turns()
    assert len(loop.watched) == MAX_CALLERS + 1
    callers[-1].sendall(b"hello\n")
    loop.turns()
    assert callers[-1].recv(100) == b"answer\n"
    assert [caller.recv(100) for caller in callers[:3]] == [b"", b"", b""]
    for caller in callers:
        caller.close()


def test_many_callers_at_once_take_several_turns(loop: Loop) -> None:
    callers = [loop.caller(b"hello\n") for _ in range(MAX_CALLERS)]
    assert loop.turns() >= MAX_CALLERS // server.PER_TURN
    assert [caller.recv(100) for caller in callers] == [b"answer\n"] * MAX_CALLERS
    for caller in callers:
        caller.close()


def test_closing_ends_conversations_and_removes_the_path(loop: Loop) -> None:
    with loop.caller() as caller:
        loop.turns()
        loop.socket.close()
        assert caller.recv(100) == b""
    assert not loop.path.exists()
    loop.socket.close()


def test_closing_leaves_what_somebody_else_has_put_there(loop: Loop) -> None:
    loop.path.unlink()
    loop.path.write_text("mine")
    loop.socket.close()
    assert loop.path.read_text() == "mine"


def test_a_dead_sockets_place_is_taken_and_a_living_ones_is_not(loop: Loop) -> None:
    with pytest.raises(InvalidInput, match="another endpoint listens there"):
        Loop(loop.path)
    with loop.caller(b"hello\n") as caller:
        loop.turns()
        assert caller.recv(100) == b"answer\n"
    listener = loop.socket._listener
    assert listener is not None
    listener.close()  # as the kernel does when a process is killed: the path stays
    loop.socket._listener = None
    other = Loop(loop.path)
    with other.caller(b"hello\n") as caller:
        other.turns()
        assert caller.recv(100) == b"answer\n"
    other.socket.close()


def test_what_cannot_be_listened_at(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for path, problem in [
        (file, "File exists"),
        (tmp_path / "none" / "socket", "No such file"),
        (tmp_path / ("x" * 120), "too long"),
    ]:
        with pytest.raises(InvalidInput, match=f"control_socket=.*{problem}"):
            Loop(path)
    assert file.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [file]
    tmp_path.chmod(0o777)
    with pytest.raises(InvalidInput, match="others can write to"):
        Loop(tmp_path / "socket")
    tmp_path.chmod(0o1777)  # a temporary folder: nobody can put something else in our place
    Loop(tmp_path / "socket").socket.close()


def test_without_a_path_nothing_listens() -> None:
    nowhere = ControlSocket(None, lambda line: b"")
    nowhere.take_turn({0})
    nowhere.after_fork()
    nowhere.close()


def test_without_descriptors_a_caller_is_turned_away(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    with loop.caller(b"hello\n") as caller:
        with _no_descriptors():
            assert loop.turns() == 1, "it does not wake us for ever"
        with contextlib.suppress(ConnectionResetError):
            assert caller.recv(100) == b""
    with loop.caller(b"hello\n") as caller:
        loop.turns()
        assert caller.recv(100) == b"answer\n"
    assert "Too many open files" in caplog.text


def test_not_even_one_to_turn_callers_away_with(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    spare, loop.socket._spare = loop.socket._spare, None
    assert spare is not None
    os.close(spare)
    with loop.caller(b"hello\n"), _no_descriptors():
        assert loop.turns() == 1
    assert loop.watched == set()
    assert "nobody is heard any more" in caplog.text


@contextlib.contextmanager
def _no_descriptors() -> Iterator[None]:
    """All that this process may have are in use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
