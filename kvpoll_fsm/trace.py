"""What a trace holds, and how traces of both ends are checked against each other.

A trace is a list of records, one JSON object a line in a file. Four kinds, told apart by `kind`:

- `endpoint`: the incarnation that writes; the first record of every trace;
- `state`: a room has entered a state here;
- `part`: a part has an outcome here;
- `message`: a room message was sent ("out") or delivered ("in").

`check()` reads the records of any number of endpoints and returns what is wrong with them: a move the table has
no row for, a state after a terminal one, parts out of order, Success without coverage, a receiver's Success that
its sender does not share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from kvpoll_fsm.errors import MalformedMessage
from kvpoll_fsm.lifecycle import TABLE
from kvpoll_fsm.poll import KVPoll

__all__ = [
    "EndpointRecord",
    "MessageRecord",
    "PartEntry",
    "Record",
    "StateRecord",
    "check",
    "decode_line",
    "encode_line",
]

MAX_LINE_NBYTES = 1 << 20
Text = Annotated[str, Meta(max_length=4096)]
Word = Annotated[str, Meta(max_length=256, pattern=r"\A[ -~]*\Z")]
"""Text that `check` repeats: nothing in it moves a terminal's cursor."""
Number = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class EndpointRecord(msgspec.Struct, frozen=True, tag_field="kind", tag="endpoint"):
    """Who writes this trace: incarnation in hex, process, and when (seconds, monotonic of that machine)."""

    at_s: float
    endpoint: Word
    pid: int


class _RoomRecord(msgspec.Struct, frozen=True, tag_field="kind", kw_only=True):
    """Common to records of a room.

    Attributes:
        at_s: When, on the clock of the machine that wrote it.
        endpoint: The incarnation that wrote it, in hex.
        peer: A receiver's sender: the incarnation it is bound to. Empty on a sender, or before that is known.
        generation: This side's life of the room.
        sender_generation: The sender's life of it, 0 before Opened.
    """

    at_s: float
    endpoint: Word
    side: Word
    room: Number
    rank: Number
    generation: Number
    sender_generation: Number = 0
    peer: Text = ""


class StateRecord(_RoomRecord, frozen=True, tag="state"):
    """A room has entered `state`; `gate` is what it waits for there, empty if it has gone on already."""

    state: Word
    gate: Text = ""
    cause: Text = ""


class PartEntry(_RoomRecord, frozen=True, tag="part"):
    """A part has an outcome."""

    part: Number
    offset: Number
    tokens: Number
    is_last: bool
    transport: Text = ""


class MessageRecord(msgspec.Struct, frozen=True, tag_field="kind", tag="message"):
    """A room message left ("out") or was delivered ("in")."""

    at_s: float
    endpoint: Text
    peer: Text
    way: Text
    message: dict[str, Any]


Record = EndpointRecord | StateRecord | PartEntry | MessageRecord

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


def encode_line(record: Record) -> bytes:
    """A record as one line of a trace file."""
    return _encoder.encode(record) + b"\n"


def decode_line(line: bytes) -> Record:
    """The record of one line.

    Raises:
        MalformedMessage: No such record.
    """
    if len(line) > MAX_LINE_NBYTES:
        raise MalformedMessage(f"a trace line of {len(line)} bytes; at most {MAX_LINE_NBYTES} are taken")
    try:
        return _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(f"not a trace record: {error}") from error


@dataclass
class _Life:
    """One life of a room on one side, put together from its records."""

    first: StateRecord | PartEntry
    states: list[str] = field(default_factory=list)
    parts: list[PartEntry] = field(default_factory=list)
    sender: tuple[str, int] | None = None
    cause: str = ""

    def __str__(self) -> str:
        one = self.first
        return f"{one.side} of room {one.room} rank {one.rank} generation {one.generation} at {one.endpoint[:8]}"

    @property
    def end(self) -> str:
        """The state it was last seen in, if any."""
        return self.states[-1] if self.states else ""


_MOVES = {(source.name, dest.name) for (source, _), dest in TABLE.items()}
_TERMINAL = {state.name for state in KVPoll if state.is_terminal}


def check(records: Iterable[Record]) -> list[str]:
    """What is wrong with the traces of one or more endpoints, a sentence each; nothing if all is right.

    A bounded trace may lack the beginning of old rooms; those are checked from where they begin.
    """
    lives = _lives(records)
    problems: list[str] = []
    for life in lives.values():
        problems += _check_states(life)
        problems += _check_parts(life)
    for life in lives.values():
        problems += _check_agreement(life, lives)
    return problems


def _lives(records: Iterable[Record]) -> dict[tuple[Any, ...], _Life]:
    lives: dict[tuple[Any, ...], _Life] = {}
    for record in records:
        if not isinstance(record, (StateRecord, PartEntry)):
            continue
        key = (record.endpoint, record.side, record.room, record.rank, record.generation)
        if key not in lives:
            lives[key] = _Life(record)
        _add(lives[key], record)
    return lives


def _add(life: _Life, record: StateRecord | PartEntry) -> None:
    if record.side == "receiver" and record.peer and record.sender_generation:
        life.sender = (record.peer, record.sender_generation)
    if isinstance(record, PartEntry):
        life.parts.append(record)
    else:
        life.states.append(record.state)
        life.cause = record.cause or life.cause


def _check_states(life: _Life) -> list[str]:
    problems = []
    for before, after in zip(life.states, life.states[1:], strict=False):
        if before in _TERMINAL:
            problems.append(f"{life}: {after} after {before}, which nothing leaves")
        elif (before, after) not in _MOVES:
            problems.append(f"{life}: no row leads from {before} to {after}")
    unknown = [state for state in life.states if state not in KVPoll.__members__]
    return problems + [f"{life}: there is no state {state}" for state in unknown]


def _check_parts(life: _Life) -> list[str]:
    problems = []
    for before, after in zip(life.parts, life.parts[1:], strict=False):
        if after.part != before.part + 1 or before.is_last:
            problems.append(f"{life}: part {after.part} after part {before.part}")
        if after.tokens and after.offset != before.offset + before.tokens:
            problems.append(f"{life}: part {after.part} begins at token {after.offset}, not where the last ended")
    last = life.parts[-1] if life.parts else None
    if life.end == KVPoll.Success.name and (last is None or not last.is_last):
        problems.append(f"{life}: Success without its last part")
    return problems


def _check_agreement(life: _Life, lives: Mapping[tuple[Any, ...], _Life]) -> list[str]:
    """A receiver against its sender, if that one's trace is here."""
    if life.sender is None:
        return []
    endpoint, generation = life.sender
    sender = lives.get((endpoint, "sender", life.first.room, 0, generation))
    if sender is None:
        return []
    problems = []
    if life.end == KVPoll.Success.name != sender.end:
        problems.append(f"{life}: Success while its sender is {sender.end}")
    ranges = {part.part: (part.offset, part.tokens, part.is_last) for part in sender.parts}
    for part in life.parts:
        if part.tokens and ranges.get(part.part) not in (None, (part.offset, part.tokens, part.is_last)):
            problems.append(f"{life}: part {part.part} covers another range than at its sender")
    return problems
