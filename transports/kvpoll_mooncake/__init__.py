"""Through the Mooncake Transfer Engine, RDMA or TCP: in processes of its own, which can be killed.

Those processes import a few modules of this package and nothing of the library, so as to start soon: `child`, `worker`,
`flight`, `frames`, `framing` and `memory`. What is named here is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvpoll_mooncake.settings import MooncakeSettings
    from kvpoll_mooncake.transport import MooncakeTransport

__all__ = ["MooncakeSettings", "MooncakeTransport"]

_LAZY = {"MooncakeSettings": "settings", "MooncakeTransport": "transport"}


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
