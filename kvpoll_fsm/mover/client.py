"""The host's end of the pipe: an endpoint's engine whose driver is in a mover, which is replaced when it is lost.

One thread listens. Any thread posts, under a lock that is held for no more than that.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np

from kvpoll_fsm.address import Address
from kvpoll_fsm.arena import BlockPool
from kvpoll_fsm.arrays import Kind
from kvpoll_fsm.config import Config
from kvpoll_fsm.display import log_end
from kvpoll_fsm.engine import CALL_S, Question
from kvpoll_fsm.errors import EndpointClosed, Failure, FailureCode, KvpollError
from kvpoll_fsm.inputs import Supplied
from kvpoll_fsm.mover import frames
from kvpoll_fsm.mover.keeper import bring_up, port_held, relay
from kvpoll_fsm.mover.launch import Launched
from kvpoll_fsm.mover.managed import ManagedOnly, needs_thread
from kvpoll_fsm.mover.questions import Asking, Questions
from kvpoll_fsm.mover.results import SharedResults
from kvpoll_fsm.mover.settings import plain_config
from kvpoll_fsm.mover.views import HostView, fail_all
from kvpoll_fsm.requests import ReceiverOrder
from kvpoll_fsm.selection import Policy
from kvpoll_fsm.sources import RoomSource
from kvpoll_fsm.staging import Source, stage
from kvpoll_fsm.status import Places, Sign, StatusTable
from kvpoll_fsm.switching import TransportStatus
from kvpoll_fsm.view import RoomView

__all__ = ["ProcessEngine"]

log = logging.getLogger("kvpoll_fsm")

CLOSE_S = 15.0
"""How long a mover may take to close the endpoint: longer than all that it waits for."""
SIGN_S = 0.5
"""How often the mover is told, at least, that the host has called."""
PAUSES_S = (0.0, 0.1, 0.5, 2.0, 5.0)
"""Before a lost mover is replaced, each time. If so many in a row are lost or cannot start, the endpoint has ended."""
SETTLED_S = 10.0
"""A mover that has served so long counts as no failed start."""


class ProcessEngine(ManagedOnly):
    """An `engine.Engine`.

    Attributes:
        forked: This is a forked child's copy.
        pid: The host.
        sign: Set by every call of the host; the mover hears of it.
        mover: The mover's process; None while it is being replaced, and at the end. For tools and tests.
    """

    def __init__(self, pool: BlockPool, config: Config) -> None:
        """Store the settings.

        Raises:
            InvalidInput: One cannot be given to another process.
        """
        self.forked = False
        self.pid = os.getpid()
        self.mover: Launched | None = None
        self._pool = pool
        self._config = config
        self._plain = plain_config(config, config.listen)
        self._views: dict[int, HostView] = {}
        self._questions = Questions()
        self._pending: list[frames.Command] = []
        self.sign = Sign()
        self._places = Places()
        self._lock = threading.RLock()  # reentrant: a signal handler may call us in the middle of our own call
        self._ended: str | None = None
        self._closing = threading.Event()
        self._results = SharedResults(lambda segment, again: None)

    # Start and end

    @property
    def ended(self) -> str | None:
        """Why it has ended, or None while it runs, or is being replaced."""
        return self._ended

    def start(self) -> Address:
        """Start a mover, and wait until it serves. Raises what `bring_up` does, and BlockError."""
        self._pool.claim()
        try:
            self._table = StatusTable.shared()
            self._table.sign[0] = 1
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            address = self._bring_up()
        except BaseException:
            self._give_back()
            if hasattr(self, "_table"):
                self._table.discard()
            raise
        self._ways: dict[type, Callable[[Any], None]] = {
            frames.Changed: self._changed,
            frames.NewSegment: self._new_segment,
            frames.Dropped: lambda event: self._results.drop(event.segment),
            frames.Answer: self._questions.answer,
            frames.Stage: self._stage,
            frames.Logged: lambda event: relay([event]),
            frames.Switched: lambda event: self._plain.update(policy=event.policy, canary=event.canary),
        }
        self._thread = threading.Thread(target=self._run, name="kvpoll-listener", daemon=True)
        self._thread.start()
        return address

    def close(self) -> None:
        """Have the endpoint closed, and wait for the mover's end; one that hangs is killed."""
        with self._lock:
            first = not self._closing.is_set()
            self._closing.set()
        if first:
            self._post(frames.Close())
        if threading.current_thread() is self._thread:
            return
        self._thread.join(CLOSE_S)
        mover = self.mover
        if self._thread.is_alive() and mover is not None:
            log.error("the mover does not end: it is killed")
            mover.kill()
        self._thread.join()

    def after_fork(self) -> None:
        """This is a forked child: nothing runs here, and its parent's end must show at the mover."""
        self.forked = True
        self._table.after_fork()
        if self.mover is not None:
            self.mover.after_fork()

    # Rooms

    def view(self, room: int, rank: int, tag: str) -> HostView:
        """Written by the mover, through the table, and by the listener."""
        return HostView(self._table, self._places, room, rank, tag)

    def open_sender(self, view: RoomView, required_ranks: int | None, policy: Policy | None) -> None:
        """Soon."""
        view.side = "sender"
        number, chosen = _number(view), None if policy is None else str(policy)
        self._open(view, frames.OpenSender(number, view.room, _sayable(view.tag), required_ranks, chosen))

    def open_receiver(self, view: RoomView, order: ReceiverOrder) -> None:
        """Soon."""
        view.side = "receiver"
        place = (_number(view), view.room, view.rank, _sayable(view.tag), str(order.peer))
        self._open(view, frames.OpenReceiver(*place, order.ranks, order.blocks, order.resume, order.window))

    def supply(self, view: RoomView, source: RoomSource, supplied: Supplied) -> None:
        """The mover fetches the data when it needs them; the arrays are kept until it has."""
        if not isinstance(view, HostView) or not isinstance(source, Source):
            raise needs_thread()
        view.source = source
        self._order(view, frames.Supply(view.number, supplied.total_tokens, tuple(map(_address, source.buffers))))

    def abort(self, view: RoomView, detail: str) -> None:
        """Soon."""
        self._order(view, frames.Abort(_number(view), _sayable(detail)))

    def clear(self, view: RoomView) -> None:
        """Soon."""
        self._order(view, frames.Clear(_number(view)))

    def ask(self, question: Question) -> Any:
        """Answered by the mover, or by the next one if it is lost."""
        return self._call(lambda number: frames.Ask(number, question), question)

    def switch(self, policy: Policy, share: float | None) -> TransportStatus:
        """Done by the mover, or by the next one if it is lost; those that follow begin with it."""
        status: TransportStatus = self._call(lambda number: frames.Switch(number, str(policy), share), "transports")
        return status

    def _call(self, asking: Asking, answer: Question) -> Any:
        with self._lock:
            if self._ended is not None:
                raise EndpointClosed(self._ended)
            command, future = self._questions.new(asking, answer)
            self._post(command)
        try:
            return future.result(CALL_S)
        finally:
            self._questions.forget(command.ask)

    # Posting

    def _open(self, view: RoomView, command: frames.OpenSender | frames.OpenReceiver) -> None:
        with self._lock:
            if self._ended is None:
                self._views[command.number] = cast("HostView", view)
                return self._post(command)
        cause = EndpointClosed(self._ended)
        view.fail(Failure.of(FailureCode.InternalError, f"could not be opened: {cause}", state=view.state))
        view.settle()

    def _order(self, view: RoomView, command: frames.Command) -> None:
        """Post a command for a room, unless the room is over, or was lost with its mover."""
        with self._lock:
            if self._views.get(_number(view)) is view:
                self._post(command)

    def _post(self, command: frames.Command) -> None:
        with self._lock:
            mover = self.mover
            if mover is None:
                self._pending.append(command)
                return
            mover.pipe.post(command)
        if not mover.pipe.flush():  # the listener sends the rest
            with self._lock:
                if self._ended is None:  # else the descriptor's number is somebody else's
                    os.eventfd_write(self._wake, 1)

    def _free(self, mover: Launched, segment: int, again: bool) -> None:
        """The host has no array over a segment of this mover any more; another's segments have the same numbers."""
        if self.forked:  # the lock may be held for ever here
            return
        with self._lock:
            if self.mover is mover:
                self._post(frames.Free(segment, again))

    # Listening

    def _run(self) -> None:
        cause = "closed"
        try:
            failures = 0
            while True:
                since_s = time.monotonic()
                how = self._serve()
                failures = 0 if time.monotonic() - since_s > SETTLED_S else failures
                if self._closing.is_set():
                    break
                failures = self._replace(how, failures)
        except BaseException as error:  # nothing may die silently: every room is told
            cause = f"{type(error).__name__}: {error}"
            log.exception("endpoint ended")
        finally:
            self._finish(cause)

    def _serve(self) -> str:
        """Hear one mover out; returns how it ended."""
        mover = self.mover
        if mover is None:
            return "it was never there"
        self._results = SharedResults(partial(self._free, mover))
        problem = ""
        try:
            while not mover.pipe.ended and self._hear(mover):
                pass
        except (OSError, MemoryError) as error:  # what it has told is lost, but the next may fare better
            problem = f"{error}: "
            mover.kill()
        except BaseException:
            mover.kill()
            raise
        finally:
            with self._lock:
                self.mover = None
            how = mover.end()
        return problem + how

    def _hear(self, mover: Launched) -> bool:
        """Wait for what the mover says, and take it; False once it has ended and said all."""
        ready = mover.pipe.wait(SIGN_S, self._wake)
        running = mover.pipe.fileno() in ready or mover.running  # asked before what it said last is read
        if self._wake in ready:
            os.eventfd_read(self._wake)
        self._give_sign()
        mover.pipe.flush()
        events = mover.pipe.read()
        for event in events:
            self._ways[type(event)](event)
        return running or bool(events)

    def _give_sign(self) -> None:
        """Let the mover know that the host has called lately."""
        if self.sign.seen:
            self.sign.seen, self._table.sign[0] = False, 1

    def _replace(self, how: str, failures: int) -> int:
        """A mover was lost: fail its rooms, and start another; returns how many have failed in a row."""
        log.error("the mover was lost: %s", how)
        with self._lock:
            lost, self._views = self._views, {}
            self._pending = self._questions.open()
        self._results.clear()
        fail_all(lost, FailureCode.MoverLost, f"the mover was lost: {how}")
        with port_held(Address.parse(self._plain["listen"])):
            while not self._closing.is_set():
                if failures == len(PAUSES_S):
                    raise EndpointClosed(f"{failures} movers in a row were lost")
                self._closing.wait(PAUSES_S[failures])
                failures += 1
                if self._try_again():
                    break
        return failures

    def _try_again(self) -> bool:
        try:
            self._pool.renew()
            self._bring_up()
        except (KvpollError, OSError) as error:
            log.error("the mover cannot be replaced: %s", error)
            return False
        return True

    def _bring_up(self) -> Address:
        mover, started = bring_up(self._pool, self._config, self._plain, self._table)
        self._plain["listen"] = started.bound  # another mover listens where peers know us
        if not started.reads_host:
            log.info("the mover cannot read this process's memory: staging takes turns of this interpreter")
        with self._lock:
            self.mover, pending, self._pending = mover, self._pending, []
            for command in pending:
                mover.pipe.post(command)
            if self._closing.is_set():
                mover.pipe.post(frames.Close())
        mover.pipe.flush()
        return Address.parse(started.address)

    def _finish(self, cause: str) -> None:
        with self._lock:
            self._ended = cause
            lost, self._views = self._views, {}
        code = FailureCode.Aborted if cause == "closed" else FailureCode.InternalError
        fail_all(lost, code, cause)
        self._questions.fail(cause)
        self._give_back()

    def _give_back(self) -> None:
        """What `start` has taken."""
        self._results.clear()
        if hasattr(self, "_table"):
            self._table.close()
        if hasattr(self, "_wake"):
            os.close(self._wake)
        self._pool.unclaim()

    # Events

    def _changed(self, event: frames.Changed) -> None:
        data = self._results.buffer(event.segment, event.inline) if event.total_tokens else None
        with self._lock:
            view = self._views.pop(event.number, None) if event.over else self._views.get(event.number)
        if view is None:
            return
        ended = view.told
        view.hear(event, data, cast("Kind", self._config.arrays), self._pool.layout)
        if view.told and not ended:
            log_end(view)

    def _new_segment(self, event: frames.NewSegment) -> None:
        if self.mover is None or not self.mover.pipe.fds:
            raise MemoryError("no file descriptor is left for a result: raise `ulimit -n`")
        self._results.add(event.segment, event.nbytes, self.mover.pipe.fds.popleft())

    def _stage(self, event: frames.Stage) -> None:
        view = self._views.get(event.number)
        problem = "" if view is not None and view.source is not None else "the room is over"
        if view is not None and isinstance(view.source, Source):
            try:
                stage(self._pool, event.blocks, view.source, event.offset, event.tokens, event.first)
            except Exception as error:  # told to the room
                problem = f"{type(error).__name__}: {error}"
        self._post(frames.Staged(event.stage, problem))


def _number(view: RoomView) -> int:
    return cast("HostView", view).number


def _address(buffer: memoryview) -> int:
    """Where bytes lie that may be read-only."""
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address


def _sayable(text: str) -> str:
    """Text that can be encoded: without halves of characters."""
    return text.encode(errors="replace").decode()
