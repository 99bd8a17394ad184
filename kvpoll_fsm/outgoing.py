"""Carries out StartPart: stage, hash, write under tickets, and report once per rank how that ended.

Used by the driver's thread alone, but for `_prepare`, which runs on a worker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from kvpoll_fsm.arena import BlockPool
from kvpoll_fsm.commands import CancelWrites, StartPart
from kvpoll_fsm.connection import Connection
from kvpoll_fsm.errors import KvpollError
from kvpoll_fsm.inputs import Input, PartWritten, Progress, RankQuiesced
from kvpoll_fsm.layout import plan_runs, runs
from kvpoll_fsm.links import Links
from kvpoll_fsm.session import RoomKey
from kvpoll_fsm.sources import EngineBlocks, RoomSource, StagedElsewhere, Unreadable
from kvpoll_fsm.spi import MAX_TICKET_NBYTES, Done, Failed, Link, Quiesced, Transport
from kvpoll_fsm.spi import Progress as TicketProgress
from kvpoll_fsm.staging import checksum_runs, stage
from kvpoll_fsm.writings import Lane, Prepared, Ticket, Writing, batches, cancel_all

__all__ = ["Outgoing", "Submit"]

log = logging.getLogger("kvpoll_fsm")
Submit = Callable[[RoomKey, Callable[[], object], Callable[[object], None], int], None]
"""For a room, do the first and give its result or exception to the second on the driver's thread.

A worker does it, unless it concerns very few bytes: the number comes last.
"""


class Outgoing:
    """The parts on their way out of one endpoint."""

    def __init__(
        self,
        pool: BlockPool,
        transports: Mapping[str, Transport],
        links: Links,
        peers: Mapping[int, Connection],
        submit: Submit,
        feed: Callable[[RoomKey, Input], None],
        hashes: Callable[[str], bool],
    ) -> None:
        """Store what is needed.

        Args:
            pool: Where parts are staged, and where the engine's blocks are.
            transports: By name.
            links: To the peers' data ports.
            peers: The connections by number.
            submit: Runs work on a worker.
            feed: Gives an input to a room.
            hashes: Whether a transport wants a checksum.
        """
        self.sources: dict[RoomKey, RoomSource] = {}
        self._pool = pool
        self._transports = transports
        self._links = links
        self._peers = peers
        self._submit = submit
        self._feed = feed
        self._hashes = hashes
        self._writings: dict[tuple[RoomKey, int], Writing] = {}
        self._by_ticket: dict[tuple[str, int], Writing] = {}
        self._lanes: dict[tuple[int, str], Lane] = {}
        self._landed: dict[RoomKey, int] = {}
        self._loose: dict[RoomKey, set[tuple[str, int]]] = {}

    def start(self, key: RoomKey, command: StartPart) -> None:
        """Begin to move a part to its targets; each is answered by one PartWritten, whatever goes wrong."""
        for target in command.targets:
            self._writings[key, target.rank] = Writing(key, command, target)
        source = self.sources.get(key)
        if isinstance(source, StagedElsewhere) and command.attempt == 0:
            self._elsewhere(key, command, source)
        else:
            self._staged(key, command, None)

    def _elsewhere(self, key: RoomKey, command: StartPart, source: StagedElsewhere) -> None:
        source.stage(command, lambda error: self._staged(key, command, error))

    def _staged(self, key: RoomKey, command: StartPart, error: Exception | None) -> None:
        """The data are in our blocks, or a worker can bring them there."""
        if error is not None:
            return self._prepared(key, command, error)
        nbytes = self._pool.layout.part_nbytes(command.tokens, first=command.part == 0)
        try:
            self._submit(
                key, lambda: self._prepare(key, command), lambda result: self._prepared(key, command, result), nbytes
            )
        except Exception as error:  # no worker will answer
            self._prepared(key, command, error)

    def cancel(self, key: RoomKey) -> None:
        """Stop what can be stopped of the room's part; its ends are reported all the same."""
        for writing in self._of(key):
            self._cancel(writing, "cancelled")

    def hurry(self, key: RoomKey, command: CancelWrites) -> None:
        """Stop one attempt that takes too long, if it has not ended meanwhile; its end is reported all the same.

        One that is being staged is let alone: no transport is to blame, and another would have to wait as well.
        """
        writing = self._writings.get((key, command.rank))
        if writing is None or (writing.command.part, writing.command.attempt) != (command.part, command.attempt):
            return
        if writing.planned:
            self._cancel(writing, command.why)

    def _cancel(self, writing: Writing, why: str) -> None:
        self._give_up(writing, why)
        place = (writing.target.conn, writing.target.transport)
        link, lane = self._links.get(*place), self._lanes.get(place)
        if link is not None:
            cancel_all(link, writing.tickets)
        if lane is not None and writing in lane.queue:
            self._finish(writing)  # perhaps none of its tickets is out, whose end would report it

    def completed(self, transport: str, completion: Done | Failed | Quiesced | TicketProgress) -> None:
        """A ticket ended, moved on, or can land no more."""
        writing = self._by_ticket.get((transport, completion.ticket))
        if writing is None:
            return
        if isinstance(completion, TicketProgress):
            ticket = writing.tickets.get(completion.ticket)
            if ticket is not None:
                self._advance(writing, ticket, completion.nbytes)
        elif isinstance(completion, Quiesced):
            self._quiesced(writing, transport, completion.ticket)
        else:
            self._ended(writing, transport, completion)

    def hang_up(self, conn: int) -> None:
        """The peer is gone. Its own fence keeps it safe from what may land still, and nobody waits for our word.

        That says nothing of our own memory: a source that may be read still stays as it is.
        """
        for (transport, ticket), writing in list(self._by_ticket.items()):
            if writing.target.conn == conn and ticket in writing.loose:
                writing.loose.discard(ticket)
                self._settle(writing, transport, ticket)

    def lost(self, transport: str, why: str) -> None:
        """The transport has been closed: it reads no source any more, and its tickets have ended without a word."""
        for (name, ticket), writing in list(self._by_ticket.items()):
            if name != transport:
                continue
            if ticket in writing.tickets:
                self._ended(writing, name, Failed(ticket, why, quiescent=False))
            elif ticket in writing.reading:
                writing.reading.discard(ticket)
                self._settle(writing, name, ticket)

    def room_of(self, transport: str, ticket: int) -> RoomKey | None:
        """The room a ticket belongs to."""
        writing = self._by_ticket.get((transport, ticket))
        return writing.key if writing else None

    def forget(self, key: RoomKey) -> None:
        """The room is over: let go of its source."""
        self.sources.pop(key, None)
        self._landed.pop(key, None)
        for place in self._loose.pop(key, ()):
            del self._by_ticket[place]

    @property
    def idle(self) -> bool:
        """Nothing is being written."""
        return not self._writings and not self._by_ticket

    def _of(self, key: RoomKey) -> list[Writing]:
        return [writing for (other, _), writing in self._writings.items() if other == key]

    # Staging and hashing, on a worker

    def _prepare(self, key: RoomKey, command: StartPart) -> Prepared:
        source = self.sources[key]
        first = command.part == 0
        if isinstance(source, EngineBlocks):
            slots, room_block = source.slots(command.offset, command.tokens), source.room_block
        else:
            if command.attempt == 0 and not isinstance(source, StagedElsewhere):
                stage(self._pool, command.blocks, source, command.offset, command.tokens, first)
            slots = list(runs(command.blocks, self._pool.layout.block_tokens, command.tokens))
            room_block = command.blocks[0]
        wanted = any(self._hashes(target.transport) for target in command.targets)
        of_room = room_block if first else None
        return Prepared(slots, of_room, checksum_runs(self._pool, slots, of_room) if wanted else None)

    def _prepared(self, key: RoomKey, command: StartPart, result: object) -> None:
        if isinstance(result, Unreadable) and key in self.sources:
            self.sources[key] = result.instead
            return self._elsewhere(key, command, result.instead)
        for target in command.targets:
            writing = self._writings[key, target.rank]
            try:
                if not isinstance(result, Prepared):
                    self._give_up(writing, f"staging failed: {result!r}")
                    writing.ours = True
                elif target.shut:
                    self._give_up(writing, target.shut)
                elif not writing.failed:
                    self._plan(writing, result)
            except Exception as error:  # a grant that makes no sense ends this part, which must be reported
                self._give_up(writing, f"{type(error).__name__}: {error}")
                writing.ours = True
            if writing.failed:
                self._finish(writing)

    def _plan(self, writing: Writing, prepared: Prepared) -> None:
        """Turn the part into batches of writes, and queue them once the link works."""
        target = writing.target
        writing.checksum = prepared.checksum if self._hashes(target.transport) else None
        connection, transport = self._peers.get(target.conn), self._transports.get(target.transport)
        if connection is None or transport is None:
            return self._give_up(writing, "the connection has ended" if transport else "the transport was given up")
        there = runs(target.grant.blocks, connection.block_tokens, writing.command.tokens)
        room_slots = None if prepared.room_block is None else (prepared.room_block, target.grant.blocks[0])
        extents = plan_runs(self._pool.layout, prepared.slots, there, room_slots)
        entries = transport.capabilities.scatter_entries
        writing.pending.extend(batches(extents, MAX_TICKET_NBYTES, entries))
        writing.planned = True
        offer = connection.offers.get(target.transport)
        self._links.reach(target.conn, offer, target.transport, lambda ok, why: self._reached(writing, ok, why))

    def _reached(self, writing: Writing, ok: bool, why: str) -> None:
        lane = (writing.target.conn, writing.target.transport)
        if not ok:
            self._give_up(writing, why)
        if writing.failed:
            return self._finish(writing)
        self._lanes.setdefault(lane, Lane()).queue.append(writing)
        self._pump(lane)

    # Tickets

    def _pump(self, place: tuple[int, str]) -> None:
        """Submit batches on a link, rooms taking turns, as many as may be outstanding."""
        lane, link, transport = self._lanes.get(place), self._links.get(*place), self._transports.get(place[1])
        if lane is None:
            return
        most = transport.capabilities.max_outstanding if transport else 0
        while lane.queue and link is not None and lane.outstanding < most:
            writing = lane.queue.popleft()
            if writing.pending and self._submit_batch(writing, link):
                lane.outstanding += 1
                lane.queue.append(writing)
        if link is None or transport is None:
            for writing in lane.queue:
                self._give_up(writing, "the link went down")
                self._finish(writing)
            lane.queue.clear()
        if not lane.queue and not lane.outstanding:
            del self._lanes[place]

    def _submit_batch(self, writing: Writing, link: Link) -> bool:
        batch = writing.pending.popleft()
        transport = writing.target.transport
        try:
            ticket = link.submit(batch, writing.target.grant.token(transport))
        except Exception as error:  # a transport's own code may raise anything; this may be another room's turn
            self._give_up(writing, str(error) if isinstance(error, KvpollError) else repr(error))
            self._finish(writing)
            return False
        writing.tickets[ticket] = Ticket(sum(write.nbytes for write in batch))
        self._by_ticket[transport, ticket] = writing
        return True

    def _advance(self, writing: Writing, ticket: Ticket, landed: int) -> None:
        grown = landed - ticket.landed
        if grown > 0:
            ticket.landed = landed
            total = self._landed[writing.key] = self._landed.get(writing.key, 0) + grown
            self._feed(writing.key, Progress(writing.command.part, total))

    def _ended(self, writing: Writing, transport: str, end: Done | Failed) -> None:
        ticket = writing.tickets.pop(end.ticket)
        if isinstance(end, Failed):
            self._give_up(writing, end.reason, collateral=end.collateral)
            self._note_doubts(writing, end)
        else:
            self._advance(writing, ticket, ticket.nbytes)
        if end.ticket in writing.loose | writing.reading:
            self._loose.setdefault(writing.key, set()).add((transport, end.ticket))
        else:
            del self._by_ticket[transport, end.ticket]
        place = (writing.target.conn, transport)
        self._lanes[place].outstanding -= 1
        self._finish(writing)
        self._pump(place)

    def _note_doubts(self, writing: Writing, end: Failed) -> None:
        """Whether the ticket may land, and whether it may read its source, although it has ended."""
        if not end.quiescent and self._peers.get(writing.target.conn) is not None:
            writing.loose.add(end.ticket)
        if not end.source_free:
            writing.reading.add(end.ticket)

    def _quiesced(self, writing: Writing, transport: str, ticket: int) -> None:
        writing.loose.discard(ticket)
        writing.reading.discard(ticket)
        self._settle(writing, transport, ticket)

    def _settle(self, writing: Writing, transport: str, ticket: int) -> None:
        """Forget a ticket that ended before, if nothing is in doubt any more; the last one is told."""
        if ticket in writing.loose | writing.reading:
            return
        del self._by_ticket[transport, ticket]
        self._loose[writing.key].discard((transport, ticket))
        if writing.reported and not (writing.loose or writing.reading):
            command = writing.command
            self._feed(writing.key, RankQuiesced(writing.target.rank, command.part, command.attempt))

    def _give_up(self, writing: Writing, why: str, *, collateral: bool = False) -> None:
        writing.collateral = collateral and (writing.collateral or not writing.failed)
        writing.failed = writing.failed or why
        writing.pending.clear()

    def _finish(self, writing: Writing) -> None:
        """Report the rank's writes if they have all ended."""
        if writing.pending or writing.tickets or writing.reported:
            return
        writing.reported = True
        target, command = writing.target, writing.command
        self._writings.pop((writing.key, target.rank), None)
        written = PartWritten(
            rank=target.rank,
            part=command.part,
            transport=target.transport,
            ok=not writing.failed,
            quiescent=not writing.loose,
            source_free=not writing.reading,
            detail=writing.failed,
            checksum=writing.checksum,
            attempt=command.attempt,
            collateral=writing.collateral,
            ours=writing.ours,
            shut=bool(target.shut),
        )
        self._feed(writing.key, written)
