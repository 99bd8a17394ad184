"""Nothing is left behind: no file descriptor, no thread, no process."""

from __future__ import annotations

import contextlib
import os
import threading

import pytest

from kvpoll_fsm.spi import Write
from kvpoll_fsm.testing.conformance.base import Base
from kvpoll_fsm.testing.conformance.fencing import first_byte
from kvpoll_fsm.testing.conformance.sides import HUGE, Pair, footprint, until
from kvpoll_fsm.testing.conformance.system import offspring

__all__ = ["Leaks"]


_warm: set[type] = set()


class Leaks(Base):
    """What is there after `close` is what was there before `start`."""

    @pytest.mark.parametrize("how", ["unused", "used", "busy"])
    def test_close_leaves_nothing_behind(self, how: str) -> None:
        """No file descriptor, thread or process; whatever was under way."""
        if type(self) not in _warm:  # what is made once for all is no leak
            self._life("busy")
            _warm.add(type(self))
        before, children, tasks = footprint(), offspring(), _tasks()
        self._life(how)
        left = [now - then for now, then in zip(footprint(), before, strict=True)]
        assert left == [set(), set()], f"left behind: {left}"
        until(lambda: _tasks() <= tasks, "the end of its threads", self.within_s)
        until(lambda: offspring() <= children, "the end of its processes", self.within_s)

    def test_closed_links_leave_nothing_behind(self) -> None:
        """A link that is closed while its transport lives lets go of what it had."""
        pair = Pair(self.side(filled=True), self.side())
        fds, threads = map(len, footprint())
        for _ in range(6):
            link = pair.tx.connect(pair.rx)
            pair.up(link)
            pair.done(link.submit([Write(0, 0, 0, 1)], pair.rx.grant()))
            link.close()
        pair.until(lambda: len(footprint()[0]) < fds + 5, "file descriptors of closed links to be closed")
        pair.until(lambda: len(footprint()[1]) < threads + 5, "threads of closed links to end")
        pair.close()

    def test_what_it_opens_is_not_inherited_and_threads_have_names(self) -> None:
        """Programs that the host starts get none of its file descriptors; who looks at threads knows whose they are."""
        before, threads = _inheritable(), set(threading.enumerate())
        pair = Pair(self.side(filled=True), self.side())
        link = pair.tx.connect(pair.rx)
        pair.up(link)
        inherited = _inheritable() - before
        assert not inherited
        nameless = [each for each in set(threading.enumerate()) - threads if each.name.startswith("Thread-")]
        assert not nameless
        pair.close()

    def _life(self, how: str) -> None:
        """From start to close."""
        pair = Pair(self.side(filled=True), self.side())
        if how != "unused":
            self._use(pair, how == "busy")
        pair.close()

    def _use(self, pair: Pair, is_busy: bool) -> None:
        """Write, and leave more under way."""
        link, token = pair.tx.connect(pair.rx), pair.rx.grant()
        pair.done(link.submit([Write(0, 0, 1, 1)], token))
        if is_busy:
            for _ in range(min(6, pair.tx.transport.capabilities.max_outstanding)):
                link.submit(HUGE[:1], token)
            first_byte(pair)


def _tasks() -> set[str]:
    """The threads of this process, those that are not Python's, too."""
    return set(os.listdir("/proc/self/task"))


def _inheritable() -> set[str]:
    """The file descriptors that programs started here would have."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # it was closed meanwhile
            if os.get_inheritable(int(fd)):
                found.add(f"{fd}:{os.readlink(f'/proc/self/fd/{fd}')}")
    return found
