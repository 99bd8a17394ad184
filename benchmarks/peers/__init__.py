"""The peers: every module of this folder that has a list `PEERS` adds its own."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from benchmarks.peers.base import Peer

__all__ = ["KINDS", "peers"]

KINDS = ("limit", "ours", "other")
"""The order in which tables show them."""


@functools.cache
def peers() -> dict[str, Peer]:
    """All peers by name: limits, ours, others. None of the software they need is imported for this."""
    found: list[Peer] = []
    for module in pkgutil.iter_modules(__path__):
        found += getattr(importlib.import_module(f"{__name__}.{module.name}"), "PEERS", ())
    found.sort(key=lambda peer: KINDS.index(peer.kind))
    return {peer.name: peer for peer in found}
