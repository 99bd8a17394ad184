"""Where a transport listens, and what it tells peers of that."""

from __future__ import annotations

import ipaddress
import re
import socket

from kvpoll_fsm.errors import AddressError, TransportUnavailable

__all__ = ["advertised", "listen", "require_numeric", "require_reachable", "split_advertised"]

_INTERFACE = re.compile(r"[A-Za-z0-9_-]{1,15}(\.[A-Za-z0-9_-]{1,15})*")


def listen(transport: str, host: str, ports: tuple[int, int] | None) -> socket.socket:
    """Open the port that peers connect to.

    Args:
        transport: Its name.
        host: The address to listen on, or a name that stands for one.
        ports: The first and the last to try; None takes any free one.

    Raises:
        TransportUnavailable: The address is not this machine's, or every port is taken.
    """
    low, high = ports or (0, 0)
    problem = ""
    for port in range(low, high + 1):
        try:
            return _listen_on(host, port)
        except OSError as error:
            tried = f" ports {low} to {high}" if high else ""
            problem = f"cannot listen on {host or 'any address'}{tried}: {error.strerror or error}"
    raise TransportUnavailable(transport, problem, "give another host= or data_ports=")


def _listen_on(host: str, port: int) -> socket.socket:
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, _, _, address = found[0]
    sock = socket.socket(family, kind)
    try:
        sock.setblocking(True)  # whatever socket.setdefaulttimeout() says
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(address)
        sock.listen(128)
    except OSError:
        sock.close()
        raise
    return sock


def advertised(transport: str, listening: socket.socket, advertise: str | None) -> tuple[str, int]:
    """Where peers reach a listening socket, the address in numbers.

    Args:
        transport: Its name.
        listening: The socket.
        advertise: What `split_advertised` reads, where peers reach us by another address.

    Raises:
        AddressError: The name given stands for an address nobody could connect to.
        TransportUnavailable: The name given stands for nothing.
    """
    host, port = listening.getsockname()[:2]
    if advertise is not None:
        name, other_port = split_advertised(advertise)
        port = other_port or port
        try:
            host = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0][4][0]
        except OSError as error:
            problem = f"cannot resolve {name!r}: {error.strerror or error}"
            raise TransportUnavailable(transport, problem, "give an address as advertise=") from error
    require_reachable(str(host), "tell peers where with advertise=")
    return str(host), int(port)


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


def require_numeric(host: str) -> None:
    """Refuse what is no address in numbers, with or without an interface.

    Raises:
        ValueError: A name, or an interface of an odd one.
    """
    scope = getattr(ipaddress.ip_address(host), "scope_id", None)
    if scope is not None and not _INTERFACE.fullmatch(scope):
        raise ValueError("an interface of an odd name")


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
    if not port.isascii() or not port.isdigit() or len(port) > 5 or not 0 < int(port) < 1 << 16:
        raise AddressError(text, f"{port!r} is no port")
    return host, int(port)
