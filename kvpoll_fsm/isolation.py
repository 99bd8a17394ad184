"""Decides where an endpoint's driver runs: in a process of its own, or in a thread of the host."""

from __future__ import annotations

import contextlib
import logging
import os

from kvpoll_fsm import registry
from kvpoll_fsm.arena import BlockPool
from kvpoll_fsm.config import Config
from kvpoll_fsm.engine import Engine, ThreadEngine
from kvpoll_fsm.errors import InvalidInput, TransportUnavailable
from kvpoll_fsm.mover.client import ProcessEngine
from kvpoll_fsm.mover.settings import plain_options

__all__ = ["new_engine"]

log = logging.getLogger("kvpoll_fsm")


def new_engine(pool: BlockPool, config: Config) -> Engine:
    """What is to run an endpoint; not started.

    Raises:
        InvalidInput: In a process, as wanted, it cannot run.
        TransportUnavailable: No transport of the policy can be loaded.
    """
    if _isolation(pool, config) == "thread":
        return ThreadEngine(pool, config)
    return ProcessEngine(pool, config)


def _isolation(pool: BlockPool, config: Config) -> str:
    wanted = config.isolation
    if wanted == "thread":
        return wanted
    obstacle = _obstacle(pool, config)
    if obstacle and wanted == "process":
        raise InvalidInput(f'isolation="process": {obstacle}; use "thread"')
    if obstacle:
        log.debug("isolation is thread: %s", obstacle)
    return "thread" if obstacle else "process"


def _obstacle(pool: BlockPool, config: Config) -> str:
    """What keeps the driver from running in a process of its own, or nothing."""
    if not pool.managed:
        return "the memory of the pool is the engine's own"
    if not pool.shareable or not hasattr(os, "pidfd_open"):
        return "this system has no memfd or no pidfd"
    for name in config.names:
        with contextlib.suppress(TransportUnavailable):  # told where it is needed
            if registry.load(name).capabilities.one_process:
                return f"transport {name!r} works within one process alone"
    try:
        plain_options(config)
    except InvalidInput as error:
        return str(error)
    return ""
