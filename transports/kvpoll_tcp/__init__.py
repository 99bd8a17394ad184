"""Writes over plain TCP connections: the transport that works wherever a socket does."""

from __future__ import annotations

from kvpoll_tcp.settings import TcpSettings
from kvpoll_tcp.transport import TcpTransport

__all__ = ["TcpSettings", "TcpTransport"]
