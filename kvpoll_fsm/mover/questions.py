"""What the host has asked of its mover and has not been answered yet."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import msgspec

from kvpoll_fsm.blocks import BlockLoad
from kvpoll_fsm.engine import Question
from kvpoll_fsm.errors import EndpointClosed, KvpollError
from kvpoll_fsm.mover import frames
from kvpoll_fsm.mover.told import error_of
from kvpoll_fsm.switching import TransportStatus
from kvpoll_fsm.trace import Record

__all__ = ["Questions"]

Asking = Callable[[int], "frames.Ask | frames.Switch"]

_DECODERS: dict[Question, msgspec.msgpack.Decoder[Any]] = {
    "load": msgspec.msgpack.Decoder(BlockLoad),
    "is_idle": msgspec.msgpack.Decoder(bool),
    "dump": msgspec.msgpack.Decoder(list[dict[str, Any]]),
    "refused": msgspec.msgpack.Decoder(dict[str, dict[str, int]]),
    "trace": msgspec.msgpack.Decoder(list[Record]),
    "transports": msgspec.msgpack.Decoder(TransportStatus),
    "report": msgspec.msgpack.Decoder(dict[str, Any]),
}


class Questions:
    """Futures by number. New ones come from any thread, under its caller's lock; answers from one thread."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._open: dict[int, tuple[frames.Ask | frames.Switch, Question, Future[Any]]] = {}

    def new(self, asking: Asking, answer: Question) -> tuple[frames.Ask | frames.Switch, Future[Any]]:
        """Note what is asked; the answer, which is like that to a question, or why there is none, is the future's."""
        number, future = next(self._numbers), Future[Any]()
        command = asking(number)
        self._open[number] = command, answer, future
        return command, future

    def forget(self, number: int) -> None:
        """Nobody waits for the answer any more."""
        self._open.pop(number, None)

    def open(self) -> list[frames.Command]:
        """What another mover has to be asked, when one was lost."""
        return [command for command, _, _ in list(self._open.values())]

    def answer(self, event: frames.Answer) -> None:
        """The mover has answered."""
        _, answer, future = self._open.pop(event.ask, (None, None, None))
        if answer is None or future is None:
            return
        if event.refused is not None:
            future.set_exception(error_of(event.refused))
        elif event.problem:
            future.set_exception(KvpollError(event.problem))
        else:
            future.set_result(_DECODERS[answer].decode(event.result))

    def fail(self, cause: str) -> None:
        """The endpoint has ended: nothing is answered any more."""
        for _, _, future in list(self._open.values()):
            if not future.done():
                future.set_exception(EndpointClosed(cause))
