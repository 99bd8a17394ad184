"""Addresses that peers can really reach."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from kvpoll_fsm.errors import AddressError

__all__ = ["Address", "hide_passwords"]

_LOGIN = re.compile(r"(?<=://)\S*@")


@dataclass(frozen=True, slots=True)
class Address:
    """`tcp://host:port`; IPv6 hosts are written in brackets. Port 0 means: any free one.

    An endpoint with CURVE keys adds its public key, `tcp://host:port?curve=HEX`, so that whoever is told the
    address can also tell that the endpoint there is the one that was meant.

    Attributes:
        host: A name or an address, without brackets.
        port: 0 to 65535.
        key: The endpoint's public key, Z85 text of 40 bytes, or None.
    """

    host: str
    port: int
    key: bytes | None = None

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
        place, question, query = text[len("tcp://") :].partition("?")
        key = _read_key(text, query) if question else None
        host, colon, port = place.rpartition(":")
        if not colon or not port.isascii() or not port.isdigit() or len(port) > 5 or int(port) > 65535:
            raise AddressError(text, "the port is a number from 0 to 65535")
        return cls(_read_host(text, host), int(port), key)

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
        return Address(self.host, port, self.key)

    def with_key(self, key: bytes | None) -> Address:
        """The same place with the public key of the endpoint there."""
        return Address(self.host, self.port, key)

    @property
    def place(self) -> str:
        """`tcp://host:port`, without the key: what a socket takes."""
        return f"tcp://[{self.host}]:{self.port}" if self.is_v6 else f"tcp://{self.host}:{self.port}"

    def __str__(self) -> str:
        return self.place if self.key is None else f"{self.place}?{_QUERY}{self.key.hex()}"


_QUERY = "curve="


def _read_host(text: str, host: str) -> str:
    """The host without brackets. ZeroMQ gives some other characters a meaning of their own."""
    if host.startswith("[") and host.endswith("]"):
        try:
            scope = ipaddress.IPv6Address(host[1:-1]).scope_id
        except ValueError:
            raise AddressError(text, "between brackets goes an IPv6 host, e.g. tcp://[::1]:0") from None
        if scope is not None and not _is_plain(scope):
            raise AddressError(text, "the interface after '%' has odd characters")
        return host[1:-1]
    if ":" in host:
        raise AddressError(text, "write an IPv6 host in brackets, e.g. tcp://[::1]:0")
    if host != "*" and not _is_plain(host):
        raise AddressError(text, "the host is missing or has odd characters")
    return host


def _is_plain(name: str) -> bool:
    return name.isascii() and name.replace("-", "").replace(".", "").replace("_", "").isalnum()


def _read_key(text: str, query: str) -> bytes:
    digits = query[len(_QUERY) :] if query.startswith(_QUERY) else ""
    try:
        key = bytes.fromhex(digits)
    except ValueError:
        key = b""
    if len(key) != 40 or len(digits) != 80:  # fromhex skips blanks
        raise AddressError(text, "after '?' comes curve= and the endpoint's public key, 80 hex digits")
    return key


def hide_passwords(text: str) -> str:
    """A text whose URLs do not show who logs in there, and with which password."""
    return _LOGIN.sub("(hidden)@", text)
