"""What a peer is: a name, its settings, and one class for each side. A file of this folder has one or more."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cases import Case
from kvpoll_fsm.segment import Segment

__all__ = ["Memory", "Peer", "Sample", "Side", "Told"]

Told = dict[str, Any]
"""What one side says to the other before it starts; JSON."""
Sample = tuple[float, int]
"""Seconds and bytes of one transfer."""


class Memory:
    """The bytes a side sends from or receives into: shared memory, every page present.

    Attributes:
        buffer: All of them.
        fd: The file they are.
        address: Where they begin.
    """

    def __init__(self, nbytes: int) -> None:
        self._segment = Segment(nbytes)
        self.buffer = self._segment.buffer
        self.fd = self._segment.fd
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))

    def views(self, places: list[tuple[int, int]]) -> list[memoryview]:
        """The bytes at each (offset, nbytes)."""
        return [self.buffer[start : start + nbytes] for start, nbytes in places]


class Side:
    """One side of a peer. Only `transfer` is timed; a method that a peer has no use for does nothing."""

    def __init__(self, memory: Memory, options: Mapping[str, Any]) -> None:
        """Store these.

        Args:
            memory: What to send from or to receive into.
            options: The peer's.
        """
        self.memory = memory
        self.options = options
        self.places: list[tuple[int, int]] = []

    def listen(self) -> Told:
        """Receiver: be ready for the sender; says where."""
        return {}

    def join(self, told: Told) -> None:
        """Both, at the same time: meet the other side, at what its `listen` said."""

    def prepare(self, case: Case, told: Told) -> Told:
        """Sender, then receiver with what the sender said: get ready for transfers of this kind."""
        return {}

    def ready(self, told: Told) -> None:
        """Sender: what the receiver's `prepare` said."""

    def transfer(self) -> Sample | None:
        """Move the case's bytes once.

        The sender returns when it knows that all have landed in the receiver's memory. A receiver that takes no part
        returns at once. A side that takes its own time returns it.
        """
        return None

    def landed(self) -> None:
        """Receiver: what arrived is about to be compared, in `memory`."""

    def close(self) -> None:
        """The end."""


@dataclass(frozen=True)
class Peer:
    """Somebody to measure.

    Attributes:
        name: In tables and figures.
        kind: "limit" (nothing can be much faster), "ours", or "other".
        sender: Its class, of the module that lists the peer: there its processes look for it.
        receiver: Its class.
        settings: What it was told, and why.
        checksum: Whether the data are protected by one, and which.
        loop: Where the busy loop runs: "inside" the processes that move the data, or "beside" them.
        cases: Names of the cases it can do, or None for all.
        needs: Modules and programs it cannot do without.
        install: What brings them.
        options: For its sides.
        env: Environment of its processes.
        verify: Whether what arrived can be compared with what was sent.
    """

    name: str
    kind: str
    sender: type[Side]
    receiver: type[Side]
    settings: str
    checksum: str = "none but tcp's own"
    loop: str = "inside"
    cases: tuple[str, ...] | None = None
    needs: tuple[str, ...] = ()
    install: str = "make bench installs it (extra bench)"
    options: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    verify: bool = True

    def missing(self) -> str | None:
        """Why it cannot be measured here, or None."""
        for need in self.needs:
            if importlib.util.find_spec(need) is None and shutil.which(need) is None:
                return f"{need} is not installed: {self.install}"
        return None

    def does(self, case: Case) -> bool:
        """Whether it can do such a transfer."""
        return self.cases is None or case.name in self.cases
