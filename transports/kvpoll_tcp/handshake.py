"""Both sides prove that they know the descriptor's secret, before anything else is read.

Each proof covers both nonces and the prover's role, so that neither an old conversation nor the other side's
own proof can be played back. Without TLS, what follows on the connection is neither encrypted nor signed.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
import socket
import ssl
import time
from typing import Annotated

import msgspec
from msgspec import Meta

from kvpoll_fsm.errors import MalformedMessage
from kvpoll_tcp import wire
from kvpoll_tcp.contexts import FINGERPRINT_NBYTES
from kvpoll_tcp.sockets import Broken, Refused, Sock, receive_exactly, receive_timeout, send_timeout
from kvpoll_tcp.tls import TlsSocket, check_fingerprint

__all__ = ["Descriptor", "Visitor", "call_securely", "new_identity", "prove_to_receiver", "read_descriptor"]

WRONG_SECRET = "does not know our secret"

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
        tls: SHA-256 of the certificate shown at that port; empty if it speaks no TLS.
    """

    version: int
    host: Annotated[str, Meta(min_length=1, max_length=64)]
    port: Annotated[int, Meta(ge=1, lt=1 << 16)]
    incarnation: Incarnation
    secret: Annotated[bytes, Meta(min_length=32, max_length=32)]
    tls: Annotated[bytes, Meta(max_length=FINGERPRINT_NBYTES)] = b""

    def __repr__(self) -> str:
        return f"Descriptor({self})"

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def new_identity(host: str, port: int, tls: bytes = b"") -> Descriptor:
    """A descriptor with a fresh secret and incarnation."""
    incarnation = secrets.token_bytes(wire.INCARNATION_NBYTES)
    return Descriptor(wire.VERSION, host, port, incarnation, secrets.token_bytes(32), tls)


def _proof(secret: bytes, role: bytes, sender: wire.Hello, receiver: wire.Hello) -> bytes:
    return hmac.new(secret, role + sender.pack() + receiver.pack(), hashlib.sha256).digest()


def call_securely(sock: socket.socket, peer: Descriptor, context: ssl.SSLContext, within_s: float) -> TlsSocket:
    """Begin TLS with the receiver whose descriptor we have.

    Raises:
        Broken: It is another one, or takes too long.
        OSError: As TLS or the socket says.
    """
    secured = TlsSocket(sock, context, server_side=False, hostname=peer.host)
    secured.shake_hands(time.monotonic() + within_s)
    check_fingerprint(secured, peer.tls)
    return secured


def prove_to_receiver(sock: Sock, peer: Descriptor, within_s: float, writer: bytes = bytes(wire.WRITER_NBYTES)) -> None:
    """The sender's half: prove ourselves and check the receiver's proof.

    Args:
        sock: The connection.
        peer: Whom we mean.
        within_s: How long it may take.
        writer: The number of our transport.

    Raises:
        Broken: The peer is another one, speaks another version, has another secret or takes too long.
        MalformedMessage: Whoever answers does not speak this protocol.
        OSError: As the socket says.
    """
    deadline = time.monotonic() + within_s
    send_timeout(sock, within_s)
    ours = wire.Hello(wire.VERSION, peer.incarnation, secrets.token_bytes(wire.NONCE_NBYTES), writer)
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
    """The receiver's half, in two steps so that the caller may turn away one who did prove himself.

    Attributes:
        writer: The number of the transport that he is.
    """

    def __init__(self, sock: Sock, identity: Descriptor) -> None:
        self.writer = b""
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
            raise Refused("speaks another version of the wire format", f"{theirs.version}, we speak {wire.VERSION}")
        if theirs.incarnation != self._identity.incarnation:
            raise Refused("means another start of this endpoint, or another endpoint")
        proof = receive_exactly(self._socket, _PROOF_NBYTES, deadline)
        if not hmac.compare_digest(proof, _proof(self._identity.secret, _SENDER, theirs, ours)):
            raise Refused(WRONG_SECRET)
        self.writer = theirs.writer
        self._answer = _proof(self._identity.secret, _RECEIVER, theirs, ours)

    def welcome(self) -> None:
        """Prove ourselves in turn. The socket waits for ever in calls from here on.

        Raises:
            OSError: As the socket says.
        """
        receive_timeout(self._socket, 0)
        send_timeout(self._socket, 0)
        self._socket.sendall(self._answer, socket.MSG_NOSIGNAL)


_INTERFACE = re.compile(r"[A-Za-z0-9_-]{1,15}(\.[A-Za-z0-9_-]{1,15})*")


def read_descriptor(data: bytes) -> Descriptor:
    """Read a descriptor.

    Raises:
        MalformedMessage: It is none, or of another version.
    """
    try:
        descriptor = msgspec.msgpack.decode(data, type=Descriptor)
        scope = getattr(ipaddress.ip_address(descriptor.host), "scope_id", None)
        if scope is not None and not _INTERFACE.fullmatch(scope):
            raise ValueError("an interface of an odd name")
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors too
        raise MalformedMessage(f"no descriptor of a tcp transport: {error}") from error
    if len(descriptor.tls) not in (0, FINGERPRINT_NBYTES):
        raise MalformedMessage("no descriptor of a tcp transport: its certificate's fingerprint is cut")
    if descriptor.version != wire.VERSION:
        raise MalformedMessage(
            f"the peer speaks version {descriptor.version} of the tcp wire format, we speak {wire.VERSION}"
        )
    return descriptor
