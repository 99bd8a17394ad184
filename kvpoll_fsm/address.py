"""Addresses that peers can really reach."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from kvpoll_fsm.errors import AddressError

__all__ = ["Address"]


@dataclass(frozen=True, slots=True)
class Address:
    """`tcp://host:port`; IPv6 hosts are written in brackets. Port 0 means: any free one.

    Attributes:
        host: A name or an address, without brackets.
        port: 0 to 65535.
    """

    host: str
    port: int

    @classmethod
    def parse(cls, text: str | Address) -> Address:
        """Read an address.

        Raises:
            AddressError: Not `tcp://host:port`, or a port outside its range.
        """
        if isinstance(text, Address):
            return text
        if not isinstance(text, str) or not text.startswith("tcp://"):
            raise AddressError(str(text), "write tcp://host:port, e.g. tcp://127.0.0.1:0 or tcp://[::1]:0")
        host, colon, port = text[len("tcp://") :].rpartition(":")
        if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise AddressError(text, "the port is a number from 0 to 65535")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise AddressError(text, "write an IPv6 host in brackets, e.g. tcp://[::1]:0")
        if not host or any(c.isspace() or c in "/[]@" for c in host):
            raise AddressError(text, "the host is missing or has odd characters")
        return cls(host, int(port))

    @property
    def is_v6(self) -> bool:
        """The host is a literal IPv6 address."""
        return ":" in self.host

    def require_reachable(self) -> Address:
        """Check that a peer could connect to this.

        Raises:
            AddressError: A wildcard host, which no peer can connect to, or port 0.
        """
        if self.is_wildcard:
            raise AddressError(str(self), "a wildcard is no address a peer can reach: pass advertise='tcp://host:port'")
        if not self.port:
            raise AddressError(str(self), "a peer needs a real port")
        return self

    @property
    def is_wildcard(self) -> bool:
        """The host means every interface (0.0.0.0, ::, *)."""
        try:
            return self.host == "*" or ipaddress.ip_address(self.host.split("%")[0]).is_unspecified
        except ValueError:
            return False

    @property
    def is_loopback(self) -> bool:
        """Only this machine can reach the host."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host.split("%")[0]).is_loopback
        except ValueError:
            return False

    def with_port(self, port: int) -> Address:
        """The same host with another port."""
        return Address(self.host, port)

    def __str__(self) -> str:
        return f"tcp://[{self.host}]:{self.port}" if self.is_v6 else f"tcp://{self.host}:{self.port}"
