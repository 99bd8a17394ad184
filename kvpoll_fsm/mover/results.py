"""Where the data of receivers' rooms are gathered: memory the mover fills and the host makes arrays of, uncopied."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, cast

from kvpoll_fsm.arrays import Kind, wrap
from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.layout import Layout
from kvpoll_fsm.mover.frames import Dropped, Event, NewSegment
from kvpoll_fsm.segment import Segment
from kvpoll_fsm.staging import Destination

__all__ = ["Held", "Results", "SharedResults"]

INLINE_NBYTES = 32 << 10
"""Results of up to so many bytes travel in the frame that tells of them."""
KEPT_NBYTES = 256 << 20
"""Segments whose arrays are gone are used again, which saves the first touch; at most so many bytes of them wait."""
_ALIGNMENT = 64


def spans(layout: Layout, total_tokens: int) -> tuple[list[tuple[int, int]], int]:
    """(offset, bytes) of every field in one piece of memory, and the size of that."""
    found, at = [], 0
    for field in layout.fields:
        nbytes = field.block_nbytes(total_tokens)
        found.append((at, nbytes))
        at += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    return found, at


class Held:
    """A room's data at the mover, until the host has them: in a segment, or inline. Given back if nobody takes them."""

    __slots__ = ("_give_back", "inline", "segment", "total_tokens")

    def __init__(
        self, total_tokens: int, segment: int, inline: bytearray | None, give_back: Callable[[int], None]
    ) -> None:
        self.total_tokens = total_tokens
        self.segment = segment
        self.inline = inline
        self._give_back = give_back

    def take(self) -> int:
        """The segment's number, or 0; it is the host's from now on."""
        segment, self.segment = self.segment, 0
        return segment

    def __del__(self) -> None:
        if self.segment:
            self._give_back(self.segment)


class Results:
    """The mover's side. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # reentrant: the end of a `Held` may come in the middle of our own call
        self._segments: dict[int, Segment] = {}
        self._free: dict[int, list[int]] = {}
        self._free_nbytes = 0
        self._unsaid: list[tuple[Event, list[int]]] = []
        self._last = 0

    def destination(self, layout: Layout, total_tokens: int) -> Destination:
        """A place for a room of so many tokens.

        Raises:
            InvalidInput: Fewer than 1 token, or more than memory can hold.
        """
        if total_tokens < 1:
            raise InvalidInput(f"a room of {total_tokens} tokens")
        places, nbytes = spans(layout, total_tokens)
        if nbytes <= INLINE_NBYTES:
            inline = bytearray(nbytes)
            memory, held = memoryview(inline), Held(total_tokens, 0, inline, self.free)
        else:
            number = self._take(_size_class(nbytes))
            memory, held = self._segments[number].buffer, Held(total_tokens, number, None, self.free)
        return Destination(layout, total_tokens, [memory[at : at + n] for at, n in places], held)

    def free(self, number: int, *, again: bool = True) -> None:
        """Nobody uses the segment any more; unless `again`, it is not to be written again either."""
        with self._lock:
            segment = self._segments[number]
            size = segment.buffer.nbytes
            if not again or self._free_nbytes + size > KEPT_NBYTES:
                segment.close()
                del self._segments[number]
                self._unsaid.append((Dropped(number), []))
            else:
                self._free_nbytes += size
                self._free.setdefault(size, []).append(number)

    @property
    def has_unsaid(self) -> bool:
        """There is something that the host has to hear."""
        return bool(self._unsaid)

    def unsaid(self) -> list[tuple[Event, list[int]]]:
        """What the host has to hear before it hears of a room, and the descriptors that go with it."""
        with self._lock:
            unsaid, self._unsaid = self._unsaid, []
        return unsaid

    def _take(self, nbytes: int) -> int:
        with self._lock:
            if self._free.get(nbytes):
                self._free_nbytes -= nbytes
                return self._free[nbytes].pop()
        try:
            segment = Segment(nbytes)
        except (OSError, OverflowError, MemoryError) as error:
            raise InvalidInput(f"no memory for a result of {nbytes} bytes ({error})") from None
        with self._lock:
            self._last += 1
            self._segments[self._last] = segment
            self._unsaid.append((NewSegment(self._last, nbytes), [os.dup(cast("int", segment.fd))]))
            return self._last


def _size_class(nbytes: int) -> int:
    """The next size up of those that segments have: four to each power of two, so that few fit many."""
    step = max(64 << 10, 1 << (nbytes.bit_length() - 3))
    return -(-nbytes // step) * step


class SharedResults:
    """The host's side. `add`, `drop` and `buffer` for one thread."""

    def __init__(self, free: Callable[[int, bool], None]) -> None:
        """Store what is needed.

        Args:
            free: Called, in any thread, with a segment that has no array any more, and whether it may be used again.
        """
        self._free = free
        self._mapped: dict[int, Mapped] = {}
        self._in_use: set[int] = set()
        self._inherited: set[int] = set()
        with _joining:
            _all.add(self)

    def before_fork(self) -> None:
        """A child may keep all arrays that there are: their memory must not change under it."""
        self._inherited |= self._in_use

    def add(self, number: int, nbytes: int, fd: int) -> None:
        """Map a segment; takes over `fd`.

        Raises:
            OSError: It cannot be mapped.
        """
        try:
            self._mapped[number] = Mapped(fd, nbytes)
        finally:
            os.close(fd)

    def drop(self, number: int) -> None:
        """Let go of a segment."""
        self._mapped.pop(number, None)

    def clear(self) -> None:
        """The mover is gone; arrays that there are keep their memory."""
        self._mapped.clear()

    def buffer(self, number: int, inline: bytes) -> Any:
        """The memory of a room's data; once nothing uses it, the segment is free."""
        if not number:
            return bytearray(inline)
        segment = self._mapped[number]
        self._in_use.add(number)
        memory = segment.array()
        weakref.finalize(memory, self._done, segment, number).atexit = False
        return memory

    def _done(self, segment: Mapped, number: int) -> None:
        """Nothing here uses a room's data any more: `segment` was kept for them."""
        self._in_use.discard(number)
        again = number not in self._inherited
        self._inherited.discard(number)
        self._free(number, again)


def _before_fork() -> None:
    _joining.acquire()  # until the fork is over, so that the child does not inherit it from a thread it has not
    for results in list(_all):
        results.before_fork()


_all: weakref.WeakSet[SharedResults] = weakref.WeakSet()
_joining = threading.RLock()
os.register_at_fork(before=_before_fork, after_in_parent=_joining.release, after_in_child=_joining.release)


class Mapped:
    """Shared memory that is mapped without a file descriptor: a host may keep results by the thousand."""

    __slots__ = ("__weakref__", "_address", "nbytes")

    def __init__(self, fd: int, nbytes: int) -> None:
        """Map `fd`, which stays the caller's.

        Raises:
            OSError: It cannot be mapped.
        """
        address = _libc.mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
        if address == _FAILED:
            raise OSError(ctypes.get_errno(), f"mmap of {nbytes} bytes: {os.strerror(ctypes.get_errno())}")
        self._address = address
        self.nbytes = nbytes
        weakref.finalize(self, _libc.munmap, address, nbytes).atexit = False

    def array(self) -> Any:
        """Its bytes, which do not keep it alive."""
        return (ctypes.c_char * self.nbytes).from_address(self._address)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value


def arrays(layout: Layout, total_tokens: int, memory: Any, kind: Kind) -> dict[str, Any]:
    """A room's arrays by field name, over memory that they keep alive."""
    places, _ = spans(layout, total_tokens)
    view = memoryview(memory).cast("B")
    return {
        field.name: wrap(field, view[at : at + nbytes], () if field.per_room else (total_tokens,), kind)
        for field, (at, nbytes) in zip(layout.fields, places, strict=True)
    }
