"""The programs of a run as the conductor sees them: started, told, stopped, killed."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import tempfile
import threading
from typing import Any

from tests.faults.processes import Mother

__all__ = ["Member"]


class Member:
    """One process of a program; a program that was killed and started again has another one.

    Attributes:
        program: Which program of the plan.
        buried: It has ended, and how is known.
        alive: It has been neither killed nor told to leave, and has not died of itself.
    """

    def __init__(self, mother: Mother, program: str, heard: queue.SimpleQueue[tuple[Member, dict[str, Any]]]) -> None:
        self.program = program
        self.alive = True
        self.buried = False
        self._heard = heard
        self._orders = 0
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in `end`
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        self._process = mother.start(theirs_in, theirs_out, self._errors.fileno())
        os.close(theirs_in)
        os.close(theirs_out)
        self._reader = threading.Thread(target=self._read, name=f"reads {program}", daemon=True)
        self._reader.start()

    def post(self, do: str, **order: Any) -> int:
        """Give an order to a process that is alive; what comes of it is heard under the number returned."""
        assert self.alive, f"{self.program} is told to {do} after its end"
        self._orders += 1
        with contextlib.suppress(BrokenPipeError):  # it has died, which is heard too
            os.write(self._out, json.dumps({"id": self._orders, "do": do, **order}).encode() + b"\n")
        return self._orders

    def stop(self) -> None:
        """Freeze the process."""
        self._process.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on, unless it was killed meanwhile."""
        if self.alive:
            self._process.signal(signal.SIGCONT)

    def leave(self) -> None:
        """Let the process close its endpoints and end; it is heard when it has."""
        self.resume()
        self.alive = False
        os.close(self._out)

    def kill(self) -> None:
        """End the process without a word."""
        self.alive = False
        self._process.signal(signal.SIGKILL)
        self._process.wait()
        os.close(self._out)

    def end(self) -> tuple[int, str]:
        """Wait for the end, after `leave()` or `kill()`; returns the exit status and what was written to stderr."""
        status, self.buried = self._process.wait(), True
        self._reader.join()
        self._errors.seek(0)
        text = self._errors.read()
        self._errors.close()
        return status, text

    def _read(self) -> None:
        with open(self._in) as lines:
            for line in lines:
                if line.endswith("\n"):  # what a killed process has not finished saying does not count
                    self._heard.put((self, json.loads(line)))
        self._heard.put((self, {"ended": True}))
