"""The shm protocol by hand, for tests of what a well-behaved peer would not do."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Sequence
from typing import Any

import msgspec

from kvpoll_fsm.spi import Transport
from kvpoll_shm import handshake, hosts, wire


def read_descriptor(data: bytes) -> handshake.Descriptor:
    return handshake.read_descriptor(data)


def changed(transport: Transport, **changes: Any) -> bytes:
    """The transport's descriptor, but for some of it."""
    descriptor = msgspec.msgpack.decode(transport.descriptor())
    return msgspec.msgpack.encode({**descriptor, **changes})


class Peer:
    """One end of a connection, that waits."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.socket.settimeout(20)

    def say(self, message: wire.Message | bytes, fds: Sequence[int] = ()) -> None:
        packet = message if isinstance(message, bytes) else wire.encode(message)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([packet], rights)

    def hear(self) -> wire.Message:
        return wire.decode(self.socket.recv(1 << 20))

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

    def greet(self) -> tuple[wire.Hello, wire.Hello]:
        ours = handshake.hello(self.identity.incarnation, os.urandom(16))
        self.say(ours)
        theirs = self.hear()
        assert isinstance(theirs, wire.Hello)
        return ours, theirs

    def prove(self) -> None:
        ours, theirs = self.greet()
        self.say(handshake.prove(self.identity.secret, handshake.SENDER, ours, theirs))
        assert isinstance(self.hear(), wire.Proof)

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
    def accept(cls, listening: socket.socket) -> Impostor:
        return cls(listening.accept()[0])
