"""A transport fails in the middle of a part: the part goes on by another, or by the same, and the room ends well.

What happens to real processes is in tests/mover/test_fallback.py.
"""

from __future__ import annotations

from typing import Any

import pytest

from kvpoll_fsm import FailureCode, KVPoll
from kvpoll_fsm.sender_attempts import MAX_COLLATERALS
from kvpoll_fsm.staging import stage
from kvpoll_memory import Faults
from kvpoll_memory.transport import MemoryLink
from tests.helpers import (
    SOON_S,
    adopted,
    deadlines,
    failed,
    make_data,
    on_driver,
    open_pair,
    pair,
    same,
    transfer,
    until,
)

S, T = KVPoll.Success, KVPoll.Transferring
COSTLY = {"transport_options": {"memory": {"costly_fence": True}}}
"""A fence kills a process."""
LONG = deadlines(breaker_s=600.0, breaker_max_s=600.0)
"""A breaker that opens stays so until a test says that its time is over."""


def history(handle: Any) -> list[str]:
    return [f"{part.part}:{part.transport}" for part in handle.parts]


@pytest.mark.parametrize("settings", [{}, {"rx": COSTLY}], ids=["token", "process"])
@pytest.mark.parametrize("after_nbytes", [0, 100])
def test_what_may_land_still_is_fenced_and_goes_by_the_next(settings: dict[str, Any], after_nbytes: int) -> None:
    """The bytes that come late find their token dead; those of the next transport stay as they are."""
    faults, data = Faults(), make_data(100)
    faults.fail_late(0, "the child was killed", after_nbytes)
    with pair("prefer:memory,tcp", faults=faults, **settings) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(data)
        until(lambda: len(sender.parts) > 0, "the first part has its outcome")
        faults.land(0)
        assert same(receiver.result(SOON_S), data)
        assert sender.wait(SOON_S) is S
        assert history(sender) == history(receiver) == ["0:tcp", "1:tcp"]
        assert "the child was killed" in sender.parts[0].passed_over
        assert [part.tokens for part in sender.parts] == [64, 36]
        assert rx.load().quarantined == 0


def test_a_source_that_is_read_still_is_waited_for() -> None:
    faults, data = Faults(), make_data(64)
    faults.fail_late(0, reading=True)
    with pair("prefer:memory,tcp", faults=faults) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(data)
        until(lambda: rx.driver.incoming._exposed and not rx.driver.incoming._fences and faults.submitted)
        assert not sender.parts
        faults.land(0)
        assert same(receiver.result(SOON_S), data)
        assert history(sender) == ["0:tcp"]


@pytest.mark.parametrize("late", [False, True], ids=["quiescent", "late"])
def test_collateral_goes_by_the_same_transport(late: bool) -> None:
    faults, data = Faults(), make_data(64)
    for ticket in range(MAX_COLLATERALS):
        (faults.fail_late if late else faults.fail)(ticket, "killed", collateral=True)
    with pair("require:memory", faults=faults) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(data)
        assert same(receiver.result(SOON_S), data)
        assert history(sender) == ["0:memory"]
        assert faults.submitted == MAX_COLLATERALS + 1
        for ticket in range(MAX_COLLATERALS):
            faults.land(ticket)
        assert sender.wait_quiescent(SOON_S)


def test_collateral_is_not_for_ever() -> None:
    faults, data = Faults(), make_data(64)
    for ticket in range(MAX_COLLATERALS + 1):
        faults.fail(ticket, "killed", collateral=True)
    with pair("prefer:memory,tcp", faults=faults) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(data)
        assert same(receiver.result(SOON_S), data)
        assert history(sender) == ["0:tcp"]
        assert faults.submitted == MAX_COLLATERALS + 1


# A transport that hangs


def test_a_transport_that_hangs_is_left_for_the_next() -> None:
    faults, data = Faults(), make_data(100)
    faults.hold(0)
    with pair("prefer:memory,tcp", faults=faults, deadlines=deadlines(fallback_s=0.2)) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(data)
        assert same(receiver.result(SOON_S), data)
        assert history(sender) == ["0:tcp", "1:tcp"]
        assert "memory to rank 0: no bytes landed for 0.2 s" in sender.parts[0].passed_over


def test_a_receiver_waits_as_long_as_something_else_is_tried() -> None:
    """Its clock is short: it would not outlast the two attempts if it did not hear of them."""
    faults, data = Faults(), make_data(64)
    faults.hold()
    patience = {"rx": {"deadlines": deadlines(stall_s=2.0)}, "tx": {"deadlines": deadlines(fallback_s=1.2)}}
    with pair("prefer:memory,tcp", faults=faults, **patience) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(data)
        assert same(receiver.result(SOON_S), data)
        assert history(sender) == ["0:tcp"]


def test_without_another_transport_a_room_waits_as_before() -> None:
    faults, data = Faults(), make_data(64)
    faults.hold(0)
    with pair("require:memory", faults=faults, deadlines=deadlines(fallback_s=0.05, stall_s=0.5)) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(data)
        assert sender.wait(SOON_S) is receiver.wait(SOON_S) is KVPoll.Failed
        assert "moving for 0.5 s" in str(sender.failure)


# Breakers


def test_other_rooms_do_not_run_into_a_transport_that_has_failed_until_a_part_shows_that_it_works() -> None:
    faults = Faults()
    faults.fail(0, "the child was killed")
    with pair("prefer:memory,tcp", faults=faults, deadlines=LONG) as (tx, rx):
        transfer(tx, rx, 1, 16)
        waiting = tx.sender(9)
        sender, receiver = open_pair(tx, rx, 2)
        until(lambda: any(entry["breakers"] for entry in tx.dump() if entry["room"] == 2), "room 2 met the breaker")
        (shut,) = next(entry["breakers"] for entry in tx.dump() if entry["room"] == 2)
        assert (shut["transport"], shut["state"], shut["cause"]) == ("memory", "open", "the child was killed")
        assert 0 < shut["left_s"] <= 600
        assert all(entry["breakers"] == [] for entry in rx.dump())
        sender.send(make_data(16))
        assert receiver.wait(SOON_S) is S
        assert history(sender) == ["0:tcp"]
        assert "not tried, as it failed lately: the child was killed" in sender.parts[0].passed_over
        time_over(tx)
        sender, receiver = open_pair(tx, rx, 3)
        sender.send(make_data(16))
        assert receiver.wait(SOON_S) is S
        assert history(sender) == ["0:memory"]
        until(lambda: not on_driver(tx, lambda: len(tx.driver.core.breakers)), "the breaker is closed")
        waiting.clear()


def test_a_link_that_broke_is_made_anew() -> None:
    faults, data = Faults(), make_data(16)
    faults.hold(0)
    with pair("prefer:memory,tcp", faults=faults, deadlines=LONG) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(data)
        until(lambda: faults.submitted)
        faults.break_links("cable")
        assert same(receiver.result(SOON_S), data)
        assert history(sender) == ["0:tcp"]
        time_over(tx)
        sender, receiver = open_pair(tx, rx, 2)
        sender.send(data)
        assert receiver.wait(SOON_S) is S
        assert history(sender) == ["0:memory"]


def time_over(tx: Any) -> None:
    """The breaker has been open for its time."""

    def fire() -> None:
        core = tx.driver.core
        for conn in core.connections:
            for name, breaker in core.breakers.of(conn).items():
                core.timer(None, core.breakers.timer_of(conn, name), breaker.epoch, host_alive=True)

    on_driver(tx, fire)


def test_a_long_room_goes_back_to_the_better_transport(caplog: pytest.LogCaptureFixture) -> None:
    faults = Faults()
    faults.fail(0)
    caplog.set_level("INFO", "kvpoll_fsm")
    with pair("prefer:memory,tcp", faults=faults, deadlines=LONG, rx={"pool": adopted(4)[0]}) as (tx, rx):
        sender = tx.sender(1, required_ranks=1)
        receiver = rx.receiver(1, peer=str(tx.address), resume="manual", blocks=[0])
        sender.send(make_data(48))
        until(lambda: len(receiver.parts) == 1, "the first part has come")
        receiver.resume(blocks=[1])
        until(lambda: len(receiver.parts) == 2, "the second part has come")
        time_over(tx)
        receiver.resume(blocks=[2])
        assert receiver.wait(SOON_S) is sender.wait(SOON_S) is S
        assert history(sender) == history(receiver) == ["0:tcp", "1:tcp", "2:memory"]
        assert sender.parts[2].passed_over == ""
    told = [record.getMessage() for record in caplog.records if "breaker" in record.getMessage()]
    assert [line.split(" peer=")[0] for line in told] == [
        "breaker open transport=memory",
        "breaker closed transport=memory",
    ]


def test_a_breaker_never_stands_in_the_way_of_the_only_transport() -> None:
    faults = Faults()
    faults.fail(0)
    with pair("require:memory", faults=faults, deadlines=LONG) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(make_data(16))
        assert receiver.wait(SOON_S) is KVPoll.Failed
        assert on_driver(tx, lambda: len(tx.driver.core.breakers)) == 1
        transfer(tx, rx, 2)


def test_a_room_that_its_receiver_gave_up_opens_no_breaker() -> None:
    faults = Faults()
    faults.hold(0)
    with pair("prefer:memory,tcp", faults=faults) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(make_data(16))
        until(lambda: faults.submitted)
        receiver.abort("enough")
        assert sender.wait(SOON_S) is KVPoll.Failed
        faults.release()
        assert sender.wait_quiescent(SOON_S)
        assert on_driver(tx, lambda: len(tx.driver.core.breakers)) == 0


@pytest.mark.parametrize("policy", ["prefer:memory,tcp", "require:memory"])
def test_a_part_that_cannot_be_staged_goes_by_no_transport(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one would send what lies in the blocks, with a checksum of just that."""
    staged = []

    def stage_once_badly(*given: Any) -> None:
        staged.append(given)
        if len(staged) == 1:
            raise MemoryError("the device gave nothing")
        stage(*given)

    monkeypatch.setattr("kvpoll_fsm.outgoing.stage", stage_once_badly)
    with pair(policy) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(make_data(64))
        assert sender.wait(SOON_S) is receiver.wait(SOON_S) is KVPoll.Failed
        assert sender.failure is not None
        assert "the device gave nothing" in sender.failure.detail
        again, there = open_pair(tx, rx, 2)
        again.send(make_data(64))
        assert same(there.result(SOON_S), make_data(64))
        assert history(again) == ["0:memory"]  # nothing is held against it


def test_a_transport_that_hangs_for_good_fails_one_room_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not even end what is cancelled, against its promise: nobody can tell whether it still writes."""
    faults, data = Faults(), make_data(64)
    faults.hold()
    monkeypatch.setattr(MemoryLink, "cancel", lambda link, ticket: None)
    hasty = deadlines(fallback_s=0.2, stall_s=0.5, breaker_s=300.0, breaker_max_s=300.0)
    with pair("prefer:memory,tcp", faults=faults, deadlines=hasty) as (tx, rx):
        sender, _ = open_pair(tx, rx, 1)
        sender.send(data)
        assert failed(sender).code is FailureCode.DeadlinePassed
        second, receiver = open_pair(tx, rx, 2)
        second.send(data)
        assert same(receiver.result(SOON_S), data)
        assert history(second) == ["0:tcp"]
        faults.release()
        assert sender.wait_quiescent(SOON_S)
