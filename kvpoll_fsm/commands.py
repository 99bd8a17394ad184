"""What a session asks the world to do. Plain frozen values; whoever hosts the session carries them out.

Each command says which input answers it. A session never waits: it is fed the answer, or a timer.

| command | carried out by | answered by (kvpoll_fsm.inputs) |
|---|---|---|
| Send | channel | nothing; the channel delivers or the peer is gone |
| Preflight | transport link, unless its breaker is open | Preflighted |
| Grant, Regrant | block accounts (then, for a receiver, `Transport.grant`) | Granted, GrantQueued, GrantRefused |
| Expose (from the core) | transports' `grant` | Granted |
| StartPart | staging and transport links | Progress, one PartWritten per target, RankQuiesced |
| CancelPart, CancelWrites | transport links | only asks; PartWritten and RankQuiesced still come |
| Verify, CopyOut | staging | Verified, CopiedOut |
| Fence | transports | Fenced, unless it was not forced and would hurt other rooms |
| Release | block accounts, transports (tokens die) | nothing |
| SetTimer, CancelTimer | the host's clock | TimerFired |
"""

from __future__ import annotations

from msgspec import Struct

from kvpoll_fsm.messages import BlockGrant, Message

__all__ = [
    "CancelPart",
    "CancelTimer",
    "CancelWrites",
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


class Send(Struct, frozen=True):
    """Put a message on the channel of connection `conn`."""

    conn: int
    message: Message


class Preflight(Struct, frozen=True):
    """Reach the data port of `rank` through `transport`, before anything is promised.

    Attributes:
        insist: Whatever its breaker says: nothing else is left.
    """

    rank: int
    conn: int
    transport: str
    insist: bool = False


class Grant(Struct, frozen=True):
    """Lease `blocks` blocks for `part`, or exactly those the engine named.

    A receiver's lease is also exposed to the transports, so that the answer carries tokens.

    Attributes:
        or_refuse: Answer GrantRefused at once instead of waiting for blocks.
    """

    part: int
    blocks: int
    exact: tuple[int, ...] = ()
    or_refuse: bool = False


class Regrant(Struct, frozen=True):
    """Turn the lease of `old_part` into one of `part`, keeping the first `blocks` blocks, freeing the rest.

    The old part's tokens are dead afterwards and new ones are made.
    """

    old_part: int
    part: int
    blocks: int


class Expose(Struct, frozen=True):
    """Admit writes to leased blocks: make the transports' tokens of a receiver's grant."""

    part: int
    blocks: tuple[int, ...]


class Target(Struct, frozen=True):
    """One rank a part goes to.

    Attributes:
        insist: Whatever the transport's breaker says: nothing else is left.
        shut: Why nothing is to be written there: the breaker's reason, set by the core. Answered like a failed write.
    """

    rank: int
    conn: int
    transport: str
    grant: BlockGrant
    insist: bool = False
    shut: str = ""


class StartPart(Struct, frozen=True):
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


class CancelPart(Struct, frozen=True):
    """Nobody wants this part any more: stop where the transport can."""

    part: int


class CancelWrites(Struct, frozen=True):
    """One attempt to write a part to a rank takes too long: stop where the transport can."""

    rank: int
    part: int
    attempt: int
    why: str


class HeldPart(Struct, frozen=True):
    """A committed part, or one being checked, and the blocks it lies in."""

    part: int
    offset: int
    tokens: int
    blocks: tuple[int, ...]


class Verify(Struct, frozen=True):
    """Compare the checksum of a landed part with what the sender computed."""

    held: HeldPart
    checksum: bytes


class CopyOut(Struct, frozen=True):
    """Copy landed parts into the room's own destination of `total_tokens`.

    `checksum` is that of the last part in `parts` and is compared on the way, or None.
    """

    parts: tuple[HeldPart, ...]
    total_tokens: int
    checksum: bytes | None


class Fence(Struct, frozen=True):
    """Make sure that no write can land in the blocks of `part` any more. They are quarantined until then.

    With `transport` the room lives and goes on: the blocks stay leased, what was written through that one transport
    lands no more, and the answer brings a new token for it.

    Attributes:
        force: The writer will not tell; use means that may hurt other rooms.
        transport: Fence what was written through this one alone, or "" for all.
    """

    part: int
    force: bool
    transport: str = ""


class Release(Struct, frozen=True):
    """The lease of `part` has ended: its blocks are free."""

    part: int


class SetTimer(Struct, frozen=True):
    """Feed `TimerFired(name, epoch)` after `after_s` seconds; replaces an earlier one of that name."""

    name: str
    after_s: float
    epoch: int


class CancelTimer(Struct, frozen=True):
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
    | CancelWrites
    | Verify
    | CopyOut
    | Fence
    | Release
    | SetTimer
    | CancelTimer
)
