"""Copying between arrays and blocks, and checksums over blocks.

Copies are memoryview slice assignments, which never release the GIL: beside a busy Python thread each release
costs up to 5 ms, many times the copy itself. They are cut into slices, and between two slices other threads
get their turn. Nothing here is done per token: blocks that lie side by side are one copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import xxhash

from kvpoll_fsm.arena import BlockPool
from kvpoll_fsm.arrays import Array, Kind, as_bytes, empty, require_fields, resolve_kind
from kvpoll_fsm.commands import HeldPart
from kvpoll_fsm.errors import ForeignBlock, InvalidInput, LayoutError
from kvpoll_fsm.layout import Field, Layout, runs

__all__ = [
    "Destination",
    "Piece",
    "Source",
    "TokenSource",
    "checksum",
    "checksum_runs",
    "new_arrays",
    "stage",
    "verify",
]

SLICE_NBYTES = 2 << 20
"""Most bytes copied without letting another thread run: 0.2 ms, or 1 ms into memory never touched before."""

# Since version 4, xxhash keeps the GIL for up to 64 KiB; before, it let go of it on every call.
_HASH_NBYTES = 64 << 10 if int(xxhash.VERSION.split(".")[0]) >= 4 else 8 << 20

Runs = Sequence[tuple[int, int]]
Piece = tuple[int, int, int]
"""Where to, where from, and how many bytes."""


class TokenSource(Protocol):
    """What a sender's room is staged from."""

    layout: Layout
    total_tokens: int

    def fill(self, field_number: int, arena: memoryview, pieces: Sequence[Piece]) -> None:
        """Copy pieces of a field's bytes, which lie token after token, into an arena."""
        ...


class Source:
    """The arrays of one room to be sent: one per field, all with the same number of tokens.

    Attributes:
        layout: What they hold.
        total_tokens: Tokens in every token field.
    """

    __slots__ = ("_buffers", "layout", "total_tokens")

    def __init__(self, layout: Layout, total_tokens: int, buffers: tuple[memoryview, ...]) -> None:
        self.layout = layout
        self.total_tokens = total_tokens
        self._buffers = buffers

    @classmethod
    def of(cls, layout: Layout, data: Mapping[str, Array], copy: bool = False) -> Source:
        """Take a room's data.

        Args:
            layout: What is sent.
            data: For every field a numpy array or CPU tensor `[tokens, *shape_per_token]`, or
                `shape_per_token` if per room. Arrays that are not C-contiguous are copied at once.
            copy: Take a snapshot. Otherwise the arrays are borrowed: they stay alive as long as this object,
                and must stay unchanged.

        Raises:
            InvalidInput: No mapping, or no tokens.
            LayoutError: Names the field that is missing or unknown, does not fit, or differs in tokens.
        """
        require_fields(layout, data)
        buffers = [as_bytes(field, data[field.name]) for field in layout.fields]
        total_tokens = _common_tokens(layout, buffers)
        if copy:
            buffers = [_snapshot(buffer) for buffer in buffers]
        return cls(layout, total_tokens, tuple(buffers))

    @property
    def buffers(self) -> tuple[memoryview, ...]:
        """The bytes of every field, token after token; perhaps read-only."""
        return self._buffers

    def fill(self, field_number: int, arena: memoryview, pieces: Sequence[Piece]) -> None:
        """Copy pieces of a field's bytes into an arena."""
        data = self._buffers[field_number]
        for dst_at, src_at, nbytes in pieces:
            _copy(arena, dst_at, data, src_at, nbytes)


def stage(pool: BlockPool, blocks: Sequence[int], source: TokenSource, offset: int, tokens: int, first: bool) -> None:
    """Copy tokens [offset, offset + tokens) into blocks, the first of them to the start of `blocks[0]`.

    Args:
        pool: Whose blocks.
        blocks: In any order; of those beyond `tokens` nothing is touched.
        source: The room's data.
        offset: First token of the part.
        tokens: Tokens of the part.
        first: This is part 0: the per-room values go along, into the slot of `blocks[0]`.

    Raises:
        InvalidInput: Tokens the source has not, or more than the blocks hold.
        ForeignBlock: A block this pool has not.
        LayoutMismatch: The source has another layout.
    """
    if source.layout is not pool.layout:
        pool.layout.require_same(source.layout.fields)
    _require_range(offset, tokens, source.total_tokens)
    slots = _slot_runs(pool, blocks, tokens)
    for region, field in zip(pool.regions(), pool.layout.fields, strict=True):
        if not field.per_room:
            source.fill(region.number, region.buffer, _pieces(slots, offset, field.slot_nbytes))
        elif first:
            source.fill(region.number, region.buffer, [(blocks[0] * field.slot_nbytes, 0, field.slot_nbytes)])


def checksum(pool: BlockPool, blocks: Sequence[int], tokens: int, first: bool) -> bytes:
    """XXH3-128 of a part: its bytes field after field in layout order, token after token. 16 bytes.

    It does not depend on where the blocks lie or on how many tokens one holds, so both sides get the same.

    Args:
        pool: Whose blocks.
        blocks: The part starts at the first token of `blocks[0]`.
        tokens: Tokens of the part.
        first: This is part 0: the per-room values are part of it.

    Raises:
        InvalidInput: Fewer than 1 token, or more than the blocks hold.
        ForeignBlock: A block this pool has not.
    """
    return checksum_runs(pool, _slot_runs(pool, blocks, tokens), blocks[0] if first else None)


def checksum_runs(pool: BlockPool, slot_runs: Runs, room_block: int | None) -> bytes:
    """`checksum` of token slots given as (first slot, length) runs, for parts that start inside a block.

    Args:
        pool: Whose slots.
        slot_runs: From `layout.runs` and `layout.cut`.
        room_block: The block that holds the per-room values, or None to leave those out.

    Raises:
        ForeignBlock: A slot or block this pool has not.
    """
    _require_blocks(pool, () if room_block is None else (room_block,))
    size = pool.layout.block_tokens
    _require_blocks(pool, [at // size for slot, length in slot_runs for at in (slot, slot + length - 1)])
    digest = xxhash.xxh3_128()
    for region, field in zip(pool.regions(), pool.layout.fields, strict=True):
        pieces = slot_runs
        if field.per_room:
            pieces = () if room_block is None else ((room_block, 1),)
        for slot, length in pieces:
            _hash(digest, region.buffer, slot * field.slot_nbytes, length * field.slot_nbytes)
    return digest.digest()


def verify(pool: BlockPool, held: HeldPart, expected: bytes) -> bool:
    """Whether the bytes of a landed part have this checksum.

    Raises:
        InvalidInput: As `checksum`.
    """
    return checksum(pool, held.blocks, held.tokens, held.part == 0) == expected


class Destination:
    """Where the bytes of one room are gathered, part by part.

    Attributes:
        layout: What they hold.
        total_tokens: Tokens of the whole room.
        result: What the host is given once every part has been copied.
    """

    __slots__ = ("_buffers", "layout", "result", "total_tokens")

    def __init__(self, layout: Layout, total_tokens: int, buffers: Sequence[memoryview], result: Any) -> None:
        """Store what is needed.

        Args:
            layout: What to hold.
            total_tokens: Tokens of the whole room.
            buffers: Writable bytes for every field, in layout order; their content is undefined until copied.
            result: What the host is given.
        """
        self.layout = layout
        self.total_tokens = total_tokens
        self.result = result
        self._buffers = tuple(buffers)

    def copy_out(self, pool: BlockPool, parts: Iterable[HeldPart]) -> None:
        """Copy landed parts to their place; part 0 brings the per-room values.

        Raises:
            InvalidInput: A part outside the room, or with more tokens than its blocks hold.
            ForeignBlock: A block this pool has not.
            LayoutMismatch: The pool has another layout.
        """
        if pool.layout is not self.layout:
            self.layout.require_same(pool.layout.fields)
        for held in parts:
            self._copy_part(pool, held)

    def _copy_part(self, pool: BlockPool, held: HeldPart) -> None:
        _require_range(held.offset, held.tokens, self.total_tokens)
        slots = _slot_runs(pool, held.blocks, held.tokens)
        for region, field, data in zip(pool.regions(), self.layout.fields, self._buffers, strict=True):
            if not field.per_room:
                _gather(data, region.buffer, slots, held.offset, field.slot_nbytes)
            elif held.part == 0:
                _copy(data, 0, region.buffer, held.blocks[0] * field.slot_nbytes, field.slot_nbytes)


def new_arrays(layout: Layout, total_tokens: int, kind: Kind | str = "auto") -> Destination:
    """A destination of new arrays, one for every field; `result` is a dict of them by name, in layout order.

    Args:
        layout: What to hold.
        total_tokens: Tokens of the whole room.
        kind: Whose arrays: "numpy" (bfloat16 and float8 as raw bits), "torch", or "auto", which is torch
            if the program has imported it.

    Raises:
        InvalidInput: Fewer than 1 token, more than memory can hold, or an impossible kind.
    """
    if total_tokens < 1:
        raise InvalidInput(f"a room of {total_tokens} tokens")
    resolved = resolve_kind(kind)
    arrays = {field.name: empty(field, total_tokens, resolved) for field in layout.fields}
    buffers = [as_bytes(field, arrays[field.name]) for field in layout.fields]
    return Destination(layout, total_tokens, buffers, arrays)


def _common_tokens(layout: Layout, buffers: Sequence[memoryview]) -> int:
    counts = [
        (field, buffer.nbytes // field.slot_nbytes)
        for field, buffer in zip(layout.fields, buffers, strict=True)
        if not field.per_room
    ]
    first, tokens = counts[0]
    for field, count in counts:
        if count != tokens:
            raise LayoutError(field.name, f"has {count} tokens where {first.name!r} has {tokens}")
    if not tokens:
        raise InvalidInput(f"no tokens to send: {first.name!r} is of length 0")
    return tokens


def _require_range(offset: int, tokens: int, total_tokens: int) -> None:
    if offset < 0 or tokens < 1 or offset + tokens > total_tokens:
        raise InvalidInput(f"a part of {tokens} tokens at {offset} in a room of {total_tokens}")


def _require_blocks(pool: BlockPool, blocks: Iterable[int]) -> None:
    foreign = tuple(block for block in blocks if not 0 <= block < pool.blocks)
    if foreign:
        raise ForeignBlock(foreign, f"block ids of this pool are 0 to {pool.blocks - 1}")


def _slot_runs(pool: BlockPool, blocks: Sequence[int], tokens: int) -> list[tuple[int, int]]:
    """The token slots of a part, checked before any byte moves: a negative slice would hit other blocks."""
    _require_blocks(pool, blocks)
    if tokens < 1:
        raise InvalidInput(f"a part of {tokens} tokens")
    return list(runs(blocks, pool.layout.block_tokens, tokens))


def _pieces(slots: Runs, offset: int, size: int) -> list[Piece]:
    """Tokens from `offset` on, of `size` bytes each, to these slots."""
    pieces = []
    for slot, length in slots:
        pieces.append((slot * size, offset * size, length * size))
        offset += length
    return pieces


def _gather(data: memoryview, arena: memoryview, slots: Runs, offset: int, size: int) -> None:
    for slot, length in slots:
        _copy(data, offset * size, arena, slot * size, length * size)
        offset += length


def _copy(dst: memoryview, dst_at: int, src: memoryview, src_at: int, nbytes: int) -> None:
    for at in range(0, nbytes, SLICE_NBYTES):
        n = min(SLICE_NBYTES, nbytes - at)
        dst[dst_at + at : dst_at + at + n] = src[src_at + at : src_at + at + n]


def _hash(digest: xxhash.xxh3_128, data: memoryview, start: int, nbytes: int) -> None:
    for at in range(start, start + nbytes, _HASH_NBYTES):
        digest.update(data[at : min(at + _HASH_NBYTES, start + nbytes)])


def _snapshot(data: memoryview) -> memoryview:
    copy = empty(Field("snapshot", "uint8"), data.nbytes, "numpy").data
    _copy(copy, 0, data, 0, data.nbytes)
    return memoryview(copy)
