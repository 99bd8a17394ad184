"""What `Outgoing` keeps of the writes under way: parts made ready, their tickets, whose turn it is on a link."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from kvpoll_fsm.commands import StartPart, Target
from kvpoll_fsm.layout import Extent
from kvpoll_fsm.session import RoomKey
from kvpoll_fsm.sources import Runs
from kvpoll_fsm.spi import Link, Write

__all__ = ["Lane", "Prepared", "Ticket", "Writing", "batches", "cancel_all"]

log = logging.getLogger("kvpoll_fsm")


@dataclass(slots=True)
class Prepared:
    """A part that is ready to be written: where it lies, and its checksum if one is wanted."""

    slots: Runs
    room_block: int | None
    checksum: bytes | None


@dataclass(slots=True)
class Ticket:
    """Bytes under one ticket: in all, and landed so far."""

    nbytes: int
    landed: int = 0


@dataclass(eq=False, slots=True)
class Writing:
    """The writes of one part to one rank.

    Attributes:
        tickets: In flight.
        loose: Ended, but may land still.
        reading: Ended, but may read the source still. A subset of `loose` until the peer is gone.
        collateral: All that failed did so through no fault of the transport's.
        planned: It is staged, and its batches are made.
        ours: It failed before a transport had any part in it.
    """

    key: RoomKey
    command: StartPart
    target: Target
    checksum: bytes | None = None
    pending: deque[list[Write]] = field(default_factory=deque)
    tickets: dict[int, Ticket] = field(default_factory=dict)
    loose: set[int] = field(default_factory=set)
    reading: set[int] = field(default_factory=set)
    failed: str = ""
    collateral: bool = False
    ours: bool = False
    planned: bool = False
    reported: bool = False


@dataclass(slots=True)
class Lane:
    """One link: the writings that have batches left for it, and how many tickets are in flight on it."""

    queue: deque[Writing] = field(default_factory=deque)
    outstanding: int = 0


def cancel_all(link: Link, tickets: Iterable[int]) -> None:
    """Ask that each of these tickets end soon."""
    for ticket in tickets:
        try:
            link.cancel(ticket)
        except Exception:  # the others must be cancelled too
            log.exception("ticket %d cannot be cancelled", ticket)


def batches(extents: list[Extent], most_nbytes: int, most_entries: int) -> Iterator[list[Write]]:
    """Cut extents into batches of writes, each within both limits."""
    batch: list[Write] = []
    room = most_nbytes
    for extent in extents:
        done = 0
        while done < extent.nbytes:
            take = min(room, extent.nbytes - done)
            batch.append(Write(extent.field, extent.src_offset + done, extent.dst_offset + done, take))
            done, room = done + take, room - take
            if not room or len(batch) == most_entries:
                yield batch
                batch, room = [], most_nbytes
    if batch:
        yield batch
