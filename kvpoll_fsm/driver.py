"""Hosts an `EndpointCore`: one thread that owns its sockets, timers, transports and all decisions.

One turn of the loop: wait for something, take what came (the host's requests, packets, completions, workers'
results, timers), let the core decide, carry out its effects. Only the workers copy and hash; nobody else
touches the core, so there is no lock to hold while sending.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from kvpoll_fsm.actions import Actions
from kvpoll_fsm.address import Address
from kvpoll_fsm.arena import BlockPool
from kvpoll_fsm.carriers import Carriers, Loaded
from kvpoll_fsm.channel import ACK_AFTER_S, RESEND_AFTER_S
from kvpoll_fsm.config import Config
from kvpoll_fsm.connection import check_introduction
from kvpoll_fsm.control import Control
from kvpoll_fsm.core import CoreOptions, EndpointCore
from kvpoll_fsm.display import Display
from kvpoll_fsm.errors import EndpointClosed, FailureCode, LimitReached
from kvpoll_fsm.guest import Guest
from kvpoll_fsm.inbox import Inbox
from kvpoll_fsm.incoming import Incoming
from kvpoll_fsm.inputs import AbortRoom
from kvpoll_fsm.jobs import Jobs
from kvpoll_fsm.layout import Layout
from kvpoll_fsm.links import Links
from kvpoll_fsm.local.server import ControlSocket
from kvpoll_fsm.local.service import Service
from kvpoll_fsm.messages import TransportOffer
from kvpoll_fsm.metering import Meter
from kvpoll_fsm.outgoing import Outgoing
from kvpoll_fsm.performer import Performer
from kvpoll_fsm.reception import Reception
from kvpoll_fsm.recorder import Recorder
from kvpoll_fsm.requests import Requests
from kvpoll_fsm.session import RoomKey
from kvpoll_fsm.spi import CountsRefusals, Transport
from kvpoll_fsm.staging import Destination, new_arrays
from kvpoll_fsm.status import Sign
from kvpoll_fsm.timers import Timers
from kvpoll_fsm.view import RoomView
from kvpoll_fsm.workers import Workers

__all__ = ["Driver"]

log = logging.getLogger("kvpoll_fsm")
T = TypeVar("T")

POLL_INTERVAL_S = 0.001
"""How often a transport without a `fileno()` is asked, while there is something it could tell."""
TURN_S = 0.02
"""How long one turn may be spent on what hosts ask: no burst of theirs may keep timers and peers waiting."""
FLUSH_S = 2.0
"""How long `close()` waits for peers to acknowledge the last outcomes."""


class Driver:
    """One endpoint's engine room.

    Attributes:
        address: The control address that peers use, once started.
        bound: The one it listens at.
        carriers: The transports.
        core: All state that decides; the driver's thread alone touches it.
        meter: Counts how rooms fare.
        requests: What hosts ask of it, for its thread.
    """

    def __init__(
        self,
        pool: BlockPool,
        config: Config,
        transports: Loaded,
        sign: Sign,
        guest: Guest | None = None,
    ) -> None:
        """Store what is needed.

        Args:
            pool: The blocks.
            config: The settings.
            transports: Not started yet.
            sign: Set by every call of the host: tells a live host from a live driver.
            guest: Somebody who has his turn in the loop.
        """
        self.pool = pool
        self.config = config
        self.requests = Requests(self, guest)
        self._sign = sign
        self._guest = guest
        self._inbox = Inbox()
        self._timers = Timers(time.monotonic)
        self._control = Control(config.listen, config.keys, config.limits, config.deadlines.peer_lost_s)
        self.carriers = Carriers(transports, self._control)
        self._workers = Workers(config.workers)
        self._jobs = Jobs(self._workers, self._answer)
        self.meter = Meter(pool.layout, config.names)
        self._console = ControlSocket(config.control_socket, Service(self.requests).answer)
        self._phase = "running"
        self._owed = self._flush_over = self._closing = False
        self._cause: str | None = None
        self._host_seen_s = time.monotonic()

    # Start and end

    def start(self) -> Address:
        """Take ports and threads, and run in a thread; returns the address peers use.

        Raises:
            AddressError: The listen address cannot be bound.
            BlockError: Another endpoint uses the pool.
            TransportUnavailable: A transport cannot work here.
        """
        self._thread = threading.Thread(target=self.run, name="kvpoll-driver", daemon=True)
        self.open(self._thread.start)
        return self.address

    def open(self, go: Callable[[], None] = lambda: None) -> None:
        """Take ports and threads; then `go`, without which `run` has to be called. Raises what `start` does."""
        self.pool.claim()
        incarnation = os.urandom(16)
        self.recorder = Recorder(incarnation, self.config.trace)
        try:
            self._open(incarnation)
            go()
        except BaseException:
            for each in (self._console, self._control, self.carriers, self._workers, self._inbox, self.recorder):
                each.close()
            self.pool.unclaim()
            raise

    def _open(self, incarnation: bytes) -> None:
        self.recorder.start()
        offers = self.carriers.start(self.pool, self.config.policy.names)
        check_introduction(incarnation, self.pool.layout, offers)
        self.bound = self._control.start()
        self.address = self.config.advertised(self.bound)
        self._workers.start()
        self.core = EndpointCore(self._options(incarnation, offers))
        self._assemble()
        self._control.watch(self._inbox.open())
        self.carriers.watch(self._actions.lost)
        if self._guest is not None:
            self._control.watch(self._guest.fileno())
        self._console.open(self)

    def _options(self, incarnation: bytes, offers: tuple[TransportOffer, ...]) -> CoreOptions:
        pool, config = self.pool, self.config
        return CoreOptions(incarnation, pool.layout, offers, pool.blocks, pool.managed, config.deadlines, config.limits)

    def _assemble(self) -> None:
        """Make those who work for the driver; what they share are the core, the transports and the jobs."""
        core, transports, submit, feed = (
            self.core,
            self.transports,
            self._jobs.submit,
            self.meter.feeding(self.core.feed),
        )
        give_up, peers = self.carriers.give_up, self.core.connections
        self._links = Links(transports)
        self.incoming = Incoming(self.pool, transports, submit, feed, give_up, self._destination)
        self.outgoing = Outgoing(self.pool, transports, self._links, peers, submit, feed, self._hashes)
        self._actions = Actions(core, self._timers, self._links, self.outgoing, self.incoming, feed)
        self._display = Display(self.recorder, peers, self.incoming.take_result, self._guest)
        moving = (self._actions, self.incoming, self.outgoing)
        telling = (self._display, self.recorder, self.meter)
        self._performer = Performer(core, self._control, self.carriers, *moving, *telling)
        self._reception = Reception(core, self._control, self.recorder)

    def _destination(self, layout: Layout, total_tokens: int) -> Destination:
        if self._guest is not None:
            return self._guest.destination(layout, total_tokens)
        return new_arrays(layout, total_tokens, self.config.arrays)

    def close(self) -> None:
        """Fail what is live, tell peers, wait for their acknowledgement, give everything back."""
        if not self._closing:
            self._closing = True
            self.post(self.begin_close)
        if self._thread is not threading.current_thread():
            self._thread.join()

    # What the host asks, from any thread

    def post(self, task: Callable[[], None]) -> None:
        """Run `task` on the driver's thread, soon; once that has ended, here and to no effect."""
        self._inbox.put(task)
        if self._cause is not None:  # perhaps it ended just now; nobody else would run the task
            self._inbox.abandon()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` on the driver's thread; its result or exception is the future's.

        Raises:
            EndpointClosed: The driver has ended.
        """
        future: Future[T] = Future()

        def task() -> None:
            try:
                future.set_result(function())
            except BaseException as error:  # handed to the caller, whoever it is
                future.set_exception(error)

        if self._cause is not None:
            raise EndpointClosed(self._cause)
        self.post(task)
        return future

    def after_fork(self) -> None:
        """This is a forked child, in which nothing runs."""
        self._console.after_fork()

    @property
    def transports(self) -> dict[str, Transport]:
        """The transports that work, by name."""
        return self.carriers.live

    @property
    def views(self) -> dict[RoomKey, RoomView]:
        """What hosts see of their rooms, by key."""
        return self._display.views

    @property
    def closing(self) -> bool:
        """No new room is taken: it is being closed, or has ended."""
        return self._phase != "running" or self._cause is not None

    @property
    def ended(self) -> str | None:
        """Why the driver has ended, or None while it runs."""
        return self._cause

    def connect(self, address: Address) -> int:
        """The connection to the endpoint at `address`, opened if there is none. Driver's thread.

        Raises:
            LimitReached: There are as many as there may be.
        """
        conn = self.core.connect(str(address))
        try:
            self._control.connect(conn, address)
        except LimitReached as error:
            self.core.end(conn, str(error), FailureCode.LimitReached)
            raise
        return conn

    def breakers(self, key: RoomKey) -> list[dict[str, Any]]:
        """What stands in the way of a sender's room. Driver's thread."""
        return self._actions.breakers(key)

    def refused(self) -> dict[str, dict[str, int]]:
        """How often something was refused, by plane and reason. Driver's thread."""
        self._control.refusals.follow(self.core.refused)
        counts = {"control": self._control.refusals.counts()}
        for name, transport in self.transports.items():
            if isinstance(transport, CountsRefusals):
                counts[name] = dict(transport.refused())
        return counts

    def watch(self, fd: int, *, writable: bool = False) -> None:
        """Wake when `fd` is readable, and also when it is `writable`, if that is asked. Driver's thread."""
        self._control.watch(fd, writable=writable)

    def unwatch(self, fd: int) -> None:
        """Before `fd` is closed, or when it would wake us for ever. Driver's thread."""
        self._control.unwatch(fd)

    def add_view(self, key: RoomKey, view: RoomView) -> None:
        """Show a room that was opened. Driver's thread."""
        view.key = key
        self._display.open(view, self.core.sessions[key])
        self.meter.opened()

    def clear(self, key: RoomKey) -> None:
        """The host drops its handle. Driver's thread."""
        if self._cause is None:  # otherwise the room ended with the driver
            self._performer.clear(key)

    # The loop

    def run(self) -> None:
        """Turn until the endpoint is closed, or breaks; then give everything back."""
        cause = "closed"
        try:
            self._timers.set("heartbeat", self.config.deadlines.heartbeat_s)
            self._timers.set("resend", RESEND_AFTER_S)
            while not self._finished():
                self._turn()
        except BaseException as error:  # nothing may die silently: every room is told
            cause = f"driver failed: {type(error).__name__}: {error}"
            log.exception("driver failed endpoint=%s", self.address)
        finally:
            self._end(cause)

    def _turn(self) -> None:
        readable = self._control.wait(self._wait_s())
        self._inbox.heard(readable)
        self._inbox.run(TURN_S)
        if self._guest is not None:
            self._guest.take_turn(readable)
        self._console.take_turn(readable)
        for origin, identity, packet in self._control.read():
            self._reception.take(origin, identity, packet)
        self._hear_transports(readable)
        for owner, name, epoch in self._timers.due():
            self._timer(owner, name, epoch)
        self._performer.carry_out()
        self.recorder.flush()
        if self._guest is not None:
            self._guest.end_turn()
        if self.carriers.fatal is not None:
            raise self.carriers.fatal
        if self.core.owes_ack and not self._owed:
            self._owed = True
            self._timers.set("ack", ACK_AFTER_S)

    def _hear_transports(self, readable: set[int] | None = None) -> None:
        for name, completion in self.carriers.news(readable):
            self._actions.completed(name, completion)

    def _wait_s(self) -> float | None:
        if self._inbox:
            return 0.0
        due = self._timers.next_in_s()
        awaited = not (self.outgoing.idle and self.incoming.idle and self._links.idle)
        if not (self.carriers.blind and awaited):
            return due
        return min(POLL_INTERVAL_S, POLL_INTERVAL_S if due is None else due)

    def _timer(self, key: Any, name: str, epoch: int) -> None:
        if name == "heartbeat":
            self._timers.set(name, self.config.deadlines.heartbeat_s)
            self._hear_transports()  # all of them: one that has failed may have nothing to say so with
            self.core.heartbeat_tick(self._host_alive(), self._jobs.moving())
            self._control.refusals.follow(self.core.refused)
        elif name == "resend":
            self._timers.set(name, RESEND_AFTER_S)
            self.core.resend_tick()
        elif name == "ack":
            self._owed = False
            self._performer.carry_out()
            self.core.flush(ack_now=True)
        elif name == "flush":
            self._flush_over = True
        else:
            self.core.timer(key, name, epoch, self._host_alive())

    def _host_alive(self) -> bool:
        now = time.monotonic()
        if self._sign.seen:
            self._sign.seen, self._host_seen_s = False, now
        return now - self._host_seen_s < self.config.deadlines.host_alive_s

    # Inside

    def _hashes(self, transport: str) -> bool:
        wanted, found = self.config.checksum, self.transports.get(transport)
        return not (found and found.capabilities.integrity) if wanted == "auto" else bool(wanted)

    def _answer(self, key: RoomKey, action: Callable[[], None]) -> None:
        """Act for a room on the driver's thread, soon. For any thread."""
        self._inbox.put(lambda: self._actions.guarded(key, action))

    # The end

    def begin_close(self, cause: str = "the endpoint was closed", code: FailureCode = FailureCode.Aborted) -> None:
        """Take no new room, fail what is live, tell peers; then the loop ends. Driver's thread."""
        if self._phase != "running":
            return
        for key in list(self.core.sessions):
            self.core.feed(key, AbortRoom(cause, code))
            self.clear(key)
        self._timers.set("flush", FLUSH_S)
        self._phase = "closing"

    def _finished(self) -> bool:
        """Peers have acknowledged everything, or had their time."""
        if self._phase == "running":
            return False
        if self._phase == "closing" and (self.outgoing.idle or self._flush_over):
            self._phase = "bye"
            self.core.say_bye()
            self._performer.carry_out()
        return self._flush_over or (
            self._phase == "bye" and not any(c.must_hear for c in self.core.connections.values())
        )

    def _end(self, cause: str) -> None:
        self._cause = cause
        self._display.fail_all(cause)
        for close in (self._console.close, self._release_memory, self._control.close, self.recorder.close):
            try:
                close()
            except Exception:  # whoever waits must be answered all the same
                log.exception("endpoint %s did not close", self.address)
        self._inbox.close()
        self._inbox.abandon()

    def _release_memory(self) -> None:
        """Stop all that reads or writes it, and give it back, unless something may still do so."""
        ended = self._workers.close()
        if not ended:
            log.error("workers hang, and keep what they work on and the pool of endpoint %s", self.address)
        self.carriers.close()
        quiescent = ended and not self.carriers.unsafe
        self._display.settle_all(quiescent=quiescent)
        if quiescent:
            self.pool.unclaim()
