"""What the tests of all transports share: two sides with memory, and completions collected by ticket."""

from __future__ import annotations

import fcntl
import functools
import mmap
import os
import random
import select
import threading
import time
from collections.abc import Callable, Sequence

from kvpoll_fsm.spi import (
    MAX_TICKET_NBYTES,
    Completion,
    Done,
    Failed,
    Fenced,
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

MIB = 1 << 20
SIZES = (5 * MIB, 100_003)
"""Bytes of the regions of a side: one for large writes, one that is odd."""
HUGE = (Write(0, 0, 0, 4 * MIB),) * (MAX_TICKET_NBYTES // (4 * MIB))
"""As much as a ticket may carry, over and over to the same place."""
WITHIN_S = 20.0
_PATTERN = random.Random(20).randbytes(MIB + 7)


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
    return LeaseId("receiver", 7, 0, 1, part)


def sealed_memfd(nbytes: int) -> int:
    """A file without a name that keeps its size, as a pool's arenas are."""
    fd = os.memfd_create("test-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    fcntl.fcntl(fd, 1033, 2 | 4)  # F_ADD_SEALS: shrink, grow
    return fd


class Side:
    """A started transport, its regions, and what it has reported."""

    def __init__(self, transport: Transport, sizes: Sequence[int] = SIZES, filled: bool = False) -> None:
        self.transport = transport
        self.fds = [sealed_memfd(size) for size in sizes]
        self.arenas = [mmap.mmap(fd, size) for fd, size in zip(self.fds, sizes, strict=True)]
        if filled:
            for number, arena in enumerate(self.arenas):
                arena[:] = pattern(len(arena), number)
        transport.start()
        self.regions = [
            transport.register(Region(number, memoryview(arena), fd))
            for number, (arena, fd) in enumerate(zip(self.arenas, self.fds, strict=True))
        ]
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
        return self.transport.connect(peer.transport.descriptor(), peer.regions)

    def pump(self) -> None:
        """Take what is there, and hold it to the rules."""
        for completion in self.transport.completions():
            self.seen.append(completion)
            self._note(completion)

    def _note(self, completion: Completion) -> None:
        if isinstance(completion, (Done, Failed)):
            assert completion.ticket not in self.ends, f"{completion} after {self.ends[completion.ticket]}"
            sure = isinstance(completion, Done) or completion.source_free or not completion.quiescent
            assert sure, f"{completion}: what reads its source may write as well"
            self.ends[completion.ticket] = completion
        elif isinstance(completion, Progress):
            assert completion.ticket not in self.ends, f"{completion} after {self.ends[completion.ticket]}"
            reports = self.progress.setdefault(completion.ticket, [0])
            assert completion.nbytes > reports[-1], "progress that is none"
            reports.append(completion.nbytes)
        elif isinstance(completion, Quiesced):
            end = self.ends[completion.ticket]
            assert isinstance(end, Failed)
            assert not end.quiescent
            assert completion.ticket not in self.quiesced, f"{completion} twice"
            self.quiesced.add(completion.ticket)
        elif isinstance(completion, Fenced):
            assert completion.fence not in self.fenced, f"{completion} twice"
            self.fenced.append(completion.fence)
        elif isinstance(completion, (LinkUp, LinkDown)):
            self.links.setdefault(completion.link, []).append(isinstance(completion, LinkUp))

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Collect completions until something is true."""

        def pumped() -> object:
            self.pump()
            return condition()

        until(pumped, what)

    def close(self) -> None:
        """Close, and see that the memory is let go of: an arena in use cannot be unmapped."""
        self.transport.close()
        self.pump()
        self.transport.close()
        for arena, fd in zip(self.arenas, self.fds, strict=True):
            arena.close()
            os.close(fd)


class Pair:
    """A writing and a receiving side in one process."""

    def __init__(self, tx: Side, rx: Side) -> None:
        self.tx = tx
        self.rx = rx

    def pump(self) -> None:
        self.tx.pump()
        self.rx.pump()

    def until(self, condition: Callable[[], object], what: str, within_s: float = WITHIN_S) -> None:
        """Collect completions on both sides until something is true."""
        deadline = time.monotonic() + within_s
        self.pump()
        while not condition():
            assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}; {self.tx.seen[-5:]}"
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
        self.until(lambda: self.tx.ends.keys() >= set(tickets), f"the end of {tickets}")
        return [self.tx.ends[ticket] for ticket in tickets]

    def done(self, *tickets: int) -> None:
        for end in self.ended(*tickets):
            assert isinstance(end, Done), end

    def failed(self, ticket: int) -> Failed:
        (end,) = self.ended(ticket)
        assert isinstance(end, Failed), end
        return end

    def fence(self, token: bytes) -> None:
        """Fence a token and wait until that is reported."""
        number = self.rx.transport.fence(token)
        self.until(lambda: number in self.rx.fenced, "the fence")

    def up(self, link: Link) -> None:
        self.until(lambda: self.tx.links.get(link.number, [False])[-1], "the link")

    def close(self) -> None:
        self.tx.close()
        self.rx.close()


def same(writes: Sequence[Write], tx: Side, rx: Side) -> None:
    """The receiving side holds the bytes of these writes and nothing else."""
    images = [bytearray(len(arena)) for arena in rx.arenas]
    for write in writes:
        data = tx.arenas[write.region][write.src_offset : write.src_offset + write.nbytes]
        images[write.region][write.dst_offset : write.dst_offset + write.nbytes] = data
    for number, (image, arena) in enumerate(zip(images, rx.arenas, strict=True)):
        assert arena[:] == bytes(image), f"region {number}"


def untouched(rx: Side) -> None:
    """Not a byte has landed."""
    same([], rx, rx)


def footprint() -> tuple[set[str], set[str]]:
    """The file descriptors and the threads of this process."""
    fds = {f"{fd}:{_link(fd)}" for fd in os.listdir("/proc/self/fd")}
    return {fd for fd in fds if not fd.endswith(":")}, {thread.name for thread in threading.enumerate()}


def _link(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # the one that listed the folder
        return ""
