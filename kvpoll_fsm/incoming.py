"""Carries out what a receiving room asks: expose blocks to transports, fence, verify, copy out.

Used by the driver's thread alone, but for the copying and hashing, which runs on a worker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

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


@dataclass(slots=True)
class _Exposed:
    """Blocks of one part that admit writes.

    Attributes:
        tokens: By transport.
        over: The part is given up: no token is made for it any more.
    """

    lease: LeaseId
    ranges: list[Range]
    tokens: dict[str, bytes]
    over: bool = False


class _Place(NamedTuple):
    """What a transport is asked to fence: a part, on this transport alone, or on all ("")."""

    key: RoomKey
    part: int
    transport: str = ""


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
        self._exposed: dict[tuple[RoomKey, int], _Exposed] = {}
        self._fences: dict[tuple[str, int], _Place] = {}
        self._destinations: dict[RoomKey, Destination] = {}

    def expose(self, key: RoomKey, command: Expose) -> None:
        """Admit writes to the blocks on every transport that takes them, and feed the grant."""
        lease = LeaseId(key.side, key.room, key.rank, key.generation, command.part)
        exposed = _Exposed(lease, self._ranges(command.blocks, first=command.part == 0), {})
        self._exposed[key, command.part] = exposed
        problem = "no transport works"
        for name, transport in list(self._transports.items()):
            try:
                exposed.tokens[name] = transport.grant(lease, exposed.ranges)
            except Exception as error:  # a transport's own code may raise anything: the part may come by another
                problem = str(error) if isinstance(error, KvpollError) else repr(error)
                log.warning("transport %s grants nothing: %s", name, problem)
        if not exposed.tokens:
            self.release(key, command.part)
            detail = f"grant: {problem}"
            failure = Failure.of(FailureCode.InternalError, detail, state=KVPoll.Bootstrapping, rank=key.rank)
            self._feed(key, GrantRefused(command.part, failure))
            return
        capacity = len(command.blocks) * self._pool.layout.block_tokens
        self._feed(key, Granted(command.part, command.blocks, capacity, tuple(exposed.tokens.items())))

    def release(self, key: RoomKey, part: int) -> None:
        """The lease of a part is over: its tokens admit nothing any more."""
        exposed = self._exposed.pop((key, part), None)
        if exposed is not None:
            # A fence alone that is under way must not renew a token of the blocks that the part may get next.
            alone = [each for each, place in self._fences.items() if place[:2] == (key, part) and place.transport]
            for fence in alone:
                del self._fences[fence]
            self._revoke(exposed.tokens)

    def fence(self, key: RoomKey, command: Fence) -> None:
        """Fence the part on every transport it was offered on, or on the one that is named.

        Without force nothing is done that would hurt other rooms: the tokens die, and the blocks wait in
        quarantine for the writer's word.
        """
        place = _Place(key, command.part, command.transport)
        exposed = self._exposed.get((key, command.part))
        tokens = {} if exposed is None else exposed.tokens
        if exposed is not None and not command.transport:
            exposed.over = True
            if not command.force and self._is_costly(tokens):
                return self._revoke(tokens)
        under_way = self._take_over(place)
        for name, token in list(tokens.items()):
            if name not in under_way and command.transport in ("", name):
                self._fence(place, name, token)
        if place not in self._fences.values() and not (tokens if place.transport == "" else place.transport in tokens):
            self._fenced(place)

    def fenced(self, transport: str, fence: int) -> None:
        """One transport has fenced; the part is once all have that were asked."""
        place = self._fences.pop((transport, fence), None)
        if place is not None and place not in self._fences.values():
            self._fenced(place)

    def lost(self, transport: str) -> None:
        """The transport has been closed: no byte lands through it any more, under whatever token."""
        for exposed in self._exposed.values():
            exposed.tokens.pop(transport, None)
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

    def _is_costly(self, tokens: dict[str, bytes]) -> bool:
        return any(self._transports[name].capabilities.fence is FenceKind.process for name in tokens)

    def _take_over(self, place: _Place) -> set[str]:
        """What was asked of the part before is asked anew and answered once; names those who are at it already."""
        under_way = set()
        for fence, other in list(self._fences.items()):
            if other == place:
                del self._fences[fence]
            elif other[:2] == place[:2] and not place.transport:
                self._fences[fence] = place
                under_way.add(fence[0])
        return under_way

    def _fence(self, place: _Place, name: str, token: bytes) -> None:
        try:
            self._fences[name, self._transports[name].fence(token)] = place
        except Exception as error:  # closing it is the one fence that is left
            self._give_up(name, error)

    def _fenced(self, place: _Place) -> None:
        token = self._renewed(place) if place.transport else None
        self._feed(place.key, Fenced(place.part, place.transport, token))

    def _renewed(self, place: _Place) -> bytes | None:
        """A new token for a part that goes on, in place of the one that was fenced."""
        name, exposed = place.transport, self._exposed.get((place.key, place.part))
        if exposed is None or exposed.over or name not in exposed.tokens:
            return None
        try:
            exposed.tokens[name] = self._transports[name].grant(exposed.lease, exposed.ranges)
        except Exception as error:  # this part goes on without it
            log.warning("transport %s grants no second token: %s", name, error)
            del exposed.tokens[name]
            return None
        return exposed.tokens[name]

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
            nbytes = sum([self._pool.layout.part_nbytes(held.tokens, first=held.part == 0) for held in parts])
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
