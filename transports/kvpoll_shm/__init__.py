"""Between processes of one host: one copy, from the sender's arena straight into the receiver's."""

from __future__ import annotations

from kvpoll_shm.settings import ShmSettings
from kvpoll_shm.transport import ShmTransport

__all__ = ["ShmSettings", "ShmTransport"]
