"""Every gate of every live state has a deadline, and the settings are checked."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from typing import Any

import pytest

from kvpoll_fsm import deadlines
from kvpoll_fsm.deadlines import GATES, GATES_OF, Clock, Deadlines, Gate
from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.poll import KVPoll

SETTINGS = [field.name for field in fields(Deadlines)]

SECONDS = {
    KVPoll.Bootstrapping: {"waiting_ranks": 30, "waiting_blocks": 300},
    KVPoll.WaitingForInput: {"queued": 300, "waiting_blocks": 300, "moving": 10, "waiting_outcome": 10},
    KVPoll.Transferring: {
        "queued": 300,
        "waiting_blocks": 300,
        "moving": 10,
        "waiting_outcome": 10,
        "waiting_resume": 30,
    },
}
"""Written out by hand, so that a change of the table or of a default shows."""


def test_pain_08_every_live_state_waits_somewhere_and_nothing_waits_without_an_end() -> None:
    assert GATES_OF.keys() == {state for state in KVPoll if not state.is_terminal}
    assert GATES.keys() == {(state, gate) for state, gates in GATES_OF.items() for gate in gates}
    assert {gate for _, gate in GATES} == set(Gate) - {Gate.closed}


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("    (_W, Gate.moving): Clock.stall,\n", ""),
        ("    _T: (Gate.queued, ", "    _T: ("),
        ("    _B: (Gate.waiting_ranks, Gate.waiting_blocks),\n", ""),
        ("    (_B, Gate.waiting_ranks)", "    (KVPoll.Failed, Gate.closed)"),
    ],
)
def test_a_gate_without_a_clock_is_found_at_import(line: str, instead: str) -> None:
    source = inspect.getsource(deadlines)
    assert source.count(line) == 1
    with pytest.raises(AssertionError, match="has no clock"):
        exec(source.replace(line, instead), {"__name__": "changed"})


def test_a_state_without_gates_is_found_at_import() -> None:
    source = inspect.getsource(deadlines)
    for line in [line for line in source.splitlines(keepends=True) if line.startswith(("    (_B, ", "    _B: "))]:
        source = source.replace(line, "")
    with pytest.raises(AssertionError, match="has no clock"):
        exec(source, {"__name__": "changed"})


def test_defaults() -> None:
    of = Deadlines().of
    drawn = {state: {gate.value: of(state, gate) for gate in gates} for state, gates in GATES_OF.items()}
    assert drawn == SECONDS


@pytest.mark.parametrize("clock", list(Clock))
def test_each_clock_is_a_setting_and_is_the_one_read(clock: Clock) -> None:
    assert clock.value in SETTINGS
    changed = replace(Deadlines(), **{clock.value: 7.5})
    pairs = {pair for pair, used in GATES.items() if used is clock}
    assert pairs
    assert {pair for pair in GATES if changed.of(*pair) == 7.5} == pairs


@pytest.mark.parametrize("state", list(KVPoll))
@pytest.mark.parametrize("gate", list(Gate))
def test_a_gate_the_state_does_not_have_is_a_key_error(state: KVPoll, gate: Gate) -> None:
    if (state, gate) in GATES:
        assert Deadlines().of(state, gate) > 0
    else:
        with pytest.raises(KeyError):
            Deadlines().of(state, gate)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), 1e9, True, "10", None, 10j])
def test_each_setting_is_a_number_of_seconds(name: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=name):
        Deadlines(**{name: value})


@pytest.mark.parametrize("name", SETTINGS)
def test_small_and_whole_numbers_will_do(name: str) -> None:
    small = {"heartbeat_s": 1e-6, "peer_lost_s": 2e-6, name: 1e-3} if name != "heartbeat_s" else {name: 1e-3}
    assert getattr(Deadlines(**small), name) == 1e-3
    assert getattr(Deadlines(**{"heartbeat_s": 1, name: 3}), name) == 3


@pytest.mark.parametrize("peer_lost_s", [0.5, 1.0])
def test_a_peer_may_miss_a_heartbeat(peer_lost_s: float) -> None:
    with pytest.raises(InvalidInput, match="peer_lost_s"):
        Deadlines(peer_lost_s=peer_lost_s)
    assert Deadlines(peer_lost_s=1.5).peer_lost_s == 1.5


def test_gates_and_clocks_are_shown_by_name() -> None:
    assert all(str(gate) == gate.name for gate in Gate)
