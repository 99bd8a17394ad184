"""The handshake and the tcp wire format spoken by hand, so that a test can break any rule of it."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import socket
import struct
from typing import Any

import msgspec

MAGIC = b"KVPOLTCP"
FRAME_MAGIC = 0x564B
HELLO_NBYTES = 74
WRITER = b"w" * 16
ACK = struct.Struct("<HBBIQ")


def read_descriptor(data: bytes) -> dict[str, Any]:
    descriptor: dict[str, Any] = msgspec.msgpack.decode(data)
    return descriptor


def write_descriptor(descriptor: dict[str, Any]) -> bytes:
    return msgspec.msgpack.encode(descriptor)


def hello(
    incarnation: bytes, nonce: bytes = b"n" * 32, magic: bytes = MAGIC, version: int = 1, writer: bytes = WRITER
) -> bytes:
    return magic + struct.pack("<H", version) + incarnation + nonce + writer


def proof(secret: bytes, role: bytes, sender: bytes, receiver: bytes) -> bytes:
    return hmac.new(secret, role + sender + receiver, hashlib.sha256).digest()


def entry(region: int, nbytes: int, offset: int, zero: int = 0) -> bytes:
    return struct.pack("<HHIQ", region, zero, nbytes, offset)


def frame(
    token: bytes,
    entries: list[bytes],
    payload: bytes,
    *,
    nbytes: int | None = None,
    count: int | None = None,
    magic: int = FRAME_MAGIC,
    kind: int = 1,
    flags: int = 1,
    zero: int = 0,
    ticket: int = 77,
    index: int = 0,
) -> bytes:
    """A frame, right unless told otherwise."""
    head = struct.pack(
        "<HBBIQIHH16s",
        magic,
        kind,
        flags,
        index,
        ticket,
        len(payload) if nbytes is None else nbytes,
        len(entries) if count is None else count,
        zero,
        token,
    )
    return head + b"".join(entries) + payload


class Raw:
    """A connection to a receiver's data port."""

    def __init__(self, descriptor: bytes, shake_hands: bool = True, writer: bytes = WRITER, source: str = "") -> None:
        self.writer = writer
        self.peer = read_descriptor(descriptor)
        place = (self.peer["host"], self.peer["port"])
        self.socket = socket.create_connection(place, timeout=20, source_address=(source, 0) if source else None)
        if shake_hands:
            self.shake_hands()

    def shake_hands(self) -> None:
        ours = hello(self.peer["incarnation"], writer=self.writer)
        self.send(ours)
        theirs = self.read(HELLO_NBYTES)
        self.send(proof(self.peer["secret"], b"kvpoll-tcp sender", ours, theirs))
        assert self.read(32) == proof(self.peer["secret"], b"kvpoll-tcp receiver", ours, theirs)

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self, nbytes: int) -> bytes:
        data = b""
        while len(data) < nbytes:
            piece = self.socket.recv(nbytes - len(data))
            assert piece, "closed too early"
            data += piece
        return data

    def verdict(self, ticket: int = 77, index: int = 0) -> int:
        """What the receiver answers to the next frame."""
        magic, kind, verdict, got_index, got_ticket = ACK.unpack(self.read(ACK.size))
        assert (magic, kind, got_index, got_ticket) == (FRAME_MAGIC, 2, index, ticket)
        return int(verdict)

    def is_dropped(self) -> bool:
        """Wait until the receiver has closed the connection; True if it said nothing before."""
        try:
            return self.socket.recv(1) == b""
        except (ConnectionResetError, BrokenPipeError):
            return True

    def finish(self) -> None:
        """Say that nothing more comes, unless the receiver has ended the connection already."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
