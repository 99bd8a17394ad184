"""A busy Python loop, as an engine's scheduler is one: in a thread of a process, or in a process beside it."""

from __future__ import annotations

import subprocess
import sys
import threading

__all__ = ["Beside", "Inside", "spin"]


def spin(ended: threading.Event) -> None:
    """Compute without ever letting go of the interpreter by itself."""
    value = 1
    while not ended.is_set():
        for number in range(1000):
            value = (value * 31 + number) % 65_521


class Inside:
    """The loop is a thread of this very process: whoever moves data here shares the interpreter with it."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=spin, args=(self._ended,), daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; returns when it has."""
        self._ended.set()
        self._thread.join()


class Beside:
    """The loop is a process of its own, and competes for processors only."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin; returns when it runs."""
        command = [sys.executable, "-m", "benchmarks.busy"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if self._process.stdout is not None:
            self._process.stdout.read(1)

    def stop(self) -> None:
        """End; returns when it has."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


def main() -> None:
    """Spin until standard input ends, which it does when the parent has died."""
    ended = threading.Event()

    def watch() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=watch, daemon=True).start()
    print(flush=True)
    spin(ended)


if __name__ == "__main__":
    main()
