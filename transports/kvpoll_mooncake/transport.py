"""The transport itself: ties the receiving engine, the links and the completions together."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TookTooLong  # the builtin one from Python 3.11 on
from typing import Any

import msgspec

from kvpoll_common.addresses import advertised, listen
from kvpoll_common.grants import Grants
from kvpoll_common.handshake import WRITER_NBYTES
from kvpoll_common.loop import Loop
from kvpoll_common.outbox import Outbox
from kvpoll_common.regions import check_ranges, check_region, describe, read_regions
from kvpoll_common.settings import settings_of
from kvpoll_fsm.errors import InvalidInput, KvpollError, TransportUnavailable
from kvpoll_fsm.spi import Capabilities, Completion, FenceKind, LeaseId, Range, Region
from kvpoll_mooncake import environment, installed, wire
from kvpoll_mooncake.handshake import Descriptor, new_identity, read_descriptor
from kvpoll_mooncake.keeper import Keeper
from kvpoll_mooncake.lane import Lane
from kvpoll_mooncake.link import MooncakeLink
from kvpoll_mooncake.maker import Maker
from kvpoll_mooncake.reception import Reception
from kvpoll_mooncake.settings import MooncakeSettings
from kvpoll_mooncake.trouble import Crowd, Sources

__all__ = ["MooncakeTransport"]

_SLACK_S = 5.0


class MooncakeTransport:
    """Writes through Mooncake engines in processes of their own. Follows `kvpoll_fsm.spi.Transport`.

    One engine receives, for all peers; each link has one that sends. Adapters speak with each other over TCP: every
    ticket is asked for, and admitted for its exact ranges, before an engine is told of it.

    All methods are called from one thread; only `completions` and `fileno` may be called after `close`.
    """

    name = "mooncake"
    capabilities = Capabilities(
        scatter_entries=wire.MAX_RANGES,
        max_outstanding=wire.MAX_TICKETS,
        cancellable=True,
        fence=FenceKind.process,
        reports_progress=True,
        integrity=False,
        cuda=False,
        listens=True,
    )

    def __init__(self, **settings: Any) -> None:
        """Make a transport; nothing is started yet.

        Args:
            **settings: The fields of `MooncakeSettings`.

        Raises:
            AddressError: An address nobody could connect to.
            InvalidInput: A setting out of its range.
        """
        self._settings = settings_of(MooncakeSettings, settings)
        self._regions: dict[int, Region] = {}
        self._buffers: dict[int, memoryview] = {}
        self._outbox = Outbox()
        self._grants = Grants(self._outbox, self.name)
        self._loop = Loop(self.name)
        self._links: list[MooncakeLink] = []
        self._numbers = (itertools.count(), itertools.count())  # of links, of tickets
        self._identity: Descriptor | None = None
        self._inside: _Inside | None = None
        self._pid = os.getpid()

    def start(self) -> None:
        """Open the port, and start the engine that receives.

        Raises:
            AddressError: The host's name stands for an address nobody could connect to.
            TransportUnavailable: Mooncake is not installed or does not work here, RDMA is required and missing, or
                the address is not this machine's.
        """
        if not hasattr(os, "eventfd") or not hasattr(os, "pidfd_open"):
            raise TransportUnavailable(self.name, "needs Linux and Python 3.10 or newer")
        problem = environment.problem_of(os.environ)
        if problem:
            raise TransportUnavailable(self.name, problem)
        installed.require_one_wheel()
        protocol = installed.protocol_of(self._settings)
        self._pid = os.getpid()
        try:
            with contextlib.ExitStack() as undo:
                self._open(undo, protocol)
                undo.pop_all()
        except (OSError, RuntimeError) as error:  # out of file descriptors or threads
            raise TransportUnavailable(self.name, f"cannot start: {error}") from error
        # A program that ends without close() is not held up by our thread, and it ends before it does.
        atexit.register(self.close)

    def _open(self, undo: contextlib.ExitStack, protocol: str) -> None:
        settings = self._settings
        listening = listen(self.name, settings.host, settings.data_ports)
        undo.callback(listening.close)
        host, port = advertised(self.name, listening, settings.advertise)
        self._identity = new_identity(host, port, protocol, settings.directory)
        self._outbox.open()
        undo.callback(self._outbox.close)
        self._loop.start()
        undo.callback(self._stop)
        maker = Maker(self._loop.reactor, settings, host, protocol)
        self._inside = _Inside(self._loop, self._identity, maker, self._regions, self._grants)
        self._inside.start(listening)

    def descriptor(self) -> bytes:
        """Address, incarnation and secret of the adapter. Whoever has it and a token may write.

        Raises:
            InvalidInput: Not started.
        """
        if self._identity is None:
            raise InvalidInput("the mooncake transport has no descriptor before start()")
        return msgspec.msgpack.encode(self._identity)

    def register(self, region: Region) -> bytes:
        """Make a region writable for peers and readable as a source; returns its descriptor.

        Raises:
            InvalidInput: Not writable contiguous bytes, a number that is taken, or too many regions.
            TransportUnavailable: Mooncake does not take it.
        """
        check_region(region, self._regions, wire.MAX_REGIONS)
        if self._inside is None:
            raise InvalidInput("the mooncake transport takes no region before start()")
        self._inside.register(region)
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
        """Admit nothing under the token any more. Says nothing about what was admitted before: `fence` does."""
        self._grants.revoke(token)

    def fence(self, token: bytes) -> int:
        """Revoke, and report `Fenced` once no byte can land: at once, unless something is under way there.

        Then the engine that receives is killed, and another one started: what others have under way ends too.
        """
        number = self._grants.fence(token)
        if self._inside is not None:
            keeper = self._inside.keeper
            self._loop.post(lambda: keeper.fence(token))
        return number

    def connect(self, descriptor: bytes, regions: Sequence[bytes]) -> MooncakeLink:
        """A link to the peer that sent these descriptors; `LinkUp` or `LinkDown` follows.

        Raises:
            InvalidInput: A descriptor cannot be read.
            TransportUnavailable: The peer's engines cannot be reached by ours.
        """
        peer = read_descriptor(descriptor)
        read_regions(regions, self.name)
        if self._inside is None or self._identity is None:
            raise InvalidInput("the mooncake transport has no links before start()")
        _check_match(self._identity, peer)
        links, tickets = self._numbers
        number = next(links)
        lane = Lane(number, peer, self._inside.sources(self._outbox), self._loop.reactor)
        link = MooncakeLink(number, lane, self._buffers, self._outbox, tickets, self._loop.post)
        self._links = [other for other in self._links if not other.lane.is_over]
        self._links.append(link)
        self._loop.post(lane.open)
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
            raise KvpollError(f"the mooncake transport's thread failed: {self._loop.failure!r}")
        self._outbox.about_to_take()
        return self._outbox.take()

    def fileno(self) -> int | None:
        """Readable when `completions()` has something; None before `start` and after `close`."""
        return self._outbox.fileno()

    def close(self) -> None:
        """Kill the engines, end links, thread and port, and let go of the regions. May be called twice.

        Does nothing in a forked child: the engines are the parent's.
        """
        if os.getpid() != self._pid:
            return
        atexit.unregister(self.close)
        self._stop()
        self._outbox.close()
        self._links.clear()
        self._regions.clear()
        self._buffers.clear()

    def _stop(self) -> None:
        """End everything that runs; the engines first, and their ends are waited for."""
        inside, self._inside = self._inside, None
        if inside is not None:
            inside.stop([link.lane for link in self._links])
        self._loop.stop()
        self._loop.reactor.close()


class _Inside:
    """What runs on the transport's thread."""

    def __init__(
        self, loop: Loop, identity: Descriptor, maker: Maker, regions: dict[int, Region], grants: Grants
    ) -> None:
        self._loop = loop
        self._regions = regions
        self._maker = maker
        self._writer = secrets.token_bytes(WRITER_NBYTES)
        self._crowd = Crowd(maker.settings.max_senders)
        self._reception = Reception(identity, maker.settings, loop.reactor, grants.refusals)
        self.keeper = Keeper(loop.reactor, maker, regions, grants, self._reception.tell_all)
        self._reception.keeper = self.keeper

    def start(self, listening: Any) -> None:
        """Start the engine that receives, and then to listen.

        Raises:
            TransportUnavailable: It does not start.
        """
        ready: Future[None] = Future()
        self._loop.post(lambda: self.keeper.start(ready))
        self._wait(ready)
        self._loop.post(lambda: self._reception.start(listening))

    def register(self, region: Region) -> None:
        """Give the engine a region.

        Raises:
            TransportUnavailable: It does not take it.
        """
        if region.fd is None and not self._maker.hosted:
            self._move_in(region)
        done: Future[None] = Future()

        def give() -> None:
            self._regions[region.number] = region
            self.keeper.register(region, done)

        self._loop.post(give)
        self._wait(done)

    def _move_in(self, region: Region) -> None:
        """Have engines in this process from now on: another one cannot be given this memory."""
        if self._maker.settings.engine == "child":
            problem = f"region {region.number} is not in shared memory: a pool that allocates its blocks is, one of "
            raise TransportUnavailable(
                "mooncake", problem + "adopted arrays is not", "engine='host' or 'auto' takes it"
            )
        ready: Future[None] = Future()

        def replace() -> None:
            self._maker.hosted = True
            self.keeper.replace(ready)

        self._loop.post(replace)
        self._wait(ready)

    def sources(self, outbox: Outbox) -> Sources:
        """What links share."""
        return Sources(self._regions, self._writer, self._maker, outbox, self._crowd)

    def stop(self, lanes: list[Lane]) -> None:
        """Kill all engines and wait for their ends."""
        over: Future[None] = Future()

        def look() -> None:
            if self.keeper.over and all(lane.is_over for lane in lanes):
                self._reception.stop()  # the writers have been told
                return over.set_result(None)
            self._loop.reactor.later(0.002, look)

        def stop() -> None:
            for lane in lanes:
                lane.close()
                lane.bury()
            self.keeper.stop()
            look()

        if self._loop.post(stop):
            over.result()
        else:  # the thread has ended by a mistake of ours
            self._maker.end_all()
            self._reception.stop()
            for lane in lanes:
                lane.abandon()

    def _wait(self, future: Future[None]) -> None:
        try:
            future.result(self._maker.settings.engine_s + _SLACK_S)
        except TookTooLong:
            raise TransportUnavailable("mooncake", "its engine does not answer") from None


def _check_match(ours: Descriptor, theirs: Descriptor) -> None:
    """Engines reach each other only by the same protocol and the same directory.

    Raises:
        TransportUnavailable: They do not.
    """
    if ours.protocol != theirs.protocol:
        problem = f"the peer's engines speak {theirs.protocol}, ours {ours.protocol}"
        raise TransportUnavailable("mooncake", problem, f"give both protocol={ours.protocol!r}")
    if ours.metadata != theirs.metadata:
        problem = f"the peer's engines are found through {theirs.metadata}, ours through {ours.metadata}"
        raise TransportUnavailable("mooncake", problem, "give both the same metadata=")
