"""The processes of the demo talk in JSON, one message a line."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["Lines", "Message", "encode"]

Message = dict[str, Any]


def encode(message: Message) -> bytes:
    """A message as one line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Lines:
    """Cuts what comes out of a pipe into messages."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Message]:
        """The messages that are complete with these bytes.

        Raises:
            ValueError: A line that is no JSON.
        """
        *complete, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in complete]
