"""The processes of the tests themselves."""

from __future__ import annotations

import os
import signal

from tests.faults.processes import Mother


def test_nothing_is_left_behind_not_even_what_is_frozen() -> None:
    mother = Mother()
    theirs, ours = os.pipe()
    process = mother.start(theirs, theirs, theirs)
    process.signal(signal.SIGSTOP)
    mother.close()
    assert process.has_ended(10.0)
    for fd in (theirs, ours):
        os.close(fd)


def test_how_a_process_ended() -> None:
    mother = Mother()
    theirs, ours = os.pipe()
    ends, killed = mother.start(theirs, theirs, theirs), mother.start(theirs, theirs, theirs)
    killed.signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    for fd in (theirs, ours):
        os.close(fd)  # the end of the orders
    assert ends.wait() == 0
    mother.close()
