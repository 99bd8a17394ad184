"""Carries out what a receiving room asks: expose blocks to transports, fence, verify, copy out.

Used by the driver's thread alone, but for the copying and hashing, which runs on a worker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, cast

from kvpoll_fsm.arena import BlockPool
from kvpoll_fsm.commands import CopyOut, Expose, Fence, HeldPart, Verify
from kvpoll_fsm.errors import Failure, FailureCode, InvalidInput, KvpollError
from kvpoll_fsm.inputs import CopiedOut, Fenced, Granted, GrantRefused, Input, Verified
from kvpoll_fsm.layout import Layout
from kvpoll_fsm.outgoing import Submit
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.session import RoomKey
from kvpoll_fsm.spi import FenceKind, LeaseId, Range, Transport
from kvpoll_fsm.staging import Destination, verify

__all__ = ["Incoming"]

log = logging.getLogger("kvpoll_fsm")
Problem = tuple[FailureCode, str]


class Incoming:
    """The exposed blocks and the destinations of one endpoint's receiving rooms."""

    def __init__(
        self,
        pool: BlockPool,
        transports: Mapping[str, Transport],
        submit: Submit,
        feed: Callable[[RoomKey, Input], None],
        give_up: Callable[[str, Exception], None],
        new_destination: Callable[[Layout, int], Destination],
    ) -> None:
        """Store what is needed.

        Args:
            pool: The blocks that are exposed and copied from.
            transports: By name; a grant is good for all of them.
            submit: Runs work on a worker.
            feed: Gives an input to a room.
            give_up: Closes a transport that cannot be kept from writing by less, given its name and the error.
            new_destination: Makes the place where a room of so many tokens is gathered.
        """
        self._pool = pool
        self._transports = transports
        self._submit = submit
        self._feed = feed
        self._give_up = give_up
        self._new_destination = new_destination
        self._tokens: dict[tuple[RoomKey, int], dict[str, bytes]] = {}
        self._fences: dict[tuple[str, int], tuple[RoomKey, int]] = {}
        self._destinations: dict[RoomKey, Destination] = {}

    def expose(self, key: RoomKey, command: Expose) -> None:
        """Admit writes to the blocks on every transport and feed the grant."""
        lease = LeaseId(key.side, key.room, key.rank, key.generation, command.part)
        ranges = self._ranges(command.blocks, first=command.part == 0)
        tokens: dict[str, bytes] = {}
        self._tokens[key, command.part] = tokens
        try:
            for name, transport in list(self._transports.items()):
                tokens[name] = transport.grant(lease, ranges)
        except Exception as error:  # a transport's own code may raise anything
            self.release(key, command.part)
            detail = f"grant: {error if isinstance(error, KvpollError) else repr(error)}"
            failure = Failure.of(FailureCode.InternalError, detail, state=KVPoll.Bootstrapping, rank=key.rank)
            self._feed(key, GrantRefused(command.part, failure))
            return
        capacity = len(command.blocks) * self._pool.layout.block_tokens
        self._feed(key, Granted(command.part, command.blocks, capacity, tuple(tokens.items())))

    def release(self, key: RoomKey, part: int) -> None:
        """The lease of a part is over: its tokens admit nothing any more."""
        self._revoke(self._tokens.pop((key, part), {}))

    def fence(self, key: RoomKey, command: Fence) -> None:
        """Fence the part on every transport it was offered on.

        Without force nothing is done that would hurt other rooms: the tokens die, and the blocks wait in
        quarantine for the writer's word.
        """
        tokens = self._tokens.get((key, command.part), {})
        costly = any(self._transports[name].capabilities.fence is FenceKind.process for name in tokens)
        if costly and not command.force:
            return self._revoke(tokens)
        place = (key, command.part)
        for earlier in [fence for fence, other in self._fences.items() if other == place]:
            del self._fences[earlier]  # asked anew, answered once
        for name, token in list(tokens.items()):
            try:
                self._fences[name, self._transports[name].fence(token)] = place
            except Exception as error:  # closing it is the one fence that is left
                self._give_up(name, error)
        if not tokens:
            self._feed(key, Fenced(command.part))

    def fenced(self, transport: str, fence: int) -> None:
        """One transport has fenced; the part is once all have."""
        place = self._fences.pop((transport, fence), None)
        if place is not None and place not in self._fences.values():
            self._feed(place[0], Fenced(place[1]))

    def lost(self, transport: str) -> None:
        """The transport has been closed: no byte lands through it any more, under whatever token."""
        for tokens in self._tokens.values():
            tokens.pop(transport, None)
        for name, fence in [place for place in self._fences if place[0] == transport]:
            self.fenced(name, fence)

    def verify(self, key: RoomKey, command: Verify) -> None:
        """Check a landed part where it lies."""
        self._work(
            key,
            lambda: self._check(command.held, command.checksum),
            lambda problem: Verified(command.held.part, problem),
            command.held,
        )

    def copy_out(self, key: RoomKey, command: CopyOut) -> None:
        """Check and copy landed parts into the room's own arrays."""
        last = command.parts[-1]
        self._work(key, lambda: self._copy(key, command), lambda problem: CopiedOut(last.part, problem), *command.parts)

    def take_result(self, key: RoomKey) -> Any:
        """What a room that ended Success has brought, given out once; None where the engine owns the blocks."""
        destination = self._destinations.pop(key, None)
        return destination.result if destination else None

    @property
    def idle(self) -> bool:
        """No transport is asked to fence."""
        return not self._fences

    def forget(self, key: RoomKey) -> None:
        """The room is over."""
        self._destinations.pop(key, None)

    def _revoke(self, tokens: dict[str, bytes]) -> None:
        """Let the tokens admit nothing; one that might still is not left behind with a transport that works."""
        for name, token in list(tokens.items()):
            try:
                self._transports[name].revoke(token)
            except Exception as error:
                self._give_up(name, error)

    def _ranges(self, blocks: tuple[int, ...], *, first: bool) -> list[Range]:
        layout = self._pool.layout
        ranges = []
        for number, field in enumerate(layout.fields):
            size = field.block_nbytes(layout.block_tokens)
            chosen = blocks if not field.per_room else blocks[: 1 if first else 0]
            ranges += [Range(number, block * size, size) for block in chosen]
        return ranges

    def _work(
        self, key: RoomKey, work: Callable[[], object], answer: Callable[[Problem | None], Input], *parts: HeldPart
    ) -> None:
        """Have it done, which concerns these parts, and feed the answer, which comes once, whatever happens."""

        def done(result: object) -> None:
            self._feed(key, answer(_problem(result)))

        try:
            layout = self._pool.layout
            nbytes = sum(layout.part_nbytes(held.tokens, first=held.part == 0) for held in parts)
            self._submit(key, work, done, nbytes)
        except Exception as error:  # no worker will answer
            done(error)

    def _check(self, held: HeldPart, checksum: bytes) -> Problem | None:
        if verify(self._pool, held, checksum):
            return None
        detail = f"part {held.part}, tokens {held.offset} to {held.offset + held.tokens}: the bytes differ"
        return FailureCode.ChecksumMismatch, detail

    def _copy(self, key: RoomKey, command: CopyOut) -> Problem | None:
        last = command.parts[-1]
        problem = None if command.checksum is None else self._check(last, command.checksum)
        if problem is None:
            if key not in self._destinations:
                self._destinations[key] = self._new_destination(self._pool.layout, command.total_tokens)
            self._destinations[key].copy_out(self._pool, command.parts)
        return problem


def _problem(result: object) -> Problem | None:
    """What a worker found, or the exception it ended with, as a failure."""
    if isinstance(result, InvalidInput):
        return FailureCode.RequestTooLarge, str(result)
    if isinstance(result, BaseException):
        return FailureCode.InternalError, f"{type(result).__name__}: {result}"
    return cast("Problem | None", result)
