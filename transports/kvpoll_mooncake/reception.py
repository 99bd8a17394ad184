"""The receiving side's desk: lets writers' adapters in, and passes on what they ask."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from kvpoll_common.door import UNFINISHED, Door, Refused, note_stranger
from kvpoll_common.handshake import Called, said_in
from kvpoll_common.loop import Reactor
from kvpoll_fsm.errors import MalformedMessage
from kvpoll_fsm.refusals import Refusals
from kvpoll_mooncake import wire
from kvpoll_mooncake.handshake import Descriptor
from kvpoll_mooncake.keeper import Keeper, Visit
from kvpoll_mooncake.settings import MooncakeSettings
from kvpoll_mooncake.stream import Stream
from kvpoll_mooncake.wire import Ask, Doubt, Message, Opening, Over, Ping, Pong

__all__ = ["Reception"]


class Reception:
    """The socket that writers' adapters connect to, and all who did. Used by the reactor's thread alone.

    Attributes:
        keeper: Has the engine; set before `start`.
        door: Whom we let in.
    """

    def __init__(self, identity: Descriptor, settings: MooncakeSettings, reactor: Reactor, refusals: Refusals) -> None:
        """Store what is needed."""
        self.identity = identity
        self.settings = settings
        self.reactor = reactor
        self.keeper: Keeper | None = None
        most = {"max_strangers": settings.max_strangers, "max_known": settings.max_connections}
        self.door: Door[Visitor] = Door(reactor, refusals, self._welcome, **most)

    def start(self, listening: socket.socket) -> None:
        """Begin to accept; the socket is ours from here on."""
        self.door.open(listening)

    def stop(self) -> None:
        """End the socket and all connections."""
        self.door.close()

    def tell_all(self, message: Message) -> None:
        """Tell all writers."""
        for visitor in list(self.door.known):
            visitor.tell(message)

    def forget(self, visitor: Visitor) -> None:
        """A connection has ended."""
        self.door.forget(visitor)
        if self.keeper is not None:
            self.keeper.forget(visitor)

    def _welcome(self, sock: socket.socket, address: Any) -> Visitor:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Visitor(self, sock, str(address[0]))


class Visitor:
    """One connection: the handshake, then questions.

    Attributes:
        writer: The number of the transport that he is.
    """

    def __init__(self, reception: Reception, sock: socket.socket, address: str) -> None:
        self.writer = b""
        self._reception = reception
        self._address = address
        self._closed = False
        self._expect: Callable[[Message], None] = self._on_hello
        self._called = Called(wire.KIND, reception.identity)
        self._visits: dict[int, Visit] = {}
        self._asked: set[int] = set()
        self._stream = Stream(reception.reactor, sock, self, wire.FRAME_NBYTES)
        reception.reactor.later(reception.settings.connect_s, self._time_is_up)

    def received(self, frame: bytes) -> None:
        """What the writer's adapter says.

        Raises:
            MalformedMessage: It breaks the rules.
            Refused: It is not to be dealt with.
        """
        self._expect(wire.decode(frame))

    def ended(self, error: Exception) -> None:
        """The connection is gone, or is to end."""
        if self._expect != self._on_message:
            note_stranger(self._reception.door.refusals, error, self._address)
        elif isinstance(error, (MalformedMessage, Refused)):
            self._reception.door.refusals.add("broke the rules of the protocol", f"{self._address}: {error}")
        self.close()

    def turn_away(self, error: Exception) -> None:
        """End the connection of one who is not to be dealt with."""
        self.ended(error)

    def close(self) -> None:
        """End the connection. What the writer has under way may land all the same."""
        if self._closed:
            return
        self._closed = True
        self._stream.close()
        self._reception.forget(self)

    # Answers

    def tell(self, message: Message) -> None:
        """Answer him."""
        if isinstance(message, wire.No):
            self._asked.discard(message.ticket)
        self._stream.send(wire.encode(message))

    def entered(self, visit: Visit) -> None:
        """He may write."""
        self._asked.discard(visit.ticket)
        self._visits[visit.ticket] = visit

    def left(self, visit: Visit) -> None:
        """He may not any more, and cannot."""
        self._visits.pop(visit.ticket, None)

    # What he says

    def _on_hello(self, message: Message) -> None:
        self._called.hear(said_in(message), self._say)
        self._expect = self._on_proof

    def _on_proof(self, message: Message) -> None:
        answer = self._called.check(said_in(message))
        self._reception.door.admit(self)
        self.writer = self._called.writer
        self._expect = self._on_message
        self._say(answer)
        if self._reception.keeper is not None and self._reception.keeper.current is not None:
            self.tell(self._reception.keeper.current)

    def _say(self, said: bytes) -> None:
        self.tell(Opening(said))

    def _on_message(self, message: Message) -> None:
        keeper = self._reception.keeper
        if keeper is None:
            return
        if isinstance(message, Ask):
            self._ask(keeper, message)
        elif isinstance(message, Over):
            self._over(keeper, message)
        elif isinstance(message, Doubt):
            if keeper.current is not None and keeper.current.number == message.engine:
                keeper.doubt(self)
        elif isinstance(message, Ping):
            self.tell(Pong())
        else:
            raise MalformedMessage("says what only a receiver says")

    def _ask(self, keeper: Keeper, ask: Ask) -> None:
        if ask.ticket in self._visits or ask.ticket in self._asked:
            raise MalformedMessage("asks twice for a ticket")
        if len(self._visits) + len(self._asked) >= 2 * wire.MAX_TICKETS:
            raise MalformedMessage("asks for too many tickets at once")
        wire.unpack_ranges(ask.ranges)
        self._asked.add(ask.ticket)
        keeper.ask(self, ask)

    def _over(self, keeper: Keeper, over: Over) -> None:
        """A ticket has ended; one whose engine has ended before is none of ours any more."""
        visit = self._visits.get(over.ticket)
        if visit is None:
            self._asked.discard(over.ticket)
            keeper.withdraw(self, over.ticket)
        elif over.quiescent:
            del self._visits[over.ticket]
            keeper.leave(visit)
        else:
            keeper.doubt(None)

    def _time_is_up(self) -> None:
        if self._expect != self._on_message and not self._closed:
            self.ended(Refused(UNFINISHED))
