"""What one token consists of, and how blocks of tokens map to bytes.

A layout declares fields. Each field has an arena of its own, token-major: `[blocks, block_tokens, *shape]`,
so a block is one byte range. A per-room field has one slot per block, `[blocks, *shape]`; the value of a room
lies in the slot of the first block of its part 0.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import field as attribute
from typing import Any

from kvpoll_fsm.errors import InvalidInput, LayoutError, LayoutMismatch

__all__ = ["ITEMSIZE", "Extent", "Field", "Layout", "cut", "plan_part", "plan_runs", "runs"]

ITEMSIZE: dict[str, int] = {
    "bool": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "int32": 4,
    "uint32": 4,
    "int64": 8,
    "uint64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
}
"""Bytes per element of every dtype, by the name that numpy and torch share."""

MAX_FIELDS = 64
MAX_SLOT_NBYTES = 1 << 40


@dataclass(frozen=True, slots=True)
class Field:
    """One kind of data of a transfer.

    Attributes:
        name: Unique in its layout; 1 to 128 printable characters.
        dtype: A name in `ITEMSIZE`.
        shape_per_token: Shape of one token's value, e.g. `(3584,)`; `()` is a scalar.
        per_room: One value of that shape per room instead of one per token.
        slot_nbytes: Bytes of one token's value (one room's, if `per_room`).

    Raises:
        LayoutError: An empty name, an unknown dtype, or a shape with a size below 1.
    """

    name: str
    dtype: str
    shape_per_token: tuple[int, ...] = ()
    per_room: bool = False
    slot_nbytes: int = attribute(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Names go into messages, logs and the fingerprint: no line ends, no lone surrogates.
        if not isinstance(self.name, str) or not 0 < len(self.name) <= 128 or not self.name.isprintable():
            raise LayoutError(ascii(self.name)[:128], "a field's name has 1 to 128 printable characters")
        if not isinstance(self.dtype, str) or self.dtype not in ITEMSIZE:
            raise LayoutError(self.name, f"unknown dtype {self.dtype!r}; known: {', '.join(ITEMSIZE)}")
        object.__setattr__(self, "shape_per_token", _sizes(self.name, self.shape_per_token))
        object.__setattr__(self, "slot_nbytes", ITEMSIZE[self.dtype] * math.prod(self.shape_per_token))
        if len(self.shape_per_token) > 16 or self.slot_nbytes > MAX_SLOT_NBYTES:
            raise LayoutError(self.name, f"shape_per_token {self.shape_per_token!r} is too large")

    def block_nbytes(self, block_tokens: int) -> int:
        """Bytes one block takes in this field's arena."""
        return self.slot_nbytes if self.per_room else self.slot_nbytes * block_tokens

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape_per_token)) or "scalar"
        return f"{self.dtype}[{shape}]{' per room' if self.per_room else ''}"


def _sizes(name: str, shape: Any) -> tuple[int, ...]:
    """A shape as a tuple of plain integers, which is what messages can carry."""
    if hasattr(shape, "__index__"):
        raise LayoutError(name, f"shape_per_token is a tuple: write ({shape},)")
    try:
        sizes = tuple(0 if isinstance(size, bool) else operator.index(size) for size in shape)
    except TypeError:
        raise LayoutError(name, f"shape_per_token {shape!r} is not a tuple of integers") from None
    if any(size < 1 for size in sizes):
        raise LayoutError(name, f"every size in shape_per_token {shape!r} is an integer of at least 1")
    return sizes


@dataclass(frozen=True, slots=True)
class Layout:
    """The fields of a transfer and how many tokens a block holds.

    Attributes:
        block_tokens: Tokens per block; the two sides of a transfer may differ in it.
        fields: At least one that is not per room; names are unique.
        token_nbytes: Bytes of one token over all token fields.
        room_nbytes: Bytes of all per-room fields together.

    Raises:
        InvalidInput: `block_tokens` below 1, something else than fields, or no token field.
        LayoutError: A name used twice.
    """

    block_tokens: int
    fields: tuple[Field, ...]
    token_nbytes: int = attribute(init=False, repr=False, compare=False)
    room_nbytes: int = attribute(init=False, repr=False, compare=False)

    def __init__(self, block_tokens: int, fields: Sequence[Field]) -> None:
        object.__setattr__(self, "block_tokens", block_tokens)
        object.__setattr__(self, "fields", _as_fields(fields))
        counts = isinstance(block_tokens, int) and not isinstance(block_tokens, bool)
        if not counts or not 0 < block_tokens < 1 << 31:
            raise InvalidInput(f"block_tokens={block_tokens!r}: give an integer of at least 1")
        if not any(not field.per_room for field in self.fields) or len(self.fields) > MAX_FIELDS:
            raise InvalidInput(f"a layout has 1 to {MAX_FIELDS} fields, at least one of them not per_room")
        names = [field.name for field in self.fields]
        for name in names:
            if names.count(name) > 1:
                raise LayoutError(name, "is declared twice")
        per_room = sum([field.slot_nbytes for field in self.fields if field.per_room])
        object.__setattr__(self, "room_nbytes", per_room)
        object.__setattr__(self, "token_nbytes", sum([field.slot_nbytes for field in self.fields]) - per_room)

    @property
    def token_fields(self) -> tuple[Field, ...]:
        """The fields with one value per token."""
        return tuple(field for field in self.fields if not field.per_room)

    def part_nbytes(self, tokens: int, *, first: bool) -> int:
        """Bytes of a part; those of the per-room fields are in part 0."""
        return self.token_nbytes * tokens + (self.room_nbytes if first else 0)

    @property
    def fingerprint(self) -> bytes:
        """16 bytes over names, dtypes, shapes and per_room; block sizes are not part of it."""
        text = "\n".join(f"{field.name}:{field}" for field in self.fields)
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_tokens)

    def differences(self, other_fields: Sequence[Field]) -> tuple[str, ...]:
        """How another side's fields differ from ours, one sentence a field, or nothing."""
        theirs = {field.name: field for field in other_fields}
        ours = {field.name: field for field in self.fields}
        lines = [f"{n}: only on this side ({f})" for n, f in ours.items() if n not in theirs]
        lines += [f"{n}: only on the peer ({f})" for n, f in theirs.items() if n not in ours]
        lines += [f"{n}: {f} here, {theirs[n]} on the peer" for n, f in ours.items() if theirs.get(n, f) != f]
        if not lines and [f.name for f in self.fields] != [f.name for f in other_fields]:
            lines.append(f"{self.fields[0].name}: the fields come in another order on the peer")
        return tuple(lines)

    def require_same(self, other_fields: Sequence[Field]) -> None:
        """Check that a peer declares the same fields.

        Raises:
            LayoutMismatch: Names every field that differs, and how.
        """
        differences = self.differences(other_fields)
        if differences:
            raise LayoutMismatch(differences)


def _as_fields(fields: Any) -> tuple[Field, ...]:
    if isinstance(fields, (list, tuple)) and all(isinstance(field, Field) for field in fields):
        return tuple(fields)
    raise InvalidInput(f"fields={fields!r}: give a list of Field(name, dtype, shape_per_token)")


@dataclass(frozen=True, slots=True)
class Extent:
    """One contiguous copy: `nbytes` from `src_offset` to `dst_offset` of field number `field`'s arenas."""

    field: int
    src_offset: int
    dst_offset: int
    nbytes: int


def runs(blocks: Sequence[int], block_tokens: int, tokens: int) -> Iterator[tuple[int, int]]:
    """The contiguous runs of token slots that `tokens` tokens take in `blocks`: (first slot, length).

    Neighbouring blocks that lie side by side in the arena make one run.

    Raises:
        InvalidInput: The blocks hold fewer than `tokens` tokens. Raised before the first run is given out.
    """
    if len(blocks) * block_tokens < tokens:
        raise InvalidInput(f"{len(blocks)} blocks of {block_tokens} tokens hold less than {tokens} tokens")
    start, length, left = -1, 0, tokens
    for block in blocks:
        if left <= 0:
            break
        take = min(block_tokens, left)
        left -= take
        if length and start + length == block * block_tokens:
            length += take
            continue
        if length:
            yield start, length
        start, length = block * block_tokens, take
    if length:
        yield start, length


def cut(runs: Iterable[tuple[int, int]], offset: int, tokens: int) -> Iterator[tuple[int, int]]:
    """Tokens [offset, offset + tokens) of a run list, as runs.

    For a part that starts inside a block of the engine's own: the receiver's blocks end elsewhere.
    """
    at = 0
    for slot, length in runs:
        low, high = max(offset, at), min(offset + tokens, at + length)
        if low < high:
            yield slot + low - at, high - low
        at += length


def _shared_runs(src: Iterator[tuple[int, int]], dst: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Cut two run lists of equal total length where either ends: (source slot, destination slot, length)."""
    src_at = src_left = dst_at = dst_left = 0
    while True:
        if not src_left:
            src_at, src_left = next(src, (0, 0))
        if not dst_left:
            dst_at, dst_left = next(dst, (0, 0))
        take = min(src_left, dst_left)
        if not take:
            return
        yield src_at, dst_at, take
        src_at, src_left, dst_at, dst_left = src_at + take, src_left - take, dst_at + take, dst_left - take


def plan_runs(
    layout: Layout,
    src_runs: Iterable[tuple[int, int]],
    dst_runs: Iterable[tuple[int, int]],
    room_slots: tuple[int, int] | None,
) -> list[Extent]:
    """The byte copies between two run lists of equal total length, in field and token order.

    Args:
        layout: Of either side; block sizes do not matter here.
        src_runs: (first slot, length) at the source.
        dst_runs: Likewise at the destination.
        room_slots: The blocks that hold the per-room values, (source, destination), or None if those stay.
    """
    shared = list(_shared_runs(iter(src_runs), iter(dst_runs)))
    extents: list[Extent] = []
    for number, field in enumerate(layout.fields):
        size = field.slot_nbytes
        if not field.per_room:
            extents += [Extent(number, src * size, dst * size, n * size) for src, dst, n in shared]
        elif room_slots is not None:
            extents.append(Extent(number, room_slots[0] * size, room_slots[1] * size, size))
    return extents


def plan_part(
    layout: Layout,
    src_blocks: Sequence[int],
    dst_blocks: Sequence[int],
    dst_block_tokens: int,
    tokens: int,
    *,
    first: bool,
) -> list[Extent]:
    """The byte copies that move one part, in field and token order.

    Block lists may be in any order and non-contiguous on both sides, and block sizes may differ.

    Args:
        layout: The source's layout.
        src_blocks: The source's blocks, the part starting at token 0 of the first.
        dst_blocks: The destination's blocks, likewise.
        dst_block_tokens: Tokens per block at the destination.
        tokens: Tokens in the part.
        first: This is part 0, which also carries the per-room fields.

    Raises:
        InvalidInput: No tokens, or either side's blocks hold fewer.
    """
    if tokens < 1:
        raise InvalidInput(f"a part of {tokens} tokens")
    src = list(runs(src_blocks, layout.block_tokens, tokens))
    dst = list(runs(dst_blocks, dst_block_tokens, tokens))
    return plan_runs(layout, src, dst, (src_blocks[0], dst_blocks[0]) if first else None)
