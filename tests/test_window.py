"""A window of two between endpoints: the next part is received while one is copied out, and nothing else differs."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest

from kvpoll_fsm import Endpoint, InvalidInput, KVPoll, RequestTooLarge
from kvpoll_fsm.arena import BlockPool
from kvpoll_fsm.commands import HeldPart
from kvpoll_fsm.staging import Destination
from kvpoll_fsm.trace import MessageRecord
from tests.helpers import BLOCK_TOKENS, SOON_S, endpoint, make_data, open_pair, pair, pool, same, until

W, T, S = KVPoll.WaitingForInput, KVPoll.Transferring, KVPoll.Success
PART = 2 * BLOCK_TOKENS
THREE_PARTS = 5 * BLOCK_TOKENS
CARRIERS = ("memory", "tcp", "shm")


class Gate:
    """Workers that copy out wait until it is opened; `begun` has the parts whose copies were begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[int] = []
        self.opened = threading.Event()
        self._copy_out = Destination.copy_out
        gate = self

        def copy_out(destination: Destination, pool: BlockPool, parts: Iterable[HeldPart]) -> None:
            parts = tuple(parts)
            gate.begun += [held.part for held in parts]
            assert gate.opened.wait(SOON_S)
            gate._copy_out(destination, pool, parts)

        monkeypatch.setattr(Destination, "copy_out", copy_out)
        monkeypatch.setattr("kvpoll_fsm.jobs.SMALL_NBYTES", -1)  # so that a worker does it, however little it is


def heard(one: Endpoint, way: str) -> list[tuple[str, Any]]:
    """Room messages that left or came in, in order: kind, and the part it is about."""
    records = [record for record in one.trace() if isinstance(record, MessageRecord) and record.way == way]
    messages = [msgspec.to_builtins(record.message) for record in records]
    return [(said["kind"], said.get("part", said.get("grant", {}).get("part"))) for said in messages]


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_the_next_part_arrives_while_one_is_copied_out(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, data = Gate(monkeypatch), make_data(THREE_PARTS, seed=1)
    with pair(transport, isolation="thread") as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1, tokens=PART, window=2)
        sender.send(data)
        until(lambda: ("PartReport", 1) in heard(rx, "in"))
        assert gate.begun == [0]
        assert heard(rx, "out") == [("Reserve", 0), ("Resume", 1), ("PartAck", 0)]
        assert [part.part for part in receiver.parts] == [0]
        assert receiver.poll() is T
        assert rx.load().leased == 4
        gate.opened.set()
        assert same(receiver.result(timeout=SOON_S), data)
        assert sender.wait(SOON_S) is S
        assert gate.begun == [0, 1, 2]
        assert receiver.history[1:] == (W, T, S)
        assert [part.tokens for part in receiver.parts] == [PART, PART, BLOCK_TOKENS]
        until(lambda: rx.load().free == rx.load().total)


def test_with_a_window_of_one_the_next_part_waits_for_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, data = Gate(monkeypatch), make_data(THREE_PARTS, seed=1)
    with pair("tcp", isolation="thread") as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1, tokens=PART)
        sender.send(data)
        until(lambda: gate.begun == [0])
        assert heard(rx, "out") == [("Reserve", 0)]
        assert rx.load().leased == 2
        gate.opened.set()
        assert same(receiver.result(timeout=SOON_S), data)
        assert [said for said in heard(rx, "out") if said[0] == "Resume"] == [("Resume", 1), ("Resume", 2)]


@pytest.mark.parametrize("transport", CARRIERS)
@pytest.mark.parametrize("tokens", [PART, 9 * PART + 3])
def test_windows_differ_in_nothing_that_arrives(transport: str, tokens: int) -> None:
    data = make_data(tokens, seed=tokens)
    with pair(transport) as (tx, rx):
        rooms = [open_pair(tx, rx, window, tokens=PART, window=window) for window in (1, 2)]
        for sender, _ in rooms:
            sender.send(data)
        for _, receiver in rooms:
            assert same(receiver.result(timeout=SOON_S), data)
        lengths = [[(part.offset, part.tokens, part.is_last) for part in receiver.parts] for _, receiver in rooms]
        assert lengths[0] == lengths[1]
        for sender, _ in rooms:
            assert sender.wait(SOON_S) is S


def test_ranks_may_have_different_windows() -> None:
    data = make_data(THREE_PARTS, seed=3)
    with pair("tcp") as (tx, rx):
        sender = tx.sender(1, required_ranks=3)
        peer = str(tx.address)
        ranks = [
            rx.receiver(1, peer=peer, rank=0, ranks=3, tokens=PART, window=2),
            rx.receiver(1, peer=peer, rank=1, ranks=3, tokens=PART),
            rx.receiver(1, peer=peer, rank=2, ranks=3, dummy=True),
        ]
        sender.send(data)
        assert same(ranks[0].result(timeout=SOON_S), data)
        assert same(ranks[1].result(timeout=SOON_S), data)
        assert ranks[2].wait(SOON_S) is S


def test_rooms_that_leave_no_second_blocks_to_each_other_end_all_the_same() -> None:
    """A pool of two grants for four rooms of a window of two each."""
    with pair("tcp", rx={"pool": pool(4)}) as (tx, rx):
        rooms = [open_pair(tx, rx, room, tokens=PART, window=2) for room in (4, 3, 2, 1)]
        for (sender, _), seed in zip(rooms, range(4), strict=True):
            sender.send(make_data(THREE_PARTS, seed=seed))
        for (_, receiver), seed in zip(rooms, range(4), strict=True):
            assert same(receiver.result(timeout=SOON_S), make_data(THREE_PARTS, seed=seed))
        until(lambda: rx.load().free == 4)


def test_an_abort_while_two_parts_have_blocks_gives_all_back(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with pair("tcp", isolation="thread") as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1, tokens=PART, window=2)
        sender.send(make_data(THREE_PARTS, seed=1))
        until(lambda: ("PartReport", 1) in heard(rx, "in"))
        receiver.abort("enough")
        assert sender.wait(SOON_S) is KVPoll.Failed
        assert receiver.wait(SOON_S) is KVPoll.Failed
        assert rx.load().leased + rx.load().quarantined >= 2  # the copy still reads what it was given
        gate.opened.set()
        assert receiver.wait_quiescent(SOON_S)
        assert rx.load().free == rx.load().total


def test_a_copy_that_fails_after_the_part_was_acknowledged(monkeypatch: pytest.MonkeyPatch) -> None:
    def copy_out(destination: Destination, pool: BlockPool, parts: Iterable[HeldPart]) -> None:
        raise MemoryError("none left")

    monkeypatch.setattr(Destination, "copy_out", copy_out)
    with pair("tcp", isolation="thread") as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1, tokens=PART, window=2)
        sender.send(make_data(THREE_PARTS, seed=1))
        assert sender.wait(SOON_S) is KVPoll.Failed
        for side in (sender, receiver):
            assert side.wait(SOON_S) is KVPoll.Failed
            assert side.failure is not None
            assert "MemoryError: none left" in side.failure.detail
        until(lambda: rx.load().free == rx.load().total)


@pytest.mark.parametrize(
    ("arguments", "error", "problem"),
    [
        ({"window": 0}, InvalidInput, "window=0: give an integer from 1 to 2"),
        ({"window": 3}, InvalidInput, "window=3"),
        ({"window": True}, InvalidInput, "window=True"),
        ({"window": 2, "resume": "extend"}, InvalidInput, "window=2 goes with resume='drain'"),
        ({"window": 2, "resume": "manual", "blocks": [1]}, InvalidInput, "window=2 goes with resume='drain'"),
        ({"window": 2, "dummy": True}, InvalidInput, "a dummy rank has no use for it"),
        ({"window": 2, "tokens": 5 * BLOCK_TOKENS}, RequestTooLarge, "10 blocks wanted but the pool has 9 in all"),
    ],
)
def test_a_window_that_cannot_work_is_refused(arguments: dict[str, Any], error: type[Exception], problem: str) -> None:
    with endpoint(pool=pool(9)) as rx, pytest.raises(error, match=problem):
        rx.receiver(1, peer="tcp://127.0.0.1:1", **arguments)


@pytest.mark.parametrize(("blocks", "grant"), [(64, 8), (16, 8), (9, 4), (2, 1)])
def test_by_default_half_the_pool_is_one_grant(blocks: int, grant: int) -> None:
    with pair("memory", rx={"pool": pool(blocks)}) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1, tokens=None, window=2)
        sender.send(make_data(20 * BLOCK_TOKENS, seed=2))
        receiver.result(timeout=SOON_S)
        assert receiver.parts[0].tokens == grant * BLOCK_TOKENS


def test_a_pool_of_one_block_has_no_window() -> None:
    with endpoint(pool=pool(1)) as rx, pytest.raises(RequestTooLarge, match="2 blocks wanted but the pool has 1"):
        rx.receiver(1, peer="tcp://127.0.0.1:1", window=2)
