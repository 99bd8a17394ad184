"""What sessions are fed. Plain frozen values, each an answer to a command or something that happened.

Ids, time and randomness are in here, never made by a session.
"""

from __future__ import annotations

from msgspec import Struct

from kvpoll_fsm.deadlines import Gate
from kvpoll_fsm.errors import Failure, FailureCode
from kvpoll_fsm.messages import Message

__all__ = [
    "AbortRoom",
    "BeatReceived",
    "ClearRoom",
    "CopiedOut",
    "Crashed",
    "Fenced",
    "GrantQueued",
    "GrantRefused",
    "Granted",
    "Input",
    "MessageReceived",
    "PartWritten",
    "PeerGone",
    "Preflighted",
    "Probing",
    "Progress",
    "RankQuiesced",
    "Reconsider",
    "ReleasePart",
    "ResumeWith",
    "RevokeGrant",
    "Start",
    "Supplied",
    "TimerFired",
    "Verified",
    "Worked",
]


class Start(Struct, frozen=True):
    """The host opened the room."""


class Supplied(Struct, frozen=True):
    """The sender's host: `ready_tokens` of `total_tokens` can be sent.

    Attributes:
        staged: The data is in the host's tensors and goes through leased source blocks.
    """

    total_tokens: int
    ready_tokens: int
    staged: bool


class ResumeWith(Struct, frozen=True):
    """The receiver's host grants these blocks for the next part (`manual`)."""

    blocks: tuple[int, ...]


class ReleasePart(Struct, frozen=True):
    """The receiver's host has no more use for the blocks of a committed part (`manual`)."""

    part: int


class AbortRoom(Struct, frozen=True):
    """The host gives the room up."""

    detail: str
    code: FailureCode = FailureCode.Aborted


class ClearRoom(Struct, frozen=True):
    """The host drops its handle; a live room is aborted, blocks it still held go back."""


class MessageReceived(Struct, frozen=True):
    """A room message the channel of `conn` delivered."""

    conn: int
    message: Message


class BeatReceived(Struct, frozen=True):
    """The other side's heartbeat for this room."""

    rank: int
    gate: Gate
    bytes_done: int
    host_alive: bool
    working: bool = False
    tries: int = 0


class PeerGone(Struct, frozen=True):
    """Connection `conn` has ended for good; `code` is why."""

    conn: int
    detail: str
    code: FailureCode = FailureCode.PeerLost


class Preflighted(Struct, frozen=True):
    """The answer to Preflight.

    Attributes:
        shut: It was not tried: the transport's breaker is open.
    """

    rank: int
    conn: int
    transport: str
    ok: bool
    detail: str = ""
    shut: bool = False


class Reconsider(Struct, frozen=True):
    """A transport to the peer of this connection may work again: choose anew for the next part."""

    conn: int


class Probing(Struct, frozen=True):
    """This attempt is the one that is to show whether its transport works again."""

    rank: int
    part: int
    attempt: int


class Granted(Struct, frozen=True):
    """Blocks are leased for `part`.

    Attributes:
        tokens: What they hold.
        tokens_by_transport: For a receiver, the transports' tokens; empty for a sender.
    """

    part: int
    blocks: tuple[int, ...]
    tokens: int
    tokens_by_transport: tuple[tuple[str, bytes], ...] = ()


class GrantQueued(Struct, frozen=True):
    """No block is free; Granted will follow."""

    part: int


class GrantRefused(Struct, frozen=True):
    """No block is free and waiting was not wanted, or the request can never be met."""

    part: int
    failure: Failure | None = None


class RevokeGrant(Struct, frozen=True):
    """Earlier rooms wait for blocks: give back what this room was granted and has not used."""


class Progress(Struct, frozen=True):
    """Bytes of the whole room that have landed so far, over all ranks; they came with part `part`."""

    part: int
    bytes_done: int


class PartWritten(Struct, frozen=True):
    """The writes of a part to one rank have ended. Comes exactly once per target of a StartPart.

    Attributes:
        ok: Every byte is in the destination's memory.
        quiescent: No write can land any more (always so when `ok`).
        source_free: The source is not read any more.
        collateral: It failed through no fault of the transport's and may be tried there again.
        ours: It failed before a transport had any part in it.
        shut: Nothing was written: the transport's breaker is open.
    """

    rank: int
    part: int
    transport: str
    ok: bool
    quiescent: bool = True
    source_free: bool = True
    detail: str = ""
    checksum: bytes | None = None
    attempt: int = 0
    collateral: bool = False
    ours: bool = False
    shut: bool = False


class RankQuiesced(Struct, frozen=True):
    """The writes to `rank` that had ended without quiescence can land no more, nor read the source."""

    rank: int
    part: int
    attempt: int = 0


class Verified(Struct, frozen=True):
    """The answer to Verify; `failure` is None if the checksum is right."""

    part: int
    failure: tuple[FailureCode, str] | None = None


class CopiedOut(Struct, frozen=True):
    """The answer to CopyOut; `part` is the last of those copied."""

    part: int
    failure: tuple[FailureCode, str] | None = None


class Worked(Struct, frozen=True):
    """Staging, Verify or CopyOut of this room is not answered yet, but the workers move on: that is progress too."""


class Fenced(Struct, frozen=True):
    """No byte lands in the blocks of `part` any more, or none that was written through `transport` before now.

    Attributes:
        transport: The one that the Fence named, or "".
        token: Admits writes through that one anew; None if it is not used any more.
    """

    part: int
    transport: str = ""
    token: bytes | None = None


class TimerFired(Struct, frozen=True):
    """A timer set by SetTimer; one with a stale epoch is ignored.

    Attributes:
        host_alive: This side's host process has called its endpoint lately.
    """

    name: str
    epoch: int
    host_alive: bool = False


class Crashed(Struct, frozen=True):
    """Carrying out a command raised; only this room fails."""

    detail: str


Input = (
    Start
    | Supplied
    | ResumeWith
    | ReleasePart
    | AbortRoom
    | ClearRoom
    | MessageReceived
    | BeatReceived
    | PeerGone
    | Preflighted
    | Reconsider
    | Probing
    | Granted
    | GrantQueued
    | GrantRefused
    | RevokeGrant
    | Progress
    | PartWritten
    | RankQuiesced
    | Verified
    | CopiedOut
    | Fenced
    | TimerFired
    | Crashed
    | Worked
)
