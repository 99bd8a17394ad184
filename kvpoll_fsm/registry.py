"""Transports by name, found as entry points and imported on first use.

Ours and a third party's are found in the same way: the group `kvpoll_fsm.transports` maps a name to a class
that follows `kvpoll_fsm.spi.Transport`. The one thing known here beforehand is what to tell somebody who asks
for a name that is not there.
"""

from __future__ import annotations

import difflib
from importlib import metadata
from typing import cast

from kvpoll_fsm.errors import TransportUnavailable
from kvpoll_fsm.spi import Transport

__all__ = ["GROUP", "HINTS", "available", "find", "load"]

GROUP = "kvpoll_fsm.transports"

HINTS: dict[str, str] = {
    "memory": "it comes with kvpoll-fsm: install the package again, its entry points are missing",
    "tcp": "it comes with kvpoll-fsm: install the package again, its entry points are missing",
    "shm": "it comes with kvpoll-fsm: install the package again, its entry points are missing",
    "mooncake": "it comes with kvpoll-fsm: install the package again, its entry points are missing; it needs Mooncake: "
    "pip install 'kvpoll-fsm[mooncake]', or 'kvpoll-fsm[mooncake-cuda]' where there is CUDA, never both",
    "nixl": "it comes with a later release of kvpoll-fsm; tcp works between hosts",
}
"""What helps somebody who asks for one of these and does not have it."""

_METHODS = (
    "start",
    "descriptor",
    "register",
    "grant",
    "revoke",
    "fence",
    "connect",
    "completions",
    "fileno",
    "close",
)


def available() -> dict[str, metadata.EntryPoint]:
    """The transports installed, by name; none is imported. Of two with one name the first found counts."""
    found: dict[str, metadata.EntryPoint] = {}
    for entry in metadata.entry_points(group=GROUP):
        found.setdefault(entry.name, entry)
    return found


def find(name: str) -> metadata.EntryPoint:
    """Where a transport is; nothing is imported.

    Raises:
        TransportUnavailable: No transport of that name is installed. Says how to get it, or which names are near.
    """
    installed = available()
    if name not in installed:
        raise TransportUnavailable(name, "is not installed", _hint(name, installed))
    return installed[name]


def load(name: str) -> type[Transport]:
    """Import a transport.

    Raises:
        TransportUnavailable: No transport of that name is installed, it cannot be imported, or what its entry
            point names is no transport. Says how to get it, or which names are near.
    """
    entry = find(name)
    try:
        loaded = entry.load()
    except Exception as error:  # another party's module may raise anything
        raise TransportUnavailable(name, f"cannot be imported: {error!r}", HINTS.get(name, "")) from error
    missing = [method for method in _METHODS if not callable(getattr(loaded, method, None))]
    if not isinstance(loaded, type) or missing:
        lacks = f", it lacks {', '.join(missing)}" if missing else ""
        raise TransportUnavailable(name, f"{entry.value} is no transport class{lacks}")
    return cast("type[Transport]", loaded)


def _hint(name: str, installed: dict[str, metadata.EntryPoint]) -> str:
    if name in HINTS:
        return HINTS[name]
    near = difflib.get_close_matches(name, {*installed, *HINTS}, n=3)
    if near:
        return "did you mean " + " or ".join(repr(other) for other in sorted(near)) + "?"
    return "installed: " + (", ".join(sorted(installed)) or "none")
