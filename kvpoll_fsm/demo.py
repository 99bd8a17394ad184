"""`kvpoll demo`: transfers between real processes, watched and compared.

The parent starts one sender process and one receiver process per rank, opens all rooms on all of them, and
writes down what each says. It decides nothing about a room.
"""

from __future__ import annotations

import time
from typing import Protocol

from kvpoll_fsm.demos.crew import Crew, Worker
from kvpoll_fsm.demos.lines import Message
from kvpoll_fsm.demos.plan import Plan
from kvpoll_fsm.demos.report import Report

__all__ = ["Demo", "Watcher", "run"]

START_S = 60.0
"""How long the processes may take to be ready."""
SILENCE_S = 60.0
"""The demo ends when nothing has moved for this long; every wait within it is much shorter."""
AFTER_LOSS_S = 15.0
"""How long the others are listened to when a process has died: they find out by themselves within 5 s."""
TURN_S = 0.1


class Watcher(Protocol):
    """Is told everything as it happens."""

    def saw(self, worker: Worker, message: Message, report: Report) -> None:
        """A process has said something, and the report takes it into account."""
        ...


def run(plan: Plan, watcher: Watcher | None = None) -> Report:
    """Carry out a plan. All processes have ended when this returns or raises."""
    with Crew(plan) as crew:
        demo = Demo(crew, watcher)
        demo.run()
    return demo.report


class Demo:
    """One run.

    Attributes:
        report: What is known so far.
    """

    def __init__(self, crew: Crew, watcher: Watcher | None = None) -> None:
        self.report = Report(crew.plan)
        self._crew = crew
        self._watcher = watcher
        self._addresses: dict[Worker, str] = {}
        self._rooms_left = crew.plan.rooms
        self._give_up_s = time.monotonic() + START_S
        self._lost = False

    def run(self) -> None:
        """From the processes' start to their end."""
        while len(self._addresses) < len(self._crew.workers) and self._turn():
            pass
        if not self._lost and not self.report.trouble:
            self._open_rooms()
            while self._rooms_left and self._turn():
                pass
        self._close_open_accounts()
        self.report.trouble += self._crew.finish()

    def _open_rooms(self) -> None:
        self._heard()
        self._crew.sender.send({"do": "open"})
        for worker in self._crew.receivers:
            worker.send({"do": "open", "peer": self._addresses[self._crew.sender]})

    def _turn(self) -> bool:
        """Listen for a moment; False if there is no use in going on."""
        for worker, message in self._crew.read(TURN_S):
            self._heard()
            self._take(worker, message)
            if self._watcher is not None:
                self._watcher.saw(worker, message, self.report)
        if all(worker.gone for worker in self._crew.workers):
            return False
        if time.monotonic() < self._give_up_s:
            return True
        if not self._lost:
            self.report.trouble.append(f"nothing has happened for {SILENCE_S:g} s")
        return False

    def _heard(self) -> None:
        if not self._lost:
            self._give_up_s = time.monotonic() + SILENCE_S

    def _take(self, worker: Worker, message: Message) -> None:
        event = message["event"]
        if event == "ready":
            self._addresses[worker] = message["address"]
        elif event == "gone":
            self._take_loss(worker, message["detail"])
        elif event in ("states", "done"):
            account = self.report.account(worker.side, worker.rank, message["room"])
            account.states = message["states"]
            if event == "done":
                account.parts, account.sha256 = message["parts"], message["sha256"]
                account.failure = message["failure"]
                account.sent_s, account.ended_s = message.get("sent_s"), message["ended_s"]
                self._end(worker, message["room"])

    def _take_loss(self, worker: Worker, detail: str) -> None:
        self.report.trouble.append(f"{worker.name}: {detail}")
        if not self._lost:
            self._lost = True
            self._give_up_s = time.monotonic() + AFTER_LOSS_S
        for room in self.report.rooms:
            account = self.report.account(worker.side, worker.rank, room)
            if not account.over:
                account.failure = detail
                self._end(worker, room)

    def _end(self, worker: Worker, room: int) -> None:
        """One side of a room has ended; the sender may let go of its data once all have."""
        self.report.account(worker.side, worker.rank, room).over = True
        if self.report.rooms[room].over:
            self._rooms_left -= 1
            self._crew.sender.send({"do": "release", "room": room})

    def _close_open_accounts(self) -> None:
        for room in self.report.rooms.values():
            for account in room.accounts:
                if not account.over:
                    account.failure = account.failure or "the demo did not wait any longer"
