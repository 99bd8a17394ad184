"""Small rooms, many in flight: one transfer is a batch of rooms of 1 KiB, its time that of one room on average."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.cases import ROOM, Case
from benchmarks.peers.base import Peer, Sample, Side, Told
from benchmarks.peers.ours_rooms import ISOLATIONS
from benchmarks.peers.ours_writes import names
from kvpoll_fsm import BlockPool, Endpoint, Field, KVPoll, Layout

__all__ = ["BATCH", "PEERS"]

BATCH = 256
IN_FLIGHT = 64
WAIT_S = 60.0


class _Ours(Side):
    """What both have: an endpoint with a block for every room in flight."""

    def _open(self) -> str:
        self._next = 0
        layout = Layout(block_tokens=1, fields=[Field("x", "uint8", (ROOM.nbytes,))])
        policy = f"require:{self.options['transport']}"
        self._endpoint = Endpoint(
            pool=BlockPool(layout, blocks=2 * IN_FLIGHT), transports=policy, isolation=self.options["isolation"]
        ).start()
        return str(self._endpoint.address)

    def _batch(self, open_one: Callable[[int], Any]) -> None:
        """Open rooms, never more than IN_FLIGHT at once, and see that each ends in Success."""
        rooms: deque[Any] = deque()
        for _ in range(BATCH):
            if len(rooms) == IN_FLIGHT:
                _finish(rooms.popleft())
            self._next += 1
            rooms.append(open_one(self._next))
        while rooms:
            _finish(rooms.popleft())

    def close(self) -> None:
        """End the endpoint."""
        self._endpoint.close()


class Receiver(_Ours):
    """Opens its side of each room."""

    def prepare(self, case: Case, told: Told) -> Told:
        """An endpoint, once; the sender's stays too."""
        if not hasattr(self, "_endpoint"):
            self._open()
        self._peer = told["address"]
        return {}

    def transfer(self) -> None:
        """A batch."""
        self._batch(lambda room: self._endpoint.receiver(room, peer=self._peer, tokens=1))


class Sender(_Ours):
    """Opens its side of each room and sends."""

    def prepare(self, case: Case, told: Told) -> Told:
        """An endpoint, once."""
        if not hasattr(self, "_endpoint"):
            self._open()
            self._data = np.frombuffer(self.memory.buffer, np.uint8, ROOM.nbytes).reshape(1, -1)
        return {"address": str(self._endpoint.address)}

    def transfer(self) -> Sample:
        """A batch; the time of one room on average, from opening to clearing."""
        started_s = time.perf_counter()
        self._batch(self._send)
        return (time.perf_counter() - started_s) / BATCH, ROOM.nbytes

    def _send(self, room: int) -> Any:
        sender = self._endpoint.sender(room, required_ranks=1)
        sender.send({"x": self._data})
        return sender


def _finish(room: Any) -> None:
    state = room.wait(WAIT_S)
    if state is not KVPoll.Success:
        raise RuntimeError(f"room {room.room} is {state}: {room.failure}")
    room.clear()


PEERS = [
    Peer(
        f"small rooms {transport} {isolation}",
        "ours",
        Sender,
        Receiver,
        settings=f'endpoints, isolation="{isolation}", {IN_FLIGHT} rooms of 1 KiB in flight, opened to cleared',
        checksum="default",
        cases=(ROOM.name,),
        options={"transport": transport, "isolation": isolation},
        verify=False,
    )
    for transport in names()
    for isolation in ISOLATIONS
]
