"""What host and mover tell each other: msgspec structs, a list of them per frame. `number` names a room's view."""

from __future__ import annotations

from typing import Any

import msgspec

from kvpoll_fsm.errors import Failure
from kvpoll_fsm.session import PartRecord

__all__ = [
    "Abort",
    "Answer",
    "Ask",
    "Changed",
    "Clear",
    "Close",
    "Command",
    "Dropped",
    "Event",
    "Free",
    "Logged",
    "NewSegment",
    "OpenReceiver",
    "OpenSender",
    "Refused",
    "Setup",
    "Stage",
    "Staged",
    "Started",
    "Supply",
    "Switch",
    "Switched",
]


class _Struct(msgspec.Struct, array_like=True, frozen=True, gc=False):
    pass


# From the host


class Setup(_Struct, frozen=True, tag=1):
    """The first frame. With it come the file descriptors of the arenas, in the order of the fields, and the table's.

    Attributes:
        layout: (block_tokens, fields as (name, dtype, shape_per_token, per_room)).
        config: Settings as plain data; see `settings`.
        challenge: Where in the host's memory `nonce` lies.
        nice: How far the mover stands back behind others.
        cpus: Processors it may use, or None for all.
        paths: The host's `sys.path`, for transports that are found there.
        log_level: What the host's logger takes.
    """

    layout: tuple[int, list[tuple[str, str, tuple[int, ...], bool]]]
    blocks: int
    config: dict[str, Any]
    host_pid: int
    challenge: int
    nonce: bytes
    nice: int
    cpus: tuple[int, ...] | None
    paths: list[str]
    log_level: int


class OpenSender(_Struct, frozen=True, tag=2):
    """Open the sender's side of a room; `policy` as text, None for the endpoint's."""

    number: int
    room: int
    tag: str
    required_ranks: int | None
    policy: str | None


class OpenReceiver(_Struct, frozen=True, tag=3):
    """Open one receiver rank of a room; `peer` as text."""

    number: int
    room: int
    rank: int
    tag: str
    peer: str
    ranks: int
    blocks: int
    resume: str
    window: int


class Supply(_Struct, frozen=True, tag=4):
    """The data of a sender's room: where every field's bytes begin in the host's memory."""

    number: int
    total_tokens: int
    addresses: tuple[int, ...]


class Abort(_Struct, frozen=True, tag=5):
    """Give a room up."""

    number: int
    detail: str


class Clear(_Struct, frozen=True, tag=6):
    """The host drops a room."""

    number: int


class Ask(_Struct, frozen=True, tag=7):
    """A `Question`; answered by an `Answer` of the same `ask`."""

    ask: int
    question: str


class Staged(_Struct, frozen=True, tag=8):
    """The answer to `Stage`; `problem` is empty if the data are in the blocks."""

    stage: int
    problem: str


class Free(_Struct, frozen=True, tag=9):
    """The host has no array over this segment any more. Unless `again`, a child of its may have one."""

    segment: int
    again: bool


class Close(_Struct, frozen=True, tag=10):
    """End the endpoint."""


class Switch(_Struct, frozen=True, tag=11):
    """Give new rooms another policy, or a share of them; answered like the question "transports"."""

    ask: int
    policy: str
    share: float | None


Command = Setup | OpenSender | OpenReceiver | Supply | Abort | Clear | Ask | Staged | Free | Close | Switch


# From the mover


class Started(_Struct, frozen=True, tag=1):
    """The driver runs, and listens at `bound`. `reads_host`: the mover can read the host's memory by itself."""

    address: str
    bound: str
    reads_host: bool


class Refused(_Struct, frozen=True, tag=2):
    """The driver cannot run: an error by the name of its class, its `args`, and its fields."""

    kind: str
    args: list[Any]
    fields: dict[str, Any]


class Changed(_Struct, frozen=True, tag=3):
    """What is new of a room. A final state is in the table once this has been sent, others before.

    Attributes:
        states: One bit for each state it has gone through, as in the status table.
        parts: Those that have an outcome since the last time.
        quiescent: No write can land, or read its source, any more.
        over: The room is forgotten.
        total_tokens: Of a receiver's room that ended Success, else 0.
        segment: The segment that holds its data, or 0.
        inline: Its data, if they are few.
    """

    number: int
    states: int
    failure: Failure | None = None
    parts: tuple[PartRecord, ...] = ()
    quiescent: bool = False
    over: bool = False
    total_tokens: int = 0
    segment: int = 0
    inline: bytes = b""


class NewSegment(_Struct, frozen=True, tag=4):
    """The frame brings the file descriptor of this segment."""

    segment: int
    nbytes: int


class Dropped(_Struct, frozen=True, tag=5):
    """The segment will not be used again."""

    segment: int


class Answer(_Struct, frozen=True, tag=6):
    """The answer to an `Ask` or a `Switch`; `problem`, or `refused`, says why there is none."""

    ask: int
    result: msgspec.Raw
    problem: str = ""
    refused: Refused | None = None


class Stage(_Struct, frozen=True, tag=7):
    """Copy tokens of a sender's room into these blocks: the mover cannot read the host's memory."""

    stage: int
    number: int
    blocks: tuple[int, ...]
    offset: int
    tokens: int
    first: bool


class Logged(_Struct, frozen=True, tag=8):
    """A line for the host's log."""

    logger: str
    level: int
    text: str


class Switched(_Struct, frozen=True, tag=9):
    """New rooms have these policies from now on; whoever wanted that. Another mover has to begin with them."""

    policy: str
    canary: tuple[str, float] | None


Event = Started | Refused | Changed | NewSegment | Dropped | Answer | Stage | Logged | Switched
