"""The mover's end of the pipe: hands the host's commands to the driver, and tells the host what it has to know.

Used by the driver's thread alone, but for `destination` and the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import msgspec

from kvpoll_fsm.address import Address
from kvpoll_fsm.commands import StartPart
from kvpoll_fsm.driver import Driver
from kvpoll_fsm.errors import FailureCode, KvpollError
from kvpoll_fsm.inputs import Supplied
from kvpoll_fsm.layout import Layout
from kvpoll_fsm.mover import frames
from kvpoll_fsm.mover.frames import Command
from kvpoll_fsm.mover.memory import HostSource
from kvpoll_fsm.mover.pipe import Pipe
from kvpoll_fsm.mover.results import Held, Results
from kvpoll_fsm.mover.told import refusal
from kvpoll_fsm.mover.views import MoverView
from kvpoll_fsm.requests import ReceiverOrder
from kvpoll_fsm.selection import Policy
from kvpoll_fsm.sources import RoomSource, StagedElsewhere
from kvpoll_fsm.staging import Destination
from kvpoll_fsm.status import Sign, StatusTable
from kvpoll_fsm.switching import Choice

__all__ = ["Desk", "Host", "LogToHost"]

log = logging.getLogger("kvpoll_fsm")
Then = Callable[[Exception | None], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Host:
    """The process this mover belongs to.

    Attributes:
        pid: Its number.
        pidfd: Readable once it has ended.
        readable: This process may read its memory.
    """

    pid: int
    pidfd: int
    readable: bool


class Desk:
    """A guest of the driver's loop."""

    def __init__(self, pipe: Pipe[Command], table: StatusTable, host: Host, sign: Sign) -> None:
        """Store what is needed.

        Args:
            pipe: To the host.
            table: Where rooms stand.
            host: The host's process.
            sign: Set when the host has called lately.
        """
        self._pipe = pipe
        self._table = table
        self._host = host
        self._sign = sign
        self._views: dict[int, MoverView] = {}
        self._changed: dict[int, MoverView] = {}
        self._results = Results()
        self._staging: dict[int, Then] = {}
        self._stages = 0
        self._full = self._gone = False

    def serve(self, driver: Driver) -> None:
        """From now on for this driver, which has been opened."""
        self._driver = driver
        driver.watch(self._host.pidfd)
        self._requests = driver.requests
        self._ways: dict[type, Callable[[Any], None]] = {
            frames.OpenSender: self._open_sender,
            frames.OpenReceiver: self._open_receiver,
            frames.Supply: self._supply,
            frames.Abort: self._abort,
            frames.Clear: self._clear,
            frames.Ask: lambda command: self._answer(command.ask, getattr(self._requests, command.question)),
            frames.Switch: self._switch,
            frames.Staged: self._staged,
            frames.Free: lambda command: self._results.free(command.segment, again=command.again),
            frames.Close: lambda command: driver.begin_close(),
        }

    # The driver's guest

    def fileno(self) -> int:
        """The pipe's."""
        return self._pipe.fileno()

    def take_turn(self, readable: set[int]) -> None:
        """Carry out what the host has sent. A host that is gone has nothing more to say: the endpoint ends."""
        if self._table.sign[0]:
            self._table.sign[0], self._sign.seen = 0, True
        if self._gone:
            return
        for command in self._pipe.read() if self._pipe.fileno() in readable else ():
            try:
                self._ways[type(command)](command)
            except Exception:  # one room's request must not end the others'
                log.exception("request failed")
        if self._pipe.ended or self._host.pidfd in readable:
            self._gone = True
            self._driver.unwatch(self._pipe.fileno())
            self._driver.unwatch(self._host.pidfd)
            self._driver.begin_close("the host process is gone", FailureCode.PeerLost)

    def end_turn(self) -> None:
        """Tell the host what is new, and send what it has not taken before."""
        self.tell()
        self._pipe.flush()
        if self._full is not self._pipe.waiting and not self._gone:
            self._full = self._pipe.waiting
            self._driver.watch(self._pipe.fileno(), writable=self._full)

    def destination(self, layout: Layout, total_tokens: int) -> Destination:
        """In memory that the host is given."""
        return self._results.destination(layout, total_tokens)

    # Commands

    def _open_sender(self, command: frames.OpenSender) -> None:
        view = self._view(command.number, command.room, 0, command.tag)
        policy = None if command.policy is None else Policy.parse(command.policy)
        self._requests.open_sender(view, command.required_ranks, policy)

    def _open_receiver(self, command: frames.OpenReceiver) -> None:
        view = self._view(command.number, command.room, command.rank, command.tag)
        peer = Address.parse(command.peer)
        order = ReceiverOrder(peer, command.ranks, command.blocks, command.resume, (), command.window)
        self._requests.open_receiver(view, order)

    def _view(self, number: int, room: int, rank: int, tag: str) -> MoverView:
        view = self._views[number] = MoverView(self._table, number, self, room, rank, tag)
        return view

    def _supply(self, command: frames.Supply) -> None:
        view = self._views.get(command.number)
        if view is None:
            return
        layout, total = self._driver.pool.layout, command.total_tokens
        source: RoomSource = (by_host := StagedByHost(self, command.number))
        if self._host.readable:
            source = HostSource(layout, total, self._host.pid, command.addresses, by_host)
        self._requests.supply(view, source, Supplied(total, total, staged=True))

    def _abort(self, command: frames.Abort) -> None:
        view = self._views.get(command.number)
        if view is not None:
            self._requests.abort(view, command.detail)

    def _clear(self, command: frames.Clear) -> None:
        view = self._views.get(command.number)
        if view is not None:
            self._requests.clear(view)

    def _switch(self, command: frames.Switch) -> None:
        policy = Policy.parse(command.policy)
        self._answer(command.ask, lambda: self._requests.switch(policy, command.share))

    def _answer(self, ask: int, function: Callable[[], object]) -> None:
        try:
            answer = frames.Answer(ask, msgspec.Raw(msgspec.msgpack.encode(function())))
        except KvpollError as error:
            answer = frames.Answer(ask, msgspec.Raw(b"\xc0"), refused=refusal(error))
        except Exception as error:  # whoever asked must be answered
            answer = frames.Answer(ask, msgspec.Raw(b"\xc0"), f"{type(error).__name__}: {error}")
        self._pipe.post(answer)

    def switched(self, choice: Choice) -> None:
        """Tell the host, who has to tell another mover if this one is lost."""
        canary = None if choice.canary is None else (str(choice.canary), choice.share)
        self._pipe.post(frames.Switched(str(choice.policy), canary))
        self._pipe.flush()  # before whoever wanted it is told that it is done

    # Staging by the host, where we cannot read its memory

    def stage(self, number: int, command: StartPart, then: Then) -> None:
        """Have the host copy a part into our blocks."""
        self._stages += 1
        self._staging[self._stages] = then
        first = command.part == 0
        self._pipe.post(
            frames.Stage(self._stages, number, tuple(command.blocks), command.offset, command.tokens, first)
        )

    def _staged(self, command: frames.Staged) -> None:
        then = self._staging.pop(command.stage)
        then(RuntimeError(command.problem) if command.problem else None)

    # Telling

    def tell(self) -> None:
        """Tell the host what is new."""
        if self._changed or self._results.has_unsaid:
            self._tell()

    def seen(self, view: MoverView) -> None:
        """Note a view that has something to tell: its end, its quiescence, or another part."""
        settled = view.state.is_terminal or view.quiescent
        if (settled and (view.state, view.quiescent, view.over) != view.sent) or len(view.parts) != view.parts_told:
            self._changed[view.number] = view

    def _tell(self) -> None:
        changed, self._changed = self._changed, {}
        for some in _pieces(self._results.unsaid()):
            self._pipe.send([event for event, _ in some], [fd for _, fds in some for fd in fds])
        for these in _pieces(list(changed.values())):
            changes = [self._change(view) for view in these]
            # The host may give the place of one that is over to another room: what it was told is all there is.
            rows = [(view, view.states, view.parts_told) for view in these if not view.over]
            self._pipe.send(changes, [], partial(_write, rows))

    def _change(self, view: MoverView) -> frames.Changed:
        parts, view.parts_told = view.parts[view.parts_told :], len(view.parts)
        held, view.data = cast("Held | None", view.data), None
        view.sent = (view.state, view.quiescent, view.over)
        if view.over:
            self._views.pop(view.number, None)
        return frames.Changed(
            view.number,
            view.states,
            failure=view.failure,
            parts=parts,
            quiescent=view.quiescent,
            over=view.over,
            total_tokens=held.total_tokens if held else 0,
            segment=held.take() if held else 0,
            inline=bytes(held.inline) if held and held.inline is not None else b"",
        )

    def finish(self) -> None:
        """The driver has ended: say the last. Why it has is in what is told of its rooms, and in the log."""
        self._tell()
        self._pipe.drain(LAST_WORDS_S)


def _pieces(items: list[T]) -> Iterator[list[T]]:
    """A list in pieces of what one frame takes."""
    return (items[at : at + MOST_ROWS] for at in range(0, len(items), MOST_ROWS))


def _write(rows: list[tuple[MoverView, int, int]]) -> None:
    """Show what the host has been told."""
    for view, states, parts in rows:
        view.write(states, parts)


MOST_ROWS = 200
"""Most rooms, or descriptors, in one frame: the kernel takes 253 descriptors."""
LAST_WORDS_S = 5.0
"""How long a host that does not read keeps a mover that ends."""


class StagedByHost(StagedElsewhere):
    """A room's data in memory that only the host can read."""

    def __init__(self, desk: Desk, number: int) -> None:
        self._desk = desk
        self._number = number

    def stage(self, command: StartPart, then: Then) -> None:
        """Ask the host."""
        self._desk.stage(self._number, command, then)


class LogToHost(logging.Handler):
    """Hands log records to the host; for any thread."""

    def __init__(self, pipe: Pipe[Command]) -> None:
        super().__init__()
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        """Leave it for the next turn."""
        self._pipe.post(frames.Logged(record.name, record.levelno, self.format(record)))
