"""Writes within one process, with faults on demand: the transport for tests."""

from __future__ import annotations

from kvpoll_memory.faults import Faults
from kvpoll_memory.transport import MemoryTransport

__all__ = ["Faults", "MemoryTransport"]
