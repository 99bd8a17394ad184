from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvpoll_fsm.local import client
from kvpoll_fsm.local.client import NoAnswer, Refused, ask
from kvpoll_fsm.local.words import Status


@contextmanager
def answering(path: Path, *pieces: bytes) -> Iterator[None]:
    """Somebody who hears one caller, and says this to him."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                for piece in pieces:
                    connection.sendall(piece)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "socket"


def test_an_answer_may_come_in_pieces(path: Path) -> None:
    with answering(path, b'{"ok":true,', b'"result":{"a":1}}', b"\n"):
        assert ask(path, Status()) == {"a": 1}


def test_a_refusal_has_its_reason(path: Path) -> None:
    with (
        answering(path, b'{"ok":false,"error":"PolicyError","detail":"no such mode"}\n'),
        pytest.raises(Refused, match="no such mode") as caught,
    ):
        ask(path, Status())
    assert caught.value.error == "PolicyError"


@pytest.mark.parametrize("said", [b"", b"{}\n", b"hello\n", b"\xff\n", b'{"ok":true,"error":"\xf2("}\n', b'{"ok":true'])
def test_what_is_no_answer(path: Path, said: bytes) -> None:
    with answering(path, said), pytest.raises(NoAnswer, match="no endpoint of ours"):
        ask(path, Status())


def test_nobody_is_there(path: Path) -> None:
    with pytest.raises(NoAnswer, match="No such file"):
        ask(path, Status())
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    with pytest.raises(NoAnswer, match="refused"):
        ask(path, Status())


def test_somebody_who_says_nothing(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(NoAnswer, match="timed out"):
            ask(path, Status(), within_s=0.05)


def test_somebody_who_does_not_stop(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_ANSWER_NBYTES", 100)
    with answering(path, bytes(200)), pytest.raises(NoAnswer):
        ask(path, Status())
