"""Whatever the order of events: no move out of a terminal state, none backwards, and never a crash."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from kvpoll_fsm.errors import IllegalTransition
from kvpoll_fsm.events import Aborted, LifecycleEvent, PartDone
from kvpoll_fsm.lifecycle import EVENTS, MACHINE, TABLE, Lifecycle, outcome, trigger_name
from kvpoll_fsm.poll import KVPoll

FORWARD = (KVPoll.Bootstrapping, KVPoll.WaitingForInput, KVPoll.Transferring, KVPoll.Success)

sequences = st.lists(st.sampled_from(EVENTS), max_size=20)


def walk(events: list[LifecycleEvent]) -> list[KVPoll]:
    """The states gone through; an illegal event changes nothing."""
    room = Lifecycle()
    states = [room.state]
    for event in events:
        with contextlib.suppress(IllegalTransition):
            assert room.apply(event) is room.state
        states.append(room.state)
    return states


@given(sequences)
def test_pain_04_nothing_leaves_a_terminal_state(events: list[LifecycleEvent]) -> None:
    states = walk(events)
    ends = [at for at, state in enumerate(states) if state.is_terminal]
    if ends:
        assert set(states[ends[0] :]) == {states[ends[0]]}


@given(sequences)
def test_no_move_is_backwards(events: list[LifecycleEvent]) -> None:
    states = walk(events)
    for before, after in itertools.pairwise(states):
        assert after is KVPoll.Failed or FORWARD.index(after) >= FORWARD.index(before)


@given(sequences)
def test_a_move_needs_a_row_and_a_row_moves(events: list[LifecycleEvent]) -> None:
    states = walk(events)
    for (before, after), event in zip(itertools.pairwise(states), events, strict=True):
        assert after is TABLE.get((before, event), before)


@given(sequences)
def test_every_room_can_still_end(events: list[LifecycleEvent]) -> None:
    before = walk(events)[-1]
    after = walk([*events, Aborted()])[-1]
    assert after is (before if before.is_terminal else KVPoll.Failed)


@given(sequences)
def test_late_events_are_counted_one_by_one(events: list[LifecycleEvent]) -> None:
    room = Lifecycle()
    late = 0
    for event in events:
        late += room.state.is_terminal
        try:
            room.apply(event)
        except IllegalTransition:
            assert not room.state.is_terminal
        assert room.late_events == late


class Model:
    state: str
    trigger: Callable[[str], bool]


@given(sequences)
def test_sequences_end_where_the_transitions_machine_ends(events: list[LifecycleEvent]) -> None:
    model = Model()
    MACHINE.add_model(model, initial=KVPoll.Bootstrapping.name)
    try:
        for event in events:
            if MACHINE.get_transitions(trigger_name(event), model.state):
                model.trigger(trigger_name(event))
        assert walk(events)[-1].name == model.state
    finally:
        MACHINE.remove_model(model)


@given(st.booleans(), st.lists(st.booleans(), min_size=1, max_size=64))
def test_outcome_is_the_row_of_any_open_state(is_last: bool, polls: list[bool]) -> None:
    event = PartDone(is_last=is_last, all_ok=all(polls))
    state = outcome(is_last, polls)
    assert state is outcome(is_last, reversed(polls))
    for source in (KVPoll.WaitingForInput, KVPoll.Transferring):
        assert Lifecycle(source).apply(event) is state
