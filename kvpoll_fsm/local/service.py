"""What a control socket is good for: each request, and what it does."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import msgspec

from kvpoll_fsm.errors import KvpollError
from kvpoll_fsm.local.words import Answer, Report, Request, Switch, read_request
from kvpoll_fsm.selection import Policy
from kvpoll_fsm.switching import read_share

if TYPE_CHECKING:
    from kvpoll_fsm.requests import Requests

__all__ = ["Service"]

log = logging.getLogger("kvpoll_fsm")


class Service:
    """Used by the driver's thread alone."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests

    def answer(self, line: bytes) -> bytes:
        """The answer to a line."""
        try:
            answer = Answer(ok=True, result=self._do(read_request(line)))
        except (KvpollError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            answer = Answer(ok=False, error=type(error).__name__, detail=str(error))
        except Exception as error:  # a caller's request must end nobody's rooms
            log.exception("request failed")
            answer = Answer(ok=False, error=type(error).__name__, detail=str(error))
        return msgspec.json.encode(answer) + b"\n"

    def _do(self, request: Request) -> dict[str, Any]:
        requests = self._requests
        if isinstance(request, Switch):
            requests.switch(Policy.parse(request.policy), read_share(request.canary))
        if isinstance(request, Report):
            return {**self._who(), **requests.report()}
        return {
            **self._who(),
            **asdict(requests.transports()),
            "load": asdict(requests.load()),
            "breakers": requests.breakers(),
        }

    def _who(self) -> dict[str, Any]:
        return {"endpoint": self._requests.address, "pid": os.getpid(), "parent_pid": os.getppid()}
