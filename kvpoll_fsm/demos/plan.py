"""What one demo is to do: sizes that are checked before any process is started."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from kvpoll_fsm import registry
from kvpoll_fsm.errors import InvalidInput, TransportUnavailable
from kvpoll_fsm.layout import Field, Layout
from kvpoll_fsm.messages import MAX_BLOCKS_PER_GRANT
from kvpoll_fsm.selection import Policy

__all__ = ["DTYPES", "FIRST_ROOM", "ISOLATIONS", "RESUMES", "Plan", "available_nbytes", "require_transport"]

DTYPES = ("bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "int8", "uint8")
"""Dtypes of the embeddings: those of which random bits make valid values."""

RESUMES = ("drain", "extend")
ISOLATIONS = ("auto", "process", "thread")
"""Ways to make room for the next part that need no engine (`manual` does)."""

FIRST_ROOM = 42

MOST_AT_ONCE = 16
"""Reservations a receiver's pool holds for rooms that move together; further rooms queue for them."""

LIMITS: dict[str, tuple[int, int]] = {
    "tokens": (1, 1_000_000_000),
    "blocks": (1, MAX_BLOCKS_PER_GRANT),
    "block_tokens": (1, 1_000_000),
    "hidden": (1, 1_000_000),
    "ranks": (1, 64),
    "rooms": (1, 10_000),
    "at_once": (1, MOST_AT_ONCE),
}
"""Smallest and largest value of every number in a plan."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A demo: `rooms` rooms from one sender process to `ranks` receiver processes.

    Attributes:
        tokens: Tokens of every room.
        blocks: Blocks of one reservation, that is of one grant.
        block_tokens: Tokens per block.
        hidden: Elements of one token's embedding.
        dtype: Of the embeddings.
        ranks: Receiver processes, each of which gets every room.
        rooms: How many there are; their numbers start at `FIRST_ROOM`. All are opened at once.
        transport: A policy as `Endpoint` takes it.
        resume: What receivers do to make room for the next part.
        isolation: Where endpoints' drivers run, as `Endpoint` takes it.
        at_once: Rooms whose data exists at the same time; bounds the memory the demo takes.

    Raises:
        InvalidInput: A number outside its limits, or another word than allowed; names it.
        LayoutError: Tokens too large for a field.
        PolicyError: A policy that cannot be read.
    """

    tokens: int = 2000
    blocks: int = 8
    block_tokens: int = 128
    hidden: int = 3584
    dtype: str = "bfloat16"
    ranks: int = 1
    rooms: int = 1
    transport: str = "prefer:shm,tcp"
    resume: str = "drain"
    isolation: str = "auto"
    at_once: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name in LIMITS:
                _require_within(field.name, getattr(self, field.name))
        _require_one_of("dtype", self.dtype, DTYPES)
        _require_one_of("resume", self.resume, RESUMES)
        _require_one_of("isolation", self.isolation, ISOLATIONS)
        Policy.parse(self.transport)
        _ = self.layout

    @property
    def layout(self) -> Layout:
        """Embeddings and ids per token, and 16 numbers per room."""
        return Layout(
            self.block_tokens,
            [
                Field("embeddings", self.dtype, (self.hidden,)),
                Field("fill_ids", "int32"),
                Field("aux", "int64", (16,), per_room=True),
            ],
        )

    @property
    def room_numbers(self) -> range:
        """The rooms, in the order in which they are served."""
        return range(FIRST_ROOM, FIRST_ROOM + self.rooms)

    @property
    def grant_tokens(self) -> int:
        """Tokens one reservation holds: the size of every part but the last."""
        return self.blocks * self.block_tokens

    @property
    def parts(self) -> int:
        """Parts that a room takes, all reservations being of one size."""
        return -(-self.tokens // self.grant_tokens)

    @property
    def room_nbytes(self) -> int:
        """Bytes of one room's data."""
        return sum(field.slot_nbytes * (1 if field.per_room else self.tokens) for field in self.layout.fields)

    @property
    def sender_blocks(self) -> int:
        """Blocks of the sender's pool: it stages one part of every room that moves."""
        return self.at_once * self.blocks

    @property
    def receiver_blocks(self) -> int:
        """Blocks of a receiver's pool: a room that extends holds on to a reservation per part."""
        return self.sender_blocks * (self.parts if self.resume == "extend" else 1)

    @property
    def nbytes_at_once(self) -> int:
        """Most bytes the demo's processes hold together: pools, the sender's arrays, the receivers' arrays."""
        block_nbytes = sum(field.block_nbytes(self.block_tokens) for field in self.layout.fields)
        pools = self.sender_blocks + self.ranks * self.receiver_blocks
        return pools * block_nbytes + self.at_once * self.room_nbytes * (1 + self.ranks)

    def fitted(self, memory_nbytes: int) -> Plan:
        """This plan with as many rooms at once as fit into half of the memory.

        Raises:
            InvalidInput: Not even one room fits.
        """
        one = self._with_at_once(1)
        if one.nbytes_at_once > memory_nbytes * 0.8:
            raise InvalidInput(
                f"one room takes {one.nbytes_at_once / 1e9:,.1f} GB (its data once in each of "
                f"{1 + self.ranks} processes, and their pools) where {memory_nbytes / 1e9:,.1f} GB are free: "
                "use fewer tokens, blocks or ranks, or a smaller hidden size"
            )
        fits = int(memory_nbytes * 0.5) // one.nbytes_at_once
        return self._with_at_once(max(1, min(fits, self.rooms, MOST_AT_ONCE)))

    def _with_at_once(self, at_once: int) -> Plan:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Plan(**{**values, "at_once": at_once})


def require_transport(policy: str) -> None:
    """Check that at least one transport of a policy is installed.

    Raises:
        PolicyError: It cannot be read.
        TransportUnavailable: None of them can be loaded; says how to get it.
    """
    refusals = []
    for name in Policy.parse(policy).names:
        try:
            registry.load(name)
        except TransportUnavailable as error:
            refusals.append(error)
        else:
            return
    raise refusals[0]


def available_nbytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Memory that can be taken without swapping, in bytes; 8 GiB where the kernel does not say."""
    try:
        lines = meminfo.read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, IndexError, ValueError):
        return 8 << 30


def _require_within(name: str, value: object) -> None:
    low, high = LIMITS[name]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidInput(f"{name}={value!r}: give an integer from {low:,} to {high:,}")


def _require_one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidInput(f"{name}={value!r}: choose one of {', '.join(allowed)}")
