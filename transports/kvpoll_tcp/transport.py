"""The transport itself: ties the receiving side, the links and the completions together."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from kvpoll_common.addresses import advertised, listen
from kvpoll_common.grants import Grants
from kvpoll_common.handshake import WRITER_NBYTES
from kvpoll_common.outbox import Outbox
from kvpoll_common.regions import check_ranges, check_region, describe, read_regions
from kvpoll_common.settings import settings_of
from kvpoll_fsm.errors import InvalidInput, TransportUnavailable
from kvpoll_fsm.spi import Capabilities, Completion, FenceKind, LeaseId, LinkDown, Range, Region
from kvpoll_tcp.contexts import check_verifies, fingerprint_of
from kvpoll_tcp.crew import Crew
from kvpoll_tcp.handshake import Descriptor, new_identity, read_descriptor
from kvpoll_tcp.lane import Lane, Shared
from kvpoll_tcp.link import LinkStatus, TcpLink
from kvpoll_tcp.receiver import Landing, Listener
from kvpoll_tcp.settings import TcpSettings
from kvpoll_tcp.watch import Watch

__all__ = ["TcpTransport"]


_BOTH_OR_NONE = "give both endpoints transport_options={'tcp': {'tls': (server context, client context)}}, or neither"


class TcpTransport:
    """Writes over TCP, one listening socket per instance. Follows `kvpoll_fsm.spi.Transport`.

    Authenticated by a secret in the descriptor, bounds-checked by the receiver; encrypted with `tls` only.
    All methods are called from one thread; only `completions` and `fileno` may be called after `close`.
    """

    name = "tcp"
    capabilities = Capabilities(
        scatter_entries=1024,
        max_outstanding=1024,
        cancellable=True,
        fence=FenceKind.token,
        reports_progress=True,
        integrity=False,
        cuda=False,
        listens=True,
    )

    def __init__(self, **settings: Any) -> None:
        """Make a transport; nothing is opened yet.

        Args:
            **settings: The fields of `TcpSettings`.

        Raises:
            AddressError: An address nobody could connect to.
            InvalidInput: A setting out of its range.
        """
        self._settings = settings_of(TcpSettings, settings)
        self._regions: dict[int, memoryview] = {}
        self._outbox = Outbox()
        self._watch = Watch()
        self._grants = Grants(self._outbox, self.name)
        self._crew = Crew()
        self._links: list[TcpLink] = []
        self._link_numbers = itertools.count()
        self._tickets = itertools.count()
        self._listener: Listener | None = None
        self._identity: Descriptor | None = None
        self._pid = os.getpid()
        self._writer = secrets.token_bytes(WRITER_NBYTES)

    def start(self) -> None:
        """Open the port and start to listen.

        Raises:
            AddressError: The host's name stands for an address nobody could connect to.
            TransportUnavailable: The address is not this machine's, or no port of the range is free.
        """
        if not hasattr(os, "eventfd"):
            raise TransportUnavailable(self.name, "needs Linux and Python 3.10 or newer")
        self._pid = os.getpid()
        try:
            with contextlib.ExitStack() as undo:
                self._open(undo)
                undo.pop_all()
        except (OSError, RuntimeError) as error:  # out of file descriptors or threads
            raise TransportUnavailable(self.name, f"cannot start: {error}") from error
        # A program that ends without close() is not held up by our threads, and they end before it does.
        atexit.register(self.close)

    def _open(self, undo: contextlib.ExitStack) -> None:
        settings = self._settings
        listening = undo.enter_context(listen(self.name, settings.host, settings.data_ports))
        undo.callback(self._outbox.close)
        self._watch.open()
        undo.callback(self._watch.close)
        self._watch.add(self._outbox.open())
        tls = b"" if settings.tls is None else fingerprint_of(settings.tls[0])
        self._identity = new_identity(*advertised(self.name, listening, settings.advertise), tls)
        self._listener = Listener(self._identity, Landing(self._regions, self._grants), self._settings, self._crew)
        self._listener.start(listening)

    def descriptor(self) -> bytes:
        """Address, port, incarnation and secret. Whoever has it and a token may write.

        Raises:
            InvalidInput: Not started.
        """
        if self._identity is None:
            raise InvalidInput("the tcp transport has no descriptor before start()")
        return msgspec.msgpack.encode(self._identity)

    def register(self, region: Region) -> bytes:
        """Make a region writable for peers and readable as a source; returns its descriptor.

        Raises:
            InvalidInput: Not writable contiguous bytes, or a number that is taken or beyond 65,535.
        """
        check_region(region, self._regions)
        self._regions[region.number] = region.buffer
        return describe(region)

    def grant(self, lease: LeaseId, ranges: Sequence[Range]) -> bytes:
        """Admit writes to exactly these ranges; returns a token of 16 random bytes.

        Raises:
            InvalidInput: A range outside its region, or an empty one.
        """
        check_ranges(lease, ranges, self._regions)
        return self._grants.add(ranges)

    def revoke(self, token: bytes) -> None:
        """Admit nothing under the token any more; a connection that is in the middle of a write there is cut."""
        self._grants.end(token)

    def fence(self, token: bytes) -> int:
        """Revoke, and report `Fenced` once no byte can land: at once, or after 0.1 s of a silent peer."""
        return self._grants.fence(token)

    def connect(self, descriptor: bytes, regions: Sequence[bytes]) -> TcpLink:
        """A link to the peer that sent these descriptors; `LinkUp` or `LinkDown` follows.

        Raises:
            InvalidInput: A descriptor cannot be read, or our TLS would verify nothing there.
            TransportUnavailable: One of us has TLS and the other has not.
        """
        peer = read_descriptor(descriptor)
        read_regions(regions, self.name)
        self._check_tls(peer)
        number = next(self._link_numbers)
        status = LinkStatus(number, self._outbox)
        settings = self._settings
        shared = Shared(self._regions, self._outbox, settings, self._writer, self._watch)
        lanes = [Lane(peer, shared, status) for _ in range(settings.streams)]
        most = self.capabilities.scatter_entries
        link = TcpLink(number, lanes, self._regions, self._outbox, self._tickets, most)
        self._links = [other for other in self._links if not other.is_closed]
        self._links.append(link)
        self._start_lanes(link, lanes)
        return link

    def refused(self) -> Mapping[str, int]:
        """How many connections and writes were turned away, by reason. For any thread."""
        return self._grants.refusals.counts()

    def completions(self) -> list[Completion]:
        """What has happened since the last call, in order."""
        self._outbox.about_to_take()
        self._watch.turn()
        return self._outbox.take()

    def fileno(self) -> int | None:
        """Readable when `completions()` has something; None before `start` and after `close`."""
        return self._watch.fileno()

    def close(self) -> None:
        """End links, threads and ports, and let go of the regions. May be called twice.

        Does nothing in a forked child: the connections are the parent's.
        """
        if os.getpid() != self._pid:
            return
        atexit.unregister(self.close)
        for link in self._links:
            link.close()
        if self._listener is not None:
            self._listener.stop()
        self._crew.join()
        self._watch.close()
        self._outbox.close()
        self._links.clear()
        self._regions.clear()

    def _check_tls(self, peer: Descriptor) -> None:
        """TLS is never left out because the other side has none."""
        tls = self._settings.tls
        if tls is not None and peer.tls:
            check_verifies(tls[1], peer.host)
        elif tls is not None:
            raise TransportUnavailable(self.name, f"the data port of {peer} has no TLS, and we have", _BOTH_OR_NONE)
        elif peer.tls:
            raise TransportUnavailable(self.name, f"the data port of {peer} wants TLS, and we have none", _BOTH_OR_NONE)

    def _start_lanes(self, link: TcpLink, lanes: Sequence[Lane]) -> None:
        try:
            for number, lane in enumerate(lanes):
                lane.start(self._crew, f"link-{link.number}.{number}")
        except (OSError, RuntimeError) as error:  # out of file descriptors or threads
            link.close()
            self._outbox.put(LinkDown(link.number, f"cannot start: {error}"))
