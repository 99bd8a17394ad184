"""The kit asks no more than is promised: who claims little passes it, as does one whose fence costs a process."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import pytest

from kvpoll_fsm.spi import Failed, LinkDown, Write
from kvpoll_fsm.testing.conformance import TransportSuite
from kvpoll_memory import MemoryTransport
from kvpoll_memory.transport import MemoryLink


class Costly(MemoryTransport):
    """A fence ends all that is under way in this process, as if it were the process that did all the writing.

    Tickets end Failed, and it is not known what of them still lands; links go down, and have to be made anew.
    """

    everybody: ClassVar[weakref.WeakSet[Costly]] = weakref.WeakSet()

    def __init__(self) -> None:
        super().__init__(steps=1, step_nbytes=1 << 20, costly_fence=True)
        self.everybody.add(self)

    def fence(self, token: bytes) -> int:
        for each in list(self.everybody):
            each.lose_all()
        return super().fence(token)

    def lose_all(self) -> None:
        for link in self._links:
            self.report(LinkDown(link.number, "the process was killed"))
            for number in list(link._tickets):
                del link._tickets[number]
                self.report(Failed(number, "the process was killed", quiescent=False, collateral=True))
            link.close()


class TestCostly(TransportSuite):
    def make(self) -> Costly:
        return Costly()


class Small(MemoryTransport):
    """One write under a ticket, one ticket on a link, no cancel; it counts what is asked of it beyond that."""

    capabilities = replace(MemoryTransport.capabilities, scatter_entries=1, max_outstanding=1, cancellable=False)
    excess: ClassVar[list[str]] = []

    def __init__(self) -> None:
        super().__init__(steps=1, step_nbytes=1 << 20)

    def connect(self, descriptor: bytes, regions: Sequence[bytes]) -> MemoryLink:
        link = super().connect(descriptor, regions)
        submit = link.submit

        def counted(writes: Sequence[Write], token: bytes) -> int:
            ticket = submit(writes, token)
            if len(link._tickets) > 1:
                self.excess.append(f"{len(link._tickets)} tickets")
            return ticket

        link.submit = counted  # type: ignore[method-assign]
        link.cancel = lambda ticket: None  # type: ignore[method-assign]
        return link


class TestSmall(TransportSuite):
    def make(self) -> Small:
        return Small()

    @pytest.fixture(autouse=True)
    def modest(self) -> Iterator[None]:
        """No test may ask for more than is claimed."""
        Small.excess.clear()
        yield
        assert not Small.excess
