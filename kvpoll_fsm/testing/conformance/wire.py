"""What a test and the process of its peer say to each other: one packet for each call of the transport, one answer."""

from __future__ import annotations

import socket
from typing import Any

import msgspec

from kvpoll_fsm.spi import Completion, Done, Failed, Fenced, LinkDown, LinkUp, Progress, Quiesced

__all__ = ["MAX_NBYTES", "Answer", "Call", "news_from", "news_of", "receive", "send"]

MAX_NBYTES = 1 << 17
"""Of a packet, at most."""
_KINDS: dict[str, type[Completion]] = {
    kind.__name__: kind for kind in (Done, Failed, Quiesced, Progress, Fenced, LinkUp, LinkDown)
}


class Call(msgspec.Struct, array_like=True):
    """A method of the transport, or of one of its links."""

    method: str
    arguments: list[Any] = []
    link: int | None = None


class Answer(msgspec.Struct, array_like=True):
    """What it returned, or the text of what it raised, with the names of that exception's classes."""

    value: Any = None
    raised: list[str] = []
    text: str = ""


def send(pipe: socket.socket, packet: Call | Answer, fd: int | None = None) -> None:
    """Send a packet, and a file descriptor with it."""
    data = msgspec.msgpack.encode(packet)
    assert len(data) <= MAX_NBYTES, f"a packet of {len(data)} bytes"
    socket.send_fds(pipe, [data], [] if fd is None else [fd])


def receive(pipe: socket.socket) -> tuple[bytes, list[int]]:
    """A packet and what came with it; empty if the other end is gone."""
    data, fds, _, _ = socket.recv_fds(pipe, MAX_NBYTES, 1, socket.MSG_CMSG_CLOEXEC)
    return data, fds


def news_of(completions: list[Completion]) -> list[Any]:
    """Completions as a packet holds them."""
    return [[type(each).__name__, each] for each in completions]


def news_from(value: list[Any]) -> list[Completion]:
    """Completions from a packet."""
    return [msgspec.convert(fields, _KINDS[kind]) for kind, fields in value]
