"""What is said over a control socket: one line of JSON each way, then the connection ends."""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["MAX_REQUEST_NBYTES", "Answer", "Report", "Request", "Status", "Switch", "read_request"]

MAX_REQUEST_NBYTES = 4096


class _Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag=str.lower):
    pass


class Switch(_Request, frozen=True):
    """Give new rooms another policy, or a share of them (`canary`); answered by what `Status` is answered by."""

    policy: str
    canary: float | None = None


class Report(_Request, frozen=True):
    """How rooms have fared by transport: `Endpoint.report`."""


class Status(_Request, frozen=True):
    """Who this is, and how new rooms are carried."""


Request = Switch | Report | Status


class Answer(msgspec.Struct, frozen=True):
    """What came of it.

    Attributes:
        ok: It was done.
        result: What was asked for.
        error: Otherwise, the error's class.
        detail: And its words.
    """

    ok: bool
    result: dict[str, Any] = {}
    error: str = ""
    detail: str = ""


_requests: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)


def read_request(line: bytes) -> Request:
    """A request.

    Raises:
        msgspec.MsgspecError: The line is none.
        UnicodeDecodeError: Likewise.
    """
    return _requests.decode(line)
