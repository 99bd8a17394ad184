"""Keeps an endpoint's trace: the newest records in a ring, and all of them in a file if one is named."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.messages import Frame, Packet
from kvpoll_fsm.receiver_session import ReceiverSession
from kvpoll_fsm.session import RoomKey, Session
from kvpoll_fsm.trace import EndpointRecord, MessageRecord, PartEntry, Record, StateRecord, encode_line

__all__ = ["Recorder"]

log = logging.getLogger("kvpoll_fsm")
RING_RECORDS = 4096


class Recorder:
    """The trace of one endpoint. Used by the driver's thread alone."""

    def __init__(self, incarnation: bytes, path: str | Path | None = None, ring: int = RING_RECORDS) -> None:
        """Store the settings.

        Args:
            incarnation: Whose trace this is.
            path: Also append every record to this file, or None.
            ring: How many records are kept in memory.
        """
        self._endpoint = incarnation.hex()
        self._path = path
        self._ring: deque[Record] = deque(maxlen=ring)
        self._file: BinaryIO | None = None

    def start(self) -> None:
        """Open the file, if one is named.

        Raises:
            InvalidInput: It cannot be written.
        """
        if self._path is not None:
            try:
                self._file = open(self._path, "ab")  # noqa: SIM115  closed by close()
            except OSError as error:
                raise InvalidInput(f"trace={str(self._path)!r}: {error}") from error
            self._write(self._header())

    def frame(self, way: str, packet: Packet) -> None:
        """The messages of a packet left ("out") or arrived ("in")."""
        if not isinstance(packet, Frame) or not packet.messages:
            return
        now_s, peer = time.monotonic(), (packet.target if way == "out" else packet.source).hex()
        for message in packet.messages:
            shown: Any = message  # encoded as a map like any other struct
            self._write(MessageRecord(now_s, self._endpoint, peer, way, shown))

    def room(
        self, key: RoomKey, session: Session, states: int, parts: int, peer_of: Callable[[Session], bytes | None]
    ) -> None:
        """Record what is new in a room.

        Args:
            key: Which.
            session: What is said of it now.
            states: How many of the states that it has gone through were recorded before.
            parts: How many of the parts that have an outcome were.
            peer_of: Tells a receiver's sender.
        """
        common = self._common(key, session, peer_of(session))
        for part in session.parts[parts:]:
            entry = PartEntry(
                **common,
                part=part.part,
                offset=part.offset,
                tokens=part.tokens,
                is_last=part.is_last,
                transport=part.transport,
            )
            self._write(entry)
        for state in session.history[states:]:
            present = state is session.state  # it passed through the others since the last look
            cause = str(session.failure) if present and session.failure else ""
            self._write(
                StateRecord(**common, state=state.name, gate=session.gate.value if present else "", cause=cause)
            )

    def records(self) -> list[Record]:
        """The header and the records in the ring, oldest first."""
        return [self._header(), *self._ring]

    def flush(self) -> None:
        """Hand what was recorded to the operating system, so that a crash of this process loses none of it."""
        if self._file is not None:
            self._try(lambda file: file.flush())

    def close(self) -> None:
        """Close the file. May be called twice."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _try(self, action: Callable[[BinaryIO], object]) -> None:
        """Write, or give the file up: a full disk must not end a transfer."""
        try:
            if self._file is not None:
                action(self._file)
        except OSError as error:
            log.error("trace file given up path=%s cause=%s", self._path, error)
            with suppress(OSError):  # closing tries to write once more
                self.close()
            self._file = None

    def _header(self) -> EndpointRecord:
        return EndpointRecord(time.monotonic(), self._endpoint, os.getpid())

    def _common(self, key: RoomKey, session: Session, peer: bytes | None) -> dict[str, Any]:
        bound = session.sender_generation if isinstance(session, ReceiverSession) else key.generation
        return {
            "at_s": time.monotonic(),
            "endpoint": self._endpoint,
            "side": key.side,
            "room": key.room,
            "rank": key.rank,
            "generation": key.generation,
            "sender_generation": bound,
            "peer": (peer or b"").hex() if key.side == "receiver" else "",
        }

    def _write(self, record: Record) -> None:
        self._ring.append(record)
        if self._file is not None:
            self._try(lambda file: file.write(encode_line(record)))
