"""Two sides of a transfer with their memory, and what they report, held to the rules that bind every report."""

from __future__ import annotations

import fcntl
import functools
import mmap
import os
import random
import select
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from kvpoll_fsm.spi import (
    MAX_TICKET_NBYTES,
    Completion,
    Done,
    Failed,
    Fenced,
    Gathers,
    LeaseId,
    Link,
    LinkDown,
    LinkUp,
    Progress,
    Quiesced,
    Range,
    Region,
    Transport,
    Write,
)

__all__ = [
    "CANARY",
    "HUGE",
    "MIB",
    "SIZES",
    "WITHIN_S",
    "Pair",
    "Side",
    "footprint",
    "lease",
    "painted",
    "pattern",
    "same",
    "sealed_memfd",
    "until",
    "untouched",
]

MIB = 1 << 20
SIZES = (5 * MIB, 100_003)
"""Bytes of the regions of a side: one for large writes, one that is odd."""
HUGE = (Write(0, 0, 0, 4 * MIB),) * (MAX_TICKET_NBYTES // (4 * MIB))
"""As much as a ticket may carry, over and over to the same place."""
WITHIN_S = 20.0
"""How long one condition is waited for, unless a suite says otherwise."""
CANARY = b"\xc5"
"""What memory is painted with where nothing may land any more."""
_PATTERN = random.Random(20).randbytes(MIB + 7)
_F_ADD_SEALS, _F_SEAL_SHRINK, _F_SEAL_GROW = 1033, 2, 4  # fcntl(2); the module lacks some


@functools.cache
def pattern(nbytes: int, start: int = 0) -> bytes:
    """Bytes in which a shift shows."""
    shifted = _PATTERN[start % len(_PATTERN) :] + _PATTERN[: start % len(_PATTERN)]
    return (shifted * (nbytes // len(shifted) + 1))[:nbytes]


def until(condition: Callable[[], object], what: str, within_s: float = WITHIN_S) -> None:
    """Wait for something to become true; it is an error if it does not."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        time.sleep(0.001)


def lease(part: int = 0) -> LeaseId:
    """The holder of blocks in all tests."""
    return LeaseId("receiver", 7, 0, 1, part)


def sealed_memfd(nbytes: int) -> int:
    """A file without a name that keeps its size, as a pool's arenas are."""
    fd = os.memfd_create("test-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW)
    return fd


class Side:
    """A started transport, its regions, and what it has reported.

    Attributes:
        seen: Every completion, in order.
        ends: How each ticket ended.
        quiesced: Tickets that Failed without quiescence and became quiescent later.
        progress: What was reported of each ticket, from 0 on.
        fenced: The fences that hold.
        links: For each link, whether it came up (True) or went down, in order.
    """

    def __init__(
        self,
        transport: Transport,
        sizes: Sequence[int] = SIZES,
        filled: bool = False,
        *,
        within_s: float = WITHIN_S,
        flushes: bool = False,
        shared: bool = True,
        fds: Sequence[int] | None = None,
    ) -> None:
        """Start a transport and register memory.

        Args:
            transport: Not started yet.
            sizes: Bytes of each region.
            filled: Whether the memory holds a pattern, or zeros.
            within_s: How long a condition is waited for.
            flushes: Whether `flush` is called in every turn, as the driver does where a transport has it.
            shared: Whether the transport is told of the files that are the memory.
            fds: The files that are the memory, which are taken over; None makes some.
        """
        self.transport = transport
        self.within_s = within_s
        self._gathers = transport if flushes and isinstance(transport, Gathers) else None
        self._fds = [sealed_memfd(size) for size in sizes] if fds is None else list(fds)
        self.arenas = [mmap.mmap(fd, size) for fd, size in zip(self._fds, sizes, strict=True)]
        if filled:
            self.fill()
        self._doubtful: set[int] = set()
        self.regions = self._start(shared)
        self.forget()

    def _start(self, shared: bool) -> list[bytes]:
        """Start, and register the memory; leaves nothing behind where that fails."""
        regions = [
            Region(number, memoryview(arena), fd if shared else None)
            for number, (arena, fd) in enumerate(zip(self.arenas, self._fds, strict=True))
        ]
        try:
            self.transport.start()
            return [self.transport.register(region) for region in regions]
        except BaseException:
            self.transport.close()
            raise

    def fill(self) -> None:
        """Write the pattern into all regions."""
        for number, arena in enumerate(self.arenas):
            arena[:] = pattern(len(arena), number)

    def paint(self, with_byte: bytes) -> None:
        """Write one byte all over all regions."""
        for arena in self.arenas:
            arena[:] = with_byte * len(arena)

    def forget(self) -> None:
        """Let go of what was reported so far."""
        self.seen: list[Completion] = []
        self.ends: dict[int, Done | Failed] = {}
        self.quiesced: set[int] = set()
        self.progress: dict[int, list[int]] = {}
        self.fenced: list[int] = []
        self.links: dict[int, list[bool]] = {}

    def grant(self, *ranges: Range, part: int = 0) -> bytes:
        """A token for these ranges, or for everything."""
        whole = [Range(number, 0, len(arena)) for number, arena in enumerate(self.arenas)]
        return self.transport.grant(lease(part), ranges or whole)

    def connect(self, peer: Side) -> Link:
        """A link to another side."""
        return self.transport.connect(peer.transport.descriptor(), peer.regions)

    def pump(self) -> None:
        """Take what is there, and hold it to the rules."""
        if self._gathers is not None:
            self._gathers.flush()
        for completion in self.transport.completions():
            self.seen.append(completion)
            self._note(completion)

    def _note(self, completion: Completion) -> None:
        if isinstance(completion, (Done, Failed)):
            self._note_end(completion)
        elif isinstance(completion, Progress):
            assert completion.ticket not in self.ends, f"{completion} after {self.ends[completion.ticket]}"
            reports = self.progress.setdefault(completion.ticket, [0])
            assert completion.nbytes > reports[-1], f"{completion}: progress that is none, after {reports[-1]}"
            reports.append(completion.nbytes)
        elif isinstance(completion, Quiesced):
            self._note_quiesced(completion)
        elif isinstance(completion, Fenced):
            assert completion.fence not in self.fenced, f"{completion} twice"
            self.fenced.append(completion.fence)
        else:
            assert isinstance(completion, (LinkUp, LinkDown)), f"{completion!r} is no completion"
            self.links.setdefault(completion.link, []).append(isinstance(completion, LinkUp))

    def _note_end(self, end: Done | Failed) -> None:
        assert end.ticket not in self.ends, f"{end} after {self.ends[end.ticket]}"
        if isinstance(end, Failed):
            assert end.reason, f"{end}: a failure needs a reason"
            assert end.source_free or not end.quiescent, f"{end}: what reads its source may write as well"
            if not end.quiescent:
                self._doubtful.add(end.ticket)
        self.ends[end.ticket] = end

    def _note_quiesced(self, completion: Quiesced) -> None:
        assert completion.ticket not in self.quiesced, f"{completion} twice"
        assert completion.ticket in self._doubtful, f"{completion}: not of a ticket that failed without quiescence"
        self._doubtful.discard(completion.ticket)
        self.quiesced.add(completion.ticket)

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Collect completions until something is true."""

        def pumped() -> object:
            self.pump()
            return condition()

        until(pumped, what, self.within_s)

    def close(self) -> None:
        """Close, and see that the memory is let go of: an arena in use cannot be unmapped."""
        self.transport.close()
        self.never_flush()
        self.pump()
        self.transport.close()
        for arena, fd in zip(self.arenas, self._fds, strict=True):
            arena.close()
            os.close(fd)

    def never_flush(self) -> None:
        """From now on `flush` is not called: for a transport that sends at once until it is."""
        self._gathers = None


class Pair:
    """A writing and a receiving side in one process."""

    def __init__(self, tx: Side, rx: Side) -> None:
        self.tx = tx
        self.rx = rx

    def pump(self) -> None:
        """Take what is there on both sides."""
        self.tx.pump()
        self.rx.pump()

    def until(self, condition: Callable[[], object], what: str, within_s: float | None = None) -> None:
        """Collect completions on both sides until something is true; it is an error if it does not become so."""
        within_s = self.tx.within_s if within_s is None else within_s
        deadline = time.monotonic() + within_s
        self.pump()
        while not condition():
            assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}; last seen: {self.tx.seen[-5:]}"
            self._doze()
            self.pump()

    def _doze(self) -> None:
        """Wait as a driver would: for a file descriptor, or for a moment where there is none."""
        filenos = [side.transport.fileno() for side in (self.tx, self.rx)]
        poller = select.poll()
        for fileno in filenos:
            if fileno is not None:
                poller.register(fileno, select.POLLIN)
        poller.poll(1 if None in filenos else 50)

    def ended(self, *tickets: int) -> list[Done | Failed]:
        """Wait for tickets and say how they ended."""
        self.until(lambda: self.tx.ends.keys() >= set(tickets), f"the end of {_few(tickets)}")
        return [self.tx.ends[ticket] for ticket in tickets]

    def done(self, *tickets: int) -> None:
        """Wait for tickets, which must have been done."""
        for end in self.ended(*tickets):
            assert isinstance(end, Done), end

    def failed(self, ticket: int) -> Failed:
        """Wait for a ticket, which must have failed."""
        (end,) = self.ended(ticket)
        assert isinstance(end, Failed), end
        return end

    def stream(self, link: Link, batches: Iterable[Sequence[Write]], token: bytes) -> list[int]:
        """Submit one ticket for each batch, with no more in flight than may be; returns the tickets."""
        most = self.tx.transport.capabilities.max_outstanding
        open_: list[int] = []
        tickets: list[int] = []

        def fits() -> bool:
            open_[:] = [ticket for ticket in open_ if ticket not in self.tx.ends]
            return len(open_) < most

        for batch in batches:
            self.until(fits, f"fewer than {most} tickets in flight")
            tickets.append(link.submit(batch, token))
            open_.append(tickets[-1])
        return tickets

    def calm(self, token: bytes, *tickets: int) -> list[Done | Failed]:
        """Wait until no byte of these can land any more: they ended quiescent, or behind a fence of their token."""
        ends = self.ended(*tickets)
        if not all(isinstance(end, Done) or end.quiescent for end in ends):
            self.fence(token)
        return ends

    def fence(self, token: bytes) -> None:
        """Fence a token and wait until that is reported."""
        number = self.rx.transport.fence(token)
        self.until(lambda: number in self.rx.fenced, "the fence")

    def up(self, link: Link) -> None:
        """Wait for a link."""
        self.until(lambda: self.tx.links.get(link.number, [False])[-1], f"link {link.number}")

    def close(self) -> None:
        """Close both sides."""
        try:
            self.tx.close()
        finally:
            self.rx.close()


def _few(tickets: Sequence[int]) -> str:
    return f"{tickets}" if len(tickets) < 10 else f"{len(tickets)} tickets"


def same(writes: Iterable[Write], tx: Side, rx: Side) -> None:
    """The receiving side holds the bytes of these writes and nothing else."""
    images = [bytearray(len(arena)) for arena in rx.arenas]
    for write in writes:
        data = tx.arenas[write.region][write.src_offset : write.src_offset + write.nbytes]
        images[write.region][write.dst_offset : write.dst_offset + write.nbytes] = data
    for number, (image, arena) in enumerate(zip(images, rx.arenas, strict=True)):
        if arena[:] != image:  # an assert would print megabytes
            at = next(n for n, (is_, should) in enumerate(zip(arena[:], image, strict=True)) if is_ != should)
            raise AssertionError(f"region {number}, byte {at}: {arena[at]:#04x} where {image[at]:#04x} belongs")


def untouched(rx: Side) -> None:
    """Not a byte has landed."""
    same([], rx, rx)


def painted(rx: Side) -> None:
    """Not a byte has landed in the first region since it was painted with `CANARY`."""
    arena = rx.arenas[0][:]
    if arena.count(CANARY) != len(arena):
        at = next(n for n, byte in enumerate(arena) if byte != CANARY[0])
        raise AssertionError(f"byte {at} of region 0 has changed: something landed behind the fence")


def footprint() -> tuple[set[str], set[str]]:
    """The file descriptors and the threads of this process."""
    fds = {f"{fd}:{_link(fd)}" for fd in os.listdir("/proc/self/fd")}
    threads = {f"{thread.native_id}:{thread.name}" for thread in threading.enumerate()}
    return {fd for fd in fds if not fd.endswith(":")}, threads


def _link(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # the one that listed the folder
        return ""
