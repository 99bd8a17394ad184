"""How many control frames a small room costs where many are in flight: counted on the sockets of both sides."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import pytest
import zmq

from kvpoll_fsm import BlockPool, Endpoint, Field, KVPoll, Layout, control
from kvpoll_fsm.handles import Room

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
