"""Measurements in a process of their own, which is ended by force if it hangs: `python -m benchmarks.task JSON`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import calls, growth, job
from benchmarks.pair import ROOT
from benchmarks.results import Results, Series

__all__ = ["perform"]

TASKS: dict[str, Callable[..., Iterator[None]]] = {"calls": calls.measure, "growth": growth.measure, "job": job.measure}


def perform(results: Results, task: str, within_s: float, **arguments: Any) -> None:
    """Run a task and add what it found out; why it failed, if it did, is in `missing` under the task's name."""
    order = json.dumps({"task": task, **arguments})
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.task", order],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        start_new_session=True,  # killed with its children
    )
    try:
        out, err = process.communicate(timeout=max(1.0, within_s))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        results.missing[task] = f"not done after {within_s:.0f} s, killed"
    else:
        if process.returncode:
            last = err.decode(errors="replace").strip().splitlines() or [f"exit status {process.returncode}"]
            results.missing[task] = last[-1]
    for line in out.decode().splitlines():
        _merge(results, json.loads(line))


def _merge(results: Results, found: dict[str, Any]) -> None:
    for name, (nbytes, rounds) in found["calls"].items():
        results.calls[name] = Series({int(round_): values for round_, values in rounds.items()}, nbytes)
    results.numbers |= found["numbers"]
    results.missing |= found["missing"]


def main() -> None:
    """Perform the task that the argument names; after each step, say what has been found out so far."""
    order = json.loads(sys.argv[1])
    answers_fd = os.dup(1)
    os.dup2(2, 1)
    results = Results()
    for _ in TASKS[order.pop("task")](results, **order):
        found = {
            "calls": {name: (series.nbytes, series.rounds) for name, series in results.calls.items()},
            "numbers": results.numbers,
            "missing": results.missing,
        }
        os.write(answers_fd, json.dumps(found).encode() + b"\n")


if __name__ == "__main__":
    main()
