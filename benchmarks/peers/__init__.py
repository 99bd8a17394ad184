"""The peers: every module of this folder that has a list `PEERS` adds its own."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from benchmarks.peers.base import Peer

__all__ = ["peers"]


@functools.cache
def peers() -> dict[str, Peer]:
    """All peers by name. None of the software they need is imported for this."""
    found: dict[str, Peer] = {}
    for module in pkgutil.iter_modules(__path__):
        for peer in getattr(importlib.import_module(f"{__name__}.{module.name}"), "PEERS", ()):
            found[peer.name] = peer
    return found
