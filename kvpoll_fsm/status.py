"""The status table: memory in which a driver writes where every room stands, and from which `poll()` reads one byte.

With a mover it is shared between two processes. Of each room it holds a byte with one bit for each state the room has
gone through (1 << KVPoll), which is its present state and its history in one; its gate; how many of its parts have an
outcome; and its bytes done.
"""

from __future__ import annotations

import itertools
import mmap
import os
from collections import deque

from kvpoll_fsm.deadlines import Gate
from kvpoll_fsm.errors import LimitReached
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.segment import new_memfd

__all__ = ["GATES", "GATE_NUMBERS", "HISTORIES", "ROOMS", "STATES", "Places", "Sign", "StatusTable"]

ROOMS = 1 << 20
"""Rooms that one endpoint's host can have open; memory is taken only for those there are."""

GATES = tuple(Gate)
GATE_NUMBERS = {gate: number for number, gate in enumerate(GATES)}
_ORDER = (KVPoll.Bootstrapping, KVPoll.WaitingForInput, KVPoll.Transferring, KVPoll.Success, KVPoll.Failed)


def _history(bits: int) -> tuple[KVPoll, ...]:
    return tuple(state for state in _ORDER if bits >> state & 1) or (KVPoll.Bootstrapping,)


HISTORIES = tuple(_history(bits) for bits in range(1 << len(KVPoll)))
"""The states gone through, by a room's byte: a room enters each at most once, and in this order."""
STATES = tuple(history[-1] for history in HISTORIES)
"""The present state, by a room's byte."""


class Sign:
    """What tells a live host from a live driver: every call of the host sets `seen`."""

    __slots__ = ("seen",)

    def __init__(self) -> None:
        self.seen = True


class StatusTable:
    """The table, mapped.

    Attributes:
        fd: The memfd behind it, this object's to close; None if it is this process's alone.
        states: A room's byte by its number; 0 for a number not in use. In a forked child it is closed.
        sign: One byte, set by a mover's host now and then while it lives.
        gates: Index into `GATES`.
        parts: Parts that have an outcome.
        bytes_done: Bytes that have landed.
    """

    def __init__(self, fd: int | None) -> None:
        """Map the table behind `fd`, which is taken over; None makes one for this process alone.

        Raises:
            OSError: There is no memory for it.
        """
        self.fd = fd
        self.states = mmap.mmap(-1 if fd is None else fd, _NBYTES)
        with memoryview(self.states) as memory:
            self.sign = memory[ROOMS : ROOMS + 1]
            self.gates = memory[ROOMS + _HEAD : 2 * ROOMS + _HEAD]
            with memory[2 * ROOMS + _HEAD : 6 * ROOMS + _HEAD] as parts, memory[6 * ROOMS + _HEAD :] as bytes_done:
                self.parts, self.bytes_done = parts.cast("I"), bytes_done.cast("Q")

    @classmethod
    def shared(cls) -> StatusTable:
        """A table that another process can be given.

        Raises:
            OSError: There is no memory for it, or no memfd on this system.
        """
        return cls(new_memfd("kvpoll-status", _NBYTES))

    def begin(self, number: int) -> None:
        """A room takes the place of this number."""
        self.states[number] = 1 << KVPoll.Bootstrapping
        self.gates[number] = self.parts[number] = self.bytes_done[number] = 0

    def after_fork(self) -> None:
        """This is a forked child: whoever asks for a room's state gets a ValueError."""
        self.discard()

    def discard(self) -> None:
        """Let go of the memory; nobody can read it any more."""
        self.close()
        for view in (self.sign, self.gates, self.parts, self.bytes_done):
            view.release()
        self.states.close()

    def close(self) -> None:
        """Close the file descriptor; the memory stays as long as a view uses it. May be called twice."""
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)


_HEAD = 64
_NBYTES = _HEAD + 14 * ROOMS


class Places:
    """The numbers of a table: given out, and taken back. For any thread."""

    def __init__(self) -> None:
        self._unused: deque[int] = deque()
        self._numbers = itertools.count(1)
        self.give_back = self._unused.append

    def take(self) -> int:
        """A number nobody uses.

        Raises:
            LimitReached: All are in use.
        """
        try:
            return self._unused.popleft()
        except IndexError:
            number = next(self._numbers)
        if number >= ROOMS:
            raise LimitReached("rooms", ROOMS - 1)
        return number
