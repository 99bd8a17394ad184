"""The sending side of one link: reaches the receiver, hands it our arenas for reading, and sends it orders."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvpoll_common.door import Refused
from kvpoll_common.handshake import Caller, said_in
from kvpoll_common.loop import Reactor
from kvpoll_common.outbox import Outbox
from kvpoll_fsm.errors import MalformedMessage
from kvpoll_fsm.spi import Done, Failed, LinkDown, LinkUp, Quiesced, Region
from kvpoll_shm import hosts, wire
from kvpoll_shm.handshake import Descriptor
from kvpoll_shm.pipe import Pipe
from kvpoll_shm.settings import ShmSettings
from kvpoll_shm.wire import Cancel, End, Ends, Message, Opening, Order, Place, Ready, Regions, Verdict

__all__ = ["Gathering", "Lane", "Sources"]


class Gathering:
    """Orders are kept until they are asked for, once somebody has shown that he does ask.

    Whoever never calls `flush` has every order sent at once.
    """

    def __init__(self) -> None:
        self._is_on = False
        self._lanes: set[Lane] = set()

    def keeps(self, lane: Lane) -> bool:
        """Whether a lane is to wait with an order; it is asked later then."""
        if self._is_on:
            self._lanes.add(lane)
        return self._is_on

    def flush(self) -> None:
        """Let all lanes send what they have, and from now on keep what they get until the next call."""
        self._is_on = True
        self.send()

    def send(self) -> None:
        """Let all lanes send what they have."""
        while self._lanes:
            self._lanes.pop().send_waiting()


@dataclass(frozen=True)
class Sources:
    """What all links of a transport share: our regions, who we are, and whom to report to."""

    regions: Mapping[int, Region]
    writer: bytes
    settings: ShmSettings
    outbox: Outbox
    gathering: Gathering


class Lane:
    """The connection of one link, made at the start and again when there is an order and none stands.

    Used by the driver's thread, which turns the reactor. A ticket is waiting (nothing of it was sent), sent, or loose:
    it has ended as far as we told, but the receiver has not said so.

    Attributes:
        is_over: Closed, and the receiver is known to have stopped or is not waited for any more.
    """

    def __init__(self, number: int, peer: Descriptor, sources: Sources, reactor: Reactor) -> None:
        self.is_over = False
        self._number = number
        self._peer = peer
        self._sources = sources
        self._reactor = reactor
        self._pipe: Pipe | None = None
        self._expect: Callable[[Message], None] = self._on_hello
        self._caller = Caller(wire.KIND, peer, sources.writer)
        self._waiting: deque[Order] = deque()
        self._sent: set[int] = set()
        self._loose: set[int] = set()
        self._closed = False

    def open(self) -> None:
        """Reach the receiver; `LinkUp` or `LinkDown` follows."""
        if self._pipe is not None or self._closed:
            return
        try:
            self._pipe = self._connect()
        except (OSError, Refused) as error:
            return self._down(error, by_peer=True)
        self._caller = Caller(wire.KIND, self._peer, self._sources.writer)
        self._expect = self._on_hello
        attempt = self._pipe
        self._reactor.later(self._sources.settings.handshake_s, lambda: self._time_is_up(attempt))
        self._send(Opening(self._caller.hello))

    def submit(self, order: Order) -> None:
        """Send an order, or keep it until there is somebody to send it to, or others go with it."""
        if self._closed:
            return self._sources.outbox.put(Failed(order.ticket, "the link is closed", quiescent=True))
        self._waiting.append(order)
        if self._pipe is None:
            self.open()
        elif not self._sources.gathering.keeps(self):
            self.send_waiting()

    def cancel(self, ticket: int) -> None:
        """End a ticket soon."""
        if ticket in self._sent and self._pipe is not None:
            self._pipe.send(wire.encode(Cancel(ticket)))
            self._reactor.later(self._sources.settings.cancel_patience_s, lambda: self._expire(ticket))
        elif any(ticket == order.ticket for order in self._waiting):
            self._waiting = deque(order for order in self._waiting if order.ticket != ticket)
            self._sources.outbox.put(Failed(ticket, "cancelled", quiescent=True))

    def close(self) -> None:
        """End the tickets; the connection stays a little until the receiver says that it has stopped."""
        if self._closed:
            return
        self._closed = True
        self._fail_all(f"{self._peer}: the link was closed", quiescent=False)
        if self._pipe is None or not self._loose:
            return self.bury()
        self._reactor.later(self._sources.settings.cancel_patience_s, self.bury)
        self._pipe.finish()

    def bury(self) -> None:
        """Wait for the receiver no longer. May be called twice."""
        self._closed = self.is_over = True
        self._fail_all("the link was closed", quiescent=False)
        self._loose.clear()
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    # What comes over the connection

    def received(self, message: Message, fds: list[int]) -> None:
        """What the receiver says.

        Raises:
            MalformedMessage: It breaks the rules.
            Refused: It is not the one we mean.
            OSError: Our regions cannot be handed over.
        """
        if fds:
            raise MalformedMessage("file descriptors that nobody asked for")
        self._expect(message)

    def ended(self, error: Exception, by_peer: bool) -> None:
        """The connection is gone. Its end by the receiver says that it has stopped to read and write."""
        self._pipe = None
        if self._closed:
            if by_peer:
                self._settle()
            return self.bury()
        self._down(error, by_peer)

    def _on_hello(self, message: Message) -> None:
        proof = self._caller.prove(said_in(message))
        self._expect = self._on_proof
        self._send(Opening(proof))

    def _on_proof(self, message: Message) -> None:
        self._caller.check(said_in(message))
        self._expect = self._on_ready
        self._hand_over()

    def _on_ready(self, message: Message) -> None:
        if not isinstance(message, Ready):
            raise MalformedMessage("is not ready")
        self._expect = self._on_end
        self._sources.outbox.put(LinkUp(self._number))
        self.send_waiting()

    def _on_end(self, message: Message) -> None:
        if not isinstance(message, End | Ends):
            raise MalformedMessage("says something else than how a ticket ended")
        for end in message.ends if isinstance(message, Ends) else (message,):
            self._settle_one(end)
        self.send_waiting()

    def _settle_one(self, message: End) -> None:
        ticket = message.ticket
        if ticket in self._loose:
            self._loose.discard(ticket)
            self._sources.outbox.put(Quiesced(ticket))
        elif ticket not in self._sent:
            raise MalformedMessage("says how a ticket ended that is none")
        else:
            self._sent.discard(ticket)
            landed = message.verdict is Verdict.landed
            end = Done(ticket) if landed else Failed(ticket, message.verdict.reason, quiescent=True)
            self._sources.outbox.put(end)

    # Inside

    def _connect(self) -> Pipe:
        """Reach the receiver's socket, if it is on this host, ours to use and has our memory to read from.

        Raises:
            OSError: There is nobody, or there are too many before us.
            Refused: It cannot work.
        """
        if self._peer.host != hosts.boot_id():
            raise Refused("the peer is on another host (its boot id is another)")
        for region in self._sources.regions.values():
            if region.fd is None:
                raise Refused(
                    f"our region {region.number} is not in shared memory: a pool that allocates its blocks is, "
                    "one of adopted arrays is not"
                )
        sock = hosts.seqpacket()
        try:
            sock.connect("\0" + self._peer.socket)
            uid = hosts.peer_uid(sock)
            if uid != os.geteuid() and not self._sources.settings.any_uid:
                raise Refused(f"the peer is another user (uid {uid})")
            return Pipe(self._reactor, sock, self)
        except BaseException:
            sock.close()
            raise

    def _hand_over(self) -> None:
        """Give the receiver our regions, for reading only."""
        regions = sorted(self._sources.regions.values(), key=lambda region: region.number)
        places = tuple(Place(region.number, region.fd_offset, len(region.buffer)) for region in regions)
        fds: list[int] = []
        try:
            for region in regions:
                if region.fd is not None:
                    fds.append(hosts.read_only(region.fd))
        except OSError:
            for fd in fds:
                os.close(fd)
            raise
        self._send(Regions(places), fds)

    def _send(self, message: Message, fds: list[int] | None = None) -> None:
        if self._pipe is not None:
            self._pipe.send(wire.encode(message), fds or [])

    def send_waiting(self) -> None:
        """Send the orders that wait, as many as may be unanswered."""
        if not self._waiting or self._expect != self._on_end or self._closed:
            return
        room = wire.MAX_ORDERS - len(self._sent) - len(self._loose)
        orders = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        self._sent.update(order.ticket for order in orders)
        for message in wire.pack_orders(orders):
            self._send(message)

    def _down(self, error: Exception, by_peer: bool) -> None:
        """Nothing can be sent any more; an order that comes later makes a new connection."""
        self._expect = self._on_hello
        reason = f"{self._peer}: {getattr(error, 'strerror', None) or error}"
        self._sources.outbox.put(LinkDown(self._number, reason))
        self._fail_all(reason, quiescent=by_peer)
        if by_peer:
            self._settle()
        self._loose.clear()

    def _fail_all(self, reason: str, quiescent: bool) -> None:
        waiting, self._waiting = self._waiting, deque()
        sent, self._sent = self._sent, set()
        self._sources.outbox.put(*(Failed(order.ticket, reason, quiescent=True) for order in waiting))
        self._sources.outbox.put(*(Failed(ticket, reason, quiescent=quiescent) for ticket in sorted(sent)))
        if not quiescent:
            self._loose |= sent

    def _settle(self) -> None:
        """The receiver has stopped, whatever we said of its orders."""
        loose, self._loose = self._loose, set()
        self._sources.outbox.put(*map(Quiesced, sorted(loose)))

    def _expire(self, ticket: int) -> None:
        """The receiver had time enough to answer a cancel. What it still copies is nobody's: the fence holds it off."""
        if ticket in self._sent:
            self._sent.discard(ticket)
            self._loose.add(ticket)
            waited_s = self._sources.settings.cancel_patience_s
            reason = f"cancelled; the receiver has not said so within {waited_s:g} s"
            self._sources.outbox.put(Failed(ticket, reason, quiescent=False))

    def _time_is_up(self, attempt: Pipe) -> None:
        """The handshake had its time."""
        if self._pipe is attempt and self._expect != self._on_end and not self._closed:
            attempt.close()
            self.ended(Refused("the peer did not answer in time"), by_peer=False)
