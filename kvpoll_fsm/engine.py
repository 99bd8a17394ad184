"""Where an endpoint's driver runs, as its handles see it: in a thread of the host, or in a mover of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Literal, Protocol, TypeVar

from kvpoll_fsm.address import Address
from kvpoll_fsm.arena import BlockPool
from kvpoll_fsm.carriers import load_transports
from kvpoll_fsm.config import Config
from kvpoll_fsm.driver import Driver
from kvpoll_fsm.inputs import Supplied
from kvpoll_fsm.requests import ReceiverOrder
from kvpoll_fsm.selection import Policy
from kvpoll_fsm.sources import EngineBlocks, RoomSource
from kvpoll_fsm.status import Places, Sign, StatusTable
from kvpoll_fsm.switching import TransportStatus
from kvpoll_fsm.view import RoomView

__all__ = ["CALL_S", "Engine", "Question", "ThreadEngine"]

T = TypeVar("T")

CALL_S = 30.0
"""Longest wait for the driver's answer to a question such as `load()`."""

Question = Literal["load", "is_idle", "dump", "refused", "trace", "transports", "report"]


class Engine(Protocol):
    """Methods may be called from any thread. Those about a room never wait, but for `admit_receiver` and `resume`.

    Attributes:
        forked: This is a forked child's copy, in which nothing runs.
        pid: The process that owns it.
        sign: Set by every call of the host: tells a live host from a live driver.
    """

    forked: bool
    pid: int
    sign: Sign

    @property
    def ended(self) -> str | None:
        """Why it has ended, or None while it runs."""
        ...

    def start(self) -> Address:
        """Start; returns the address peers use. Raises what `Endpoint.start` does."""
        ...

    def close(self) -> None:
        """Fail what is live, tell peers, give everything back. May be called twice."""
        ...

    def after_fork(self) -> None:
        """This is a forked child: let go of what its parent has."""
        ...

    def view(self, room: int, rank: int, tag: str) -> RoomView:
        """What the host will see of a room that it is about to open."""
        ...

    def open_sender(self, view: RoomView, required_ranks: int | None, policy: Policy | None) -> None:
        """Open the sender's side of a room; without a policy of its own it has the endpoint's."""
        ...

    def open_receiver(self, view: RoomView, order: ReceiverOrder) -> None:
        """Open one receiver rank of a room."""
        ...

    def admit_receiver(self, view: RoomView, order: ReceiverOrder) -> None:
        """Open one receiver rank, and wait for that. Raises why it cannot be opened."""
        ...

    def supply(self, view: RoomView, source: RoomSource, supplied: Supplied) -> None:
        """The host has tokens of a sender's room."""
        ...

    def add_blocks(self, source: EngineBlocks, blocks: tuple[int, ...], tokens: int) -> None:
        """The next tokens of a source lie in these blocks."""
        ...

    def resume(self, view: RoomView, blocks: tuple[int, ...]) -> None:
        """Grant these blocks for the next part, and wait for that. Raises why they cannot be granted."""
        ...

    def release(self, view: RoomView, part: int) -> None:
        """The engine has no more use for the blocks of a part."""
        ...

    def abort(self, view: RoomView, detail: str) -> None:
        """Give a room up."""
        ...

    def clear(self, view: RoomView) -> None:
        """The host drops a room."""
        ...

    def ask(self, question: Question) -> Any:
        """What `Requests` answers to the method of that name. Raises EndpointClosed if nobody answers."""
        ...

    def switch(self, policy: Policy, share: float | None) -> TransportStatus:
        """Give new rooms another policy, or a share of them. Raises why it cannot be done."""
        ...


class ThreadEngine:
    """The driver in a thread of this process: for memory that the engine owns, and for tests."""

    def __init__(self, pool: BlockPool, config: Config) -> None:
        """Load the transports.

        Raises:
            TransportUnavailable: None of the policy can be loaded.
        """
        self.forked = False
        self.pid = os.getpid()
        self.sign = Sign()
        self._table, self._places = StatusTable(None), Places()
        self.driver = Driver(pool, config, load_transports(config), self.sign)

    @property
    def ended(self) -> str | None:
        """Why the driver has ended, or None while it runs."""
        return self.driver.ended

    def start(self) -> Address:
        """Take ports and threads."""
        return self.driver.start()

    def close(self) -> None:
        """Wait until the driver has ended."""
        self.driver.close()

    def after_fork(self) -> None:
        """The thread has not come along."""
        self.forked = True
        self._table.after_fork()
        self.driver.after_fork()

    def view(self, room: int, rank: int, tag: str) -> RoomView:
        """Written by the driver's thread."""
        return RoomView(self._table, self._places, room, rank, tag)

    def open_sender(self, view: RoomView, required_ranks: int | None, policy: Policy | None) -> None:
        """Soon."""
        requests = self.driver.requests
        self.driver.post(lambda: requests.open_sender(view, required_ranks, policy))

    def open_receiver(self, view: RoomView, order: ReceiverOrder) -> None:
        """Soon."""
        requests = self.driver.requests
        self.driver.post(lambda: requests.open_receiver(view, order))

    def admit_receiver(self, view: RoomView, order: ReceiverOrder) -> None:
        """At once."""
        self._call(lambda: self.driver.requests.admit_receiver(view, order))

    def supply(self, view: RoomView, source: RoomSource, supplied: Supplied) -> None:
        """Soon."""
        requests = self.driver.requests
        self.driver.post(lambda: requests.supply(view, source, supplied))

    def add_blocks(self, source: EngineBlocks, blocks: tuple[int, ...], tokens: int) -> None:
        """Soon."""
        self.driver.post(lambda: source.add(blocks, tokens))

    def resume(self, view: RoomView, blocks: tuple[int, ...]) -> None:
        """At once."""
        self._call(lambda: self.driver.requests.resume(view, blocks))

    def release(self, view: RoomView, part: int) -> None:
        """Soon."""
        requests = self.driver.requests
        self.driver.post(lambda: requests.release(view, part))

    def abort(self, view: RoomView, detail: str) -> None:
        """Soon."""
        requests = self.driver.requests
        self.driver.post(lambda: requests.abort(view, detail))

    def clear(self, view: RoomView) -> None:
        """Soon."""
        requests = self.driver.requests
        self.driver.post(lambda: requests.clear(view))

    def ask(self, question: Question) -> Any:
        """Answered on the driver's thread."""
        return self._call(getattr(self.driver.requests, question))

    def switch(self, policy: Policy, share: float | None) -> TransportStatus:
        """At once."""
        return self._call(lambda: self.driver.requests.switch(policy, share))

    def _call(self, function: Callable[[], T]) -> T:
        future: Future[T] = self.driver.call(function)
        return future.result(CALL_S)
