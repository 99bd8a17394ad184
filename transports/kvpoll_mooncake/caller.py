"""The sender's end of the connection between two adapters: reaches the peer's, proves itself, notices silence."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from typing import Protocol

from kvpoll_common import handshake
from kvpoll_common.loop import Reactor
from kvpoll_fsm.errors import MalformedMessage
from kvpoll_mooncake import wire
from kvpoll_mooncake.handshake import Descriptor
from kvpoll_mooncake.settings import MooncakeSettings
from kvpoll_mooncake.stream import Stream
from kvpoll_mooncake.wire import Message, Opening, Ping

__all__ = ["Caller", "Hearer"]


class Hearer(Protocol):
    """Whom the connection belongs to."""

    def proved(self) -> None:
        """Both sides have proved themselves: questions may be asked."""
        ...

    def told(self, message: Message) -> None:
        """The peer's adapter says something.

        Raises:
            MalformedMessage: It should not.
        """
        ...

    def hung_up(self, reason: str) -> None:
        """The connection has ended, or the peer's adapter has been silent for too long."""
        ...

    def is_waiting(self) -> bool:
        """Something has been asked and not been answered: silence counts."""
        ...


class Caller:
    """One connection. Used by the reactor's thread alone."""

    def __init__(
        self, reactor: Reactor, peer: Descriptor, writer: bytes, settings: MooncakeSettings, hearer: Hearer
    ) -> None:
        """Store what is needed.

        Args:
            reactor: The thread's.
            peer: Whom we mean.
            writer: The number of our transport.
            settings: How long things may take.
            hearer: Whom the connection belongs to.
        """
        self._reactor = reactor
        self._peer = peer
        self._caller = handshake.Caller(wire.KIND, peer, writer)
        self._settings = settings
        self._hearer = hearer
        self._stream: Stream | None = None
        self._expect: Callable[[Message], None] = self._on_hello
        self._heard_at = 0.0
        self._pinged = False

    def open(self) -> bool:
        """Reach the peer's adapter; False if there is no way to it, which its owner has been told."""
        try:
            sock = self._connect()
        except OSError as error:
            self._hearer.hung_up(f"cannot be reached: {error.strerror or error}")
            return False
        self._stream = Stream(self._reactor, sock, self, wire.FRAME_NBYTES)
        self._stream.send(wire.encode(Opening(self._caller.hello)))
        self._reactor.later(self._settings.connect_s, self._time_is_up)
        return True

    def _connect(self) -> socket.socket:
        flags = socket.AI_NUMERICHOST
        found = socket.getaddrinfo(self._peer.host, self._peer.port, type=socket.SOCK_STREAM, flags=flags)
        family, kind, _, _, address = found[0]
        sock = socket.socket(family, kind)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(BlockingIOError):
                sock.connect(address)
        except OSError:
            sock.close()
            raise
        return sock

    def tell(self, message: Message) -> None:
        """Say something."""
        if self._stream is not None:
            self._stream.send(wire.encode(message))

    def close(self) -> None:
        """End the connection; nobody is told. May be called twice."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def asked(self) -> None:
        """Something was asked: from now on silence counts."""
        if not self._pinged:
            self._pinged = True
            self._heard_at = time.monotonic()
            self._reactor.later(self._settings.answer_s / 2, self._listen)

    # What comes

    def received(self, frame: bytes) -> None:
        """The peer's adapter says something.

        Raises:
            MalformedMessage: It breaks the rules.
            Refused: It is not the one we mean.
        """
        self._heard_at = time.monotonic()
        self._expect(wire.decode(frame))

    def ended(self, error: Exception) -> None:
        """The connection is gone."""
        self._stream = None
        number = error.errno if isinstance(error, OSError) else None
        self._hearer.hung_up(os.strerror(number) if number is not None else str(error))

    def _on_hello(self, message: Message) -> None:
        proof = self._caller.prove(handshake.said_in(message))
        self._expect = self._on_proof
        self.tell(Opening(proof))

    def _on_proof(self, message: Message) -> None:
        self._caller.check(handshake.said_in(message))
        self._expect = self._on_message
        self._hearer.proved()

    def _on_message(self, message: Message) -> None:
        if isinstance(message, Opening):
            raise MalformedMessage("introduces itself twice")
        if not isinstance(message, wire.Pong):
            self._hearer.told(message)

    def _time_is_up(self) -> None:
        if self._stream is not None and self._expect != self._on_message:
            self._give_up(f"the peer's adapter did not answer within {self._settings.connect_s:g} s")

    def _listen(self) -> None:
        """Look whether the peer has said anything; ask it to, before giving up."""
        self._pinged = False
        if self._stream is None or not self._hearer.is_waiting():
            return
        if time.monotonic() - self._heard_at >= self._settings.answer_s:
            return self._give_up(f"the peer's adapter has been silent for {self._settings.answer_s:g} s")
        heard_at = self._heard_at
        self.tell(Ping())
        self._pinged = True
        self._heard_at = heard_at
        self._reactor.later(self._settings.answer_s / 2, self._listen)

    def _give_up(self, reason: str) -> None:
        self.close()
        self._hearer.hung_up(reason)
