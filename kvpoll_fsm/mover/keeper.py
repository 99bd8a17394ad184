"""Bringing a mover up to where it serves."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from kvpoll_fsm.address import Address
from kvpoll_fsm.arena import BlockPool
from kvpoll_fsm.config import Config
from kvpoll_fsm.errors import MoverUnavailable
from kvpoll_fsm.mover import frames
from kvpoll_fsm.mover.launch import Launched, launch
from kvpoll_fsm.mover.memory import address_of
from kvpoll_fsm.mover.settings import plain_layout
from kvpoll_fsm.mover.told import error_of
from kvpoll_fsm.status import StatusTable

__all__ = ["bring_up", "port_held", "relay"]

log = logging.getLogger("kvpoll_fsm")
START_S = 30.0
"""How long a mover may take to start."""
NONCE_NBYTES = 16


def bring_up(
    pool: BlockPool, config: Config, plain: dict[str, Any], table: StatusTable
) -> tuple[Launched, frames.Started]:
    """Start a mover and wait until it serves.

    Args:
        pool: Whose memory it is given.
        config: The endpoint's settings.
        plain: Those of them that the mover needs, as plain data.
        table: Where it is to write where rooms stand.

    Raises:
        MoverUnavailable: It cannot be started, or does not answer.
        KvpollError: Why its driver cannot run.
    """
    mover = launch()
    nonce = bytearray(os.urandom(NONCE_NBYTES))
    fds: list[int] = []
    try:
        fds.extend(os.dup(fd) for fd in (*(region.fd for region in pool.regions()), table.fd) if fd is not None)
        mover.pipe.send([_setup(pool, config, plain, nonce)], fds)
        return mover, _answer(mover)
    except BaseException:
        mover.kill()
        mover.end()
        while fds:  # the pipe has not taken them over
            os.close(fds.pop())
        raise


@contextlib.contextmanager
def port_held(address: Address) -> Iterator[None]:
    """Keep the port of a mover that was lost from being given to some outgoing connection of this machine.

    A socket that is bound but does not listen keeps it; beside it another may bind and listen (SO_REUSEADDR).
    """
    with socket.socket(socket.AF_INET6 if address.is_v6 else socket.AF_INET) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # taken already: the new mover will say so
            holder.bind(("" if address.host == "*" else address.host, address.port))
        yield


def _setup(pool: BlockPool, config: Config, plain: dict[str, Any], nonce: bytearray) -> frames.Setup:
    return frames.Setup(
        layout=plain_layout(pool.layout),
        blocks=pool.blocks,
        config=plain,
        host_pid=os.getpid(),
        challenge=address_of(memoryview(nonce)),
        nonce=bytes(nonce),
        nice=config.mover_nice,
        cpus=config.mover_cpus,
        paths=[path for path in sys.path if path],
        log_level=log.getEffectiveLevel(),
    )


def _answer(mover: Launched) -> frames.Started:
    ends_s = time.monotonic() + START_S
    while time.monotonic() < ends_s:
        mover.pipe.wait(ends_s - time.monotonic())
        mover.pipe.flush()
        for event in mover.pipe.read():
            if isinstance(event, frames.Started):
                return event
            if isinstance(event, frames.Refused):
                raise error_of(event)
            relay([event])
        if mover.pipe.ended:
            raise MoverUnavailable(f"it ended before it served: {mover.end()}; its own words are on stderr")
    raise MoverUnavailable(f"it did not serve within {START_S:g} s")


def relay(events: Iterable[frames.Event]) -> None:
    """Log what the mover has to say."""
    for event in events:
        if isinstance(event, frames.Logged):
            logging.getLogger(event.logger).log(event.level, "%s", event.text)
