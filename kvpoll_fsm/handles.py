"""What the host holds of a room: `Sender` and `Receiver`. Made by `Endpoint`."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Generator, Iterable, Mapping
from typing import Any, Protocol, SupportsIndex

from kvpoll_fsm.arena import BlockPool
from kvpoll_fsm.arguments import plain_block_ids, plain_integer
from kvpoll_fsm.deadlines import Gate
from kvpoll_fsm.engine import Engine
from kvpoll_fsm.errors import Failure, ForkedError, InvalidInput, TransferFailed
from kvpoll_fsm.inputs import Supplied
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.session import PartRecord
from kvpoll_fsm.sources import EngineBlocks, RoomSource
from kvpoll_fsm.staging import Source
from kvpoll_fsm.status import STATES
from kvpoll_fsm.view import RoomView

__all__ = ["Receiver", "Sender"]


class Owner(Protocol):
    """What a handle needs of its endpoint."""

    pool: BlockPool

    @property
    def engine(self) -> Engine:
        """What runs the rooms."""
        ...

    def dropped(self, handle: Room) -> None:
        """The room may be opened again."""
        ...


class Room:
    """One side of a room. All methods may be called from any thread.

    Those that wait for the room are `wait`, `wait_quiescent` and `result`.
    """

    __slots__ = ("__weakref__", "_engine", "_number", "_owner", "_sign", "_states", "view")

    side = ""

    def __init__(self, owner: Owner, engine: Engine, view: RoomView) -> None:
        self._owner = owner
        self._engine = engine
        self._sign = engine.sign
        self._states = view.table.states
        self._number = view.number
        self.view = view

    @property
    def room(self) -> int:
        """The room's number."""
        return self.view.room

    @property
    def rank(self) -> int:
        """The receiver's rank; 0 for a sender."""
        return self.view.rank

    def poll(self) -> KVPoll:
        """Where the room stands. Reads one byte of memory; never waits, never raises for a failed room.

        Raises:
            ForkedError: In a forked child of the process that made the handle.
        """
        self._sign.seen = True
        try:
            return STATES[self._states[self._number]]
        except ValueError:  # it was closed when this process was forked
            raise ForkedError(self._engine.pid, os.getpid()) from None

    def wait(self, timeout: float | None = None) -> KVPoll:
        """Wait until the room has ended, at most `timeout` seconds, and return its state then."""
        self.poll()
        self.view.wait_until(lambda: self.view.state.is_terminal, timeout)
        return self.view.state

    def wait_quiescent(self, timeout: float | None = None) -> bool:
        """Wait until no write can land, and no source is read, any more; then return True.

        Then blocks of the engine's own and borrowed arrays may be used again. False if the time passed first, or
        if the endpoint has ended and something in it hangs, so that nobody will ever know.
        """
        self.poll()
        view = self.view
        view.wait_until(lambda: view.over or (view.quiescent and view.state.is_terminal), timeout)
        return view.quiescent

    @property
    def failure(self) -> Failure | None:
        """Why the room ended Failed, or None."""
        self.poll()
        self.view.catch_up()
        return self.view.failure

    @property
    def history(self) -> tuple[KVPoll, ...]:
        """The states gone through, the present one last."""
        self.poll()
        self.view.refresh()
        return self.view.history

    @property
    def parts(self) -> tuple[PartRecord, ...]:
        """The parts that have an outcome."""
        self.poll()
        self.view.catch_up()
        return self.view.parts

    @property
    def gate(self) -> Gate:
        """What the room waits for."""
        self.poll()
        self.view.refresh()
        return self.view.gate

    @property
    def bytes_done(self) -> int:
        """Bytes of the room that have landed, over all ranks, as far as this side knows."""
        self.poll()
        self.view.refresh()
        return self.view.bytes_done

    def abort(self, reason: str = "aborted by the host") -> None:
        """Give the room up. Both sides end Failed; the other is told why."""
        self.poll()
        self._engine.abort(self.view, str(reason))  # what is no text could not be sent, and nothing after it either

    def clear(self) -> None:
        """Drop the room; its number may be used again at once. A live room is aborted.

        What must still be said to the peer, and blocks that might still be written, are looked after.
        """
        self.poll()
        self._engine.clear(self.view)
        self._owner.dropped(self)

    def __repr__(self) -> str:
        state = "of another process" if self._engine.forked else self.view.state
        return f"<{type(self).__name__} room={self.room} rank={self.rank} {state}>"


class Sender(Room):
    """The sender's side of a room."""

    __slots__ = ("_ready_tokens", "_source", "_total_tokens")

    side = "sender"

    def __init__(self, owner: Owner, engine: Engine, view: RoomView) -> None:
        super().__init__(owner, engine, view)
        self._source: RoomSource | None = None
        self._total_tokens = 0
        self._ready_tokens = 0

    def send(self, data: Mapping[str, Any], *, copy: bool = False) -> None:
        """Send a room's data, staged part by part through the endpoint's own pool. Never waits.

        Args:
            data: For every field of the layout an array or CPU tensor `[tokens, *shape_per_token]` (per-room
                fields: `shape_per_token`). All have the same number of tokens, at least 1.
            copy: Take a snapshot. Otherwise the arrays are borrowed: leave them unchanged until
                `wait_quiescent()`.

        Raises:
            LayoutError: A field is missing, unknown, or of another dtype or shape; names the field.
            InvalidInput: No tokens, data was given before, or the pool's blocks are the engine's own.
        """
        self._require_unsent()
        if not self._owner.pool.managed:
            raise InvalidInput(
                "send() stages through our own blocks; with adopt()ed ones call open() and send_blocks()"
            )
        source = Source.of(self._owner.pool.layout, data, copy)
        self._source, self._total_tokens = source, source.total_tokens
        self._supply(source, source.total_tokens, staged=True)

    def open(self, total_tokens: SupportsIndex) -> None:
        """Say how many tokens the room will have; `send_blocks()` brings them.

        Raises:
            InvalidInput: Less than 1 token, data was given before, or the pool chooses blocks by itself.
        """
        self._require_unsent()
        if self._owner.pool.managed:
            raise InvalidInput("open() is for an engine's own blocks: use BlockPool.adopt(), or call send()")
        self._total_tokens = plain_integer("total_tokens", total_tokens, 1)
        self._source = EngineBlocks(self._owner.pool.layout.block_tokens)

    def send_blocks(self, block_ids: Iterable[SupportsIndex], tokens: SupportsIndex) -> None:
        """Send the next `tokens` tokens, which lie in these blocks from the start of the first on.

        May be called any number of times (chunked prefill) until the total is reached. `is_last` follows
        from the total. The blocks must stay unchanged until `wait_quiescent()`.

        Raises:
            InvalidInput: `open()` was not called, or more tokens than it said, or than the blocks hold.
            ForeignBlock: Ids that the pool does not have, or one twice.
        """
        if not isinstance(self._source, EngineBlocks):
            raise InvalidInput("call open(total_tokens) before send_blocks()")
        pool = self._owner.pool
        blocks, count = plain_block_ids(pool, block_ids), plain_integer("tokens", tokens, 1)
        needed = pool.layout.blocks_for(count)
        if needed != len(blocks):
            raise InvalidInput(f"{count} tokens take {needed} blocks here, {len(blocks)} were given")
        if self._ready_tokens + count > self._total_tokens:
            raise InvalidInput(f"{self._ready_tokens + count} tokens in a room opened for {self._total_tokens}")
        self.poll()
        self._engine.add_blocks(self._source, blocks, count)
        self._supply(self._source, self._ready_tokens + count, staged=False)

    def _require_unsent(self) -> None:
        if self._source is not None:
            raise InvalidInput(f"room {self.room} was given its data before; one room carries one transfer")

    def _supply(self, source: RoomSource, ready_tokens: int, *, staged: bool) -> None:
        self.poll()
        self._ready_tokens = ready_tokens
        self._engine.supply(self.view, source, Supplied(self._total_tokens, ready_tokens, staged))


class Receiver(Room):
    """One receiver rank's side of a room."""

    __slots__ = ("_manual",)

    side = "receiver"

    def __init__(self, owner: Owner, engine: Engine, view: RoomView, manual: bool) -> None:
        super().__init__(owner, engine, view)
        self._manual = manual

    def result(self, timeout: float | None = None) -> dict[str, Any]:
        """Wait for the data.

        Returns:
            For every field an array `[tokens, *shape_per_token]` (per-room fields: `shape_per_token`), the
            host's own from now on. Nothing for a dummy rank.

        Raises:
            TimeoutError: The room is still live after `timeout` seconds; it goes on.
            TransferFailed: It ended Failed; carries the failure.
            InvalidInput: With resume="manual" the data stays in the engine's blocks.
        """
        self._require_library_owned()
        state = self.wait(timeout)
        if not state.is_terminal:
            raise TimeoutError(f"room {self.room} is {state}, waiting at {self.gate}, after {timeout} s")
        self.view.catch_up()
        if self.view.failure is not None:
            raise TransferFailed(self.room, self.view.failure)
        return self.view.result()

    def _require_library_owned(self) -> None:
        if self._manual:
            raise InvalidInput('with resume="manual" the data stays in your blocks: read them by `part`')

    def __await__(self) -> Generator[Any, None, dict[str, Any]]:
        return self._result_async().__await__()

    async def _result_async(self) -> dict[str, Any]:
        self._require_library_owned()
        self.poll()  # in a forked child nobody would ever call back
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop may have been closed meanwhile
                loop.call_soon_threadsafe(ended.set)

        self.view.call_when_ended(tell)
        try:
            await ended.wait()
        finally:
            self.view.call_no_more(tell)
        return self.result(timeout=0)

    @property
    def part(self) -> PartRecord | None:
        """The newest part that has an outcome: its range, and the blocks it lies in. None before the first."""
        parts = self.parts
        return parts[-1] if parts else None

    def resume(self, blocks: Iterable[SupportsIndex]) -> None:
        """Grant these blocks for the next part (`manual`).

        Raises:
            InvalidInput: Not resume="manual", or the room does not wait for a resume.
            ForeignBlock: No ids, one twice, one the pool does not have, or one that is not free.
        """
        if not self._manual:
            raise InvalidInput('resume() is for resume="manual"; this room resumes by itself')
        chosen = plain_block_ids(self._owner.pool, blocks, at_least=1)
        if self.gate is not Gate.waiting_resume:
            raise InvalidInput(f"the room is {self.view.state} at {self.gate} and takes no resume now")
        self._engine.resume(self.view, chosen)

    def release(self, part: SupportsIndex) -> None:
        """The engine has no more use for the blocks of a committed part (`manual`).

        Raises:
            InvalidInput: Not resume="manual": the blocks are ours, and still to be copied from.
        """
        if not self._manual:
            raise InvalidInput('release() is for resume="manual"; this room gives blocks back by itself')
        number = plain_integer("part", part, 0)
        self.poll()
        self._engine.release(self.view, number)
