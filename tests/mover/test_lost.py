"""A mover that is killed: its rooms fail and say so, the next one serves, and nothing is left of it."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from kvpoll_fsm import Endpoint, EndpointClosed, FailureCode, Gate, KVPoll
from kvpoll_fsm.handles import Room
from kvpoll_fsm.mover import client
from tests.helpers import (
    SOON_S,
    adopted,
    driver_stopped,
    endpoint,
    failed,
    make_data,
    open_pair,
    pool,
    same,
    transfer,
    until,
)
from tests.mover.movers import BIG_TOKENS, LOSABLE, away, children, engine, frozen, kill, moved, moved_pair, pid, worth

ROOM = 3
HUGE_TOKENS = 2_000_000
"""40 MB: more than sockets take, and seen on their way."""
Place = tuple[Endpoint, Endpoint, Room]
Scene = Callable[[ExitStack], Place]


def _pair(stack: ExitStack, own: str, **settings: Any) -> tuple[Endpoint, Endpoint]:
    """The one whose mover will be killed, and one in a thread; `own` is its side."""
    there = settings.pop("there", {})
    one = stack.enter_context(moved(deadlines=LOSABLE, **settings))
    other = stack.enter_context(endpoint("tcp", isolation="thread", deadlines=LOSABLE, **there))
    return (one, other) if own == "sender" else (other, one)


def tx_waiting_ranks(stack: ExitStack) -> Place:
    tx, rx = _pair(stack, "sender")
    return tx, rx, open_pair(tx, rx, ROOM, ranks=2)[0]


def tx_queued(stack: ExitStack) -> Place:
    tx, rx = _pair(stack, "sender")
    return tx, rx, open_pair(tx, rx, ROOM)[0]


def tx_moving(stack: ExitStack) -> Place:
    tx, rx = _pair(stack, "sender", pool=pool(4096))
    far = stack.enter_context(moved(pool=pool(4096), deadlines=LOSABLE))
    sender = tx.sender(ROOM, required_ranks=1)
    far.receiver(ROOM, peer=tx.address, tokens=4096 * 16)
    until(lambda: sender.gate is Gate.queued)
    stack.enter_context(frozen(pid(far)))
    sender.send(make_data(HUGE_TOKENS))
    return tx, rx, sender


def tx_waiting_blocks(stack: ExitStack) -> Place:
    tx, rx = _pair(stack, "sender", pool=pool(4), there={"pool": adopted(8)[0]})
    first, _ = open_pair(tx, rx, 1, tokens=None, resume="manual", blocks=[0, 1, 2, 3])
    sender, _ = open_pair(tx, rx, ROOM, tokens=None, resume="manual", blocks=[4, 5, 6, 7])
    until(lambda: sender.gate is first.gate is Gate.queued)
    stack.enter_context(driver_stopped(rx))  # so that the first room keeps its blocks
    first.send(make_data(64))
    until(lambda: first.gate is Gate.waiting_outcome)
    sender.send(make_data(64))
    return tx, rx, sender


def tx_waiting_outcome(stack: ExitStack) -> Place:
    tx, rx = _pair(stack, "sender")
    sender, _ = open_pair(tx, rx, ROOM)
    until(lambda: sender.gate is Gate.queued)
    stack.enter_context(driver_stopped(rx))
    sender.send(make_data(40))
    return tx, rx, sender


def tx_waiting_resume(stack: ExitStack) -> Place:
    tx, rx = _pair(stack, "sender", there={"pool": adopted(8)[0]})
    sender, _ = open_pair(tx, rx, ROOM, tokens=None, resume="manual", blocks=[0])
    sender.send(make_data(40))
    return tx, rx, sender


def rx_waiting_ranks(stack: ExitStack) -> Place:
    tx, rx = _pair(stack, "receiver")
    return rx, tx, rx.receiver(ROOM, peer=tx.address, tokens=64)


def rx_waiting_blocks(stack: ExitStack) -> Place:
    tx, rx = _pair(stack, "receiver", pool=pool(4))
    open_pair(tx, rx, 1)
    until(lambda: rx.load().leased == 4)
    return rx, tx, open_pair(tx, rx, ROOM)[1]


def rx_queued(stack: ExitStack) -> Place:
    tx, rx = _pair(stack, "receiver")
    return rx, tx, open_pair(tx, rx, ROOM)[1]


def _slow(stack: ExitStack) -> tuple[Endpoint, Endpoint, Room, Room]:
    """A room of two ranks, one of which gets nothing."""
    tx, rx = _pair(stack, "receiver", there={"pool": pool(4096)})
    sender, quick = open_pair(tx, rx, ROOM, ranks=2)
    far = stack.enter_context(moved(pool=pool(4096), deadlines=LOSABLE))
    slow = far.receiver(ROOM, peer=tx.address, tokens=64, rank=1, ranks=2)
    until(lambda: sender.gate is Gate.queued)
    stack.enter_context(frozen(pid(far)))
    sender.send(make_data(40))
    return tx, rx, quick, slow


def rx_moving(stack: ExitStack) -> Place:
    tx = _slow(stack)[0]
    far = stack.enter_context(moved(pool=pool(4096), deadlines=LOSABLE))
    sender = tx.sender(ROOM + 1, required_ranks=1)
    receiver = far.receiver(ROOM + 1, peer=tx.address, tokens=4096 * 16)
    sender.send(make_data(HUGE_TOKENS))
    until(lambda: receiver.gate is Gate.moving)
    return far, tx, receiver


def rx_waiting_outcome(stack: ExitStack) -> Place:
    tx, rx, quick, _ = _slow(stack)
    return rx, tx, quick


SCENES: list[tuple[Scene, Gate]] = [
    (tx_waiting_ranks, Gate.waiting_ranks),
    (tx_waiting_blocks, Gate.waiting_blocks),
    (tx_queued, Gate.queued),
    (tx_moving, Gate.moving),
    (tx_waiting_outcome, Gate.waiting_outcome),
    (tx_waiting_resume, Gate.waiting_resume),
    (rx_waiting_ranks, Gate.waiting_ranks),
    (rx_waiting_blocks, Gate.waiting_blocks),
    (rx_queued, Gate.queued),
    (rx_waiting_outcome, Gate.waiting_outcome),
]


@pytest.mark.parametrize(("scene", "gate"), SCENES)
def test_a_mover_killed_at_a_gate_fails_the_room_and_is_replaced(scene: Scene, gate: Gate) -> None:
    with ExitStack() as stack:
        one, _, handle = scene(stack)
        until(lambda: handle.gate is gate, f"{gate}, not {handle.gate}")
        before = handle.history
        kill(one)
        failure = failed(handle)
        assert (failure.code, failure.retryable) == (FailureCode.MoverLost, True)
        assert "killed by SIGKILL" in failure.detail
        assert handle.history == (*before, KVPoll.Failed)
        assert handle.gate is Gate.closed
        assert handle.wait_quiescent(SOON_S)
        handle.clear()
        _serves(one)


def _serves(one: Endpoint) -> None:
    """Rooms to and from it work."""
    with endpoint("tcp", isolation="thread", deadlines=LOSABLE) as fresh:
        until(lambda: _works(fresh, one), "a room to the new mover")
        until(lambda: _works(one, fresh), "a room from the new mover")


_rooms = iter(range(1000, 1 << 20))


def _works(tx: Endpoint, rx: Endpoint) -> bool:
    room, data = next(_rooms), make_data(100)
    sender, receiver = open_pair(tx, rx, room)
    sender.send(data)
    good = receiver.wait(SOON_S) is KVPoll.Success and same(receiver.result(0), data)
    good = sender.wait(SOON_S) is KVPoll.Success and good
    sender.clear()
    receiver.clear()
    return good


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["tx", "rx"])
def test_the_peer_of_a_lost_mover_is_told_by_the_next_one_or_by_silence(killed: str) -> None:
    with moved_pair(deadlines=LOSABLE) as (tx, rx):
        sender, receiver = open_pair(tx, rx, ROOM)
        until(lambda: receiver.poll() is KVPoll.WaitingForInput)
        address = str(tx.address)
        kill(tx if killed == "tx" else rx)
        here, there = (sender, receiver) if killed == "tx" else (receiver, sender)
        assert failed(here).code is FailureCode.MoverLost
        assert failed(there).code is FailureCode.PeerLost
        assert there.wait_quiescent(SOON_S)
        assert str(tx.address) == address
        sender.clear()
        receiver.clear()
        until(lambda: _works(tx, rx), "the next rooms")


def test_rooms_that_were_a_success_stay_so_with_their_data() -> None:
    with moved_pair(deadlines=LOSABLE) as (tx, rx):
        rooms = [open_pair(tx, rx, room, tokens=512) for room in range(1, 21)]
        for room, (sender, _) in enumerate(rooms, 1):
            sender.send(make_data(300 * room, seed=room))
        until(lambda: sum(receiver.poll() is KVPoll.Success for _, receiver in rooms) >= 5)
        os.kill(pid(rx), signal.SIGKILL)
        good = [i for i, (_, receiver) in enumerate(rooms) if receiver.poll() is KVPoll.Success]
        for i, (_, receiver) in enumerate(rooms):
            assert receiver.wait(SOON_S).is_terminal
            if i in good:
                assert receiver.poll() is KVPoll.Success
            if receiver.poll() is KVPoll.Success:
                assert same(receiver.result(0), make_data(300 * (i + 1), seed=i + 1))
                assert receiver.failure is None
                assert sum(part.tokens for part in receiver.parts) == 300 * (i + 1)


def test_results_of_a_lost_mover_are_not_written_by_the_next() -> None:
    """Segments have numbers, and the next mover counts anew."""
    data = [make_data(BIG_TOKENS, seed=seed) for seed in range(4)]
    with _big_pair() as (tx, rx):

        def got(room: int) -> tuple[Any, Any]:
            sender, receiver = open_pair(tx, rx, room, tokens=512)
            sender.send(data[room])
            receiver.wait(SOON_S)
            return receiver, receiver.result(0)

        old = got(0)
        kill(rx)
        until(lambda: _works(tx, rx))
        second = got(1)
        old[0].clear()
        del old
        gc.collect()
        third = got(2)
        assert same(second[1], data[1])
        assert same(third[1], data[2])


@contextmanager
def _big_pair() -> Iterator[tuple[Endpoint, Endpoint]]:
    with moved(pool=pool(64), deadlines=LOSABLE) as tx, moved(pool=pool(64), deadlines=LOSABLE) as rx:
        yield tx, rx


@pytest.mark.slow
def test_nothing_is_left_of_lost_movers() -> None:
    with moved_pair(deadlines=LOSABLE) as (tx, rx):
        transfer(tx, rx, 1)
        gc.collect()  # what earlier tests have left would count as ours
        before, threads, kin = worth(), threading.active_count(), len(children())
        for _ in range(2):
            old = pid(rx)
            kill(rx)
            assert away(old)
            until(lambda: _works(tx, rx))
        gc.collect()
        until(lambda: all(count <= before.get(kind, 0) for kind, count in worth().items()), "nothing is left")
        assert threading.active_count() == threads
        assert len(children()) == kin


def test_poll_never_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watched from another thread while movers are killed."""
    order = {KVPoll.Bootstrapping: 0, KVPoll.WaitingForInput: 1, KVPoll.Transferring: 2}
    monkeypatch.setattr(client, "PAUSES_S", (0.0,) * 6)
    with moved_pair(deadlines=LOSABLE) as (tx, rx):
        pairs = [open_pair(tx, rx, room) for room in range(40)]
        rooms: list[Room] = [handle for handles in pairs for handle in handles]
        stop, wrong = threading.Event(), []

        def watch() -> None:
            last = [0] * len(rooms)
            ended: list[KVPoll | None] = [None] * len(rooms)
            while not stop.is_set():
                for i, handle in enumerate(rooms):
                    now = handle.poll()
                    if order.get(now, 3) < last[i] or (ended[i] is not None and now is not ended[i]):
                        wrong.append((handle, ended[i] or last[i], now))
                    last[i] = order.get(now, 3)
                    ended[i] = now if now.is_terminal else None

        watcher = threading.Thread(target=watch)
        watcher.start()
        for i, (sender, _) in enumerate(pairs):
            sender.send(make_data(200, seed=i))
            if i == 20:
                os.kill(pid(tx), signal.SIGKILL)
            if i == 30:
                os.kill(pid(rx), signal.SIGKILL)
        for handle in rooms:
            assert handle.wait(SOON_S).is_terminal
        stop.set()
        watcher.join()
        assert not wrong


def test_another_mover_has_another_incarnation_and_fresh_memory() -> None:
    with moved() as tx:
        region = tx.pool.regions()[0]
        region.buffer[:4] = b"mark"
        kill(tx)
        until(lambda: bytes(tx.pool.regions()[0].buffer[:4]) == bytes(4), "fresh arenas")


def test_a_question_is_answered_by_the_next_mover() -> None:
    with moved() as tx:
        answers: list[Any] = []
        with frozen(pid(tx)):
            asking = threading.Thread(target=lambda: answers.append(tx.load()))
            asking.start()
            until(lambda: engine(tx)._questions.open())
            os.kill(pid(tx), signal.SIGKILL)
        asking.join(SOON_S)
        assert [load.free for load in answers] == [64]


@pytest.mark.slow
def test_a_mover_that_is_killed_again_and_again_ends_the_endpoint(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(client, "PAUSES_S", (0.0, 0.0))
    with moved() as tx:
        seen: set[int] = set()
        for _ in range(3):
            until(lambda: engine(tx).mover is not None and pid(tx) not in seen)
            seen.add(pid(tx))
            handle = tx.sender(len(seen))
            os.kill(pid(tx), signal.SIGKILL)
            assert failed(handle).code in (FailureCode.MoverLost, FailureCode.InternalError)
        held = tx._engine
        until(lambda: held is not None and held.ended is not None, "the end")
        with pytest.raises(EndpointClosed, match="movers in a row were lost"):
            tx.sender(99)
    assert not any(not away(one) for one in seen)


def test_close_while_the_mover_is_being_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PAUSES_S", (30.0,))
    before = children()
    with moved() as tx:
        sender = tx.sender(1)
        os.kill(pid(tx), signal.SIGKILL)
        assert failed(sender).code is FailureCode.MoverLost
        waiting = tx.sender(2)
    assert failed(waiting).code is FailureCode.Aborted
    assert children() == before
