"""Watches one endpoint's blocks: at every move each is in exactly one place, and nobody has written to a free one.

Blocks are painted when they are given back. A byte that changes in a free block, or in one that was leased again
and was not sent to since, is a write that came late; paint of the sender's that turns up at a receiver was read from
a source that had been given back.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

from kvpoll_fsm import BlockPool, Endpoint
from kvpoll_fsm.blocks import BlockAccounts
from kvpoll_fsm.inputs import Fenced
from kvpoll_fsm.spi import LeaseId

__all__ = ["PAINT", "SCORCH", "Watch"]

PAINT, SCORCH = b"\xc5", b"\x5a"
"""What a receiver's and a sender's free blocks are filled with."""
TRACE_NBYTES = 64
"""So many bytes of paint in a row are no accident."""
Move = tuple[str, int, int, int, tuple[int, ...]]

_watches: dict[int, Watch] = {}
_MOVES = ("_take", "take_exact", "relabel", "quarantine", "release")


class Watch:
    """The moves of one endpoint's blocks, and what was wrong with them.

    Attributes:
        moves: (what, room, rank, part, blocks), oldest first.
        problems: What must not be, in words.
    """

    def __init__(self, endpoint: Endpoint, paint: bytes) -> None:
        self.moves: list[Move] = []
        self.problems: list[str] = []
        self._pool = endpoint.pool
        self._paint = paint
        _install()
        endpoint.driver.call(lambda: self._attach(endpoint)).result(10)

    def _attach(self, endpoint: Endpoint) -> None:
        driver = endpoint.driver
        self.paint(range(self._pool.blocks))
        _watches[id(driver.core.accounts)] = self
        feed = driver.incoming._feed

        def seen(key: Any, event: Any) -> None:
            if isinstance(event, Fenced):
                self.moves.append(("fenced", key.room, key.rank, event.part, ()))
            feed(key, event)

        driver.incoming._feed = seen

    # What happens

    def moved(self, what: str, accounts: BlockAccounts, args: tuple[Any, ...], result: Any) -> None:
        """An operation on the accounts has succeeded."""
        lease: LeaseId = args[1] if what == "relabel" else args[0]
        blocks = accounts.blocks_of(lease) if what in ("relabel", "quarantine") else result
        if blocks is None:  # none were free
            return
        if what in ("_take", "take_exact"):
            self._check_unwritten(lease, blocks)
        elif what == "release":
            self._check_unscorched(lease, blocks)
            self.paint(blocks)
        elif what == "relabel":  # the part before was copied out: its bytes are of no use to anybody
            self._check_unscorched(lease, blocks)
            self.paint([*blocks, *_free(accounts)])
        self.moves.append((what.strip("_"), lease.room, lease.rank, lease.part, tuple(blocks)))
        self._check_places(accounts)

    def paint(self, blocks: Any) -> None:
        """Fill blocks."""
        for block in blocks:
            for view in self._views(block):
                view[:] = self._paint * len(view)

    def painted(self, blocks: Any) -> bool:
        """Whether no byte of these has changed since they were painted."""
        return all(view == self._paint * len(view) for block in blocks for view in self._views(block))

    def blocks_of(self, room: int) -> tuple[int, ...]:
        """What each rank of a room was leased last."""
        leases = ("take", "take_exact", "relabel")
        leased = {move[2]: move[4] for move in self.moves if move[0] in leases and move[1] == room}
        return tuple(chain.from_iterable(leased.values()))

    # What must be

    def _check_places(self, accounts: BlockAccounts) -> None:
        free, leased, quarantined, _ = accounts.key()
        places = [*free, *chain.from_iterable(blocks for _, blocks in (*leased, *quarantined))]
        load = accounts.load()
        if sorted(places) != list(range(accounts.total)):
            self.problems.append(f"blocks are in {sorted(places)} after {self.moves[-1]}")
        if load.free + load.leased + load.quarantined != load.total:
            self.problems.append(f"{load} after {self.moves[-1]}")

    def _check_unwritten(self, lease: LeaseId, blocks: tuple[int, ...]) -> None:
        if not self.painted(blocks):
            self.problems.append(f"blocks {blocks} were written while they were free, before {lease}")

    def _check_unscorched(self, lease: LeaseId, blocks: tuple[int, ...]) -> None:
        if lease.side == "receiver" and any(self.scorched(block) for block in blocks):
            self.problems.append(f"a source was read after it had been given back: {lease}")

    def scorched(self, block: int) -> bool:
        """Whether a block holds what a sender's block holds once it was given back."""
        return any(SCORCH * TRACE_NBYTES in bytes(view) for view in self._views(block))

    def _views(self, block: int) -> list[memoryview]:
        return list(_views(self._pool, block))


def _views(pool: BlockPool, block: int) -> Any:
    for region, field in zip(pool.regions(), pool.layout.fields, strict=True):
        size = field.block_nbytes(pool.layout.block_tokens)
        yield region.buffer[block * size : (block + 1) * size]


def _free(accounts: BlockAccounts) -> tuple[int, ...]:
    free: tuple[int, ...] = accounts.key()[0]
    return free


def _install() -> None:
    """Look at every move from now on; for the process."""
    for name in _MOVES:
        real = getattr(BlockAccounts, name)
        if not hasattr(real, "watched"):
            setattr(BlockAccounts, name, _watched(name, real))


def _watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def operation(self: BlockAccounts, *args: Any) -> Any:
        result = real(self, *args)
        watch = _watches.get(id(self))
        if watch is not None:
            watch.moved(name, self, args, result)
        return result

    operation.watched = True  # type: ignore[attr-defined]
    return operation
