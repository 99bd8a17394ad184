"""Our endpoints: a room for every transfer, from its data being there to Success at the sender.

The room is open on both sides before the time is taken, as engines have it. All that `send()` and `result()` do is in
it: the data are copied into blocks, carried, checked if that is on, and copied out to arrays made for the purpose.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from benchmarks.cases import KIB, Case
from benchmarks.peers.base import Peer, Sample, Side, Told
from benchmarks.peers.ours_writes import names
from kvpoll_fsm import BlockPool, Endpoint, Field, KVPoll, Layout

__all__ = ["ISOLATIONS", "PEERS"]

WAIT_S = 60.0
BLOCK_NBYTES = 64 * KIB
ISOLATIONS = ("thread", "process")


class _Ours(Side):
    """What both have: an endpoint per case, whose pool is the side's memory."""

    def _open(self, case: Case) -> str:
        self.close()
        self._case, self._room = case, 0
        self._block_nbytes = min(case.nbytes, BLOCK_NBYTES)
        self._tokens = case.nbytes // self._block_nbytes
        layout = Layout(block_tokens=1, fields=[Field("x", "uint8", (self._block_nbytes,))])
        self._pool = BlockPool(layout, blocks=self._tokens)
        checksum, isolation = self.options["checksum"], self.options["isolation"]
        policy = f"require:{self.options['transport']}"
        self._endpoint = Endpoint(pool=self._pool, transports=policy, checksum=checksum, isolation=isolation).start()
        return str(self._endpoint.address)

    def close(self) -> None:
        """End the endpoint."""
        if hasattr(self, "_endpoint"):
            self._endpoint.close()
            del self._endpoint
            self._pool.close()


class Receiver(_Ours):
    """Opens a room for each transfer."""

    def prepare(self, case: Case, told: Told) -> Told:
        """An endpoint."""
        self._open(case)
        self._sender = told["address"]
        return {}

    def transfer(self) -> None:
        """Take one room."""
        self._room += 1
        room = self._endpoint.receiver(self._room, peer=self._sender, tokens=self._tokens)
        self._data = room.result(WAIT_S)["x"]
        room.wait_quiescent(WAIT_S)
        room.clear()

    def landed(self) -> None:
        """Put the last room's data where the comparison looks for them."""
        self.memory.buffer[: self._case.nbytes] = np.asarray(self._data).reshape(-1).data


class Sender(_Ours):
    """Opens a room for each transfer, and waits for Success."""

    def prepare(self, case: Case, told: Told) -> Told:
        """An endpoint."""
        address = self._open(case)
        self._data = np.frombuffer(self.memory.buffer, np.uint8, case.nbytes).reshape(self._tokens, -1)
        return {"address": address}

    def transfer(self) -> Sample:
        """Send one room; timed from its data to Success."""
        self._room += 1
        room = self._endpoint.sender(self._room, required_ranks=1)
        _bootstrap(room)
        started_s = time.perf_counter()
        room.send({"x": self._data})
        state = room.wait(WAIT_S)
        took_s = time.perf_counter() - started_s
        if state is not KVPoll.Success:
            raise RuntimeError(f"the room is {state}: {room.failure}")
        room.wait_quiescent(WAIT_S)
        room.clear()
        return took_s, self._case.nbytes


def _bootstrap(room: Any) -> None:
    """Wait until the receiver has granted; Endpoint has no call for it, because engines poll."""
    ends_s = time.monotonic() + WAIT_S
    while room.poll() is KVPoll.Bootstrapping and time.monotonic() < ends_s:
        time.sleep(0.0002)


def _peer(transport: str, isolation: str, checksum: bool | str) -> Peer:
    return Peer(
        f"room {transport} {isolation}" + ("" if checksum else " unchecked"),
        "ours",
        Sender,
        Receiver,
        settings=f'endpoints, isolation="{isolation}", data given to Success at the sender; a room each, copies '
        "into and out of blocks included",
        checksum="default: XXH3-128 of each part, unless the medium detects errors" if checksum else "off",
        cases=("1KiB", "64KiB", "1MiB", "8MiB", "64MiB"),
        options={"transport": transport, "isolation": isolation, "checksum": checksum},
    )


PEERS = [
    _peer(transport, isolation, checksum)
    for transport in names()
    for isolation in ISOLATIONS
    for checksum in ("auto", False)
]
