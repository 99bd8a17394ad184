"""The process of one engine: `python -m kvpoll_mooncake.child FD PARENT`, started by `process.Process` alone."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import traceback

from kvpoll_mooncake.worker import Worker

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1


def main(fd: int, parent: int) -> None:
    """Serve until the adapter ends the connection, or itself."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the adapter's process
        signal.signal(number, signal.SIG_IGN)
    # The connection's end would do, but is not seen while Mooncake holds the interpreter, or while we are stopped.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == parent:
        Worker(socket.socket(fileno=fd)).run()


if __name__ == "__main__":
    status = 0
    try:
        main(int(sys.argv[1]), int(sys.argv[2]))
    except ConnectionError:  # the adapter has gone
        pass
    except BaseException:
        traceback.print_exc()
        status = 1
    # Mooncake's threads and destructors are not waited for.
    os._exit(status)
