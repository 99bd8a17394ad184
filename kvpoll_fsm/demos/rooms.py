"""What a process of the demo does with its rooms: send them, or receive them, and say what happened.

One loop, one thread (besides the endpoint's own): take orders, do one step of filling or hashing, report
transitions. What is reported of a room is what its handle says: `history`, `parts`, `failure`.
"""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, ClassVar

from kvpoll_fsm.arena import BlockPool
from kvpoll_fsm.demos.data import Arrays, allocate, fill, hash_into
from kvpoll_fsm.demos.lines import Lines, Message, encode
from kvpoll_fsm.demos.plan import Plan
from kvpoll_fsm.endpoint import Endpoint
from kvpoll_fsm.handles import Receiver, Room, Sender
from kvpoll_fsm.poll import KVPoll

__all__ = ["ReceiverSide", "SenderSide", "Side"]

LOOK_S = 0.005
"""How often handles are looked at for transitions; the end of a room wakes the loop at once."""
WORK_S = 0.002
"""How long filling and hashing may keep the loop from its rooms."""
BYTES_EVERY_S = 0.1
_CHUNK = 1 << 16


class Side:
    """One process's rooms.

    Reports `ready` (address), `states` (a room's history so far), `bytes` (how much has landed) and `done`
    (how a room ended). Takes the orders of its subclass; ends when there will be no more.
    """

    _ORDERS: ClassVar[dict[str, Any]] = {}
    blocks = 0

    def __init__(self, plan: Plan, orders_fd: int, reports_fd: int) -> None:
        """Store what is needed.

        Args:
            plan: What the demo is to do.
            orders_fd: Where orders are read; its end is the end of this process.
            reports_fd: Where reports are written.
        """
        self.plan = plan
        self._orders_fd = orders_fd
        self._reports_fd = reports_fd
        self._lines = Lines()
        self._live: dict[int, Room] = {}
        self._shown: dict[int, tuple[KVPoll, ...]] = {}
        self._landed: dict[int, int] = {}
        self._ended_s: dict[int, float] = {}
        self._work: deque[Iterator[None]] = deque()
        self._next_bytes_s = 0.0
        self._open = True

    def run(self) -> None:
        """Serve until orders end."""
        pool = BlockPool(self.plan.layout, self.blocks)
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        plan = self.plan
        with Endpoint(pool=pool, transports=plan.transport, arrays="numpy", isolation=plan.isolation) as self.endpoint:
            self._report("ready", address=str(self.endpoint.address))
            while self._open:
                self._turn()

    def _turn(self) -> None:
        timeout_s = 0.0 if self._work else LOOK_S if self._live else None
        readable, _, _ = select.select([self._orders_fd, self._wakeup], [], [], timeout_s)
        if self._wakeup in readable:
            os.eventfd_read(self._wakeup)
        if self._orders_fd in readable:
            self._take_orders()
        self._step()
        for room, handle in list(self._live.items()):
            if handle.history is not self._shown[room]:
                self._look(room, handle)
        self._count_bytes()

    def _take_orders(self) -> None:
        data = os.read(self._orders_fd, _CHUNK)
        self._open = bool(data)
        for order in self._lines.feed(data):
            self._ORDERS[order.pop("do")](self, **order)

    def _step(self) -> None:
        """A moment of work, the oldest first."""
        until_s = time.monotonic() + WORK_S
        while self._work and time.monotonic() < until_s:
            if next(self._work[0], self) is self:
                self._work.popleft()

    # Rooms

    def _watch(self, handle: Room) -> None:
        """Report this room from now on."""
        room = handle.room
        self._live[room], self._shown[room] = handle, ()

        def ended() -> None:
            self._ended_s[room] = time.monotonic()
            os.eventfd_write(self._wakeup, 1)

        handle.view.call_when_ended(ended)

    def _look(self, room: int, handle: Room) -> None:
        """A room has moved on: say so."""
        history = handle.history
        ended = history[-1].is_terminal
        if ended and room not in self._ended_s:
            return  # the callback comes a moment after the state, and wakes us
        self._shown[room] = history
        self._report("states", room=room, states=names(history), at_s=time.monotonic())
        if ended:
            del self._live[room]
            self._over(room, handle)
        else:
            self._moved(room, history[-1])

    def _moved(self, room: int, state: KVPoll) -> None:
        """A room has come to a state that is not its last."""

    def _count_bytes(self) -> None:
        now = time.monotonic()
        if now < self._next_bytes_s:
            return
        self._next_bytes_s = now + BYTES_EVERY_S
        if self._live:
            next(iter(self._live.values())).poll()  # one call is a sign of life for all: the host is not stuck
        landed = {room: handle.bytes_done for room, handle in self._live.items()}
        grown = {room: nbytes for room, nbytes in landed.items() if nbytes != self._landed.get(room, 0)}
        self._landed = landed
        if grown:
            self._report("bytes", rooms=grown)

    def _over(self, room: int, handle: Room) -> None:
        raise NotImplementedError

    def _done(self, handle: Room, hashes: dict[str, str], **more: float | None) -> None:
        """Report the end of a room, in the handle's own words."""
        parts = [
            {
                "part": p.part,
                "tokens": p.tokens,
                "is_last": p.is_last,
                "transport": p.transport,
                "passed_over": p.passed_over,
            }
            for p in handle.parts
        ]
        self._report(
            "done",
            room=handle.room,
            states=names(handle.history),
            parts=parts,
            sha256=hashes,
            failure=None if handle.failure is None else str(handle.failure),
            ended_s=self._ended_s.pop(handle.room),
            **more,
        )

    def _report(self, event: str, **fields: Any) -> None:
        data = encode({"event": event, **fields})
        while data:
            data = data[os.write(self._reports_fd, data) :]


class SenderSide(Side):
    """Opens all rooms at once; makes the data of a few at a time, for rooms that wait for it."""

    def __init__(self, plan: Plan, orders_fd: int, reports_fd: int) -> None:
        super().__init__(plan, orders_fd, reports_fd)
        self.blocks = plan.sender_blocks
        self._handles: dict[int, Sender] = {}
        self._hungry: deque[Sender] = deque()
        self._data: dict[int, Arrays] = {}
        self._hashes: dict[int, dict[str, str]] = {}
        self._sent_s: dict[int, float] = {}

    def open(self) -> None:
        """Order: open all rooms."""
        for room in self.plan.room_numbers:
            sender = self.endpoint.sender(room, required_ranks=self.plan.ranks, tag=f"demo-{room}")
            self._handles[room] = sender
            self._watch(sender)

    def release(self, room: int) -> None:
        """Order: all sides are done with the room, so its data can go."""
        self._data.pop(room, None)
        self._handles.pop(room).clear()

    def _turn(self) -> None:
        super()._turn()
        while self._hungry and len(self._data) < self.plan.at_once:
            sender = self._hungry.popleft()
            if sender.poll() is KVPoll.WaitingForInput:
                self._data[sender.room] = {}
                self._work.append(self._feed(sender.room, sender))

    def _moved(self, room: int, state: KVPoll) -> None:
        if state is KVPoll.WaitingForInput:
            self._hungry.append(self._handles[room])

    def _feed(self, room: int, sender: Sender) -> Iterator[None]:
        """Make the data, hash it in this process's memory, and send it."""
        self._data[room] = arrays = allocate(self.plan.layout, self.plan.tokens)
        yield from fill(self.plan.layout, arrays, room)
        hashes = self._hashes[room] = {}
        yield from hash_into(hashes, arrays)
        if sender.poll() is KVPoll.WaitingForInput:
            self._sent_s[room] = time.monotonic()
            sender.send(arrays)

    def _over(self, room: int, handle: Room) -> None:
        self._done(handle, self._hashes.pop(room, {}), sent_s=self._sent_s.get(room))

    _ORDERS: ClassVar[dict[str, Any]] = {"open": open, "release": release}


class ReceiverSide(Side):
    """Opens all rooms at once; the endpoint's pool decides which of them get blocks, and when."""

    def __init__(self, plan: Plan, rank: int, orders_fd: int, reports_fd: int) -> None:
        super().__init__(plan, orders_fd, reports_fd)
        self.blocks = plan.receiver_blocks
        self._rank = rank

    def open(self, peer: str) -> None:
        """Order: open all rooms with the sender at this address."""
        for room in self.plan.room_numbers:
            receiver = self.endpoint.receiver(
                room,
                peer=peer,
                tokens=self.plan.grant_tokens,
                rank=self._rank,
                ranks=self.plan.ranks,
                resume=self.plan.resume,
                tag=f"demo-{room}",
            )
            self._watch(receiver)

    def _over(self, room: int, handle: Room) -> None:
        assert isinstance(handle, Receiver)
        self._work.append(self._hash(handle))

    def _hash(self, receiver: Receiver) -> Iterator[None]:
        """Hash what has arrived in this process's memory; then it can go."""
        hashes: dict[str, str] = {}
        if receiver.poll() is KVPoll.Success:
            yield from hash_into(hashes, receiver.result(timeout=0))
        self._done(receiver, hashes)
        receiver.clear()

    _ORDERS: ClassVar[dict[str, Any]] = {"open": open}


def names(history: tuple[KVPoll, ...]) -> list[str]:
    """The states a room has gone through, by name."""
    return [state.name for state in history]


def read_first(fd: int) -> Message:
    """The first message, read to its end and not one byte further.

    Raises:
        EOFError: There is none.
    """
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(fd, 1)
        if not byte:
            raise EOFError
        line += byte
    return Lines().feed(line)[0]
