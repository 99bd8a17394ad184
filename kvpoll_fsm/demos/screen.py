"""The demo for people: rooms as they move, then what became of them."""

from __future__ import annotations

import time
from collections import Counter
from itertools import groupby
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from kvpoll_fsm.demos.crew import Worker
from kvpoll_fsm.demos.lines import Message
from kvpoll_fsm.demos.plan import Plan
from kvpoll_fsm.demos.report import Account, Report, RoomReport
from kvpoll_fsm.poll import KVPoll

__all__ = ["Screen", "print_report"]

MOST_ROWS = 8
"""Rooms that each have a bar and their transitions of their own; more are shown together."""
MOST_PROBLEMS = 10

COLORS = {
    "Bootstrapping": "dim",
    "WaitingForInput": "yellow",
    "Transferring": "cyan",
    "Success": "green",
    "Failed": "bold red",
}
"""In the order in which states are gone through."""


class Screen:
    """The live part; a context manager. Without a terminal only transitions and results are printed."""

    def __init__(self, console: Console, plan: Plan) -> None:
        self._console = console
        self._plan = plan
        self._many = plan.rooms > MOST_ROWS
        self._started_s = time.monotonic()
        self._seen: dict[tuple[str, int, int], int] = {}
        self._census: Counter[str] = Counter()
        self._landed: dict[int, int] = {}
        self._tasks: dict[int, TaskID] = {}
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), _Landed())
        self._progress = Progress(
            *columns, console=console, expand=True, transient=True, disable=not console.is_terminal
        )

    def __enter__(self) -> Screen:
        plan = self._plan
        receivers = "1 receiver process" if plan.ranks == 1 else f"{plan.ranks} receiver processes"
        self._console.print(
            f"[bold]{_rooms(plan)}[/bold] of {plan.tokens:,} tokens x {plan.hidden} {plan.dtype} "
            f"({_size(plan.room_nbytes)}), 1 sender process, {receivers}; {escape(plan.transport)}, "
            f"reservations of {plan.blocks} x {plan.block_tokens} = {plan.grant_tokens:,} tokens, {plan.resume}",
            highlight=False,
        )
        self._progress.start()
        goal = plan.room_nbytes * plan.ranks
        if self._many:
            self._tasks[0] = self._progress.add_task("starting", total=goal * plan.rooms)
        else:
            for room in plan.room_numbers:
                self._tasks[room] = self._progress.add_task(_labelled(room, "starting"), total=goal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def saw(self, worker: Worker, message: Message, report: Report) -> None:
        """Show one more message."""
        event = message["event"]
        if event in ("states", "done"):
            self._transitions(worker, message)
            self._place(report, message["room"])
        elif event == "bytes" and worker.side == "sender":
            for room, nbytes in message["rooms"].items():
                self._fill(int(room), nbytes)
        elif event == "gone":
            self._console.print(Text(f"{worker.name}: {message['detail']}", style=COLORS["Failed"]))

    def _transitions(self, worker: Worker, message: Message) -> None:
        """Print the states that are new."""
        place, states = (worker.side, worker.rank, message["room"]), message["states"]
        seen, self._seen[place] = self._seen.get(place, 0), len(states)
        at_s = message.get("at_s") or message.get("ended_s") or time.monotonic()
        if worker.side == "sender":
            self._census.subtract(states[seen - 1 : seen])
            self._census.update(states[-1:])
        for number in range(max(1, seen), len(states)):
            if not self._many or states[number] == KVPoll.Failed.name:
                line = Text(f"{at_s - self._started_s:6.2f} s  room {message['room']}  {worker.name:<12}")
                self._console.print(line, _state(states[number - 1]), Text("→", "dim"), _state(states[number]))

    def _place(self, report: Report, room: int) -> None:
        """Show where the rooms stand, and fill the bar of one that is over."""
        account = report.rooms[room].sender
        if account.state == KVPoll.Success.name:
            self._fill(room, self._plan.room_nbytes * self._plan.ranks)
        task, label = (0, self._counts()) if self._many else (room, _labelled(room, account.state))
        self._progress.update(self._tasks[task], description=label)

    def _counts(self) -> str:
        """How many rooms are in which state at the sender, a line each; states of no room are left out."""
        return "\n".join(
            f"[{color}]{name:<15}[/] {self._census[name]:>5,}" for name, color in COLORS.items() if self._census[name]
        )

    def _fill(self, room: int, nbytes: int) -> None:
        grown = nbytes - self._landed.get(room, 0)
        self._landed[room] = nbytes
        self._progress.advance(self._tasks[0 if self._many else room], grown)


class _Landed(ProgressColumn):
    """How much has landed of how much."""

    def render(self, task: Task) -> Text:
        return Text(f"{_size(task.completed)} of {_size(task.total or 0)}", "dim")


def print_report(console: Console, report: Report) -> None:
    """Print what became of every room, and every reason why one is not right."""
    rooms = list(report.rooms.values())
    if len(rooms) <= MOST_ROWS:
        for room in rooms:
            console.print()
            console.print(_heading(room))
            for choice in room.choices:
                console.print(Text(f"  over {choice}", "dim"))
            console.print(_sides(room))
            if room.sender.sha256:
                console.print(_hashes(room), soft_wrap=True)
    else:
        console.print(_overview(rooms))
    problems = report.problems()
    for line in problems[:MOST_PROBLEMS]:
        console.print(Text(line, style="red"))
    if len(problems) > MOST_PROBLEMS:
        console.print(Text(f"... and {len(problems) - MOST_PROBLEMS} more", style="red"))
    console.print()
    console.print(_verdict(report))


def _verdict(report: Report) -> Text:
    good = sum(room.ok for room in report.rooms.values())
    if not report.ok:
        return Text(f"FAILED: {good} of {_rooms(report.plan)} ended in Success with equal bytes", "bold red")
    nbytes = report.plan.room_nbytes * report.plan.ranks * report.plan.rooms
    seconds = report.seconds or 0.0
    return Text.assemble(
        ("OK", "bold green"),
        f": {_rooms(report.plan)} ended in Success on all sides, every SHA-256 is equal; ",
        f"{_size(nbytes)} in {seconds:.3f} s",
        f", {nbytes / 1e9 / seconds:.2f} GB/s" if seconds else "",
    )


def _heading(room: RoomReport) -> Text:
    text = Text.assemble((f"room {room.room}", "bold"), f"  {room.plan.tokens:,} tokens")
    return text.append(f"  {_speed(room)}") if room.seconds is not None else text


def _sides(room: RoomReport) -> Table:
    table = _grid(2)
    table.add_row("  sender", _path(room.sender))
    for rank, account in enumerate(room.receivers):
        table.add_row(f"  receiver {rank}", _path(account))
        for line in _parts(account):
            table.add_row("", Text(line, "dim"))
    return table


def _parts(account: Account) -> list[str]:
    """The parts, a line each; those that differ in nothing but their number share one."""

    def kind(part: dict[str, Any]) -> tuple[Any, ...]:
        return part["tokens"], part["is_last"], part["transport"]

    lines = []
    for (tokens, is_last, transport), group in groupby(account.parts, kind):
        numbers = [part["part"] for part in group]
        count = f"part {numbers[0]}" if len(numbers) == 1 else f"parts {numbers[0]} to {numbers[-1]}, each"
        lines.append(f"{count}: {tokens:,} tokens, {'last' if is_last else 'not last'}, {transport}")
    return lines


def _hashes(room: RoomReport) -> Text:
    """The SHA-256 of every field, as each process computed it."""
    text = Text()
    for name, digest in room.sender.sha256.items():
        others = [account.sha256.get(name, "") for account in room.receivers]
        text.append(f"  SHA-256 of {name}: ").append(*_comparison(digest, others)).append("\n")
        for side, each in [("sender", digest), *((f"receiver {n}", each) for n, each in enumerate(others))]:
            style = COLORS["Failed"] if each not in ("", digest) else "dim"
            text.append(f"    {side:<11} {each or 'none'}\n", style)
    text.rstrip()
    return text


def _comparison(digest: str, others: list[str]) -> tuple[str, str]:
    """What comes out of comparing the receivers' hashes ("" if there is none) with the sender's."""
    if any(other not in ("", digest) for other in others):
        return "DIFFERENT", COLORS["Failed"]
    return ("equal", "green") if digest and all(others) else ("incomplete", "yellow")


def _overview(rooms: list[RoomReport]) -> Table:
    """A line per room."""
    table = Table(box=None, pad_edge=False)
    for name in ("room", "sender", "receivers", "parts", "time", "SHA-256 of embeddings"):
        table.add_column(name, overflow="fold")
    for room in rooms:
        digest, *others = (_digests(account) for account in room.accounts)
        table.add_row(
            str(room.room),
            _state(room.sender.state),
            _states(room.receivers),
            ",".join(sorted({str(len(account.parts)) for account in room.receivers})),
            _speed(room),
            Text.assemble((f"{digest[:16]:<16} ", "dim"), _comparison(digest, others)),
        )
    return table


def _digests(account: Account) -> str:
    """All hashes in a row, that of the embeddings first; "" if there are none."""
    return "".join(account.sha256[name] for name in sorted(account.sha256, key="embeddings".__ne__))


def _states(accounts: list[Account]) -> Text:
    """The states of all ranks, once if they are the same."""
    names = list(dict.fromkeys(account.state for account in accounts))
    return Text(", ").join(_state(name) for name in names)


def _labelled(room: int, state: str) -> str:
    return f"room {room} [{COLORS.get(state, 'dim')}]{state:<15}[/]"


def _path(account: Account) -> Text:
    return Text(" → ", "dim").join(_state(name) for name in account.states or [account.state])


def _state(name: str) -> Text:
    return Text(name, COLORS.get(name, "dim"))


def _speed(room: RoomReport) -> str:
    if room.seconds is None:
        return ""
    return f"{room.seconds:.3f} s  {room.gb_per_s or 0.0:.2f} GB/s"


def _size(nbytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes:.0f} B"


def _rooms(plan: Plan) -> str:
    return "1 room" if plan.rooms == 1 else f"{plan.rooms:,} rooms"


def _grid(columns: int) -> Table:
    grid = Table.grid(padding=(0, 2))
    for _ in range(columns):
        grid.add_column(no_wrap=False)
    return grid
