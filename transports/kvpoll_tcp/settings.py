"""The settings of the transport, checked before anything is opened."""

from __future__ import annotations

from dataclasses import dataclass

from kvpoll_common.addresses import require_reachable, split_advertised
from kvpoll_fsm.errors import InvalidInput
from kvpoll_tcp.contexts import Contexts, check_contexts

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
        max_connections_per_peer: Most of them from one network address.
        max_strangers: Most connections that have not proved themselves yet; of the address that has most of them
            the oldest makes room.
        connect_s: How long reaching the peer may take.
        handshake_s: How long the mutual proof may take, on either side, with TLS or without.
        cancel_patience_s: How long a peer may stand still while a ticket is to end early; then the connection
            is given up.
        dead_peer_s: How long a peer's machine may be silent, or take no byte; then likewise.
        buffer_nbytes: Kernel buffer per direction. None: 1 MiB within one machine, else the kernel's choice.
        tls: (server context, client context), both `ssl.SSLContext`: connections are encrypted, and only with
            peers that have TLS too.

    Raises:
        AddressError: A wildcard or multicast address nobody could connect to.
        InvalidInput: A setting out of its range.
    """

    host: str = "127.0.0.1"
    advertise: str | None = None
    data_ports: tuple[int, int] | None = None
    streams: int = 1
    max_connections: int = 256
    max_connections_per_peer: int = 128
    max_strangers: int = 32
    connect_s: float = 5.0
    handshake_s: float = 5.0
    cancel_patience_s: float = 2.0
    dead_peer_s: float = 30.0
    buffer_nbytes: int | None = None
    tls: Contexts | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.host, str) or not isinstance(self.advertise, (str, type(None))):
            raise InvalidInput(f"host={self.host!r}, advertise={self.advertise!r}: give text")
        if self.advertise is None:
            require_reachable(self.host, "tell peers where with advertise=")
        else:
            require_reachable(split_advertised(self.advertise)[0], "advertise one that peers can reach")
        if self.data_ports is not None and not _are_ports(self.data_ports):
            raise InvalidInput(f"data_ports={self.data_ports!r}: give (first, last) within 1 to 65535")
        for name, (kind, least, most) in _RANGES.items():
            value = getattr(self, name)
            if not _is_number(value, kind) or not least <= value <= most:
                raise InvalidInput(f"{name}={value!r}: give {kind.__name__} from {least:g} to {most:g}")
        if self.buffer_nbytes is not None and not (
            _is_number(self.buffer_nbytes, int) and 4096 <= self.buffer_nbytes < 1 << 30
        ):
            raise InvalidInput(f"buffer_nbytes={self.buffer_nbytes!r}: give at least 4096")
        if self.tls is not None:
            host = self.host if self.advertise is None else split_advertised(self.advertise)[0]
            check_contexts(self.tls, host)


_COUNT = (int, 1, 1 << 16)
_SECONDS = (float, 1e-6, 86_400)
_RANGES: dict[str, tuple[type[int] | type[float], float, float]] = {
    "streams": _COUNT,
    "max_connections": _COUNT,
    "max_connections_per_peer": _COUNT,
    "max_strangers": _COUNT,
    "connect_s": _SECONDS,
    "handshake_s": _SECONDS,
    "cancel_patience_s": _SECONDS,
    "dead_peer_s": _SECONDS,
}


def _is_number(value: object, kind: type[int] | type[float]) -> bool:
    """Whether it is one of that kind; every int is a float too, and no bool is a number."""
    return isinstance(value, (int, kind)) and not isinstance(value, bool)


def _are_ports(value: object) -> bool:
    """Whether it is the first and the last port of a range."""
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(_is_number(port, int) for port in value):
        return False
    return bool(0 < value[0] <= value[1] < 1 << 16)
