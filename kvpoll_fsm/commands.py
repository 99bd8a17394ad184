"""What a session asks the world to do. Plain frozen values; whoever hosts the session carries them out.

Each command says which input answers it. A session never waits: it is fed the answer, or a timer.

| command | carried out by | answered by (kvpoll_fsm.inputs) |
|---|---|---|
| Send | channel | nothing; the channel delivers or the peer is gone |
| Preflight | transport link | Preflighted |
| Grant, Regrant | block accounts (then, for a receiver, `Transport.grant`) | Granted, GrantQueued, GrantRefused |
| Expose (from the core) | transports' `grant` | Granted |
| StartPart | staging and transport links | Progress, one PartWritten per target, RankQuiesced |
| CancelPart | transport links | only asks; PartWritten and RankQuiesced still come |
| Verify, CopyOut | staging | Verified, CopiedOut |
| Fence | transports | Fenced |
| Release | block accounts, transports (tokens die) | nothing |
| SetTimer, CancelTimer | the host's clock | TimerFired |
"""

from __future__ import annotations

from dataclasses import dataclass

from kvpoll_fsm.messages import BlockGrant, Message

__all__ = [
    "CancelPart",
    "CancelTimer",
    "Command",
    "CopyOut",
    "Expose",
    "Fence",
    "Grant",
    "HeldPart",
    "Preflight",
    "Regrant",
    "Release",
    "Send",
    "SetTimer",
    "StartPart",
    "Target",
    "Verify",
]


@dataclass(frozen=True, slots=True)
class Send:
    """Put a message on the channel of connection `conn`."""

    conn: int
    message: Message


@dataclass(frozen=True, slots=True)
class Preflight:
    """Reach the data port of `rank` through `transport`, before anything is promised."""

    rank: int
    conn: int
    transport: str


@dataclass(frozen=True, slots=True)
class Grant:
    """Lease `blocks` blocks for `part`, or exactly those the engine named.

    A receiver's lease is also exposed to the transports, so that the answer carries tokens.

    Attributes:
        or_refuse: Answer GrantRefused at once instead of waiting for blocks.
    """

    part: int
    blocks: int
    exact: tuple[int, ...] = ()
    or_refuse: bool = False


@dataclass(frozen=True, slots=True)
class Regrant:
    """Turn the lease of `old_part` into one of `part`, keeping the first `blocks` blocks, freeing the rest.

    The old part's tokens are dead afterwards and new ones are made.
    """

    old_part: int
    part: int
    blocks: int


@dataclass(frozen=True, slots=True)
class Expose:
    """Admit writes to leased blocks: make the transports' tokens of a receiver's grant."""

    part: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """One rank a part goes to."""

    rank: int
    conn: int
    transport: str
    grant: BlockGrant


@dataclass(frozen=True, slots=True)
class StartPart:
    """Move tokens [offset, offset + tokens) into the granted blocks of every target.

    Attributes:
        blocks: Leased source blocks to stage into, or () where the engine's own blocks are the source.
        attempt: 0 for the first try at these targets; a re-issue on another transport counts up.
    """

    part: int
    offset: int
    tokens: int
    blocks: tuple[int, ...]
    targets: tuple[Target, ...]
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class CancelPart:
    """Nobody wants this part any more: stop where the transport can."""

    part: int


@dataclass(frozen=True, slots=True)
class HeldPart:
    """A committed part, or one being checked, and the blocks it lies in."""

    part: int
    offset: int
    tokens: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Verify:
    """Compare the checksum of a landed part with what the sender computed."""

    held: HeldPart
    checksum: bytes


@dataclass(frozen=True, slots=True)
class CopyOut:
    """Copy landed parts into the room's own destination of `total_tokens`.

    `checksum` is that of the last part in `parts` and is compared on the way, or None.
    """

    parts: tuple[HeldPart, ...]
    total_tokens: int
    checksum: bytes | None


@dataclass(frozen=True, slots=True)
class Fence:
    """Make sure that no write can land in the blocks of `part` any more. They are quarantined until then.

    Attributes:
        force: The writer will not tell; use means that may hurt other rooms.
    """

    part: int
    force: bool


@dataclass(frozen=True, slots=True)
class Release:
    """The lease of `part` has ended: its blocks are free."""

    part: int


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Feed `TimerFired(name, epoch)` after `after_s` seconds; replaces an earlier one of that name."""

    name: str
    after_s: float
    epoch: int


@dataclass(frozen=True, slots=True)
class CancelTimer:
    """The timer of that name is not needed any more."""

    name: str


Command = (
    Send
    | Preflight
    | Grant
    | Regrant
    | Expose
    | StartPart
    | CancelPart
    | Verify
    | CopyOut
    | Fence
    | Release
    | SetTimer
    | CancelTimer
)
