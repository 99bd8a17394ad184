"""What a transport must provide: one-sided writes between registered regions.

Life of a write: the receiver registers its arenas (`register`), grants ranges to one part (`grant`) and
sends the token to the sender, which connects (`connect`), submits writes under the token (`submit`) and
learns by `completions()` how each ticket ended. The receiver ends a token with `revoke`, or `fence` where it
must know that nothing more lands.

Nothing here blocks and everything is called from one thread, the driver's, unless a method says otherwise.
A transport may run threads or processes of its own; what they find out is handed over by `completions()`. Its
threads hold up no end of the process, and its processes end with the one that started them, however that ended. Its
file descriptors are closed on exec.

A peer that stands still, dies or lies holds up the links to it alone: other links of the transport go on. So do other
tokens, unless `Capabilities.fence` says what a fence costs.

`kvpoll_fsm.testing.conformance` is this contract as tests.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from msgspec import Struct

__all__ = [
    "MAX_TICKET_NBYTES",
    "Capabilities",
    "Completion",
    "CountsRefusals",
    "Done",
    "Failed",
    "FenceKind",
    "Fenced",
    "Gathers",
    "LeaseId",
    "Link",
    "LinkDown",
    "LinkUp",
    "Progress",
    "Quiesced",
    "Range",
    "Region",
    "Transport",
    "Write",
]

MAX_TICKET_NBYTES = 16 << 20
"""The driver never submits more under one ticket, so that progress shows."""


class FenceKind(str, enum.Enum):
    """What a fence costs."""

    token = "token"
    """Concerns the token alone and ends soon; used at once. No other ticket fails by it and no link goes down."""
    process = "process"
    """Hurts other rooms (a process is killed); used when the writer's word does not come in time.

    Other tickets, of either direction, may end `Failed` with `collateral`, and links go down. New links to the same
    descriptors work again soon.
    """


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a transport can do; the conformance kit holds it to these claims.

    Attributes:
        scatter_entries: Most writes in one submit.
        max_outstanding: Most tickets in flight per link: so many may be submitted at once.
        cancellable: `cancel` ends a ticket early, if it comes in time; without this it does nothing.
        fence: What `fence` costs.
        reports_progress: `Progress` comes while a ticket is in flight.
        integrity: The medium detects flipped bits by itself (shared memory, RDMA), so `checksum="auto"` is off.
        cuda: Regions may be device memory.
        one_process: Works between endpoints of one process alone.
        listens: It takes the settings `host` and `advertise`; an endpoint gives it those of its control plane, unless
            told otherwise.
    """

    scatter_entries: int = 1024
    max_outstanding: int = 1024
    cancellable: bool = True
    fence: FenceKind = FenceKind.token
    reports_progress: bool = False
    integrity: bool = False
    cuda: bool = False
    one_process: bool = False
    listens: bool = False


class LeaseId(Struct, frozen=True, cache_hash=True, gc=False):
    """(room, generation, part) on one rank of the receiving endpoint: the holder of blocks."""

    side: str
    room: int
    rank: int
    generation: int
    part: int


@dataclass(frozen=True, slots=True)
class Region:
    """A piece of this process's memory.

    Attributes:
        number: The region's index in its endpoint, 0 upwards; one per layout field.
        buffer: Writable contiguous bytes, format "B". Stays alive until the transport is closed.
        fd: A file (memfd) that is this memory, if it is shared memory: what another process of this host reads or
            writes there, it reads or writes here. Open until the transport is closed, and the pool's to close.
        fd_offset: Where in that file the region begins.
    """

    number: int
    buffer: memoryview
    fd: int | None = None
    fd_offset: int = 0


class Range(Struct, frozen=True):
    """Bytes [offset, offset + nbytes) of region number `region`."""

    region: int
    offset: int
    nbytes: int


class Write(Struct, frozen=True):
    """Copy `nbytes` from a local region to the peer's region of the same number."""

    region: int
    src_offset: int
    dst_offset: int
    nbytes: int


class Done(Struct, frozen=True):
    """All bytes of the ticket are in the destination's memory (not merely sent)."""

    ticket: int


class Failed(Struct, frozen=True):
    """The ticket ended without all bytes in place.

    Attributes:
        reason: A sentence for people.
        quiescent: No byte of it can land any more. Otherwise `Quiesced` follows, or the receiver fences.
        source_free: The source may change: it is not read any more, or to no effect. False only where `quiescent` is
            False; then `Quiesced` follows whatever becomes of the peer, or the transport is closed: the source is
            not given back before.
        collateral: Another ticket's trouble ended this one (a process both shared was killed). It may be tried again
            on the same transport, and says nothing against it.
    """

    ticket: int
    reason: str
    quiescent: bool
    source_free: bool = True
    collateral: bool = False


class Quiesced(Struct, frozen=True):
    """A ticket that had Failed without quiescence can land no more and reads its source no more."""

    ticket: int


class Progress(Struct, frozen=True):
    """`nbytes` of the ticket have landed so far."""

    ticket: int
    nbytes: int


class Fenced(Struct, frozen=True):
    """The answer to `fence`: no byte lands under that token any more."""

    fence: int


class LinkUp(Struct, frozen=True):
    """The peer's data port has been reached and accepted us. Comes again after a link recovered."""

    link: int


class LinkDown(Struct, frozen=True):
    """The link does not work; its tickets end by themselves, after this. A new submit may try again, or fail.

    A ticket that was submitted while no byte could leave ends quiescent.
    """

    link: int
    reason: str


Completion = Done | Failed | Quiesced | Progress | Fenced | LinkUp | LinkDown


@runtime_checkable
class Link(Protocol):
    """A way to write into one peer's regions."""

    @property
    def number(self) -> int:
        """Names this link in LinkUp and LinkDown; unique in its transport."""
        ...

    def submit(self, writes: Sequence[Write], token: bytes) -> int:
        """Start writing and return a ticket, unique in its transport, that ends exactly once.

        Neither waits nor raises for what the network does: that is a Failed ticket, as is one on a closed link.

        Args:
            writes: 1 to `scatter_entries` writes of at least 1 byte each, and at most `MAX_TICKET_NBYTES` in all.
            token: From the receiver's `grant`; admits writes to exactly the ranges granted.

        Raises:
            InvalidInput: A write outside the source's regions or before the beginning of the destination's, an empty
                one, no writes, too many entries, too many bytes. What is beyond that is for the receiver to refuse.
        """
        ...

    def cancel(self, ticket: int) -> None:
        """Ask that a ticket end soon. It still ends: by Failed, or by Done if all had landed. Unknown: ignored."""
        ...

    def close(self) -> None:
        """End the link; tickets in flight end Failed. May be called twice. In a forked child it does nothing."""
        ...


@runtime_checkable
class Transport(Protocol):
    """One way to move bytes. Made by its entry point without arguments or with keyword settings."""

    name: str
    capabilities: Capabilities

    def start(self) -> None:
        """Take ports, threads and the like.

        Raises:
            TransportUnavailable: Not usable here; says what is missing and how to get it.
        """
        ...

    def descriptor(self) -> bytes:
        """How a peer connects to us, at most 64 KiB; travels in Hello and Welcome. Holds its secrets.

        It stays the same from `start()` to `close()`, and names this start: a peer that has that of an earlier one gets
        a link that goes down.
        """
        ...

    def register(self, region: Region) -> bytes:
        """Make a region writable for peers and readable as a source; returns its descriptor, at most 64 KiB.

        Called for every region in the order of their numbers, after `start()` and before anything else. Who can
        receive into memory without `Region.fd` and cannot send from it takes it, and its links go down.

        Raises:
            InvalidInput: Not writable contiguous bytes, or a number that is taken.
            TransportUnavailable: It cannot use memory of this kind.
        """
        ...

    def grant(self, lease: LeaseId, ranges: Sequence[Range]) -> bytes:
        """Admit writes to exactly these ranges; returns a token nobody can guess, 16 bytes to 1 KiB.

        Ranges that touch are one: a write may span them. A ticket with one write that is not admitted ends Failed; of
        that write nothing lands. The token may be bound to the peer that uses it first.

        Raises:
            InvalidInput: A range outside its region, or an empty one.
        """
        ...

    def revoke(self, token: bytes) -> None:
        """Admit nothing under the token any more. Unknown: ignored.

        Comes where the writer has said that nothing is on its way. Where our own side does the writing (sockets,
        copies), nothing lands once this has returned, even if that was a lie. Else it says nothing about such bytes.
        """
        ...

    def fence(self, token: bytes) -> int:
        """Revoke, and report `Fenced` with the returned number once no byte can land under the token.

        Always ends, whatever the writer does, and every call is answered. An unknown token is fenced at once; one that
        was revoked, or whose connection is dead, like any other: what was on its way lands before, or never.

        Comes after the end of a room, and in the middle of a part whose write failed without being quiescent; then,
        once `Fenced` is there, `grant` is called for the same lease and ranges again, so that the part may be tried
        once more.
        """
        ...

    def connect(self, descriptor: bytes, regions: Sequence[bytes]) -> Link:
        """A link to the peer that sent this descriptor and these region descriptors.

        Returns at once; `LinkUp` or `LinkDown` follows.

        Raises:
            InvalidInput: A descriptor cannot be read.
        """
        ...

    def completions(self) -> list[Completion]:
        """What has happened since the last call, in order.

        A transport that raises here, or in `revoke` or `fence`, is closed and not used any more.
        """
        ...

    def fileno(self) -> int | None:
        """Readable when `completions()` has something, and not for long without; None asks to be polled.

        Then `completions()` is called every millisecond while a ticket, a link or a fence of ours is under way, else
        with each heartbeat alone. So a receiver needs threads of its own, or a file descriptor, for what others write.

        The same from `start()` to `close()`; None before and after.
        """
        ...

    def close(self) -> None:
        """End all links, threads, processes and ports. Tickets in flight end Failed, fences Fenced.

        Once it has returned, no byte lands in a registered region and no source is read to any effect, whatever was
        under way; nothing refers to the regions, no thread and file descriptor is left, and processes have been told to
        end. Peers that stand still hold it up for seconds at most. `completions()` may be called once more.

        May be called twice, without `start()`, and after a `start()` that raised. In a forked child it does nothing: a
        transport stays its parent's.
        """
        ...


@runtime_checkable
class Gathers(Protocol):
    """A transport that keeps what is submitted until the driver has no more for now, to send it in one go."""

    def flush(self) -> None:
        """Send what was submitted since the last call. Comes in each turn of the driver, before it waits."""
        ...


@runtime_checkable
class CountsRefusals(Protocol):
    """A transport that counts whom and what it turned away; `Endpoint.refused` shows it."""

    def refused(self) -> Mapping[str, int]:
        """How many, by reason."""
        ...
