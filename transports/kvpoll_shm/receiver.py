"""The receiving side: lets senders in, maps their arenas, and copies what they order into ours."""

from __future__ import annotations

import logging
import os
import socket
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from kvpoll_common.door import UNFINISHED, Door, Refused, note_stranger
from kvpoll_common.handshake import Called, said_in
from kvpoll_common.loop import Reactor
from kvpoll_fsm.errors import MalformedMessage
from kvpoll_shm import hosts, wire
from kvpoll_shm.copying import SLICE_NBYTES, Copying, Landing
from kvpoll_shm.handshake import Descriptor
from kvpoll_shm.pipe import Pipe
from kvpoll_shm.settings import ShmSettings
from kvpoll_shm.wire import Cancel, End, Ends, Message, Opening, Order, Orders, Ready, Regions, Verdict

__all__ = ["Listener"]

_log = logging.getLogger("kvpoll_shm")


class Listener:
    """The socket that senders connect to, and all who did. Used by the reactor's thread alone.

    Attributes:
        door: Whom we let in.
    """

    def __init__(self, identity: Descriptor, landing: Landing, settings: ShmSettings, reactor: Reactor) -> None:
        self.identity = identity
        self.landing = landing
        self.settings = settings
        self.reactor = reactor
        most = {"max_strangers": settings.max_strangers, "max_known": settings.max_connections}
        self.door: Door[Visitor] = Door(reactor, landing.grants.refusals, self._welcome, **most)

    def start(self, listening: socket.socket) -> None:
        """Begin to accept; the socket is ours from here on."""
        self.door.open(listening)

    def stop(self) -> None:
        """End the socket and all connections: nothing is read or written any more."""
        self.door.close()

    def _welcome(self, sock: socket.socket, address: Any) -> Visitor | None:
        try:
            uid = hosts.peer_uid(sock)
        except OSError:
            sock.close()
            return None
        if uid != os.geteuid() and not self.settings.any_uid:
            self.door.refusals.add("another user", f"uid={uid}")
            sock.close()
            return None
        return Visitor(self, sock)


class Visitor:
    """One connection: the handshake, then orders, copied one after the other."""

    def __init__(self, listener: Listener, sock: socket.socket) -> None:
        self._listener = listener
        self._closed = False
        self._expect: Callable[[Message, list[int]], None] = self._on_hello
        self._called = Called(wire.KIND, listener.identity)
        self._mappings: dict[int, hosts.Mapping] = {}
        self._orders: deque[tuple[int, Copying]] = deque()
        self._pipe = Pipe(listener.reactor, sock, self)
        listener.reactor.later(listener.settings.handshake_s, self._time_is_up)

    def received(self, message: Message, fds: list[int]) -> None:
        """What the sender says.

        Raises:
            MalformedMessage: It breaks the rules.
            Refused: He is not to be dealt with.
        """
        if fds and self._expect != self._on_regions:
            raise MalformedMessage("file descriptors that nobody asked for")
        self._expect(message, fds)

    def ended(self, error: Exception, by_peer: bool) -> None:
        """The connection is gone."""
        if self._expect != self._on_order:
            note_stranger(self._listener.door.refusals, error)
        else:
            _log.info("a connection ended: %s", error)
        self.close()

    def turn_away(self, error: Exception) -> None:
        """End the connection of one who is not to be dealt with."""
        self.ended(error, by_peer=False)

    def close(self) -> None:
        """Stop to copy, let go of the sender's memory, then end the connection: its end says that it is so."""
        self._closed = True
        for _, copying in self._orders:
            copying.leave()
        self._orders.clear()
        mappings, self._mappings = self._mappings, {}
        for mapping in mappings.values():
            mapping.close()
        self._pipe.close()
        self._listener.door.forget(self)

    # The handshake

    def _on_hello(self, message: Message, fds: list[int]) -> None:
        self._called.hear(said_in(message), self._say)
        self._expect = self._on_proof

    def _on_proof(self, message: Message, fds: list[int]) -> None:
        answer = self._called.check(said_in(message))
        self._listener.door.admit(self)
        self._expect = self._on_regions
        self._say(answer)

    def _say(self, said: bytes) -> None:
        self._pipe.send(wire.encode(Opening(said)))

    def _on_regions(self, message: Message, fds: list[int]) -> None:
        if not isinstance(message, Regions) or len(message.places) != len(fds):
            raise MalformedMessage("does not give its regions")
        for place, fd in zip(message.places, fds, strict=True):
            if place.region in self._mappings:
                raise MalformedMessage("gives a region twice")
            try:
                self._mappings[place.region] = hosts.Mapping(fd, place)
            except OSError as error:
                raise Refused("gives memory that cannot be mapped", str(error)) from error
        self._expect = self._on_order
        self._pipe.send(wire.encode(Ready()))

    def _time_is_up(self) -> None:
        if self._expect != self._on_order and not self._closed:
            self.turn_away(Refused(UNFINISHED))

    # Orders

    def _on_order(self, message: Message, fds: list[int]) -> None:
        if isinstance(message, Cancel):
            for ticket, copying in self._orders:
                copying.cancelled |= ticket == message.ticket
        elif isinstance(message, Order):
            self._take([message])
        elif isinstance(message, Orders):
            self._take(message.orders)
        else:
            raise MalformedMessage("neither an order nor a cancel")

    def _take(self, orders: Sequence[Order]) -> None:
        if len(self._orders) + len(orders) > wire.MAX_ORDERS:
            raise MalformedMessage("too many orders at once")
        if not self._orders:
            self._listener.reactor.work(self._step)
        sources = {region: mapping.view for region, mapping in self._mappings.items()}
        for order in orders:
            copying = Copying(order, self._called.writer, sources, self._listener.landing)
            self._orders.append((order.ticket, copying))

    def _step(self) -> bool:
        """Copy a slice of the oldest order, and small ones after it up to a slice; answer those that are over."""
        ends: list[End] = []
        left_nbytes = SLICE_NBYTES
        while self._orders and left_nbytes > 0:
            ticket, copying = self._orders[0]
            left_nbytes += copying.moved_nbytes
            verdict = self._verdict(copying)
            left_nbytes -= copying.moved_nbytes
            if verdict is None:
                break
            self._orders.popleft()
            ends.append(End(ticket, verdict))
        if ends:
            self._pipe.send(wire.encode(ends[0] if len(ends) == 1 else Ends(tuple(ends))))
        return bool(self._orders)

    def _verdict(self, copying: Copying) -> Verdict | None:
        try:
            return copying.advance()
        except MalformedMessage as error:
            self.turn_away(error)
        except Exception as error:  # a mistake of ours: this connection ends, the others go on
            # Logged as text: a record that keeps the traceback would keep the arenas' memory in use.
            _log.error("a connection is given up:\n%s", traceback.format_exc())
            self.turn_away(error)
        return None
