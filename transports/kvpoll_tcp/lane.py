"""One connection of a link and the thread that owns it: all of a ticket's life is in this one thread."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from kvpoll_fsm.errors import MalformedMessage
from kvpoll_tcp.backlog import Backlog, Job
from kvpoll_tcp.crew import Crew
from kvpoll_tcp.handshake import Descriptor
from kvpoll_tcp.mailbox import Mailbox
from kvpoll_tcp.outbox import Outbox
from kvpoll_tcp.settings import TcpSettings
from kvpoll_tcp.sockets import Broken, Plug, advance
from kvpoll_tcp.stream import SEND_LOOK_S, Stream

__all__ = ["Cancel", "Lane", "LaneStatus"]

_log = logging.getLogger("kvpoll_tcp")


@dataclass(frozen=True, slots=True)
class Cancel:
    """The order to end a ticket soon."""

    ticket: int


@dataclass(frozen=True, slots=True)
class _Close:
    """The order to end the thread."""


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

    `post`, `close` and `ended_nbytes` are for any thread, the rest belongs to the lane's own thread.
    A connection is made at the start, and again when there is a job and none stands.
    """

    def __init__(
        self,
        peer: Descriptor,
        sources: Mapping[int, memoryview],
        outbox: Outbox,
        status: LaneStatus,
        settings: TcpSettings,
        writer: bytes,
    ) -> None:
        self._peer = peer
        self._writer = writer
        self._sources = sources
        self._outbox = outbox
        self._status = status
        self._settings = settings
        self._plug = Plug()
        self._mailbox: Mailbox[Job | Cancel | _Close] = Mailbox()
        self._backlog = Backlog()
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

    def post(self, order: Job | Cancel) -> bool:
        """Give an order; False if the lane is closed."""
        return self._mailbox.post(order)

    def close(self) -> None:
        """Let the thread end soon; jobs left end Failed."""
        self._mailbox.post(_Close())
        self._plug.cut()

    def _run(self) -> None:
        try:
            while not self._closed:
                self._guarded_turn()
        finally:
            self._end()

    def _guarded_turn(self) -> None:
        try:
            self._obey()
            if not self._closed:
                self._turn()
        except (Broken, MalformedMessage) as error:
            self._break(str(error))
        except OSError as error:
            self._break(error.strerror or repr(error))
        except Exception as error:
            # A mistake of ours: the tickets at hand fail, the next ones get a new connection.
            # Logged as text: a record that keeps the traceback would keep the arenas' memory in use.
            _log.error("the connection to %s is given up:\n%s", self._peer, traceback.format_exc())
            self._break(f"internal error: {error!r}")

    def _turn(self) -> None:
        stream = self._stream
        if stream is None and (self._backlog.has_frames or not self._tried):
            self._tried = True
            self._stream = Stream.open(self._plug, self._peer, self._settings, self._writer)
            self._status.went_up()
        elif stream is None:
            self._mailbox.wait(None, None)
        elif self._backlog.has_frames:
            self._send_frame(stream)
            if self._backlog.has_frames:
                self._collect(stream)
        else:
            self._rest(stream)

    def _obey(self) -> None:
        for order in self._mailbox.take():
            if isinstance(order, Job):
                self._backlog.add(order)
            elif isinstance(order, Cancel):
                self._outbox.put(*self._backlog.cancel(order.ticket, time.monotonic()))
            else:
                self._closed = True

    def _send_frame(self, stream: Stream) -> None:
        """Send one frame, straight from the source's memory."""
        frame, head = self._backlog.take_frame()
        views = [memoryview(head)]
        for write in frame.writes:
            views.append(self._sources[write.region][write.src_offset : write.src_offset + write.nbytes])
        while views:
            advance(views, stream.send(views))
            if views:
                self._look_up(stream)
        self._backlog.frame_left()

    def _look_up(self, stream: Stream) -> None:
        """In the middle of a frame that does not move on: do what else there is to do."""
        self._obey()
        if self._closed:
            raise Broken("closed by this side")
        self._collect(stream)
        self._check_patience(stream)

    def _rest(self, stream: Stream) -> None:
        """Nothing to send: wait for answers and orders."""
        timeout_s = None if self._backlog.stopping_since is None else SEND_LOOK_S
        if self._mailbox.wait(stream.fileno(), timeout_s):
            self._collect(stream)
        self._check_patience(stream)

    def _collect(self, stream: Stream) -> None:
        """Take the answers that are here."""
        for answer in stream.answers():
            self._outbox.put(*self._backlog.answered(answer, time.monotonic()))

    def _check_patience(self, stream: Stream) -> None:
        """Give up on a peer that stands still while a stopped ticket waits to end."""
        since = self._backlog.stopping_since
        patience_s = self._settings.cancel_patience_s
        if since is not None and time.monotonic() - max(since, stream.still_since()) > patience_s:
            raise Broken(f"the peer took no byte for {patience_s:g} s while a ticket was to end")

    def _break(self, reason: str) -> None:
        """The connection is gone. A job that comes later gets a new one."""
        was_up, self._stream = self._stream is not None, None
        self._plug.pull()
        self._obey()  # whether we were told to close, which may be why it broke
        if self._closed:
            return
        reason = f"{self._peer}: {reason}"
        self._status.went_down(was_up, reason)
        self._outbox.put(*self._backlog.abandon(reason))

    def _end(self) -> None:
        """Nobody is to wait for a ticket of ours any more."""
        for order in self._mailbox.close():
            if isinstance(order, Job):
                self._backlog.add(order)
        self._plug.pull()
        self._outbox.put(*self._backlog.abandon(f"{self._peer}: the link was closed"))
