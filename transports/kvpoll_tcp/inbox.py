"""What a connection has brought and nobody has taken yet: heads of frames, and small frames whole."""

from __future__ import annotations

from kvpoll_tcp import wire

__all__ = ["INBOX_NBYTES", "Inbox"]

INBOX_NBYTES = 1 << 15
assert INBOX_NBYTES >= wire.HEAD_NBYTES + wire.ENTRY_NBYTES * wire.MAX_ENTRIES, "the longest head fits"


class Inbox:
    """Bytes in order, at most 32 KiB.

    One read takes what is there: a small frame, or many, need one call. Of a large one only the beginning comes here;
    the rest goes into place at once.
    """

    def __init__(self) -> None:
        self._memory = memoryview(bytearray(INBOX_NBYTES))
        self._start = self._end = 0

    @property
    def nbytes(self) -> int:
        """How many bytes are here."""
        return self._end - self._start

    def has(self, nbytes: int) -> bool:
        """Whether so many bytes are here."""
        return self._end - self._start >= nbytes

    def room(self, nbytes: int) -> memoryview:
        """Where to read more into, so that `nbytes` bytes are here in the end; `add` says how many came."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start + nbytes > len(self._memory):
            here = self.nbytes
            self._memory[:here] = self._memory[self._start : self._end]
            self._start, self._end = 0, here
        return self._memory[self._end :]

    def add(self, nbytes: int) -> None:
        """So many bytes were read."""
        self._end += nbytes

    def peek(self, nbytes: int) -> memoryview:
        """The first bytes; valid until `room` is called."""
        return self._memory[self._start : self._start + nbytes]

    def take(self, nbytes: int) -> memoryview:
        """The first bytes, which leave; valid until `room` is called."""
        taken = self.peek(nbytes)
        self._start += nbytes
        return taken

    def pour(self, views: list[memoryview]) -> int:
        """Move what is here into place, as far as it goes, and drop the places that are full; returns how much."""
        before = self.nbytes
        full = 0
        for view in views:
            nbytes = min(len(view), self.nbytes)
            if not nbytes:
                break
            view[:nbytes] = self.take(nbytes)
            if nbytes < len(view):
                views[full] = view[nbytes:]
                break
            full += 1
        del views[:full]
        return before - self.nbytes
