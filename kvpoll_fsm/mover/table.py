"""The status table: a piece of shared memory in which the mover writes where every room stands.

Of each room it holds a byte with one bit for each state the room has gone through (1 << KVPoll), which is its
present state and its history in one; its gate; and its bytes done.
"""

from __future__ import annotations

import mmap
import os

from kvpoll_fsm.deadlines import Gate
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.segment import new_memfd

__all__ = ["GATES", "HISTORIES", "ROOMS", "STATES", "StatusTable"]

ROOMS = 1 << 20
"""Rooms that one endpoint's host can have open; memory is taken only for those there are."""
_HEAD = 64
_NBYTES = _HEAD + ROOMS * 10

GATES = tuple(Gate)
_ORDER = (KVPoll.Bootstrapping, KVPoll.WaitingForInput, KVPoll.Transferring, KVPoll.Success, KVPoll.Failed)


def _history(bits: int) -> tuple[KVPoll, ...]:
    return tuple(state for state in _ORDER if bits >> state & 1) or (KVPoll.Bootstrapping,)


HISTORIES = tuple(_history(bits) for bits in range(1 << len(KVPoll)))
"""The states gone through, by a room's byte: no state but by its row, so their order follows from the machine."""
STATES = tuple(history[-1] for history in HISTORIES)
"""The present state, by a room's byte."""


class StatusTable:
    """The table, mapped.

    Attributes:
        fd: The memfd behind it, this object's to close.
        sign: One byte, set by every call of the host.
        states: A room's byte by its number; 0 for a number not in use.
        gates: Index into `GATES`.
        bytes_done: Bytes that have landed.
    """

    def __init__(self, fd: int | None = None) -> None:
        """Make a table, or map the one behind `fd`, which is taken over.

        Raises:
            OSError: There is no memory for it, or no memfd on this system.
        """
        self.fd = new_memfd("kvpoll-status", _NBYTES) if fd is None else fd
        memory = memoryview(mmap.mmap(self.fd, _NBYTES))
        self.sign = memory[:1]
        self.states = memory[_HEAD : _HEAD + ROOMS]
        self.gates = memory[_HEAD + ROOMS : _HEAD + 2 * ROOMS]
        self.bytes_done = memory[_HEAD + 2 * ROOMS :].cast("Q")

    def clear(self, number: int) -> None:
        """Begin anew with a room's number."""
        self.states[number] = 1 << KVPoll.Bootstrapping
        self.gates[number] = 0
        self.bytes_done[number] = 0

    def close(self) -> None:
        """Close the file descriptor; the memory stays as long as a view uses it. May be called twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
