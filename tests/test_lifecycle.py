"""The machine: every pair of state and event, the rule for `is_last`, and the reference it must equal."""

from __future__ import annotations

import itertools
import typing
from collections.abc import Callable
from typing import Any

import pytest
import transitions

from kvpoll_fsm import lifecycle
from kvpoll_fsm.errors import IllegalTransition
from kvpoll_fsm.events import (
    FAILING,
    Aborted,
    Bootstrapped,
    DeadlinePassed,
    LifecycleEvent,
    PartDone,
    PeerLost,
    ProtocolError,
    Resumed,
)
from kvpoll_fsm.ledger import Ledger, part_tokens
from kvpoll_fsm.lifecycle import EVENTS, ROWS, TABLE, Lifecycle, outcome, reference_machine, trigger_name
from kvpoll_fsm.poll import KVPoll

PAIRS = list(itertools.product(KVPoll, EVENTS))
ILLEGAL = [pair for pair in PAIRS if pair not in TABLE and not pair[0].is_terminal]

F, B, W, T, S = KVPoll
MORE, LAST = PartDone(is_last=False, all_ok=True), PartDone(is_last=True, all_ok=True)
BAD_MORE, BAD_LAST = PartDone(is_last=False, all_ok=False), PartDone(is_last=True, all_ok=False)

DESIGNED = {
    B: {Bootstrapped(): W, Aborted(): F, PeerLost(): F, DeadlinePassed(): F, ProtocolError(): F},
    W: {
        MORE: T,
        LAST: S,
        BAD_MORE: F,
        BAD_LAST: F,
        Aborted(): F,
        PeerLost(): F,
        DeadlinePassed(): F,
        ProtocolError(): F,
    },
    T: {
        MORE: T,
        LAST: S,
        BAD_MORE: F,
        BAD_LAST: F,
        Resumed(): T,
        Aborted(): F,
        PeerLost(): F,
        DeadlinePassed(): F,
        ProtocolError(): F,
    },
}
"""The machine written out a second time, so that a change of the rows does not go unnoticed."""


def show(value: object) -> str:
    return value.name if isinstance(value, KVPoll) else trigger_name(typing.cast(LifecycleEvent, value))


class Model:
    """What a user of `transitions` would hang on the machine."""

    state: str
    trigger: Callable[[str], bool]


@pytest.fixture(scope="module")
def reference() -> tuple[transitions.Machine, Model]:
    machine, model = reference_machine(), Model()
    machine.add_model(model)
    return machine, model


@pytest.mark.parametrize(("state", "event"), PAIRS, ids=show)
def test_table_equals_the_transitions_machine(
    reference: tuple[transitions.Machine, Model], state: KVPoll, event: LifecycleEvent
) -> None:
    machine, model = reference
    machine.set_state(state.name, model)
    room = Lifecycle(state)
    try:
        model.trigger(trigger_name(event))
    except transitions.MachineError:
        with pytest.raises(IllegalTransition):
            room.apply(event)
    else:
        room.apply(event)
    assert room.state.name == model.state


@pytest.mark.parametrize(("state", "event"), PAIRS, ids=show)
def test_table_is_the_design(state: KVPoll, event: LifecycleEvent) -> None:
    assert TABLE.get((state, event)) == DESIGNED.get(state, {}).get(event)


def test_rows_name_each_pair_once() -> None:
    pairs = [(source, row.event) for row in ROWS for source in row.sources]
    assert len(pairs) == len(set(pairs)) == len(TABLE) == sum(map(len, DESIGNED.values()))
    assert len(set(EVENTS)) == len(EVENTS)


def test_every_event_with_every_flag_has_a_row() -> None:
    every = {
        kind(*flags)
        for kind in typing.get_args(LifecycleEvent)
        for flags in itertools.product([False, True], repeat=len(kind.__struct_fields__))
    }
    assert set(EVENTS) == every
    assert set(FAILING) == {Aborted(), PeerLost(), DeadlinePassed(), ProtocolError()}
    assert len({trigger_name(event) for event in EVENTS}) == len(EVENTS)


def test_no_row_leaves_a_terminal_state_and_every_other_can_be_left() -> None:
    assert {source for source, _ in TABLE} == {state for state in KVPoll if not state.is_terminal}


@pytest.mark.parametrize(("state", "event"), ILLEGAL, ids=show)
def test_illegal_event_raises_and_leaves_the_state(state: KVPoll, event: LifecycleEvent) -> None:
    room = Lifecycle(state)
    with pytest.raises(IllegalTransition) as caught:
        room.apply(event)
    assert (caught.value.state, caught.value.event) == (state, event)
    assert (room.state, room.late_events) == (state, 0)


def test_what_is_illegal() -> None:
    assert {state: {event for s, event in ILLEGAL if s is state} for state in (B, W, T)} == {
        B: {MORE, LAST, BAD_MORE, BAD_LAST, Resumed()},
        W: {Bootstrapped(), Resumed()},
        T: {Bootstrapped()},
    }


@pytest.mark.parametrize("state", [KVPoll.Success, KVPoll.Failed])
def test_pain_04_terminal_states_absorb_and_count(state: KVPoll) -> None:
    room = Lifecycle(state)
    for count, event in enumerate(EVENTS, 1):
        assert room.apply(event) is state
        assert (room.state, room.late_events) == (state, count)


@pytest.mark.parametrize("state", list(KVPoll))
@pytest.mark.parametrize("event", [None, "Aborted", 0, Aborted, PartDone(is_last=None, all_ok=True)])  # type: ignore[arg-type]
def test_what_is_no_event_is_illegal_everywhere(state: KVPoll, event: Any) -> None:
    room = Lifecycle(state)
    with pytest.raises(IllegalTransition):
        room.apply(event)
    assert (room.state, room.late_events) == (state, 0)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("is_last", [False, True])
def test_pain_06_outcome_for_every_combination_of_ranks(is_last: bool, ranks: int) -> None:
    for polls in itertools.product([False, True], repeat=ranks):
        arrived = KVPoll.Success if is_last else KVPoll.Transferring
        expected = arrived if all(polls) else KVPoll.Failed
        assert outcome(is_last, polls) is expected
        assert outcome(is_last, iter(polls)) is expected


@pytest.mark.parametrize("is_last", [False, True])
def test_outcome_of_no_ranks_is_an_error(is_last: bool) -> None:
    with pytest.raises(ValueError, match="at least one rank"):
        outcome(is_last, [])


def test_outcome_takes_what_array_libraries_call_a_bool() -> None:
    numpy = pytest.importorskip("numpy")
    flags = numpy.array([True, False])
    assert outcome(flags[0], flags[:1]) is KVPoll.Success
    assert outcome(flags[1], flags[:1]) is KVPoll.Transferring
    assert outcome(flags[0], flags) is KVPoll.Failed
    assert Lifecycle(KVPoll.Transferring).apply(PartDone(flags[0], flags[0])) is KVPoll.Success


def states_gone_through(total_tokens: int, buffer_tokens: int, fails_at: int | None = None) -> list[str]:
    """Run a room over a buffer, part by part; part number `fails_at` does not arrive on rank 1."""
    room, ledger = Lifecycle(), Ledger(0, total_tokens)
    states = [room.state, room.apply(Bootstrapped())]
    for part in itertools.count():
        if part:
            states.append(room.apply(Resumed()))
        remaining = ledger.remaining_tokens or 0
        tokens = part_tokens(remaining, (buffer_tokens, buffer_tokens), remaining)
        is_last = ledger.is_last(ledger.covered_tokens, tokens)
        polls = [True, part != fails_at]
        states.append(room.apply(PartDone(is_last=is_last, all_ok=all(polls))))
        assert states[-1] is outcome(is_last, polls)
        if room.state.is_terminal:
            break
        ledger.commit(ledger.covered_tokens, tokens)
    return [state.name for state in states]


BEGIN = ["Bootstrapping", "WaitingForInput"]


@pytest.mark.parametrize(
    ("total", "fails_at", "states"),
    [
        (500, None, [*BEGIN, "Success"]),
        (1024, None, [*BEGIN, "Success"]),
        (2000, None, [*BEGIN, "Transferring", "Transferring", "Success"]),
        (2048, None, [*BEGIN, "Transferring", "Transferring", "Success"]),
        (5000, None, [*BEGIN, *["Transferring"] * 8, "Success"]),
        (500, 0, [*BEGIN, "Failed"]),
        (2000, 0, [*BEGIN, "Failed"]),
        (2000, 1, [*BEGIN, "Transferring", "Transferring", "Failed"]),
    ],
)
def test_rooms_over_a_buffer_of_1024_tokens(total: int, fails_at: int | None, states: list[str]) -> None:
    assert states_gone_through(total, 1024, fails_at) == states


def test_clone_and_key_are_independent() -> None:
    room = Lifecycle(KVPoll.WaitingForInput, late_events=2)
    twin, key = room.clone(), room.key()
    assert (twin.state, twin.late_events, twin.key()) == (room.state, 2, key)
    twin.apply(LAST)
    assert room.key() == key != twin.key()
    twin.apply(LAST)
    assert (room.late_events, twin.late_events) == (2, 3)


def test_key_tells_states_apart_and_ignores_bookkeeping() -> None:
    assert len({Lifecycle(state).key() for state in KVPoll}) == len(KVPoll)
    assert Lifecycle(KVPoll.Failed, 7).key() == Lifecycle(KVPoll.Failed).key()


def test_reference_machine_has_no_trigger_but_the_events() -> None:
    assert set(lifecycle.MACHINE.events) == {trigger_name(event) for event in EVENTS}
    assert set(lifecycle.MACHINE.states) == {state.name for state in KVPoll}


def test_one_reference_machine_serves_many_models() -> None:
    machine = lifecycle.MACHINE
    rooms = [Model(), Model()]
    try:
        for room in rooms:
            machine.add_model(room, initial=KVPoll.WaitingForInput.name)
        rooms[0].trigger(trigger_name(LAST))
        assert [room.state for room in rooms] == ["Success", "WaitingForInput"]
    finally:
        machine.remove_model(rooms)


def test_reference_machine_takes_options_of_transitions() -> None:
    events: list[transitions.EventData] = []
    machine = reference_machine(send_event=True, after_state_change=events.append)
    machine.add_model(room := Model())
    room.trigger("Bootstrapped")
    assert [event.event.name for event in events] == ["Bootstrapped"]
