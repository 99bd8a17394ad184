"""The settings of the transport, checked before anything is opened."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from kvpoll_fsm.errors import AddressError, InvalidInput

__all__ = ["TcpSettings"]


@dataclass(frozen=True, slots=True)
class TcpSettings:
    """How a `TcpTransport` listens, connects and gives up.

    Attributes:
        host: The address to listen on, IPv4 or IPv6, or a name that stands for one of this machine's.
        advertise: Where peers reach us, as `host`, `host:port` or `[IPv6]:port`, if that is another address
            (containers, address translation). Needed if `host` is a wildcard.
        data_ports: The first and the last port to try; None takes any free one.
        streams: Connections per link. Tickets go to the one with the least to do.
        max_connections: Most connections from peers at a time.
        max_strangers: Most connections that have not proved themselves yet; the oldest makes room.
        connect_s: How long reaching the peer may take.
        handshake_s: How long the mutual proof may take, on either side.
        cancel_patience_s: How long a peer may stand still while a ticket is to end early; then the connection
            is given up.
        dead_peer_s: How long a peer's machine may be silent, or take no byte; then likewise.
        buffer_nbytes: Kernel buffer per direction. None: 1 MiB within one machine, else the kernel's choice.

    Raises:
        AddressError: A wildcard or multicast address nobody could connect to.
        InvalidInput: A setting out of its range.
    """

    host: str = "127.0.0.1"
    advertise: str | None = None
    data_ports: tuple[int, int] | None = None
    streams: int = 1
    max_connections: int = 256
    max_strangers: int = 32
    connect_s: float = 5.0
    handshake_s: float = 5.0
    cancel_patience_s: float = 2.0
    dead_peer_s: float = 30.0
    buffer_nbytes: int | None = None

    def __post_init__(self) -> None:
        if self.advertise is None:
            require_reachable(self.host, "tell peers where with advertise=")
        else:
            require_reachable(split_advertised(self.advertise)[0], "advertise one that peers can reach")
        if self.data_ports is not None:
            low, high = self.data_ports
            if not 0 < low <= high < 1 << 16:
                raise InvalidInput(f"data_ports={self.data_ports!r}: give (first, last) within 1 to 65535")
        for name in ("streams", "max_connections", "max_strangers"):
            if not 1 <= getattr(self, name) <= 1 << 16:
                raise InvalidInput(f"{name}={getattr(self, name)!r}: give an integer of at least 1")
        for name in ("connect_s", "handshake_s", "cancel_patience_s", "dead_peer_s"):
            if not 0 < getattr(self, name) <= 86_400:
                raise InvalidInput(f"{name}={getattr(self, name)!r}: give seconds above 0")
        if self.buffer_nbytes is not None and not 4096 <= self.buffer_nbytes < 1 << 30:
            raise InvalidInput(f"buffer_nbytes={self.buffer_nbytes!r}: give at least 4096")


def require_reachable(host: str, advice: str) -> None:
    """Refuse an address that nobody could connect to; a name passes.

    Raises:
        AddressError: Empty, a wildcard or multicast.
    """
    try:
        address = ipaddress.ip_address(host or "0.0.0.0")
    except ValueError:
        return
    if address.is_unspecified or address.is_multicast:
        raise AddressError(host, f"nobody can connect to it: {advice}")


def split_advertised(text: str) -> tuple[str, int | None]:
    """Read `host`, `host:port`, `[IPv6]:port` or a bare IPv6 address.

    Raises:
        AddressError: None of these.
    """
    host, port = text, ""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise AddressError(text, "write [IPv6]:port")
        port = rest[1:]
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    if not port:
        return host, None
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise AddressError(text, f"{port!r} is no port")
    return host, int(port)
