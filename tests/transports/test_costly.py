"""The kit asks no more than is promised: a transport whose fence costs a process passes it, as does one that polls."""

from __future__ import annotations

import weakref

from kvpoll_fsm.spi import Failed, LinkDown
from kvpoll_fsm.testing.conformance import TransportSuite
from kvpoll_memory import MemoryTransport


class Costly(MemoryTransport):
    """A fence ends all that is under way in this process, as if it were the process that did all the writing.

    Tickets end Failed, and it is not known what of them still lands; links go down, and have to be made anew.
    """

    everybody: weakref.WeakSet[Costly] = weakref.WeakSet()

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
