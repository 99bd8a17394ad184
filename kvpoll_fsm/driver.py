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
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, ClassVar, TypeVar

from kvpoll_fsm import commands, spi
from kvpoll_fsm.address import Address
from kvpoll_fsm.arena import BlockPool
from kvpoll_fsm.channel import ACK_AFTER_S, RESEND_AFTER_S
from kvpoll_fsm.config import Config
from kvpoll_fsm.connection import Connection, introduction
from kvpoll_fsm.control import Control
from kvpoll_fsm.core import Changed, CoreOptions, Effect, EndpointCore, Hangup, Transmit
from kvpoll_fsm.errors import EndpointClosed, Failure, FailureCode, TransportUnavailable, UnsupportedVersion
from kvpoll_fsm.incoming import Incoming
from kvpoll_fsm.inputs import AbortRoom, Crashed, Input, Preflighted
from kvpoll_fsm.links import Links
from kvpoll_fsm.messages import Frame, Hello, Packet, Stranger, TransportOffer, Welcome
from kvpoll_fsm.outgoing import Outgoing
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.receiver_session import ReceiverSession
from kvpoll_fsm.recorder import Recorder
from kvpoll_fsm.session import RoomKey, Session
from kvpoll_fsm.spi import Transport
from kvpoll_fsm.timers import Timers
from kvpoll_fsm.view import RoomView
from kvpoll_fsm.workers import Workers

__all__ = ["Driver"]

log = logging.getLogger("kvpoll_fsm")
T = TypeVar("T")

POLL_INTERVAL_S = 0.001
"""How often a transport without a `fileno()` is asked, while there is something it could tell."""
BLAME_S = 0.05
"""How long a write that failed waits for word of the receiver, which may have given the room up."""
FLUSH_S = 2.0
"""How long `close()` waits for peers to acknowledge the last outcomes."""


class Driver:
    """One endpoint's engine room.

    Attributes:
        address: The control address, once started.
        core: All state that decides; the driver's thread alone touches it.
        views: What hosts see of their rooms, by key.
        forked: This is a forked child's copy, which has no thread.
        pid: The process that owns it.
        host_seen: Set by every call of the host; tells a live host from a live driver.
    """

    def __init__(self, pool: BlockPool, config: Config, transports: Mapping[str, Transport]) -> None:
        self.pool = pool
        self.config = config
        self.transports = transports
        self.host_seen = True
        self.forked = False
        self.pid = os.getpid()
        self.views: dict[RoomKey, RoomView] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._timers = Timers(time.monotonic)
        self._control = Control(config.listen, config.keys)
        self._workers = Workers(config.workers)
        self._phase = "running"
        self._owed = self._flush_over = self._closing = False
        self._cause: str | None = None
        self._wakeup = -1
        self._wake_lock = threading.RLock()  # reentrant: a signal handler may call us in the middle of our own call
        self._host_seen_s = time.monotonic()

    # Start and end

    def start(self) -> Address:
        """Take ports and threads; returns the address peers use.

        Raises:
            AddressError: The listen address cannot be bound.
            TransportUnavailable: A transport cannot work here.
        """
        incarnation = os.urandom(16)
        self.recorder = Recorder(incarnation, self.config.trace)
        try:
            self.recorder.start()
            offers = self._start_transports()
            bound = self._control.start()
            self._workers.start()
        except BaseException:
            self._control.close()
            self._close_transports()
            self.recorder.close()
            raise
        advertise = self.config.advertise
        if advertise is not None:
            bound = advertise.with_port(advertise.port or bound.port).with_key(bound.key)
        self.address = bound
        options = CoreOptions(
            incarnation, self.pool.layout, offers, self.pool.blocks, self.pool.managed, self.config.deadlines
        )
        self.core = EndpointCore(options)
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._links = Links(self.transports)
        self.incoming = Incoming(self.pool, self.transports, self._submit, self._feed, self.config.arrays)
        self.outgoing = Outgoing(
            self.pool,
            self.transports,
            self._links,
            self.core.connections,
            self._submit,
            self._feed,
            self._hashes,
            lambda action: self._timers.set(action, BLAME_S),
        )
        self._watch()
        self._thread = threading.Thread(target=self._run, name="kvpoll-driver", daemon=True)
        self._thread.start()
        return self.address

    def close(self) -> None:
        """Fail what is live, tell peers, wait for their acknowledgement, give everything back."""
        if not self._closing:
            self._closing = True
            self.post(self._begin_close)
        if self._thread is not threading.current_thread():
            self._thread.join()

    # What the host asks, from any thread

    def post(self, task: Callable[[], None]) -> None:
        """Run `task` on the driver's thread, soon; once that has ended, here and to no effect."""
        self.host_seen = True
        self._inbox.append(task)
        self._wake()
        if self._cause is not None:  # perhaps it ended just now; nobody else would run the task
            self.abandon_inbox()

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

    @property
    def closing(self) -> bool:
        """No new room is taken: it is being closed, or has ended."""
        return self._phase != "running" or self._cause is not None

    @property
    def ended(self) -> str | None:
        """Why the driver has ended, or None while it runs."""
        return self._cause

    def check_peer(self, address: Address) -> None:
        """Refuse a peer that could not be spoken to; from any thread.

        Raises:
            AddressError: Only one side has keys, or the peer's key is not trusted.
        """
        self._control.check_peer(address)

    def connect(self, address: Address) -> int:
        """The connection to the endpoint at `address`, opened if there is none. Driver's thread."""
        conn = self.core.connect(str(address))
        self._control.connect(conn, address)
        return conn

    def add_view(self, key: RoomKey, view: RoomView) -> None:
        """Show a room that was opened. Driver's thread."""
        view.key = key
        self.views[key] = view

    def clear(self, key: RoomKey) -> None:
        """The host drops its handle. Driver's thread."""
        if self._cause is not None:  # the room ended with the driver
            return
        session = self.core.sessions.get(key)
        self.core.clear(key)
        if session is not None:
            self._show(key, session)

    def show(self, key: RoomKey) -> None:
        """Bring a room's view up to date. Driver's thread."""
        session = self.core.sessions.get(key)
        if session is not None:
            self._show(key, session)

    def _show(self, key: RoomKey, session: Session) -> None:
        view = self.views.get(key)
        if session.quiescent:
            self.outgoing.forget(key)
            if session.state is KVPoll.Failed:
                self.incoming.forget(key)
        self._record(key, session)
        if view is None:
            return
        before = view.state
        if session.state is KVPoll.Success and view.data is None:
            view.data = self.incoming.take_arrays(key)
        view.update(session)
        if session.state.is_terminal and not before.is_terminal:
            log_end(view)

    # The loop

    def _run(self) -> None:
        cause = "closed"
        try:
            self._set_ticks()
            while not self._finished():
                self._turn()
        except BaseException as error:  # nothing may die silently: every room is told
            cause = f"driver failed: {type(error).__name__}: {error}"
            log.exception("driver failed endpoint=%s", self.address)
        finally:
            self._end(cause)

    def _turn(self) -> None:
        readable = self._control.wait(self._wait_s())
        if self._wakeup in readable:
            os.eventfd_read(self._wakeup)
        self._run_inbox(len(self._inbox))
        for conn, identity, packet in self._control.read():
            self._packet(conn, identity, packet)
        for name, transport in self.transports.items():
            for completion in transport.completions():
                self._completed(name, completion)
        for timer, epoch in self._timers.due():
            self._timer(timer, epoch)
        self.core.flush()
        self._carry_out()
        self.recorder.flush()
        if self.core.owes_ack and not self._owed:
            self._owed = True
            self._timers.set("ack", ACK_AFTER_S)

    def _wait_s(self) -> float | None:
        if self._inbox:
            return 0.0
        due = self._timers.next_in_s()
        awaited = not (self.outgoing.idle and self.incoming.idle and self._links.idle)
        if not (self._blind and awaited):
            return due
        return min(POLL_INTERVAL_S, POLL_INTERVAL_S if due is None else due)

    def _packet(self, conn: int | None, identity: bytes, packet: Packet | UnsupportedVersion) -> None:
        if isinstance(packet, UnsupportedVersion):
            self._version_refused(conn, identity, packet)
        elif isinstance(packet, Hello):
            if conn is None:
                self._control.route(self.core.hello(packet), identity)
        elif isinstance(packet, Frame):
            if packet.outgoing is not (conn is None):  # only who said Hello comes to our port: this is a replay
                return
            self._record_messages("in", packet)
            found = self.core.frame(packet)
            if found is None:
                self._answer_stranger(conn, identity, packet)
            elif conn is None:
                self._control.route(found, identity)
        elif conn is not None and isinstance(packet, Welcome):
            self.core.welcome(conn, packet)
        elif conn is not None and isinstance(packet, Stranger):
            self.core.stranger(conn, packet)

    def _answer_stranger(self, conn: int | None, identity: bytes, packet: Frame) -> None:
        if conn is None:
            self._control.reply(identity, Stranger(self.core.options.incarnation, packet.target))

    def _version_refused(self, conn: int | None, identity: bytes, error: UnsupportedVersion) -> None:
        if conn is not None:
            self.core.end(conn, str(error), FailureCode.UnsupportedVersion)
        else:
            options = self.core.options
            ours = introduction(options.incarnation, options.layout, ())
            self._control.reply(identity, Welcome(answers=bytes(16), **ours))

    def _completed(self, name: str, completion: spi.Completion) -> None:
        if isinstance(completion, (spi.LinkUp, spi.LinkDown)):
            self._links.completed(name, completion)
        elif isinstance(completion, spi.Fenced):
            self.incoming.fenced(name, completion.fence)
        else:
            key = self.outgoing.room_of(name, completion.ticket)
            if key is not None:
                self._guarded(key, lambda: self.outgoing.completed(name, completion))

    def _timer(self, name: Any, epoch: int) -> None:
        if name == "heartbeat":
            self._timers.set(name, self.config.deadlines.heartbeat_s)
            self.core.heartbeat_tick(self._host_alive())
        elif name == "resend":
            self._timers.set(name, RESEND_AFTER_S)
            self.core.resend_tick()
        elif name == "ack":
            self._owed = False
            self.core.flush(ack_now=True)
        elif name == "flush":
            self._flush_over = True
        elif callable(name):
            name()
        else:
            self.core.timer(name[0], name[1], epoch, self._host_alive())

    def _host_alive(self) -> bool:
        now = time.monotonic()
        if self.host_seen:
            self.host_seen, self._host_seen_s = False, now
        return now - self._host_seen_s < self.config.deadlines.host_alive_s

    # Effects

    def _carry_out(self) -> None:
        while effects := self.core.drain():
            for effect in effects:
                self._effect(effect)
            self.core.flush()

    def _effect(self, effect: Effect) -> None:
        if isinstance(effect, Transmit):
            self._record_messages("out", effect.packet)
            self._control.send(effect.conn, effect.packet)
        elif isinstance(effect, Changed):
            self.show(effect.key)
            if effect.key not in self.core.sessions:
                self._over(effect.key)
        elif isinstance(effect, Hangup):
            self._control.hang_up(effect.conn)
            self._links.hang_up(effect.conn)
            self.outgoing.hang_up(effect.conn)
        elif effect.key is None:
            self._command(None, effect.command)
        else:
            key, command = effect.key, effect.command
            self._guarded(key, lambda: self._command(key, command))

    def _guarded(self, key: RoomKey, action: Callable[[], None]) -> None:
        """Act for one room; an exception fails this room and nothing else."""
        try:
            action()
        except Exception as error:  # whatever a transport or an array throws must stay in its room
            log.exception("room failed room=%d side=%s", key.room, key.side)
            self._feed(key, Crashed(f"{type(error).__name__}: {error}"))

    def _command(self, key: RoomKey | None, command: commands.Command) -> None:
        if isinstance(command, commands.SetTimer):
            self._timers.set((key, command.name), command.after_s, command.epoch)
        elif isinstance(command, commands.CancelTimer):
            self._timers.cancel((key, command.name))
        elif key is not None:
            self._ACTIONS[type(command)](self, key, command)

    def _preflight(self, key: RoomKey, command: commands.Preflight) -> None:
        def answer(ok: bool, why: str) -> None:
            self._feed(key, Preflighted(command.rank, command.conn, command.transport, ok, why))

        connection = self.core.connections.get(command.conn)
        offer = connection.offers.get(command.transport) if connection else None
        self._links.reach(command.conn, offer, command.transport, answer)

    _ACTIONS: ClassVar[Mapping[type, Callable[[Any, RoomKey, Any], None]]] = {
        commands.Preflight: _preflight,
        commands.StartPart: lambda self, key, command: self.outgoing.start(key, command),
        commands.CancelPart: lambda self, key, command: self.outgoing.cancel(key),
        commands.Expose: lambda self, key, command: self.incoming.expose(key, command),
        commands.Release: lambda self, key, command: self.incoming.release(key, command.part),
        commands.Fence: lambda self, key, command: self.incoming.fence(key, command),
        commands.Verify: lambda self, key, command: self.incoming.verify(key, command),
        commands.CopyOut: lambda self, key, command: self.incoming.copy_out(key, command),
    }

    # Inside

    def _start_transports(self) -> tuple[TransportOffer, ...]:
        """Start those that can work here; the others are left out, if any can."""
        offers: dict[str, TransportOffer] = {}
        refusals: list[TransportUnavailable] = []
        for name, transport in self.transports.items():
            try:
                offers[name] = self._start_transport(name, transport)
            except TransportUnavailable as error:
                log.warning("transport left out: %s", error)
                refusals.append(error)
                transport.close()
        if not offers:
            raise refusals[0]
        self.transports = {name: self.transports[name] for name in offers}
        return tuple(offers.values())

    def _start_transport(self, name: str, transport: Transport) -> TransportOffer:
        transport.start()
        regions = tuple(transport.register(region) for region in self.pool.regions())
        return TransportOffer(name, transport.descriptor(), regions)

    def _watch(self) -> None:
        self._control.watch(self._wakeup)
        self._blind = False
        for transport in self.transports.values():
            fd = transport.fileno()
            if fd is None:
                self._blind = True
            else:
                self._control.watch(fd)

    def _set_ticks(self) -> None:
        self._timers.set("heartbeat", self.config.deadlines.heartbeat_s)
        self._timers.set("resend", RESEND_AFTER_S)

    def _feed(self, key: RoomKey, event: Input) -> None:
        self.core.feed(key, event)

    def _hashes(self, transport: str) -> bool:
        wanted = self.config.checksum
        return not self.transports[transport].capabilities.integrity if wanted == "auto" else bool(wanted)

    def _submit(self, key: RoomKey, work: Callable[[], object], then: Callable[[object], None]) -> None:
        def finished(result: object) -> None:
            self._inbox.append(lambda: self._guarded(key, lambda: then(result)))
            self._wake()

        self._workers.submit(work, finished)

    def _wake(self) -> None:
        with self._wake_lock:
            if self._wakeup >= 0:
                os.eventfd_write(self._wakeup, 1)

    def _run_inbox(self, count: int) -> None:
        for _ in range(count):
            try:
                task = self._inbox.popleft()
            except IndexError:  # after the end, another thread was faster
                return
            try:
                task()
            except Exception:  # a host's request must not end the others' rooms
                log.exception("request failed")

    def _record(self, key: RoomKey, session: Session) -> None:
        peer = None
        if isinstance(session, ReceiverSession):
            connection = self.core.connections.get(session.options.conn)
            peer = connection.peer if connection else None
        self.recorder.room(key, session, peer)

    def _record_messages(self, way: str, packet: Packet) -> None:
        if isinstance(packet, Frame):
            peer = packet.target if way == "out" else packet.source
            for message in packet.messages:
                self.recorder.message(peer, way, message)

    def _over(self, key: RoomKey) -> None:
        """A room that was cleared has ended for good."""
        self.recorder.forget(key)
        view = self.views.pop(key, None)
        if view is not None:
            view.settle()
        self.outgoing.forget(key)
        self.incoming.forget(key)

    # The end

    def _begin_close(self) -> None:
        for key in list(self.core.sessions):
            self.core.feed(key, AbortRoom("the endpoint was closed"))
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
            self.core.flush()
            self._carry_out()
        return self._flush_over or (self._phase == "bye" and not any(map(_must_hear, self.core.connections.values())))

    def _end(self, cause: str) -> None:
        self._cause = cause
        for view in list(self.views.values()):
            code = FailureCode.Aborted if cause == "closed" else FailureCode.InternalError
            view.fail(Failure.of(code, cause, state=view.state))
        self._workers.close()
        self._close_transports()
        for view in list(self.views.values()):
            view.settle()
        for close in (self._control.close, self.recorder.close):
            try:
                close()
            except Exception:  # whoever waits must be answered all the same
                log.exception("endpoint %s did not close", self.address)
        with self._wake_lock:
            os.close(self._wakeup)
            self._wakeup = -1
        self.abandon_inbox()

    def _close_transports(self) -> None:
        for name, transport in self.transports.items():
            try:
                transport.close()
            except Exception:  # the others must be closed too
                log.exception("transport %s did not close", name)

    def abandon_inbox(self) -> None:
        """Run what was still asked, so that every future ends, if to no effect."""
        while self._inbox:
            self._run_inbox(1)


def _must_hear(connection: Connection) -> bool:
    """The peer has not acknowledged our last words yet. One that never said anything has no room here."""
    channel = connection.channel
    return bool(channel.target and channel.unacked and (connection.outgoing or channel.received))


def log_end(view: RoomView) -> None:
    """One structured line for a room that ended."""
    seconds = time.monotonic() - view.opened_s
    tokens = sum(part.tokens for part in view.parts)
    side = view.key.side if view.key else "?"
    text = "room ended side=%s room=%d rank=%d tag=%s state=%s parts=%d tokens=%d seconds=%.3f cause=%s"
    level = logging.INFO if view.failure is None else logging.WARNING
    log.log(
        level, text, side, view.room, view.rank, view.tag, view.state, len(view.parts), tokens, seconds, view.failure
    )
