"""What hosts ask of a driver, carried out on its thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from kvpoll_fsm.address import Address
from kvpoll_fsm.blocks import BlockLoad
from kvpoll_fsm.errors import EndpointClosed, Failure, FailureCode
from kvpoll_fsm.inputs import AbortRoom, ReleasePart, Supplied
from kvpoll_fsm.receiver_session import ReceiverOptions
from kvpoll_fsm.selection import Policy
from kvpoll_fsm.sender_session import SenderOptions
from kvpoll_fsm.session import RoomKey
from kvpoll_fsm.switching import Choice, TransportStatus
from kvpoll_fsm.trace import Record
from kvpoll_fsm.view import RoomView

if TYPE_CHECKING:
    from kvpoll_fsm.driver import Driver
    from kvpoll_fsm.guest import Guest
    from kvpoll_fsm.sources import RoomSource

__all__ = ["ReceiverOrder", "Requests"]

log = logging.getLogger("kvpoll_fsm")
_sender_options = lru_cache(maxsize=64)(SenderOptions)
"""Rooms that are opened alike share what they are opened with."""


@dataclass(frozen=True, slots=True)
class ReceiverOrder:
    """How a receiver rank is to be opened.

    Attributes:
        peer: The sender's endpoint.
        ranks: How many receiver ranks the room has.
        blocks: Blocks of one grant; 0 for a dummy rank.
        resume: "drain", "extend" or "manual".
        exact: The engine's own blocks for part 0, or () to let the pool choose.
        window: Grants that may be out at a time, 1 or 2.
    """

    peer: Address
    ranks: int
    blocks: int
    resume: str
    exact: tuple[int, ...] = ()
    window: int = 1


class Requests:
    """Used by the driver's thread alone. A room that is not open any more takes what is asked of it to no effect."""

    def __init__(self, driver: Driver, guest: Guest | None) -> None:
        """Store what is needed; nothing is asked before the driver runs.

        Args:
            driver: Of whom it is asked.
            guest: Is told what concerns whoever starts another driver in the place of this one.
        """
        self._driver = driver
        self._guest = guest
        canary, share = driver.config.canary or (None, 0.0)
        self._choice = Choice(driver.config.policy, canary, share)

    # Rooms

    def open_sender(self, view: RoomView, required_ranks: int | None, policy: Policy | None) -> None:
        """Open the sender's side of a room; one that cannot be opened ends Failed."""
        view.side = "sender"
        driver, pool = self._driver, self._driver.pool
        limit = pool.capacity_tokens if pool.managed else 0
        names, size = tuple(driver.transports), pool.layout.block_tokens
        options = _sender_options(required_ranks, policy or self._choice.of(view.room), names, size, limit)
        self._open(view, lambda: driver.core.open_sender(view.room, options))

    def open_receiver(self, view: RoomView, order: ReceiverOrder) -> None:
        """Open one receiver rank of a room; one that cannot be opened ends Failed."""
        self._open(view, lambda: self._receiver(view, order))

    def admit_receiver(self, view: RoomView, order: ReceiverOrder) -> None:
        """Open one receiver rank of a room.

        Raises:
            KvpollError: It cannot be opened.
        """
        self._admit(view, lambda: self._receiver(view, order))

    def supply(self, view: RoomView, source: RoomSource, supplied: Supplied) -> None:
        """The host has tokens of a sender's room, to be had from `source`."""
        driver, key = self._driver, view.key
        if key is None:
            return
        session = driver.core.sessions.get(key)
        if session is not None and not session.state.is_terminal:
            driver.outgoing.sources[key] = source
            driver.meter.supplied(key)
        driver.core.feed(key, supplied)

    def resume(self, view: RoomView, blocks: tuple[int, ...]) -> None:
        """Grant these blocks for the next part.

        Raises:
            KvpollError: They cannot be granted.
        """
        if view.key is not None:
            self._driver.core.resume(view.key, blocks)

    def release(self, view: RoomView, part: int) -> None:
        """The engine has no more use for the blocks of a part."""
        if view.key is not None:
            self._driver.core.feed(view.key, ReleasePart(part))

    def abort(self, view: RoomView, detail: str) -> None:
        """Give a room up."""
        if view.key is not None:
            self._driver.core.feed(view.key, AbortRoom(detail))

    def clear(self, view: RoomView) -> None:
        """The host drops a room."""
        if view.key is not None:
            self._driver.clear(view.key)

    # The whole endpoint

    def load(self) -> BlockLoad:
        """How the pool's blocks are used."""
        return self._driver.core.load()

    def is_idle(self) -> bool:
        """No room is live, and no write can land any more."""
        driver = self._driver
        return driver.outgoing.idle and all(session.quiescent for session in driver.core.sessions.values())

    def dump(self) -> list[dict[str, Any]]:
        """Every room that is not over; `Endpoint.dump` says what of it."""
        return [self._describe(key) for key in self._driver.core.sessions]

    def refused(self) -> dict[str, dict[str, int]]:
        """How often something was refused, by plane and reason."""
        return self._driver.refused()

    def transports(self) -> TransportStatus:
        """How rooms are carried that are opened from now on."""
        choice, carriers = self._choice, self._driver.carriers
        canary = None if choice.canary is None else str(choice.canary)
        return TransportStatus(
            str(choice.policy), canary, choice.share, tuple(sorted(carriers.live)), dict(carriers.left_out)
        )

    def breakers(self) -> list[dict[str, str]]:
        """The circuit breakers that are not closed: peer, transport, state and cause."""
        core = self._driver.core
        return [
            {
                "peer": connection.address or (connection.peer or b"").hex(),
                "transport": name,
                "state": "half-open" if breaker.half_open else "open",
                "cause": breaker.cause,
            }
            for number, connection in core.connections.items()
            for name, breaker in core.breakers.of(number).items()
        ]

    def report(self) -> dict[str, Any]:
        """How rooms have fared by transport; `Endpoint.report` says more."""
        return self._driver.meter.report()

    @property
    def address(self) -> str:
        """The endpoint's."""
        return str(self._driver.address)

    def switch(self, policy: Policy, share: float | None) -> TransportStatus:
        """Give new rooms another policy, or that share of them; those that are open go on as they are.

        Raises:
            TransportUnavailable: One that the policy names is not loaded, or does not work.
        """
        self._driver.carriers.require(policy)
        before, self._choice = self._choice, self._choice.switched(policy, share)
        log.info("transports switched endpoint=%s from=%s to=%s", self._driver.address, before, self._choice)
        if self._guest is not None:
            self._guest.switched(self._choice)
        return self.transports()

    def trace(self) -> list[Record]:
        """The newest records of the trace."""
        return self._driver.recorder.records()

    # Inside

    def _receiver(self, view: RoomView, order: ReceiverOrder) -> RoomKey:
        view.side = "receiver"
        driver = self._driver
        options = ReceiverOptions(
            driver.connect(order.peer),
            order.ranks,
            order.blocks,
            driver.pool.layout.block_tokens,
            order.resume,
            order.exact,
            order.window,
        )
        return driver.core.open_receiver(view.room, view.rank, options)

    def _open(self, view: RoomView, opening: Callable[[], RoomKey]) -> None:
        try:
            self._admit(view, opening)
        except Exception as error:  # told to the handle's owner by poll(), as any other failure
            code = FailureCode.__members__.get(type(error).__name__, FailureCode.InternalError)
            view.fail(Failure.of(code, f"could not be opened: {error}", state=view.state))
            view.settle()

    def _admit(self, view: RoomView, opening: Callable[[], RoomKey]) -> None:
        driver = self._driver
        if driver.closing:  # asked for before, but it comes after our Bye
            raise EndpointClosed(driver.ended or "closed")
        driver.add_view(opening(), view)

    def _describe(self, key: RoomKey) -> dict[str, Any]:
        driver = self._driver
        session, view = driver.core.sessions[key], driver.views.get(key)
        live = not session.state.is_terminal
        return {
            "side": key.side,
            "room": key.room,
            "rank": key.rank,
            "tag": view.tag if view else "",
            "state": str(session.state),
            "gate": str(session.gate),
            "waits_for": session.awaited(),
            "waited_s": round(time.monotonic() - view.gate_since_s, 3) if view else None,
            "limit_s": driver.config.deadlines.of(session.state, session.gate) if live else None,
            "bytes_done": session.bytes_done,
            "breakers": driver.breakers(key),
        }
