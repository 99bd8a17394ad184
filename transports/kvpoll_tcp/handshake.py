"""Both sides prove that they know the descriptor's secret, before anything else is read.

Each proof covers both nonces and the prover's role, so that neither an old conversation nor the other side's
own proof can be played back. What follows on the connection is neither encrypted nor signed.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import socket
import time
from typing import Annotated

import msgspec
from msgspec import Meta

from kvpoll_fsm.errors import MalformedMessage
from kvpoll_tcp import wire
from kvpoll_tcp.sockets import Broken, receive_exactly, receive_timeout, send_timeout

__all__ = ["Descriptor", "Visitor", "new_identity", "prove_to_receiver", "read_descriptor"]

_PROOF_NBYTES = 32
_SENDER, _RECEIVER = b"kvpoll-tcp sender", b"kvpoll-tcp receiver"


Incarnation = Annotated[bytes, Meta(min_length=wire.INCARNATION_NBYTES, max_length=wire.INCARNATION_NBYTES)]


class Descriptor(msgspec.Struct, frozen=True):
    """What a peer needs to connect. It travels over the control channel, which keeps it secret.

    Attributes:
        version: Wire version spoken.
        host: Numeric address.
        port: Port of the listening socket.
        incarnation: Which start of the transport; changes with every one.
        secret: What both sides prove to know.
    """

    version: int
    host: Annotated[str, Meta(min_length=1, max_length=64)]
    port: Annotated[int, Meta(ge=1, lt=1 << 16)]
    incarnation: Incarnation
    secret: Annotated[bytes, Meta(min_length=32, max_length=32)]

    def __repr__(self) -> str:
        return f"Descriptor({self})"

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def new_identity(host: str, port: int) -> Descriptor:
    """A descriptor with a fresh secret and incarnation."""
    return Descriptor(wire.VERSION, host, port, secrets.token_bytes(wire.INCARNATION_NBYTES), secrets.token_bytes(32))


def _proof(secret: bytes, role: bytes, sender: wire.Hello, receiver: wire.Hello) -> bytes:
    return hmac.new(secret, role + sender.pack() + receiver.pack(), hashlib.sha256).digest()


def prove_to_receiver(sock: socket.socket, peer: Descriptor, within_s: float) -> None:
    """The sender's half: prove ourselves and check the receiver's proof.

    Raises:
        Broken: The peer is another one, speaks another version, has another secret or takes too long.
        MalformedMessage: Whoever answers does not speak this protocol.
        OSError: As the socket says.
    """
    deadline = time.monotonic() + within_s
    send_timeout(sock, within_s)
    ours = wire.Hello(wire.VERSION, peer.incarnation, secrets.token_bytes(wire.NONCE_NBYTES))
    sock.sendall(ours.pack(), socket.MSG_NOSIGNAL)
    theirs = wire.Hello.unpack(receive_exactly(sock, wire.HELLO_NBYTES, deadline))
    if theirs.version != wire.VERSION:
        raise Broken(f"the peer speaks version {theirs.version} of the tcp wire format, we speak {wire.VERSION}")
    if theirs.incarnation != peer.incarnation:
        raise Broken("another transport answers at the peer's address: the peer was restarted")
    sock.sendall(_proof(peer.secret, _SENDER, ours, theirs), socket.MSG_NOSIGNAL)
    answer = receive_exactly(sock, _PROOF_NBYTES, deadline)
    if not hmac.compare_digest(answer, _proof(peer.secret, _RECEIVER, ours, theirs)):
        raise Broken("whoever answers at the peer's address does not know the peer's secret")


class Visitor:
    """The receiver's half, in two steps so that the caller may turn away one who did prove himself."""

    def __init__(self, sock: socket.socket, identity: Descriptor) -> None:
        self._socket = sock
        self._identity = identity
        self._answer = b""

    def check(self, within_s: float) -> None:
        """Check that the visitor knows our secret.

        Raises:
            Broken: He does not, or takes too long.
            MalformedMessage: He does not speak this protocol.
            OSError: As the socket says.
        """
        deadline = time.monotonic() + within_s
        send_timeout(self._socket, within_s)
        theirs = wire.Hello.unpack(receive_exactly(self._socket, wire.HELLO_NBYTES, deadline))
        ours = wire.Hello(wire.VERSION, self._identity.incarnation, secrets.token_bytes(wire.NONCE_NBYTES))
        # Answered even where we part ways, so that the visitor can say why.
        self._socket.sendall(ours.pack(), socket.MSG_NOSIGNAL)
        if theirs.version != wire.VERSION:
            raise Broken(f"speaks version {theirs.version} of the wire format, we speak {wire.VERSION}")
        proof = receive_exactly(self._socket, _PROOF_NBYTES, deadline)
        if not hmac.compare_digest(proof, _proof(self._identity.secret, _SENDER, theirs, ours)):
            raise Broken("does not know our secret")
        self._answer = _proof(self._identity.secret, _RECEIVER, theirs, ours)

    def welcome(self) -> None:
        """Prove ourselves in turn. The socket waits for ever in calls from here on.

        Raises:
            OSError: As the socket says.
        """
        receive_timeout(self._socket, 0)
        send_timeout(self._socket, 0)
        self._socket.sendall(self._answer, socket.MSG_NOSIGNAL)


def read_descriptor(data: bytes) -> Descriptor:
    """Read a descriptor.

    Raises:
        MalformedMessage: It is none, or of another version.
    """
    try:
        descriptor = msgspec.msgpack.decode(data, type=Descriptor)
        ipaddress.ip_address(descriptor.host)
    except ValueError as error:  # msgspec's errors are ValueErrors too
        raise MalformedMessage(f"no descriptor of a tcp transport: {error}") from error
    if descriptor.version != wire.VERSION:
        raise MalformedMessage(
            f"the peer speaks version {descriptor.version} of the tcp wire format, we speak {wire.VERSION}"
        )
    return descriptor
