"""dump() names, for each gate on each side, what holds a room, since when, and what would open the gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from kvpoll_fsm import Deadlines, Endpoint, Gate
from kvpoll_fsm.deadlines import GATES_OF
from kvpoll_memory import Faults
from tests.helpers import (
    BRISK,
    ROOM_NBYTES,
    SOON_S,
    TOKEN_NBYTES,
    adopted,
    driver_stopped,
    failed,
    make_data,
    open_pair,
    pair,
    pool,
    until,
)

ROOM = 3
Pair = Iterator[tuple[Endpoint, Endpoint]]


@contextmanager
def only_a_sender() -> Pair:
    with pair() as (tx, rx):
        tx.sender(ROOM, required_ranks=2, tag="request-3")
        yield tx, rx


@contextmanager
def only_a_receiver() -> Pair:
    with pair() as (tx, rx):
        rx.receiver(ROOM, peer=tx.address, tokens=16)
        yield tx, rx


@contextmanager
def no_source_blocks() -> Pair:
    faults = Faults()
    faults.hold()
    with pair(faults=faults, tx={"pool": pool(4)}) as (tx, rx):
        for room in (1, ROOM):
            sender, _ = open_pair(tx, rx, room)
            sender.send(make_data(64))
            until(lambda: faults.submitted)
        yield tx, rx
        faults.release()


@contextmanager
def no_blocks() -> Pair:
    with pair(rx={"pool": pool(4)}) as (tx, rx):
        open_pair(tx, rx, 1)
        until(lambda: rx.load().leased == 4)
        open_pair(tx, rx, ROOM)
        yield tx, rx


@contextmanager
def no_data() -> Pair:
    with pair() as (tx, rx):
        open_pair(tx, rx, ROOM)
        yield tx, rx


@contextmanager
def one_of_two_ranks_slow() -> Pair:
    faults = Faults()
    faults.hold(1)
    with pair(faults=faults, deadlines=BRISK) as (tx, rx):
        sender, _ = open_pair(tx, rx, ROOM, ranks=2)
        rx.receiver(ROOM, peer=tx.address, tokens=64, rank=1, ranks=2)
        sender.send(make_data(40))
        yield tx, rx
        faults.release()


@contextmanager
def no_answer() -> Pair:
    faults = Faults()
    faults.hold()
    with pair(faults=faults) as (tx, rx):
        sender, _ = open_pair(tx, rx, ROOM)
        sender.send(make_data(40))
        until(lambda: faults.submitted)
        with driver_stopped(rx):
            faults.release()
            yield tx, rx


@contextmanager
def no_resume() -> Pair:
    with pair(rx={"pool": adopted(8)[0]}) as (tx, rx):
        sender, _ = open_pair(tx, rx, ROOM, tokens=None, resume="manual", blocks=[0])
        sender.send(make_data(40))
        yield tx, rx


@contextmanager
def a_write_that_may_land_still() -> Pair:
    faults, fences = Faults(), Faults()
    faults.fail_late(0)
    fences.hold_fences()
    with pair(faults=faults, rx={"transport_options": {"memory": {"faults": fences}}}) as (tx, rx):
        sender, receiver = open_pair(tx, rx, ROOM)
        sender.send(make_data(40))
        assert failed(sender) == failed(receiver)
        yield tx, rx
        fences.release_fences()


LATE_WRITE = "the sender's word, or the fence, that nothing lands any more in part 0"
WITHOUT_SENDER = "the sender has not opened the room: is it open at that address, are all ranks here?"
SCENES = [
    (only_a_sender, "tx", "waiting_ranks", "ranks not here: [0, 1]; without a usable grant: []"),
    (only_a_receiver, "rx", "waiting_ranks", WITHOUT_SENDER),
    (no_source_blocks, "tx", "waiting_blocks", "no free source blocks in this endpoint's pool"),
    (no_blocks, "rx", "waiting_blocks", "4 blocks did not come free in this endpoint's pool"),
    (no_data, "tx", "queued", "the host has 0 tokens ready of None"),
    (no_data, "rx", "queued", "the sender has not sent part 0"),
    (one_of_two_ranks_slow, "tx", "moving", "no bytes landed; part 0 to ranks [1]"),
    (one_of_two_ranks_slow, "rx", "moving", "part 0 makes no progress"),
    (no_answer, "tx", "waiting_outcome", "no answer for part 0 from ranks [0]"),
    (one_of_two_ranks_slow, "rx", "waiting_outcome", "part 0 is acknowledged, its outcome has not come"),
    (no_resume, "tx", "waiting_resume", "no grant for part 1 from ranks [0]"),
    (no_resume, "rx", "waiting_resume", "resume() was not called for part 1"),
    (a_write_that_may_land_still, "tx", "closed", "writes to ranks [0] have not ended"),
    (
        a_write_that_may_land_still,
        "rx",
        "closed",
        "the sender's word, or the fence, that nothing lands any more in part 0",
    ),
]


def test_every_gate_has_a_scene_on_each_side() -> None:
    assert {(side, gate) for _, side, gate, _ in SCENES} == {
        (side, gate.value) for side in ("tx", "rx") for gate in Gate
    }


@pytest.mark.parametrize(("scene", "side", "gate", "waits_for"), SCENES)
def test_pain_28_dump_names_the_gate_since_when_and_what_opens_it(
    scene: Callable[[], AbstractContextManager[tuple[Endpoint, Endpoint]]], side: str, gate: str, waits_for: str
) -> None:
    with scene() as (tx, rx):
        one = tx if side == "tx" else rx

        def held() -> list[dict[str, object]]:
            found = [entry for entry in one.dump() if entry["room"] == ROOM and entry["gate"] == gate]
            return [entry for entry in found if entry["waits_for"] == waits_for]

        until(held)
        [before] = held()
        [entry] = held()
        assert entry["side"] == ("sender" if side == "tx" else "receiver")
        assert isinstance(before["waited_s"], float)
        assert isinstance(entry["waited_s"], float)
        assert 0 <= before["waited_s"] <= entry["waited_s"] <= 60
        limits = {Deadlines().of(state, Gate(gate)) for state in GATES_OF if Gate(gate) in GATES_OF[state]}
        assert entry["limit_s"] in (limits or {None})


def test_an_entry_tells_whose_room_it_is_and_how_far_it_has_come() -> None:
    with only_a_sender() as (tx, _):
        [entry] = tx.dump()
        assert (entry["room"], entry["rank"], entry["tag"]) == (3, 0, "request-3")
        assert (entry["state"], entry["bytes_done"]) == ("Bootstrapping", 0)
    with one_of_two_ranks_slow() as (tx, _):
        until(lambda: tx.dump()[0]["bytes_done"])
        assert tx.dump()[0]["bytes_done"] == 40 * TOKEN_NBYTES + ROOM_NBYTES


@pytest.mark.both
def test_a_room_is_listed_until_it_is_over_and_cleared() -> None:
    with pair() as (tx, rx):
        assert tx.dump() == rx.dump() == []
        sender, _ = open_pair(tx, rx, ROOM)
        sender.send(make_data(40))
        assert sender.wait(SOON_S).name == "Success"
        [entry] = tx.dump()
        assert (entry["state"], entry["gate"], entry["waits_for"]) == ("Success", "closed", "clear()")
        sender.clear()
        until(lambda: tx.dump() == [])
