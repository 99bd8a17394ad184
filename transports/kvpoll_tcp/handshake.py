"""Who a receiver is, and how both sides prove to each other that they know its secret, before anything else is read.

Without TLS, what follows on the connection is neither encrypted nor signed.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from typing import Annotated

import msgspec
from msgspec import Meta

from kvpoll_common.addresses import require_numeric
from kvpoll_common.handshake import (
    HELLO_NBYTES,
    PROOF_NBYTES,
    WRITER_NBYTES,
    Called,
    Caller,
    Incarnation,
    Secret,
    decode_descriptor,
    fresh,
)
from kvpoll_tcp import wire
from kvpoll_tcp.contexts import FINGERPRINT_NBYTES
from kvpoll_tcp.sockets import Sock, receive_exactly, receive_timeout, send_timeout
from kvpoll_tcp.tls import TlsSocket, check_fingerprint

__all__ = ["Descriptor", "call_securely", "meet", "new_identity", "prove_to_receiver", "read_descriptor"]


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
    secret: Secret
    tls: Annotated[bytes, Meta(max_length=FINGERPRINT_NBYTES)] = b""

    def __post_init__(self) -> None:
        require_numeric(self.host)
        if len(self.tls) not in (0, FINGERPRINT_NBYTES):
            raise ValueError("its certificate's fingerprint is cut")

    def __repr__(self) -> str:
        return f"Descriptor({self})"

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def new_identity(host: str, port: int, tls: bytes = b"") -> Descriptor:
    """A descriptor with a fresh secret and incarnation."""
    return Descriptor(wire.KIND.version, host, port, *fresh(), tls)


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


def prove_to_receiver(sock: Sock, peer: Descriptor, within_s: float, writer: bytes = bytes(WRITER_NBYTES)) -> None:
    """The sender's half: prove ourselves and check the receiver's proof.

    Args:
        sock: The connection.
        peer: Whom we mean.
        within_s: How long it may take.
        writer: The number of our transport.

    Raises:
        Broken: It takes too long.
        Refused: The peer is another one, speaks another version or has another secret.
        MalformedMessage: Whoever answers does not speak this protocol.
        OSError: As the socket says.
    """
    deadline = time.monotonic() + within_s
    send_timeout(sock, within_s)
    caller = Caller(wire.KIND, peer, writer)
    sock.sendall(caller.hello, socket.MSG_NOSIGNAL)
    sock.sendall(caller.prove(receive_exactly(sock, HELLO_NBYTES, deadline)), socket.MSG_NOSIGNAL)
    caller.check(receive_exactly(sock, PROOF_NBYTES, deadline))


def meet(sock: Sock, identity: Descriptor, within_s: float, admit: Callable[[], None]) -> bytes:
    """The receiver's half; the socket waits for ever in calls afterwards.

    Args:
        sock: The connection.
        identity: Ours.
        within_s: How long it may take.
        admit: Called once the visitor has proved himself; may turn him away all the same.

    Returns:
        The number of the transport that he is.

    Raises:
        Broken: He takes too long.
        Refused: He does not know our secret, means another one, or speaks another version.
        MalformedMessage: He does not speak this protocol.
        OSError: As the socket says.
    """
    deadline = time.monotonic() + within_s
    send_timeout(sock, within_s)
    called = Called(wire.KIND, identity)
    hello = receive_exactly(sock, HELLO_NBYTES, deadline)
    called.hear(hello, lambda ours: sock.sendall(ours, socket.MSG_NOSIGNAL))
    answer = called.check(receive_exactly(sock, PROOF_NBYTES, deadline))
    admit()
    receive_timeout(sock, 0)
    send_timeout(sock, 0)
    sock.sendall(answer, socket.MSG_NOSIGNAL)
    return called.writer


def read_descriptor(data: bytes) -> Descriptor:
    """Read a descriptor.

    Raises:
        InvalidInput: It is none, or of another version.
    """
    return decode_descriptor(data, wire.KIND, Descriptor)
