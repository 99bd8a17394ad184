"""One ticket and how its bytes are copied."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.spi import MAX_TICKET_NBYTES, Write
from kvpoll_memory.fabric import Host

__all__ = ["MemoryTicket", "check_writes"]


class MemoryTicket:
    """What is left to copy of one ticket.

    Attributes:
        number: The ticket as the driver knows it.
        nth: The ticket as `Faults` counts.
        cancelled: It is to end.
        written: Bytes copied so far.
    """

    def __init__(self, number: int, nth: int, writes: Sequence[Write], token: bytes) -> None:
        self.number = number
        self.nth = nth
        self.cancelled = False
        self.written = 0
        self._token = token
        self._left = deque((write, 0) for write in writes)
        self._snapshot: bytes | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all bytes are in place."""
        return not self._left

    def take_snapshot(self, sources: Mapping[int, memoryview]) -> None:
        """Keep the bytes that are left, so that the source is free although they land later."""
        left = ((write, done, sources[write.region]) for write, done in self._left)
        self._snapshot = b"".join(
            source[write.src_offset + done : write.src_offset + write.nbytes] for write, done, source in left
        )

    def copy(
        self, sources: Mapping[int, memoryview], host: Host, most: int | None, flips: Sequence[int] = ()
    ) -> str | None:
        """Copy at most so many bytes, all if None; returns why the receiver refuses, if it does."""
        for write, _ in self._left:
            problem = host.refusal(self._token, write.region, write.dst_offset, write.nbytes)
            if problem is not None:
                return problem
        stop = None if most is None else self.written + most
        while self._left and (stop is None or self.written < stop):
            write, done = self._left[0]
            take = write.nbytes - done if stop is None else min(write.nbytes - done, stop - self.written)
            at = write.dst_offset + done
            host.regions[write.region][at : at + take] = self._bytes(sources, write, done, take, flips)
            self._advance(take)
        return None

    def _bytes(
        self, sources: Mapping[int, memoryview], write: Write, done: int, take: int, flips: Sequence[int]
    ) -> bytes | bytearray:
        if self._snapshot is not None:
            data, self._snapshot = bytearray(self._snapshot[:take]), self._snapshot[take:]
        else:
            data = bytearray(sources[write.region][write.src_offset + done : write.src_offset + done + take])
        for position in flips:
            if 0 <= position - self.written < take:
                data[position - self.written] ^= 1
        return data

    def _advance(self, nbytes: int) -> None:
        write, done = self._left.popleft()
        self.written += nbytes
        if done + nbytes < write.nbytes:
            self._left.appendleft((write, done + nbytes))


def check_writes(writes: Sequence[Write], sources: Mapping[int, memoryview], most: int) -> None:
    """Refuse writes that cannot be made. Whether they may land is for the receiver to say.

    Raises:
        InvalidInput: Says which write is wrong.
    """
    if not 0 < len(writes) <= most:
        raise InvalidInput(f"{len(writes)} writes under one ticket: 1 to {most} are possible")
    for write in writes:
        source = sources.get(write.region)
        if source is None:
            raise InvalidInput(f"{write}: region {write.region} is not registered")
        if write.nbytes < 1 or write.src_offset < 0 or write.src_offset + write.nbytes > len(source):
            raise InvalidInput(f"{write}: the source's region has bytes 0 to {len(source)}")
        if write.dst_offset < 0:
            raise InvalidInput(f"{write}: impossible destination")
    if sum(write.nbytes for write in writes) > MAX_TICKET_NBYTES:
        raise InvalidInput(f"more than {MAX_TICKET_NBYTES} bytes under one ticket")
