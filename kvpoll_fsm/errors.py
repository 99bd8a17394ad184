"""Every error the library raises.

KvpollError
├── IllegalTransition         an event the table has no row for; the state is unchanged
├── InvalidInput              bad arguments; nothing was sent
│   ├── LayoutError           a field, dtype or shape that does not fit the layout
│   │   └── LayoutMismatch    two endpoints declare different layouts
│   ├── BlockError            a block or lease used against the rules
│   │   ├── DoubleFree        a lease released twice
│   │   ├── ForeignBlock      a block this pool or lease does not hold
│   │   └── RequestTooLarge   more tokens or blocks than there can ever be
│   ├── AddressError          an address nobody could reach
│   ├── PolicyError           a transport policy that cannot be read
│   ├── ConfigError           a setting in a file or a variable that cannot be used
│   └── DuplicateRoom         the room is open already on this endpoint
├── UnknownRoom               the room is not open here: never opened, or cleared
├── TransportUnavailable      unknown, not installed, or unusable here
├── MoverUnavailable          the process for the transfers cannot be started
├── MalformedMessage          bytes that are no message of ours
├── UnsupportedVersion        a peer that shares no protocol version with us
├── LimitReached              more than an endpoint's `Limits` allow
├── ChannelOverflow           a peer takes messages slower than they are produced
├── TransferFailed            `result()` of a room that ended Failed; carries the `Failure`
├── EndpointClosed            the endpoint, or its driver, has ended
└── ForkedError               a handle used in a forked child

Fields come first and the text is derived from them; errors pickle with all their fields.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from kvpoll_fsm.poll import KVPoll

__all__ = [
    "AddressError",
    "BlockError",
    "ChannelOverflow",
    "ConfigError",
    "DoubleFree",
    "DuplicateRoom",
    "EndpointClosed",
    "FailureCode",
    "Failure",
    "ForeignBlock",
    "ForkedError",
    "IllegalTransition",
    "InvalidInput",
    "KvpollError",
    "LayoutError",
    "LayoutMismatch",
    "LimitReached",
    "MalformedMessage",
    "MoverUnavailable",
    "PolicyError",
    "RequestTooLarge",
    "TransferFailed",
    "TransportUnavailable",
    "UnknownRoom",
    "UnsupportedVersion",
]


class FailureCode(str, enum.Enum):
    """Why a room ended Failed. The values travel between peers and never change.

    A value that a newer peer sends and we do not know is read as `Unknown`; the failure's detail still says more.
    """

    Aborted = "Aborted"
    Displaced = "Displaced"
    PeerLost = "PeerLost"
    MoverLost = "MoverLost"
    OutcomeUnknown = "OutcomeUnknown"
    DeadlinePassed = "DeadlinePassed"
    ProtocolError = "ProtocolError"
    TransportFailed = "TransportFailed"
    TransportUnavailable = "TransportUnavailable"
    ChecksumMismatch = "ChecksumMismatch"
    LayoutMismatch = "LayoutMismatch"
    UnsupportedVersion = "UnsupportedVersion"
    PoolExhausted = "PoolExhausted"
    RequestTooLarge = "RequestTooLarge"
    LimitReached = "LimitReached"
    InternalError = "InternalError"
    Unknown = "Unknown"

    @classmethod
    def _missing_(cls, value: object) -> FailureCode | None:
        return cls.Unknown if isinstance(value, str) else None

    def __str__(self) -> str:
        return self.value


MAX_DETAIL = 1000

_RETRYABLE = frozenset(
    {
        FailureCode.Displaced,
        FailureCode.PeerLost,
        FailureCode.MoverLost,
        FailureCode.OutcomeUnknown,
        FailureCode.DeadlinePassed,
        FailureCode.TransportFailed,
        FailureCode.ChecksumMismatch,
        FailureCode.PoolExhausted,
        FailureCode.LimitReached,
    }
)


@dataclass(frozen=True, slots=True)
class Failure:
    """The first cause of a room's end; it travels to every rank.

    Attributes:
        code: What kind of cause.
        rank: The receiver rank it arose on, or None for the sender itself.
        state: The state the failing side was in.
        retryable: Whether the same transfer may succeed if tried again.
        detail: A sentence for people. Cut at 1,000 characters and made encodable, wherever it comes from,
            because it is sent on to every rank.
    """

    code: FailureCode
    rank: int | None
    state: KVPoll
    retryable: bool
    detail: str

    def __post_init__(self) -> None:
        if len(self.detail) > MAX_DETAIL or not self.detail.isascii():
            clean = self.detail[:MAX_DETAIL].encode("utf-8", "replace").decode("utf-8")
            object.__setattr__(self, "detail", clean)

    @classmethod
    def of(cls, code: FailureCode, detail: str, *, state: KVPoll, rank: int | None = None) -> Failure:
        """Build a failure whose `retryable` follows from its code."""
        return cls(code, rank, state, code in _RETRYABLE, detail)

    def __str__(self) -> str:
        where = "sender" if self.rank is None else f"rank {self.rank}"
        retry = "retryable" if self.retryable else "not retryable"
        return f"{self.code} on {where} in {self.state} ({retry}): {self.detail}"


class KvpollError(Exception):
    """Root of the tree; catches everything this library raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, dict(self.__dict__))


def _rebuild(cls: type[KvpollError], args: tuple[Any, ...], fields: dict[str, Any]) -> KvpollError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(fields)
    return error


class IllegalTransition(KvpollError):
    """No row leads from `state` by `event`. The machine is where it was."""

    def __init__(self, state: KVPoll, event: object) -> None:
        self.state = state
        self.event = event
        super().__init__(f"{event!r} is not possible in {state}; the state is unchanged")


class InvalidInput(KvpollError, ValueError):
    """Arguments that cannot work. Nothing was sent."""


class LayoutError(InvalidInput):
    """Data that does not fit the layout."""

    def __init__(self, field: str, problem: str) -> None:
        self.field = field
        self.problem = problem
        super().__init__(f"field {field!r}: {problem}")


class LayoutMismatch(LayoutError):
    """Two endpoints whose layouts differ; `differences` names each field and how it differs."""

    def __init__(self, differences: tuple[str, ...]) -> None:
        self.differences = differences
        field = differences[0].split(":", 1)[0] if differences else "?"
        super().__init__(field, "the two endpoints' layouts differ: " + "; ".join(differences))


class BlockError(InvalidInput):
    """A block or lease used against the rules."""


class DoubleFree(BlockError):
    """A lease that has ended was ended again."""

    def __init__(self, lease: object) -> None:
        self.lease = lease
        super().__init__(f"{lease!r} holds no blocks: it was released before, or never given")


class ForeignBlock(BlockError):
    """Block ids that are not this pool's to give, or are in use already."""

    def __init__(self, blocks: tuple[int, ...], problem: str) -> None:
        self.blocks = blocks
        self.problem = problem
        super().__init__(f"blocks {list(blocks[:8])}: {problem}")


class RequestTooLarge(BlockError):
    """More blocks than the pool has, so waiting would never help."""

    def __init__(self, wanted_blocks: int, pool_blocks: int) -> None:
        self.wanted_blocks = wanted_blocks
        self.pool_blocks = pool_blocks
        super().__init__(
            f"{wanted_blocks} blocks wanted but the pool has {pool_blocks} in all: "
            "ask for fewer tokens or build a larger pool"
        )


class AddressError(InvalidInput):
    """An address no peer could reach, or that cannot be read."""

    def __init__(self, address: str, problem: str) -> None:
        self.address = address
        self.problem = problem
        super().__init__(f"address {address!r}: {problem}")


class PolicyError(InvalidInput):
    """A transport policy that cannot be read."""

    def __init__(self, policy: str, problem: str) -> None:
        self.policy = policy
        self.problem = problem
        super().__init__(f"transport policy {policy!r}: {problem}; write 'tcp', 'require:tcp' or 'prefer:shm,tcp'")


class ConfigError(InvalidInput):
    """A setting that a file or an environment variable gives, and that cannot be used."""

    def __init__(self, source: str, key: str, value: object, problem: str) -> None:
        self.source = source
        self.key = key
        self.value = value
        self.problem = problem
        given = f"{key} = {value!r}: " if key else ""
        super().__init__(f"{source}: {given}{problem}")


class DuplicateRoom(InvalidInput):
    """The room is open on this endpoint; only this second opening is refused."""

    def __init__(self, side: str, room: int, rank: int) -> None:
        self.side = side
        self.room = room
        self.rank = rank
        super().__init__(f"{side} of room {room}, rank {rank} is open already: clear() it before opening it again")


class UnknownRoom(KvpollError, KeyError):
    """The room is not open here."""

    def __init__(self, room: int) -> None:
        self.room = room
        super().__init__(f"room {room} is not open here: it was never opened, or it has been cleared")

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show the repr


class TransportUnavailable(KvpollError):
    """A transport that is unknown, not installed or not usable on this machine."""

    def __init__(self, name: str, problem: str, hint: str = "") -> None:
        self.name = name
        self.problem = problem
        self.hint = hint
        super().__init__(f"transport {name!r}: {problem}" + (f"; {hint}" if hint else ""))


class MoverUnavailable(KvpollError):
    """The process that an endpoint's transfers are to run in cannot be started."""

    def __init__(self, problem: str) -> None:
        self.problem = problem
        super().__init__(f"no mover: {problem}; isolation='thread' does without")


class MalformedMessage(KvpollError):
    """Bytes from outside that are no message of ours."""

    def __init__(self, problem: str) -> None:
        self.problem = problem
        super().__init__(problem)


class UnsupportedVersion(KvpollError):
    """No protocol version is known to both sides; ranges are (lowest, highest)."""

    def __init__(self, ours: tuple[int, int], theirs: tuple[int, int]) -> None:
        self.ours = ours
        self.theirs = theirs
        super().__init__(f"we speak protocol versions {ours[0]}-{ours[1]}, the peer {theirs[0]}-{theirs[1]}")


class LimitReached(KvpollError):
    """More than the `Limits` of an endpoint allow; `name` is the setting."""

    def __init__(self, name: str, limit: int) -> None:
        self.name = name
        self.limit = limit
        super().__init__(f"the limit {name}={limit} is reached")


class ChannelOverflow(KvpollError):
    """The peer acknowledges slower than messages are produced."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(f"{limit} messages are waiting for the peer's acknowledgement; no more are taken")


class TransferFailed(KvpollError):
    """`result()` of a room that ended Failed."""

    def __init__(self, room: int, failure: Failure) -> None:
        self.room = room
        self.failure = failure
        super().__init__(f"room {room}: {failure}")


class EndpointClosed(KvpollError):
    """The endpoint has been closed, or its driver ended."""

    def __init__(self, cause: str = "closed") -> None:
        self.cause = cause
        super().__init__(f"the endpoint has ended: {cause}")


class ForkedError(KvpollError):
    """A handle was used in a forked child; only the process that made it may."""

    def __init__(self, owner_pid: int, pid: int) -> None:
        self.owner_pid = owner_pid
        self.pid = pid
        super().__init__(f"made in process {owner_pid}, used in forked child {pid}: open an endpoint of its own there")
