"""The caller's end of a control socket."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import msgspec

from kvpoll_fsm.errors import KvpollError
from kvpoll_fsm.local.words import Answer, Request

__all__ = ["NoAnswer", "Refused", "ask"]

ANSWER_S = 10.0
MAX_ANSWER_NBYTES = 16 << 20


class NoAnswer(KvpollError):
    """Nobody answers at a control socket."""

    def __init__(self, path: Path, problem: str) -> None:
        self.path = path
        self.problem = problem
        super().__init__(f"{path}: {problem}")


class Refused(KvpollError):
    """The endpoint does not do what was asked; `error` is the class of its error."""

    def __init__(self, error: str, detail: str) -> None:
        self.error = error
        self.detail = detail
        super().__init__(detail)


def ask(path: Path, request: Request, within_s: float = ANSWER_S) -> dict[str, Any]:
    """Ask the endpoint that listens there.

    Raises:
        NoAnswer: Nobody does, or not in time.
        Refused: It answers that it does not do that, and why.
    """
    try:
        answer = msgspec.json.decode(_talk(path, msgspec.json.encode(request) + b"\n", within_s), type=Answer)
    except OSError as error:
        raise NoAnswer(path, error.strerror or str(error)) from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise NoAnswer(path, "what listens there is no endpoint of ours") from error
    if not answer.ok:
        raise Refused(answer.error, answer.detail)
    return answer.result


def _talk(path: Path, line: bytes, within_s: float) -> bytes:
    ends_s = time.monotonic() + within_s
    said = bytearray()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(within_s)
        connection.connect(str(path))
        connection.sendall(line)
        while not said.endswith(b"\n") and len(said) < MAX_ANSWER_NBYTES:
            connection.settimeout(max(0.001, ends_s - time.monotonic()))
            data = connection.recv(1 << 16)
            if not data:
                break
            said += data
    return bytes(said)
