"""One process of `kvpoll demo`, started as `python -m kvpoll_fsm.demo_worker sender` or `... receiver RANK`.

The plan comes as the first line of standard input and orders as further ones; reports go to standard output,
a line each. End of file on standard input, also because the parent has died, ends the process.
"""

from __future__ import annotations

import contextlib
import os
import sys

from kvpoll_fsm.demos.plan import Plan
from kvpoll_fsm.demos.rooms import ReceiverSide, SenderSide, Side, read_first

__all__ = ["main"]


def main(arguments: list[str]) -> None:
    """Be the process that the arguments say."""
    reports_fd = os.dup(1)
    os.dup2(2, 1)  # whatever prints must not come between the reports
    # EOFError, BrokenPipeError: the parent has gone, and nobody is left to tell.
    with contextlib.suppress(EOFError, BrokenPipeError):
        plan = Plan(**read_first(0))
        side: Side
        if arguments[0] == "sender":
            side = SenderSide(plan, 0, reports_fd)
        else:
            side = ReceiverSide(plan, int(arguments[1]), 0, reports_fd)
        side.run()


if __name__ == "__main__":
    main(sys.argv[1:])
