"""The memory transfers read from and write to: blocks of tokens, one arena per field of the layout."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from kvpoll_fsm.arrays import Array, Kind, arena_bytes, require_fields, wrap
from kvpoll_fsm.errors import BlockError, InvalidInput, LayoutError
from kvpoll_fsm.layout import Field, Layout
from kvpoll_fsm.segment import Segment
from kvpoll_fsm.spi import Region

__all__ = ["BlockPool"]


class BlockPool:
    """Blocks of `layout.block_tokens` tokens, in one contiguous piece of host memory per field.

    A field's arena has the shape `[blocks, block_tokens, *shape_per_token]`, a per-room field's
    `[blocks, *shape_per_token]`. One endpoint uses a pool, which also decides who holds which block.

    The memory of a pool that allocates is page-aligned, and is shared memory (`Segment`): a transport may hand it to
    another process of this host, and a forked child shares it.

    Attributes:
        layout: What the blocks hold.
        blocks: How many blocks there are; their ids are 0 to `blocks - 1`.
        managed: The endpoint chooses blocks; otherwise the engine names them (`adopt`).
    """

    __slots__ = ("_claim", "_regions", "_segments", "blocks", "layout", "managed")

    def __init__(self, layout: Layout, blocks: int) -> None:
        """Allocate a pool whose blocks the endpoint gives out by itself.

        All memory is taken and touched here, because a first touch makes a transfer five times as slow.

        Args:
            layout: What the blocks hold.
            blocks: How many.

        Raises:
            InvalidInput: No layout, fewer than 1 block, or more than memory can hold.
        """
        _require_layout(layout)
        if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1:
            raise InvalidInput(f"blocks={blocks!r}: give an integer of at least 1")
        self._segments = tuple(_allocate(field, layout, blocks) for field in layout.fields)
        self._regions = tuple(Region(n, each.buffer, each.fd) for n, each in enumerate(self._segments))
        self._set(layout, blocks, True)

    @classmethod
    def shared(cls, layout: Layout, blocks: int, fds: Sequence[int]) -> BlockPool:
        """The same pool in another process, which was given its file descriptors; it takes them over.

        Args:
            layout: As the pool's.
            blocks: As the pool's.
            fds: Of every region, in their order.

        Raises:
            OSError: They cannot be mapped.
        """
        pool = cls.__new__(cls)
        sizes = [field.block_nbytes(layout.block_tokens) * blocks for field in layout.fields]
        pool._segments = tuple(Segment(nbytes, fd) for nbytes, fd in zip(sizes, fds, strict=True))
        pool._regions = tuple(Region(n, each.buffer, each.fd) for n, each in enumerate(pool._segments))
        pool._set(layout, blocks, True)
        return pool

    def renew(self) -> None:
        """Take fresh memory: what may still be written into the old one is nobody's any more.

        Raises:
            InvalidInput: There is no memory for it, or the engine owns this pool's.
        """
        if not self.managed:
            raise InvalidInput("the memory of this pool is the engine's own")
        old = self._segments
        self._segments = tuple(_allocate(field, self.layout, self.blocks) for field in self.layout.fields)
        self._regions = tuple(Region(n, each.buffer, each.fd) for n, each in enumerate(self._segments))
        for segment in old:
            segment.close()

    @classmethod
    def adopt(cls, layout: Layout, tensors: Mapping[str, Array]) -> BlockPool:
        """Make a pool of an engine's own arrays, whose blocks the engine alone names.

        Nothing is copied: transfers read from and write into these arrays, which the pool keeps alive.

        Args:
            layout: What the blocks hold.
            tensors: For every field a C-contiguous, writable numpy array or CPU tensor of the shape
                `[blocks, block_tokens, *shape_per_token]`, or `[blocks, *shape_per_token]` if per room.

        Raises:
            InvalidInput: No layout, no mapping, or no blocks.
            LayoutError: Names the field that is missing or unknown, does not fit, has another number of
                blocks than the rest, or overlaps another in memory.
        """
        _require_layout(layout)
        require_fields(layout, tensors)
        first = layout.fields[0]
        size = first.block_nbytes(layout.block_tokens)
        blocks = len(arena_bytes(first, tensors[first.name], layout.block_tokens)) // size
        if blocks < 1:
            raise InvalidInput(f"the arrays have no blocks: {first.name!r} is of size 0")
        buffers = [arena_bytes(f, tensors[f.name], layout.block_tokens, blocks) for f in layout.fields]
        _require_apart(layout, buffers)
        pool = cls.__new__(cls)
        pool._segments = ()
        pool._regions = tuple(Region(number, buffer) for number, buffer in enumerate(buffers))
        pool._set(layout, blocks, False)
        return pool

    def _set(self, layout: Layout, blocks: int, managed: bool) -> None:
        self.layout = layout
        self.blocks = blocks
        self.managed = managed
        self._claim = threading.Lock()

    @property
    def capacity_tokens(self) -> int:
        """Tokens that all blocks together hold."""
        return self.blocks * self.layout.block_tokens

    @property
    def shareable(self) -> bool:
        """Another process can be given the memory."""
        return all(region.fd is not None for region in self.regions())

    @property
    def nbytes(self) -> int:
        """Bytes of all arenas."""
        return sum(region.buffer.nbytes for region in self.regions())

    def regions(self) -> tuple[Region, ...]:
        """The arenas as bytes, in the order of the layout's fields.

        Raises:
            InvalidInput: The pool has been closed.
        """
        if not self._regions:
            raise InvalidInput("the pool has been closed")
        return self._regions

    def view(self, field_name: str, kind: Kind = "numpy") -> Array:
        """A field's arena as an array, sharing its memory.

        Args:
            field_name: Which field.
            kind: Whose array: "numpy" (bfloat16 and float8 as raw bits), "torch" or "auto".

        Raises:
            LayoutError: The layout has no such field.
            InvalidInput: The pool has been closed.
        """
        for region, field in zip(self.regions(), self.layout.fields, strict=True):
            if field.name == field_name:
                lead = (self.blocks,) if field.per_room else (self.blocks, self.layout.block_tokens)
                return wrap(field, region.buffer, lead, kind)
        names = ", ".join(field.name for field in self.layout.fields)
        raise LayoutError(field_name, f"not in the layout, which has: {names}")

    def claim(self) -> None:
        """An endpoint begins to use the pool; two would each give out every block.

        Raises:
            BlockError: Another endpoint uses it.
        """
        if not self._claim.acquire(blocking=False):
            raise BlockError("another endpoint uses this pool: close that one first, or give each its own")

    def unclaim(self) -> None:
        """The endpoint has ended."""
        self._claim.release()

    def close(self) -> None:
        """Let go of the memory; close the endpoint first. May be called twice.

        It is unmapped once the last array or memoryview over it is gone, so none of those ever dangles.
        """
        self._regions = ()
        for segment in self._segments:
            segment.close()
        self._segments = ()


def _require_layout(layout: object) -> None:
    if not isinstance(layout, Layout):
        raise InvalidInput(f"a pool needs a Layout first, not {layout!r}")


def _allocate(field: Field, layout: Layout, blocks: int) -> Segment:
    """Memory for one arena."""
    nbytes = field.block_nbytes(layout.block_tokens) * blocks
    try:
        return Segment(nbytes)
    except (OSError, OverflowError, MemoryError) as error:
        raise InvalidInput(
            f"no memory for {blocks} blocks of field {field.name!r}, {nbytes} bytes ({error}): use fewer"
        ) from None


def _require_apart(layout: Layout, buffers: list[memoryview]) -> None:
    """Refuse arenas that overlap: a transfer of one field would overwrite another."""
    starts = [(int(np.frombuffer(buffer, np.uint8).ctypes.data), number) for number, buffer in enumerate(buffers)]
    starts.sort()
    for (start, number), (next_start, other) in pairwise(starts):
        if start + buffers[number].nbytes > next_start:
            name = layout.fields[number].name
            raise LayoutError(layout.fields[other].name, f"shares memory with field {name!r}: give it its own")
