"""What single calls cost: `poll()` and one transition, beside what engines and other libraries have for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.results import Results
from kvpoll_fsm import BlockPool, Endpoint, Field, KVPoll, Layout, Lifecycle, PartDone, Sender, StatusBoard
from kvpoll_fsm.events import Bootstrapped
from kvpoll_fsm.lifecycle import reference_machine, trigger_name

__all__ = ["measure"]

ROOM = 42
BLOCK_CALLS = 500
MORE = PartDone(is_last=False, all_ok=True)
"""Leads from Transferring to Transferring, so it can be applied again and again."""
WAIT_S = 20.0


class DictStatus:
    """What engines have today: a dictionary of rooms."""

    def __init__(self) -> None:
        self.status = {ROOM: KVPoll.Transferring}

    def poll(self, room: int) -> KVPoll:
        """Read it."""
        return self.status[room]


class LockedStatus(DictStatus):
    """The same under a lock."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def poll(self, room: int) -> KVPoll:
        """Read it."""
        with self.lock:
            return self.status[room]

    def update(self, room: int, state: KVPoll) -> None:
        """Write it."""
        with self.lock:
            self.status[room] = state


def measure(results: Results, rounds: int, call_s: float) -> Iterator[None]:
    """All calls, interleaved, with a peer that works and with one that stands still."""
    pool = BlockPool(Layout(block_tokens=1, fields=[Field("x", "uint8", (64,))]), blocks=4)
    with Endpoint(pool=pool, transports="tcp") as endpoint:
        room = endpoint.sender(ROOM, required_ranks=1)
        peer = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.calls", str(endpoint.address)], stdin=subprocess.PIPE
        )
        try:
            _bootstrap(room)
            calls = {"poll": room.poll, **_others(results)}
            for round_ in range(rounds):
                for name, call in calls.items():
                    results.call(name).add(round_, _time(call, call_s))
                os.kill(peer.pid, signal.SIGSTOP)
                results.call("poll, peer stopped").add(round_, _time(room.poll, call_s))
                os.kill(peer.pid, signal.SIGCONT)
                yield
        finally:
            peer.kill()
            peer.communicate()


def _bootstrap(room: Sender) -> None:
    ends_s = time.monotonic() + WAIT_S
    while room.poll() is KVPoll.Bootstrapping and time.monotonic() < ends_s:
        time.sleep(0.001)
    if room.poll() is not KVPoll.WaitingForInput:
        raise RuntimeError(f"the room is {room.poll()}: {room.failure}")


def _others(results: Results) -> dict[str, Callable[[], Any]]:
    """What poll() and a transition are compared with; what is not installed is missing."""
    plain, locked, board = DictStatus(), LockedStatus(), StatusBoard()
    board.open(ROOM)
    for event in (Bootstrapped(), MORE):
        board.advance(ROOM, event)
    ours = Lifecycle(KVPoll.Transferring)
    calls: dict[str, Callable[[], Any]] = {
        "dict method": lambda: plain.poll(ROOM),
        "dict method under a lock": lambda: locked.poll(ROOM),
        "StatusBoard.poll": lambda: board.poll(ROOM),
        "an empty call": lambda: None,
        "transition": lambda: ours.apply(MORE),
        "StatusBoard.advance": lambda: board.advance(ROOM, MORE),
        "dict under a lock, written": lambda: locked.update(ROOM, KVPoll.Transferring),
        "transitions": _transitions(),
    }
    try:
        calls["python-statemachine"] = _python_statemachine()
    except ImportError as error:
        results.missing["python-statemachine"] = f"{error}: make bench installs it (extra bench)"
    return calls


def _transitions() -> Callable[[], Any]:
    class Model:
        """A room of its own."""

    model = Model()
    reference_machine().add_model(model, initial=KVPoll.Transferring.name)
    return getattr(model, trigger_name(MORE))  # type: ignore[no-any-return]


def _python_statemachine() -> Callable[[], Any]:
    from statemachine import State, StateMachine

    class Machine(StateMachine):  # type: ignore[misc, unused-ignore]
        """The rows that a room goes through when all is well."""

        bootstrapping = State(initial=True)
        waiting_for_input = State()
        transferring = State()
        success = State(final=True)
        bootstrapped = bootstrapping.to(waiting_for_input)
        more = waiting_for_input.to(transferring) | transferring.to(transferring)
        last = waiting_for_input.to(success) | transferring.to(success)

    machine = Machine()
    machine.bootstrapped()
    machine.more()
    return lambda: machine.more()


def _time(call: Callable[[], Any], budget_s: float) -> list[float]:
    """Seconds per call, in blocks of calls; what goes round the loop is in all of them alike."""
    samples: list[float] = []
    ends_s = time.perf_counter() + budget_s
    while not samples or time.perf_counter() < ends_s:
        started_s = time.perf_counter()
        for _ in range(BLOCK_CALLS):
            call()
        samples.append((time.perf_counter() - started_s) / BLOCK_CALLS)
    return samples


def main() -> None:
    """The peer: grants, and waits until standard input ends."""
    pool = BlockPool(Layout(block_tokens=1, fields=[Field("x", "uint8", (64,))]), blocks=4)
    with Endpoint(pool=pool, transports="tcp") as endpoint:
        endpoint.receiver(ROOM, peer=sys.argv[1], tokens=1)
        sys.stdin.read()


if __name__ == "__main__":
    main()
