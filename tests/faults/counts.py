"""Everything of an endpoint and its process that could leak."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import Any

from kvpoll_fsm import Endpoint
from kvpoll_fsm.mover.client import ProcessEngine

__all__ = ["count_everything"]


def count_everything(endpoint: Endpoint) -> dict[str, int]:
    """The size of every table of an endpoint; the descriptors and threads of the process.

    Of an endpoint whose driver is in a process of its own: what can be seen of that from outside.
    """
    gc.collect()
    engine = endpoint.engine
    if isinstance(engine, ProcessEngine):
        assert engine.mover is not None
        counts = {"rooms": len(endpoint.dump()), "mover's sockets": _sockets(engine.mover.pid)}
    else:
        counts = endpoint.driver.call(lambda: _tables(endpoint)).result(10)
    counts["fds"] = len(os.listdir("/proc/self/fd"))
    for thread in threading.enumerate():
        if not thread.name.startswith("kvpoll-worker"):  # started when first needed, at most as many as wanted
            kind = "thread " + thread.name.rstrip("0123456789.:").rstrip("-")
            counts[kind] = counts.get(kind, 0) + 1
    return counts


def _sockets(pid: int) -> int:
    links = [fd.readlink() for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()]
    return sum(str(link).startswith("socket:") for link in links)


def _tables(endpoint: Endpoint) -> dict[str, int]:
    """The size of every table of the endpoint, whatever they are called: what is not in one cannot leak."""
    driver = endpoint.driver
    owners: list[Any] = [endpoint, driver, driver.core, driver.core.accounts, driver.outgoing, driver.incoming]
    owners += [driver._links, driver._control]
    for transport in driver.transports.values():
        owners += [transport, *(v for v in vars(transport).values() if type(v).__module__.startswith("kvpoll_"))]
    counts = {"timers": len(driver._timers)}
    for owner in owners:
        names = list(getattr(owner, "__dict__", ())) or list(getattr(owner, "__slots__", ()))
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, (dict, list, set)):
                counts[f"{type(owner).__name__}.{name}"] = sum(map(_lives, value))
    return counts


def _lives(item: object) -> bool:
    """What has ended and is only kept until the next of its kind comes does not count."""
    return not getattr(item, "is_closed", False) and (not isinstance(item, threading.Thread) or item.is_alive())
