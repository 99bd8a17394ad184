"""Through the Mooncake Transfer Engine, RDMA or TCP: in processes of its own, which can be killed."""

from __future__ import annotations

from kvpoll_mooncake.settings import MooncakeSettings
from kvpoll_mooncake.transport import MooncakeTransport

__all__ = ["MooncakeSettings", "MooncakeTransport"]
