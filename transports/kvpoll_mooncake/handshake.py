"""Who a receiver is: its secret is what both adapters prove to know, before anything else is taken.

What follows on the connection is neither encrypted nor signed.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from kvpoll_common.addresses import require_numeric
from kvpoll_common.handshake import Incarnation, Secret, decode_descriptor, fresh
from kvpoll_mooncake import wire

__all__ = ["Descriptor", "new_identity", "read_descriptor"]


class Descriptor(msgspec.Struct, frozen=True):
    """What a peer needs to connect. It travels over the control channel, which keeps it secret.

    Attributes:
        version: Wire version spoken.
        host: Numeric address of the adapter.
        port: Its port.
        incarnation: Which start of the transport; changes with every one, and not with those of its engines.
        secret: What both sides prove to know.
        protocol: What its engines speak: "tcp" or "rdma".
        metadata: How its engines are found, as `MooncakeSettings.directory` has it: peers log in as themselves.
    """

    version: int
    host: Annotated[str, Meta(min_length=1, max_length=64)]
    port: Annotated[int, Meta(ge=1, lt=1 << 16)]
    incarnation: Incarnation
    secret: Secret
    protocol: Annotated[str, Meta(max_length=16)]
    metadata: Annotated[str, Meta(max_length=256)]

    def __post_init__(self) -> None:
        require_numeric(self.host)

    def __repr__(self) -> str:
        return f"Descriptor({self})"

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def new_identity(host: str, port: int, protocol: str, metadata: str) -> Descriptor:
    """A descriptor with a fresh secret and incarnation."""
    return Descriptor(wire.KIND.version, host, port, *fresh(), protocol, metadata)


def read_descriptor(data: bytes) -> Descriptor:
    """Read a descriptor.

    Raises:
        InvalidInput: It is none, or of another version.
    """
    return decode_descriptor(data, wire.KIND, Descriptor)
