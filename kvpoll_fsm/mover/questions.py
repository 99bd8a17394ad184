"""What the host has asked of its mover and has not been answered yet."""

from __future__ import annotations

import itertools
from concurrent.futures import Future
from typing import Any

import msgspec

from kvpoll_fsm.blocks import BlockLoad
from kvpoll_fsm.engine import Question
from kvpoll_fsm.errors import EndpointClosed, KvpollError
from kvpoll_fsm.mover import frames
from kvpoll_fsm.trace import Record

__all__ = ["Questions"]

_ANSWERS: dict[str, msgspec.msgpack.Decoder[Any]] = {
    "load": msgspec.msgpack.Decoder(BlockLoad),
    "is_idle": msgspec.msgpack.Decoder(bool),
    "dump": msgspec.msgpack.Decoder(list[dict[str, Any]]),
    "refused": msgspec.msgpack.Decoder(dict[str, dict[str, int]]),
    "trace": msgspec.msgpack.Decoder(list[Record]),
}


class Questions:
    """Futures by number. New ones come from any thread, under its caller's lock; answers from one thread."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._open: dict[int, tuple[Question, Future[Any]]] = {}

    def new(self, question: Question) -> tuple[int, Future[Any]]:
        """Note a question; the answer, or why there is none, is the future's."""
        number, future = next(self._numbers), Future[Any]()
        self._open[number] = question, future
        return number, future

    def forget(self, number: int) -> None:
        """Nobody waits for the answer any more."""
        self._open.pop(number, None)

    def open(self) -> list[frames.Command]:
        """What another mover has to be asked, when one was lost."""
        return [frames.Ask(number, question) for number, (question, _) in list(self._open.items())]

    def answer(self, event: frames.Answer) -> None:
        """The mover has answered."""
        question, future = self._open.pop(event.ask, (None, None))
        if question is None or future is None:
            return
        if event.problem:
            future.set_exception(KvpollError(event.problem))
        else:
            future.set_result(_ANSWERS[question].decode(event.result))

    def fail(self, cause: str) -> None:
        """The endpoint has ended: nothing is answered any more."""
        for _, future in list(self._open.values()):
            if not future.done():
                future.set_exception(EndpointClosed(cause))
