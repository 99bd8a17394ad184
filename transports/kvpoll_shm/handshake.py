"""Both sides prove that they know the descriptor's secret, before a file descriptor or an order is taken.

Each proof covers both nonces and the prover's role, so that neither an old conversation nor the other side's
own proof can be played back.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Annotated

import msgspec
from msgspec import Meta

from kvpoll_fsm.errors import InvalidInput
from kvpoll_shm import hosts, wire
from kvpoll_shm.wire import Hello, Proof

__all__ = ["RECEIVER", "SENDER", "Descriptor", "hello", "is_proof", "new_identity", "prove", "read_descriptor"]

SENDER, RECEIVER = b"kvpoll-shm sender", b"kvpoll-shm receiver"


class Descriptor(msgspec.Struct, frozen=True):
    """What a peer needs to connect. It travels over the control channel, which keeps it secret.

    Attributes:
        version: Wire version spoken.
        host: Boot id of the host.
        socket: Name of the abstract unix socket, without the leading zero byte.
        incarnation: Which start of the transport; changes with every one.
        secret: What both sides prove to know.
    """

    version: int
    host: Annotated[str, Meta(min_length=1, max_length=64)]
    socket: Annotated[str, Meta(min_length=1, max_length=100)]
    incarnation: Annotated[bytes, Meta(min_length=wire.INCARNATION_NBYTES, max_length=wire.INCARNATION_NBYTES)]
    secret: Annotated[bytes, Meta(min_length=32, max_length=32)]

    def __repr__(self) -> str:
        return f"Descriptor({self})"

    def __str__(self) -> str:
        return self.socket


def new_identity(socket: str) -> Descriptor:
    """A descriptor of this host with a fresh secret and incarnation.

    Raises:
        OSError: The kernel does not say which host this is.
    """
    incarnation = secrets.token_bytes(wire.INCARNATION_NBYTES)
    return Descriptor(wire.VERSION, hosts.boot_id(), socket, incarnation, secrets.token_bytes(32))


def read_descriptor(data: bytes) -> Descriptor:
    """Read a descriptor.

    Raises:
        InvalidInput: It is none, or of another version.
    """
    try:
        descriptor = msgspec.msgpack.decode(data, type=Descriptor)
    except ValueError as error:  # msgspec's errors are ValueErrors too
        raise InvalidInput(f"no descriptor of a shm transport: {error}") from error
    if descriptor.version != wire.VERSION:
        raise InvalidInput(f"the peer speaks version {descriptor.version} of shm, we speak {wire.VERSION}")
    return descriptor


def hello(incarnation: bytes, writer: bytes = bytes(wire.WRITER_NBYTES)) -> Hello:
    """An introduction with a fresh nonce."""
    return Hello(wire.VERSION, incarnation, secrets.token_bytes(wire.NONCE_NBYTES), writer)


def prove(secret: bytes, role: bytes, sender: Hello, receiver: Hello) -> Proof:
    """What one in this role shows to prove that he knows the secret."""
    said = role + wire.encode(sender) + wire.encode(receiver)
    return Proof(hmac.new(secret, said, hashlib.sha256).digest())


def is_proof(shown: Proof, secret: bytes, role: bytes, sender: Hello, receiver: Hello) -> bool:
    """Whether whoever shows it knows the secret and has this role."""
    return hmac.compare_digest(shown.proof, prove(secret, role, sender, receiver).proof)
