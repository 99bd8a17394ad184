"""The mover's process: `python -m kvpoll_fsm.mover FD`, started by `client.ProcessEngine` and by nobody else."""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import sys

from kvpoll_fsm.arena import BlockPool
from kvpoll_fsm.carriers import load_transports
from kvpoll_fsm.driver import Driver
from kvpoll_fsm.mover import frames
from kvpoll_fsm.mover.desk import Desk, Host, LogToHost
from kvpoll_fsm.mover.memory import can_read
from kvpoll_fsm.mover.pipe import Pipe
from kvpoll_fsm.mover.settings import config_of, layout_of
from kvpoll_fsm.mover.told import refusal
from kvpoll_fsm.status import Sign, StatusTable

__all__ = ["main"]

SETUP_S = 30.0
"""How long a host may take to say what the mover is for."""


def main(fd: int) -> int:
    """Serve one host until it closes the endpoint, or ends. Returns the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the host, from which ours follows
        signal.signal(number, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # every result and every peer takes some
    pipe: Pipe[frames.Command] = Pipe(socket.socket(fileno=fd), frames.Command)
    setup = _first(pipe)
    if setup is None:
        return 1
    try:
        driver, desk = _assemble(pipe, setup)
    except Exception as error:  # told to the host, who raises it
        logging.getLogger("kvpoll_fsm").debug("refused", exc_info=True)
        pipe.send([refusal(error)], [])
        pipe.drain(SETUP_S)
        return 1
    driver.run()
    desk.finish()
    pipe.close()
    return 0


def _first(pipe: Pipe[frames.Command]) -> frames.Setup | None:
    """What the host wants, or None if it is gone."""
    while not pipe.ended:
        pipe.wait(SETUP_S)
        for command in pipe.read():
            if isinstance(command, frames.Setup):
                return command
    return None


def _assemble(pipe: Pipe[frames.Command], setup: frames.Setup) -> tuple[Driver, Desk]:
    _stand_back(setup.nice, setup.cpus)
    sys.path += [path for path in setup.paths if path not in sys.path]
    logging.basicConfig(handlers=[LogToHost(pipe)], level=setup.log_level, format="%(message)s")
    *arenas, status = pipe.fds
    pipe.fds.clear()
    table = StatusTable(status)
    pool = BlockPool.shared(layout_of(setup.layout), setup.blocks, arenas)
    host = Host(setup.host_pid, os.pidfd_open(setup.host_pid), can_read(setup.host_pid, setup.challenge, setup.nonce))
    config = config_of(setup.config)
    sign = Sign()
    desk = Desk(pipe, table, host, sign)
    driver = Driver(pool, config, load_transports(config), sign, desk)
    driver.open()
    desk.serve(driver)
    pipe.send([frames.Started(str(driver.address), str(driver.bound), host.readable)], [])
    return driver, desk


def _stand_back(nice: int, cpus: tuple[int, ...] | None) -> None:
    """Every thread: those that imports have started, too; later ones follow their parents."""
    for thread in map(int, os.listdir("/proc/self/task")):
        if nice:
            os.setpriority(os.PRIO_PROCESS, thread, nice)
        if cpus is not None:
            os.sched_setaffinity(thread, cpus)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
