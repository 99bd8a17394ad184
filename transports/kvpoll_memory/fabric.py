"""What the memory transports of one process share: who is there, and one lock for all of them."""

from __future__ import annotations

import secrets
import threading
import weakref
from collections.abc import Sequence

from kvpoll_fsm.spi import Range

__all__ = ["LOCK", "Host", "find", "join", "leave"]

LOCK = threading.RLock()
"""Held for every look at, and every change of, any memory transport: two drivers may share the process."""


class Host:
    """The receiving half of a transport: regions, tokens and what they admit."""

    def __init__(self) -> None:
        self.id = secrets.token_bytes(16)
        self.regions: dict[int, memoryview] = {}
        self._grants: dict[bytes, tuple[Range, ...]] = {}

    def grant(self, ranges: Sequence[Range]) -> bytes:
        """Admit writes to these ranges; returns the token."""
        token = secrets.token_bytes(16)
        self._grants[token] = tuple(_merged(ranges))
        return token

    def revoke(self, token: bytes) -> None:
        """Admit nothing more."""
        self._grants.pop(token, None)

    def refusal(self, token: bytes, region: int, offset: int, nbytes: int) -> str | None:
        """Why these bytes may not land, or None."""
        ranges = self._grants.get(token)
        if ranges is None:
            return "the receiver does not know the token, or has revoked it"
        for each in ranges:
            if each.region == region and each.offset <= offset and offset + nbytes <= each.offset + each.nbytes:
                return None
        return "a write lies outside the ranges that the token admits"

    def clear(self) -> None:
        """Admit nothing and let go of the regions."""
        self._grants.clear()
        self.regions.clear()


_hosts: weakref.WeakValueDictionary[bytes, Host] = weakref.WeakValueDictionary()


def join(host: Host) -> None:
    """Let others find this one."""
    with LOCK:
        _hosts[host.id] = host


def leave(host: Host) -> None:
    """Nobody finds it any more."""
    with LOCK:
        _hosts.pop(host.id, None)


def find(host_id: bytes) -> Host | None:
    """The host of that id, if it is still there."""
    with LOCK:
        return _hosts.get(host_id)


def _merged(ranges: Sequence[Range]) -> list[Range]:
    """Ranges in order, neighbours joined: a write may span blocks that lie side by side."""
    merged: list[Range] = []
    for each in sorted(ranges, key=lambda r: (r.region, r.offset)):
        last = merged[-1] if merged else None
        if last is not None and last.region == each.region and each.offset <= last.offset + last.nbytes:
            end = max(last.offset + last.nbytes, each.offset + each.nbytes)
            merged[-1] = Range(last.region, last.offset, end - last.offset)
        else:
            merged.append(each)
    return merged
