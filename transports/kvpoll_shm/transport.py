"""The transport itself: ties the receiving side, the links and the completions together."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import os
import secrets
import select
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from kvpoll_common.grants import Grants
from kvpoll_common.handshake import WRITER_NBYTES
from kvpoll_common.loop import Loop, Reactor
from kvpoll_common.outbox import Outbox
from kvpoll_common.regions import check_ranges, check_region, describe, read_regions
from kvpoll_common.settings import settings_of
from kvpoll_fsm.errors import InvalidInput, KvpollError, TransportUnavailable
from kvpoll_fsm.refusals import Refusals
from kvpoll_fsm.spi import Capabilities, Completion, FenceKind, LeaseId, Range, Region
from kvpoll_shm import hosts, wire
from kvpoll_shm.copying import Landing
from kvpoll_shm.handshake import new_identity, read_descriptor
from kvpoll_shm.link import ShmLink
from kvpoll_shm.receiver import Listener
from kvpoll_shm.sender import Gathering, Lane, Sources
from kvpoll_shm.settings import ShmSettings

__all__ = ["ShmTransport"]

_log = logging.getLogger("kvpoll_shm")


class ShmTransport:
    """Copies from another process of this host. Follows `kvpoll_fsm.spi.Transport`.

    The receiver copies: a link hands it the sender's arenas for reading, and a submit says what to read and where to
    put it. So nobody but the receiver ever writes to its memory, and it can fence by itself, whatever has become of
    the sender. The sender's regions must have a `Region.fd`; the receiver's may be any memory.

    All methods are called from one thread; only `completions` and `fileno` may be called after `close`.
    """

    name = "shm"
    capabilities = Capabilities(
        scatter_entries=wire.MAX_ENTRIES,
        max_outstanding=wire.MAX_ORDERS,
        cancellable=True,
        fence=FenceKind.token,
        reports_progress=False,
        integrity=True,
        cuda=False,
    )

    def __init__(self, **settings: Any) -> None:
        """Make a transport; nothing is opened yet.

        Args:
            **settings: The fields of `ShmSettings`.

        Raises:
            InvalidInput: A setting out of its range.
        """
        self._settings = settings_of(ShmSettings, settings)
        self._regions: dict[int, Region] = {}
        self._buffers: dict[int, memoryview] = {}
        self._outbox = Outbox()
        self._grants = Grants(self._outbox, self.name)
        self._grants.refusals = Refusals(self.name, _log)
        self._loop = Loop("shm")
        self._reactor = Reactor(self._wake_in)
        self._links: list[ShmLink] = []
        self._numbers = (itertools.count(), itertools.count())  # of links, of tickets
        self._listener: Listener | None = None
        self._pid = os.getpid()
        self._gathering = Gathering()
        writer = secrets.token_bytes(WRITER_NBYTES)
        self._sources = Sources(self._regions, writer, self._settings, self._outbox, self._gathering)

    def start(self) -> None:
        """Open the socket and start the thread.

        Raises:
            TransportUnavailable: Not Linux, or the system has no socket or thread to give.
        """
        if not hasattr(os, "eventfd"):
            raise TransportUnavailable(self.name, "needs Linux and Python 3.10 or newer")
        self._pid = os.getpid()
        try:
            with contextlib.ExitStack() as undo:
                self._open(undo)
                undo.pop_all()
        except (OSError, RuntimeError) as error:  # out of file descriptors or threads, or no /proc
            raise TransportUnavailable(self.name, f"cannot start: {error}") from error
        # A program that ends without close() is not held up by our thread, and it ends before it does.
        atexit.register(self.close)

    def _open(self, undo: contextlib.ExitStack) -> None:
        listening, name = hosts.listen()
        undo.callback(listening.close)
        identity = new_identity(name)
        outbox_fd = self._outbox.open()
        undo.callback(self._outbox.close)
        self._reactor.open()
        undo.callback(self._reactor.close)
        self._reactor.watch(outbox_fd, select.EPOLLIN, None)
        listener = Listener(identity, Landing(self._buffers, self._grants), self._settings, self._loop.reactor)
        self._loop.start()
        self._loop.post(lambda: listener.start(listening))
        self._listener = listener

    def _wake_in(self, delay_s: float) -> None:
        """A timer of our reactor was set: let the other thread wake the driver when it is due."""
        self._loop.post(lambda: self._loop.reactor.later(delay_s, self._reactor.wake))

    def descriptor(self) -> bytes:
        """Boot id, socket, incarnation and secret. Whoever has it and a token may write.

        Raises:
            InvalidInput: Not started.
        """
        if self._listener is None:
            raise InvalidInput("the shm transport has no descriptor before start()")
        return msgspec.msgpack.encode(self._listener.identity)

    def register(self, region: Region) -> bytes:
        """Make a region writable for peers and, if it has an `fd`, readable as a source; returns its descriptor.

        Raises:
            InvalidInput: Not writable contiguous bytes, a number that is taken, or too many regions.
        """
        check_region(region, self._regions, wire.MAX_REGIONS)
        self._regions[region.number] = region
        self._buffers[region.number] = region.buffer
        return describe(region)

    def grant(self, lease: LeaseId, ranges: Sequence[Range]) -> bytes:
        """Admit writes to exactly these ranges; returns a token of 16 random bytes.

        Raises:
            InvalidInput: A range outside its region, or an empty one.
        """
        check_ranges(lease, ranges, self._buffers)
        return self._grants.add(ranges)

    def revoke(self, token: bytes) -> None:
        """Admit nothing under the token any more; a copy at work ends with its slice, which is waited for."""
        self._grants.end(token)

    def fence(self, token: bytes) -> int:
        """Revoke, and report `Fenced` once no byte can land: at once, or at the end of the slice being copied."""
        return self._grants.fence(token)

    def connect(self, descriptor: bytes, regions: Sequence[bytes]) -> ShmLink:
        """A link to the peer that sent these descriptors; `LinkUp` or `LinkDown` follows.

        Raises:
            InvalidInput: A descriptor cannot be read.
        """
        peer = read_descriptor(descriptor)
        read_regions(regions, self.name)
        links, tickets = self._numbers
        number = next(links)
        lane = Lane(number, peer, self._sources, self._reactor)
        link = ShmLink(number, lane, self._buffers, self._outbox, tickets)
        self._links = [other for other in self._links if not other.lane.is_over]
        self._links.append(link)
        lane.open()
        return link

    def refused(self) -> Mapping[str, int]:
        """How many connections and writes were turned away, by reason. For any thread."""
        return self._grants.refusals.counts()

    def completions(self) -> list[Completion]:
        """What has happened since the last call, in order.

        Raises:
            KvpollError: The transport's thread has ended by a mistake of ours.
        """
        if self._loop.failure is not None:
            raise KvpollError(f"the shm transport's thread failed: {self._loop.failure!r}")
        self._outbox.about_to_take()
        self._gathering.send()
        self._reactor.turn()
        return self._outbox.take()

    def flush(self) -> None:
        """Send what was submitted since the last call; from the first one on, submits wait for the next."""
        self._gathering.flush()

    def fileno(self) -> int | None:
        """Readable when `completions()` has something; None before `start` and after `close`."""
        return self._reactor.fileno()

    def close(self) -> None:
        """End links, thread and socket, and let go of the regions. May be called twice.

        Waits for receivers that copy from us at this moment to stop, `cancel_patience_s` at most: what one that
        is stopped itself copies later has no effect, for it is told that its ticket is over.

        Does nothing in a forked child: the connections are the parent's.
        """
        if os.getpid() != self._pid:
            return
        atexit.unregister(self.close)
        for link in self._links:
            link.close()
        while not all(link.lane.is_over for link in self._links):
            self._reactor.turn(None)
        if self._listener is not None:
            self._loop.post(self._listener.stop)
            self._loop.stop()
            self._listener.stop()  # again: the thread may have ended by a mistake of ours
        self._loop.reactor.close()
        self._reactor.close()
        self._outbox.close()
        self._links.clear()
        self._regions.clear()
        self._buffers.clear()
