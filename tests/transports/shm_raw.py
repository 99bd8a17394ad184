"""The shm protocol by hand, for tests of what a well-behaved peer would not do."""

from __future__ import annotations

import array
import os
import select
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from kvpoll_common import handshake
from kvpoll_fsm.spi import LinkDown, Transport
from kvpoll_fsm.testing.conformance.sides import Pair, until
from kvpoll_shm import hosts, wire
from kvpoll_shm.copying import Copying
from kvpoll_shm.handshake import read_descriptor as read_descriptor


def changed(transport: Transport, **changes: Any) -> bytes:
    """The transport's descriptor, but for some of it."""
    descriptor = msgspec.msgpack.decode(transport.descriptor())
    return msgspec.msgpack.encode({**descriptor, **changes})


class Peer:
    """One end of a connection, that waits."""

    def __init__(self, sock: socket.socket, pump: Callable[[], None] = lambda: None) -> None:
        """`pump` lets the transport at the other end do its part, while we wait for it."""
        self.socket = sock
        self.socket.settimeout(20)
        self._pump = pump

    def say(self, message: wire.Message | bytes, fds: Sequence[int] = ()) -> None:
        packet = message if isinstance(message, bytes) else wire.encode(message)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([packet], rights)

    def hear(self) -> wire.Message:
        return wire.decode(self.receive()[0])

    def receive(self) -> tuple[bytes, list[int]]:
        """A packet, empty at the end of the connection, and the file descriptors with it."""

        def is_here() -> list[Any]:
            self._pump()
            return select.select([self.socket], [], [], 0)[0]

        until(is_here, "a packet")
        packet, fds, _, _ = socket.recv_fds(self.socket, 1 << 20, 10)
        return packet, fds

    def is_cut(self) -> bool:
        """Whether the other side ends the connection, whatever it says before."""
        try:
            while self.socket.recv(1 << 20):
                pass
        except ConnectionResetError:
            pass
        return True

    def close(self) -> None:
        self.socket.close()


class Caller(Peer):
    """A sender, as far as one gets by hand."""

    def __init__(self, transport: Transport) -> None:
        self.identity = read_descriptor(transport.descriptor())
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect("\0" + self.identity.socket)
        super().__init__(sock)

    def greet(self) -> bytes:
        """Say hello; returns what is answered."""
        self.call = handshake.Caller(wire.KIND, self.identity, os.urandom(16))
        self.say(wire.Opening(self.call.hello))
        return handshake.said_in(self.hear())

    def prove(self) -> None:
        theirs = self.greet()
        self.say(wire.Opening(self.call.prove(theirs)))
        self.call.check(handshake.said_in(self.hear()))

    def hand_over(self, fd: int, nbytes: int) -> None:
        self.say(wire.Regions((wire.Place(0, 0, nbytes),)), [fd])

    def be_ready(self, fd: int, nbytes: int) -> None:
        self.prove()
        self.hand_over(fd, nbytes)
        assert isinstance(self.hear(), wire.Ready)


class Impostor(Peer):
    """A receiver that is called: use after `listen`."""

    @classmethod
    def listen(cls) -> tuple[socket.socket, str]:
        listening, name = hosts.listen()
        listening.settimeout(20)
        return listening, name

    @classmethod
    def accept(cls, listening: socket.socket, pump: Callable[[], None]) -> Impostor:
        return cls(listening.accept()[0], pump)


def down(pair: Pair, descriptor: bytes) -> str:
    """Why a link to this descriptor does not work."""
    link = pair.tx.transport.connect(descriptor, [])
    pair.until(lambda: pair.tx.links.get(link.number), "the news")
    (news,) = [seen for seen in pair.tx.seen if isinstance(seen, LinkDown) and seen.link == link.number]
    return news.reason


class Gate:
    """Holds the copying before each slice from `at` on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int = 0) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()
        self.slices = 0
        copy = Copying._copy

        def held(copying: Copying) -> Any:
            if self.slices >= at:
                self.reached.set()
                assert self.opened.wait(20)
            self.slices += 1
            return copy(copying)

        monkeypatch.setattr(Copying, "_copy", held)
