"""What a small room costs, counted: control frames, turns of the drivers, bytes while it waits."""

from __future__ import annotations

import gc
import tracemalloc
from collections import Counter, deque
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import zmq

from kvpoll_fsm import BlockPool, Endpoint, Field, KVPoll, Layout, control
from kvpoll_fsm.control import Control
from kvpoll_fsm.driver import Driver
from kvpoll_fsm.handles import Room
from kvpoll_shm.pipe import Pipe
from tests.helpers import on_driver, until

ROOMS = 256
IN_FLIGHT = 64
MOST_FRAMES = 5
"""Per room, both ways, acknowledgements and heartbeats included: one for each message a room of one part takes."""


def test_small_rooms_share_control_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = 0
    send = control._try_send

    def counted(socket: zmq.Socket[bytes], parts: list[bytes]) -> bool:
        nonlocal frames
        frames += 1
        return send(socket, parts)

    monkeypatch.setattr(control, "_try_send", counted)
    layout = Layout(block_tokens=1, fields=[Field("x", "uint8", (1024,))])
    tx, rx = (
        Endpoint(pool=BlockPool(layout, blocks=2 * IN_FLIGHT), transports="tcp", isolation="thread") for _ in range(2)
    )
    data = {"x": np.ones((1, 1024), np.uint8)}

    def opened(room: int) -> tuple[Room, Room]:
        sender = tx.sender(room, required_ranks=1)
        sender.send(data)
        return sender, rx.receiver(room, peer=tx.address, tokens=1)

    with tx, rx:
        transfer(opened)
        counted_frames = frames
    assert counted_frames <= MOST_FRAMES * ROOMS, f"{counted_frames / ROOMS} frames per room"


def transfer(opened: Callable[[int], tuple[Room, Room]]) -> None:
    """Rooms from opening to clearing, never more than `IN_FLIGHT` at once."""
    live: deque[tuple[Room, Room]] = deque()
    for number in range(ROOMS + IN_FLIGHT):
        if number >= IN_FLIGHT:
            for room in live.popleft():
                assert room.wait(30) is KVPoll.Success, room.failure
                room.clear()
        if number < ROOMS:
            live.append(opened(number))


LONE_ROOMS = 30
MOST_TURNS = {"tx": 3, "rx": 1}
"""Of either driver from `send()` to Success: the data, the end of the copy, PartAck; PartReport."""
MOST_ROOM_NBYTES = 1800
"""Of a sender's room that waits, with its handle, where the driver is in the host: 1,400 with Python 3.11."""


def test_a_lone_room_of_one_block_takes_no_turn_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timers may add turns to a room: the rooms that had none show what there must be."""
    counts: Counter[str] = Counter()
    names: dict[object, str] = {}

    def counted(cls: type, name: str, label: Callable[[object], str]) -> None:
        function = getattr(cls, name)

        def call(self: object, *args: object, **kwargs: object) -> object:
            counts[label(self)] += 1
            return function(self, *args, **kwargs)

        monkeypatch.setattr(cls, name, call)

    layout = Layout(block_tokens=1, fields=[Field("x", "uint8", (1024,))])
    tx, rx = (
        Endpoint(pool=BlockPool(layout, blocks=2), transports="require:shm", isolation="thread") for _ in range(2)
    )
    counted(Driver, "_turn", lambda driver: names.get(driver, ""))
    counted(Control, "send", lambda control: "frames")
    counted(Pipe, "_send", lambda pipe: "packets")
    data, seen = {"x": np.ones((1, 1024), np.uint8)}, []
    with tx, rx:
        names.update({tx.driver: "tx", rx.driver: "rx"})
        for number in range(LONE_ROOMS):
            sender, receiver = tx.sender(number, required_ranks=1), rx.receiver(number, peer=tx.address, tokens=1)
            until(partial(waits_for_input, receiver))
            for end in (tx, rx):
                on_driver(end, lambda: None)
            counts.clear()
            sender.send(data)
            assert sender.wait(30) is KVPoll.Success, sender.failure
            seen.append(Counter(counts))
            receiver.result(30)
            for room in (sender, receiver):
                room.clear()
    least = {name: min(each[name] for each in seen) for name in (*MOST_TURNS, "frames", "packets")}
    assert least["packets"] == 2, "the order and its end"
    assert least["frames"] <= 3, "PartReport, PartAck, and perhaps PartOutcome"
    assert all(least[name] <= most for name, most in MOST_TURNS.items()), least


def waits_for_input(room: Room) -> bool:
    return room.poll() is KVPoll.WaitingForInput


def test_a_room_that_waits_keeps_few_bytes() -> None:
    """The trace is full, and the tables have their size, when the first half has been opened."""
    layout = Layout(block_tokens=1, fields=[Field("x", "uint8", (64,))])
    handles: list[Room] = []

    def opened(rooms: int) -> int:
        handles.extend(endpoint.sender(number, required_ranks=1) for number in range(len(handles), rooms))
        on_driver(endpoint, lambda: None)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    with Endpoint(pool=BlockPool(layout, blocks=4), transports="tcp", isolation="thread") as endpoint:
        tracemalloc.start()
        try:
            before, after = (opened(rooms) for rooms in (6_000, 12_000))
        finally:
            tracemalloc.stop()
        for handle in handles:
            handle.clear()
    assert (after - before) / 6_000 <= MOST_ROOM_NBYTES
