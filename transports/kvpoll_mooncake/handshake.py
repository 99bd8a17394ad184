"""Both adapters prove that they know the descriptor's secret, before anything else is taken.

Each proof covers both nonces and the prover's role, so that neither an old conversation nor the other side's own proof
can be played back. What follows on the connection is neither encrypted nor signed.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from typing import Annotated

import msgspec
from msgspec import Meta

from kvpoll_fsm.errors import InvalidInput
from kvpoll_mooncake import wire
from kvpoll_mooncake.wire import Hello, Proof

__all__ = ["RECEIVER", "SENDER", "Descriptor", "hello", "is_proof", "new_identity", "prove", "read_descriptor"]

SENDER, RECEIVER = b"kvpoll-mooncake sender", b"kvpoll-mooncake receiver"


class Descriptor(msgspec.Struct, frozen=True):
    """What a peer needs to connect. It travels over the control channel, which keeps it secret.

    Attributes:
        version: Wire version spoken.
        host: Numeric address of the adapter.
        port: Its port.
        incarnation: Which start of the transport; changes with every one, and not with those of its engines.
        secret: What both sides prove to know.
        protocol: What its engines speak: "tcp" or "rdma".
        metadata: How its engines are found.
    """

    version: int
    host: Annotated[str, Meta(min_length=1, max_length=64)]
    port: Annotated[int, Meta(ge=1, lt=1 << 16)]
    incarnation: Annotated[bytes, Meta(min_length=wire.INCARNATION_NBYTES, max_length=wire.INCARNATION_NBYTES)]
    secret: Annotated[bytes, Meta(min_length=32, max_length=32)]
    protocol: Annotated[str, Meta(max_length=16)]
    metadata: Annotated[str, Meta(max_length=256)]

    def __repr__(self) -> str:
        return f"Descriptor({self})"

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def new_identity(host: str, port: int, protocol: str, metadata: str) -> Descriptor:
    """A descriptor with a fresh secret and incarnation."""
    incarnation = secrets.token_bytes(wire.INCARNATION_NBYTES)
    return Descriptor(wire.VERSION, host, port, incarnation, secrets.token_bytes(32), protocol, metadata)


def read_descriptor(data: bytes) -> Descriptor:
    """Read a descriptor.

    Raises:
        InvalidInput: It is none, or of another version.
    """
    try:
        descriptor = msgspec.msgpack.decode(data, type=Descriptor)
        ipaddress.ip_address(descriptor.host)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors too
        raise InvalidInput(f"no descriptor of a mooncake transport: {error}") from error
    if descriptor.version != wire.VERSION:
        raise InvalidInput(f"the peer speaks version {descriptor.version} of mooncake, we speak {wire.VERSION}")
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
