"""One connection of a link: its thread sends what is large, the driver what is small."""

from __future__ import annotations

import logging
import socket
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvpoll_common.door import Refused
from kvpoll_common.outbox import Outbox
from kvpoll_fsm.errors import MalformedMessage
from kvpoll_tcp.backlog import Backlog, Job
from kvpoll_tcp.crew import Crew
from kvpoll_tcp.handshake import Descriptor
from kvpoll_tcp.mailbox import Mailbox
from kvpoll_tcp.settings import TcpSettings
from kvpoll_tcp.sockets import Broken, Plug, advance
from kvpoll_tcp.stream import SEND_LOOK_S, Stream
from kvpoll_tcp.watch import Watch

__all__ = ["Lane", "LaneStatus", "Shared"]

_log = logging.getLogger("kvpoll_tcp")

AT_ONCE_NBYTES = 1 << 20
"""A job of at most so many bytes is sent by the driver: it takes less time than waking another thread for it."""
_MOST_PIECES = 1024
"""What one call takes (IOV_MAX)."""


@dataclass(frozen=True)
class Shared:
    """What all lanes of a transport have in common."""

    sources: Mapping[int, memoryview]
    outbox: Outbox
    settings: TcpSettings
    writer: bytes
    watch: Watch


@dataclass(frozen=True, slots=True)
class _Cancel:
    """The order to end a ticket soon."""

    ticket: int


@dataclass(frozen=True, slots=True)
class _Close:
    """The order to end the thread."""


@dataclass(frozen=True, slots=True)
class _GoOn:
    """The order to go on with what the driver has begun, or to deal with what it ran into."""

    error: Exception | None = None


_Order = Job | _Cancel | _Close | _GoOn


class LaneStatus(Protocol):
    """Whom a lane tells whether it works."""

    def went_up(self) -> None:
        """The peer was reached and has accepted us."""
        ...

    def went_down(self, was_up: bool, reason: str) -> None:
        """The connection broke, or could not be made."""
        ...


class Lane:
    """Sends the jobs it is given, in order, over one connection.

    The connection belongs to the lane's thread, which lends it to the driver while it has nothing to send and nothing
    to end early: the driver then sends small jobs itself and takes the answers, and no other thread is woken. Whatever
    it cannot do without waiting goes back to the thread.

    `submit`, `cancel` and `close` are for the driver, the rest belongs to whoever has the connection. A connection is
    made at the start, and again when there is a job and none stands.
    """

    def __init__(self, peer: Descriptor, shared: Shared, status: LaneStatus) -> None:
        self._peer = peer
        self._shared = shared
        self._status = status
        self._plug = Plug()
        self._mailbox: Mailbox[_Order] = Mailbox()
        self._backlog = Backlog()
        self._leaving: list[memoryview] = []
        self._stream: Stream | None = None
        self._tried = False
        self._closed = False

    @property
    def ended_nbytes(self) -> int:
        """Bytes of all jobs that have ended."""
        return self._backlog.ended_nbytes

    def start(self, crew: Crew, name: str) -> None:
        """Begin to take orders, and start the thread that carries them out.

        Raises:
            OSError: The system has no file descriptor left to give.
            RuntimeError: It has no thread left to give.
        """
        self._mailbox.open()
        try:
            crew.start(name, self._run)
        except RuntimeError:
            self._mailbox.close()
            raise

    def submit(self, job: Job) -> bool:
        """Send a job soon, or at once if it is small and the connection is at hand; False if the lane is closed."""
        if self._mailbox.is_lent and self._stream is not None and job.nbytes <= AT_ONCE_NBYTES:
            self._backlog.add(job)
            self._at_driver(self._send_at_once)
            return True
        return self._mailbox.post(job)

    def cancel(self, ticket: int) -> None:
        """End a ticket soon, if it is on its way here."""
        self._mailbox.post(_Cancel(ticket))

    def close(self) -> None:
        """Let the thread end soon; jobs left end Failed."""
        self._mailbox.post(_Close())
        self._plug.cut()

    # The driver, while it has the connection

    def _send_at_once(self, stream: Stream) -> None:
        """Send what the kernel takes without waiting; the thread sends the rest."""
        while self._leaving or self._backlog.has_frames:
            if not self._send_some(stream, socket.MSG_DONTWAIT):
                self._mailbox.post(_GoOn())
                return

    def _answers_are_here(self) -> None:
        if self._mailbox.is_lent:
            self._at_driver(self._collect)

    def _at_driver(self, work: Callable[[Stream], None]) -> None:
        """Do something with the connection; the thread deals with what goes wrong."""
        try:
            if self._stream is not None:
                work(self._stream)
        except Exception as error:
            self._mailbox.post(_GoOn(error))

    def _lend(self, stream: Stream) -> None:
        fd, watch = stream.fileno(), self._shared.watch
        self._mailbox.lend(lambda: watch.add(fd, self._answers_are_here), lambda: watch.remove(fd))

    # The thread

    def _run(self) -> None:
        try:
            while not self._closed:
                self._guarded(self._turn)
        finally:
            self._end()

    def _turn(self) -> None:
        self._obey(self._mailbox.take())
        stream = self._stream
        if self._closed:
            return
        if stream is None and (self._backlog.has_frames or not self._tried):
            self._tried = True
            self._stream = Stream.open(self._plug, self._peer, self._shared.settings, self._shared.writer)
            self._status.went_up()
        elif stream is None:
            self._mailbox.wait(None, None)
        elif self._leaving or self._backlog.has_frames:
            self._send_frame(stream)
            if self._backlog.has_frames:
                self._collect(stream)
        else:
            self._rest(stream)

    def _obey(self, orders: Sequence[_Order]) -> None:
        error: Exception | None = None
        for order in orders:
            if isinstance(order, Job):
                self._backlog.add(order)
            elif isinstance(order, _Cancel):
                self._shared.outbox.put(*self._backlog.cancel(order.ticket, time.monotonic()))
            elif isinstance(order, _Close):
                self._closed = True
            else:
                error = order.error
        if error is not None and not self._closed:
            raise error

    def _send_frame(self, stream: Stream) -> None:
        """Send one frame, or what is left of one."""
        self._send_some(stream)
        while self._leaving:
            self._look_up(stream)
            self._send_some(stream)

    def _look_up(self, stream: Stream) -> None:
        """In the middle of a frame that does not move on: do what else there is to do."""
        self._obey(self._mailbox.take())
        if self._closed:
            raise Broken("closed by this side")
        self._collect(stream)
        self._check_patience(stream)

    def _rest(self, stream: Stream) -> None:
        """Nothing to send: wait for orders, and for answers where a job is to end early."""
        if self._backlog.stopping_since is None:
            self._lend(stream)
            self._mailbox.wait(None, None)
            return
        if self._mailbox.wait(stream.fileno(), SEND_LOOK_S):
            self._collect(stream)
        self._check_patience(stream)

    def _check_patience(self, stream: Stream) -> None:
        """Give up on a peer that stands still while a stopped ticket waits to end."""
        since = self._backlog.stopping_since
        patience_s = self._shared.settings.cancel_patience_s
        if since is not None and time.monotonic() - max(since, stream.still_since()) > patience_s:
            raise Broken(f"the peer took no byte for {patience_s:g} s while a ticket was to end")

    def _end(self) -> None:
        """Nobody is to wait for a ticket of ours any more."""
        for order in self._mailbox.close():
            if isinstance(order, Job):
                self._backlog.add(order)
        self._plug.pull()
        self._shared.outbox.put(*self._backlog.abandon(f"{self._peer}: the link was closed"))

    # Whoever has the connection

    def _guarded(self, work: Callable[[], object]) -> None:
        try:
            work()
        except (Broken, Refused, MalformedMessage) as error:
            self._break(str(error))
        except OSError as error:
            self._break(error.strerror or repr(error))
        except Exception as error:
            # A mistake of ours: the tickets at hand fail, the next ones get a new connection.
            # Logged as text: a record that keeps the traceback would keep the arenas' memory in use.
            _log.error("the connection to %s is given up:\n%s", self._peer, traceback.format_exc())
            self._break(f"internal error: {error!r}")

    def _send_some(self, stream: Stream, flags: int = 0) -> int:
        """Hand the kernel bytes of the frame at hand, straight from the source's memory; returns how many it took."""
        if not self._leaving:
            frame, head = self._backlog.take_frame()
            sources = self._shared.sources
            self._leaving = [memoryview(head)]
            self._leaving += [sources[region][start : start + nbytes] for region, start, _, nbytes in frame.pieces]
        views = self._leaving
        sent = stream.send(views if len(views) <= _MOST_PIECES else views[:_MOST_PIECES], flags)
        advance(views, sent)
        if not views:
            self._backlog.frame_left()
        return sent

    def _collect(self, stream: Stream) -> None:
        """Take the answers that are here."""
        for answer in stream.answers():
            self._shared.outbox.put(*self._backlog.answered(answer, time.monotonic()))

    def _break(self, reason: str) -> None:
        """The connection is gone. A job that comes later gets a new one."""
        was_up, self._stream = self._stream is not None, None
        self._plug.pull()
        self._leaving.clear()
        orders = self._mailbox.take()
        if any(isinstance(order, _Close) for order in orders):  # which may be why it broke
            return self._obey(orders)
        reason = f"{self._peer}: {reason}"
        self._status.went_down(was_up, reason)
        self._shared.outbox.put(*self._backlog.abandon(reason))
        self._obey(orders)  # only now: what was not given to this connection does not end with it
