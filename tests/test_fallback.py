"""A transport fails in the middle of a part: the part goes on by another, or by the same, and the room ends well."""

from __future__ import annotations

from typing import Any

import pytest

from kvpoll_fsm import KVPoll
from kvpoll_fsm.sender_attempts import MAX_COLLATERALS
from kvpoll_memory import Faults
from tests.helpers import SOON_S, make_data, open_pair, pair, same, until

S, T = KVPoll.Success, KVPoll.Transferring
COSTLY = {"transport_options": {"memory": {"costly_fence": True}}}
"""A fence kills a process."""


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
