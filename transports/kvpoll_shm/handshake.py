"""Who a receiver is: its secret is what both sides prove to know, before a file descriptor or an order is taken."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from kvpoll_common.handshake import Incarnation, Secret, decode_descriptor, fresh
from kvpoll_shm import hosts, wire

__all__ = ["Descriptor", "new_identity", "read_descriptor"]


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
    incarnation: Incarnation
    secret: Secret

    def __repr__(self) -> str:
        return f"Descriptor({self})"

    def __str__(self) -> str:
        return self.socket


def new_identity(socket: str) -> Descriptor:
    """A descriptor of this host with a fresh secret and incarnation.

    Raises:
        OSError: The kernel does not say which host this is.
    """
    return Descriptor(wire.KIND.version, hosts.boot_id(), socket, *fresh())


def read_descriptor(data: bytes) -> Descriptor:
    """Read a descriptor.

    Raises:
        InvalidInput: It is none, or of another version.
    """
    return decode_descriptor(data, wire.KIND, Descriptor)
