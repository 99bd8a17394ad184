"""One process of a pair: `python -m benchmarks.worker MODULE PEER sender|receiver NBYTES`.

Takes orders, a line of JSON each, on standard input, and answers each with one line. The end of standard input ends
the process at once.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from typing import Any

import numpy as np
import xxhash

from benchmarks import meters
from benchmarks.busy import Beside, Inside
from benchmarks.cases import CASES, Case
from benchmarks.peers.base import Memory, Peer, Side

__all__ = ["Worker", "main"]


class Worker:
    """Carries out orders: each method without an underscore is one."""

    def __init__(self, peer: Peer, side: str, nbytes: int) -> None:
        self._peer, self._role = peer, side
        self._memory = Memory(nbytes)
        if side == "sender":
            random = np.random.SFC64(7).random_raw(nbytes // 8 + 1)
            self._memory.buffer[:] = random.view(np.uint8)[:nbytes].data
        maker = self._peer.sender if side == "sender" else self._peer.receiver
        self._side: Side = maker(self._memory, self._peer.options)
        self._case: Case = next(iter(CASES.values()))
        self._loop: Inside | Beside | None = None

    def listen(self) -> Any:
        """Receiver: be ready."""
        return self._side.listen()

    def join(self, told: Any) -> None:
        """Meet the other side."""
        self._side.join(told)

    def prepare(self, case: str, told: Any) -> Any:
        """Get ready for transfers of a kind."""
        self._case = CASES[case]
        if self._role == "receiver":
            self._memory.buffer[: self._case.span_nbytes] = bytes(self._case.span_nbytes)
        return self._side.prepare(self._case, told)

    def ready(self, told: Any) -> None:
        """Sender: what the receiver said."""
        self._side.ready(told)

    def run(self, count: int) -> Any:
        """Transfers; returns seconds and bytes of each."""
        samples = []
        for _ in range(count):
            started_s = time.perf_counter()
            sample = self._side.transfer()
            samples.append(sample or (time.perf_counter() - started_s, self._case.nbytes))
        return samples

    def cpu(self) -> float:
        """Processor seconds so far."""
        return meters.cpu_s()

    def digest(self) -> str:
        """What the case's pieces hold here."""
        if self._role == "receiver":
            self._side.landed()
        digest = xxhash.xxh3_128()
        for piece in self._case.pieces():
            start = piece.src if self._role == "sender" else piece.dst
            digest.update(self._memory.buffer[start : start + piece.nbytes])
        return digest.hexdigest()

    def busy(self, on: bool) -> None:
        """Start or stop the loop."""
        if self._loop is not None:
            self._loop.stop()
            self._loop = None
        if on:
            self._loop = Inside() if self._peer.loop == "inside" else Beside()
            self._loop.start()

    def memory(self) -> int:
        """Resident bytes, without the payload."""
        return meters.memory_nbytes() - len(self._memory.buffer)

    def close(self) -> None:
        """End the peer."""
        self.busy(False)
        self._side.close()


def _find(module: str, name: str) -> Peer:
    known: list[Peer] = importlib.import_module(module).PEERS
    return next(peer for peer in known if peer.name == name)


def main(arguments: list[str]) -> None:
    """Serve orders until there are no more."""
    answers_fd = os.dup(1)
    os.dup2(2, 1)  # whatever prints must not come between the answers
    worker: Worker | None = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if worker is None:
                worker = Worker(_find(*arguments[:2]), arguments[2], int(arguments[3]))
            answer = {"ok": getattr(worker, order.pop("do"))(**order)}
        except Exception as error:  # told to whoever gave the order
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        os.write(answers_fd, json.dumps(answer).encode() + b"\n")
    os._exit(0)  # a native engine's threads may not survive an orderly exit


if __name__ == "__main__":
    main(sys.argv[1:])
