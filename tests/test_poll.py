"""The five states: numbers for engines, names for people."""

from __future__ import annotations

import copy
import pickle

import pytest

from kvpoll_fsm.poll import KVPoll


def test_numbers_are_those_engines_reduce_over() -> None:
    assert {state.name: int(state) for state in KVPoll} == {
        "Failed": 0,
        "Bootstrapping": 1,
        "WaitingForInput": 2,
        "Transferring": 3,
        "Success": 4,
    }


def test_only_success_and_failed_are_terminal() -> None:
    assert {state for state in KVPoll if state.is_terminal} == {KVPoll.Success, KVPoll.Failed}


@pytest.mark.parametrize("state", list(KVPoll))
def test_shown_by_name(state: KVPoll) -> None:
    assert str(state) == f"{state}" == "{}".format(state) == "%s" % state == state.name  # noqa: UP031, UP032
    assert f"{state:>20}" == state.name.rjust(20)


@pytest.mark.parametrize("state", list(KVPoll))
def test_copies_and_pickles_are_the_state_itself(state: KVPoll) -> None:
    assert copy.deepcopy(state) is state
    assert pickle.loads(pickle.dumps(state)) is state
    assert KVPoll(int(state)) is state
