"""The machine: which event leads from which state to which.

The rule for `is_last`, in three of the rows below: a part that arrived on all ranks leads to Transferring
if it is not the last and to Success if it is; a part that failed on any rank leads to Failed.

Two promises hold here and everything else builds on them:

1. Success and Failed absorb. An event that comes later is counted and changes nothing.
2. A pair (state, event) without a row raises `IllegalTransition` and leaves the state as it was.

`ROWS` is the only place the machine is written down. The `transitions` machine (the reference) and the
lookup table that rooms run on are both built from it at import, and so are the diagram and the tables in
the documentation. Adding a model to a `transitions` machine costs about 100 us and a trigger 11 us where a
lookup costs 0.1 us, which is why rooms use the table; a test holds the two equal on every pair.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import transitions

from kvpoll_fsm.errors import IllegalTransition
from kvpoll_fsm.events import (
    FAILING,
    Bootstrapped,
    LifecycleEvent,
    PartDone,
    Resumed,
)
from kvpoll_fsm.poll import KVPoll

__all__ = ["EVENTS", "OPEN", "ROWS", "TABLE", "Lifecycle", "Row", "after", "outcome", "reference_machine"]


@dataclass(frozen=True, slots=True)
class Row:
    """From each of `sources`, `event` leads to `dest`. The event's flags are part of it."""

    sources: tuple[KVPoll, ...]
    event: LifecycleEvent
    dest: KVPoll


_LIVE = (KVPoll.Bootstrapping, KVPoll.WaitingForInput, KVPoll.Transferring)
OPEN = (KVPoll.WaitingForInput, KVPoll.Transferring)
"""The states in which parts move."""

ROWS: tuple[Row, ...] = (
    Row((KVPoll.Bootstrapping,), Bootstrapped(), KVPoll.WaitingForInput),
    Row(OPEN, PartDone(is_last=False, all_ok=True), KVPoll.Transferring),
    Row(OPEN, PartDone(is_last=True, all_ok=True), KVPoll.Success),
    Row(OPEN, PartDone(is_last=False, all_ok=False), KVPoll.Failed),
    Row(OPEN, PartDone(is_last=True, all_ok=False), KVPoll.Failed),
    Row((KVPoll.Transferring,), Resumed(), KVPoll.Transferring),
    *(Row(_LIVE, event, KVPoll.Failed) for event in FAILING),
)

EVENTS: tuple[LifecycleEvent, ...] = tuple(row.event for row in ROWS)

TABLE: dict[tuple[KVPoll, LifecycleEvent], KVPoll] = {
    (source, row.event): row.dest for row in ROWS for source in row.sources
}


def outcome(is_last: bool, polls: Iterable[bool]) -> KVPoll:
    """The state a part leads to, given which ranks it arrived on.

    Args:
        is_last: This part completes the room.
        polls: One bool for each required rank: the part arrived there whole.

    Returns:
        Success, Transferring (more parts to come, wait for resume) or Failed.

    Raises:
        ValueError: `polls` is empty; a part nobody was asked about has no outcome.
    """
    ranks = tuple(polls)
    if not ranks:
        raise ValueError("outcome() needs the poll of at least one rank")
    return TABLE[KVPoll.WaitingForInput, PartDone(is_last=bool(is_last), all_ok=all(ranks))]


def after(state: KVPoll, event: LifecycleEvent) -> KVPoll:
    """The state that an event leads to; Success and Failed stay what they are.

    Raises:
        IllegalTransition: No row fits.
    """
    dest = TABLE.get((state, event))
    if dest is None and not (state.is_terminal and event in _KNOWN):
        raise IllegalTransition(state, event)
    return state if dest is None else dest


class Lifecycle:
    """The state of one room on one side.

    Attributes:
        state: Where the room stands.
        late_events: How many events came after a terminal state and changed nothing.
    """

    __slots__ = ("late_events", "state")

    def __init__(self, state: KVPoll = KVPoll.Bootstrapping, late_events: int = 0) -> None:
        self.state = state
        self.late_events = late_events

    def apply(self, event: LifecycleEvent) -> KVPoll:
        """Take one event and return the state it leads to.

        Raises:
            IllegalTransition: No row fits; the state is unchanged.
        """
        before = self.state
        self.state = after(before, event)
        self.late_events += before.is_terminal
        return self.state

    def clone(self) -> Lifecycle:
        """A copy that shares nothing."""
        return Lifecycle(self.state, self.late_events)

    def key(self) -> tuple[int]:
        """What tells this state from others; late events are bookkeeping and no part of it."""
        return (int(self.state),)


_KNOWN = frozenset(EVENTS)


def trigger_name(event: LifecycleEvent) -> str:
    """The name of an event in the `transitions` machine, flags included, e.g. `PartDone_last_ok`."""
    if not isinstance(event, PartDone):
        return type(event).__name__
    return f"PartDone_{'last' if event.is_last else 'more'}_{'ok' if event.all_ok else 'bad'}"


def reference_machine(**options: Any) -> transitions.Machine:
    """The `transitions` machine of `ROWS`, without a model, terminal states absorbing.

    One machine serves any number of models: `machine.add_model(model, initial=...)`.

    Args:
        options: Passed on to `transitions.Machine`.
    """
    machine = transitions.Machine(
        model=None,
        states=[state.name for state in KVPoll],
        initial=KVPoll.Bootstrapping.name,
        auto_transitions=False,
        **options,
    )
    for row in ROWS:
        sources: list[Any] = [source.name for source in row.sources]
        machine.add_transition(trigger_name(row.event), sources, row.dest.name)
        for terminal in (KVPoll.Success.name, KVPoll.Failed.name):
            machine.add_transition(trigger_name(row.event), terminal, dest=None)
    return machine


MACHINE = reference_machine()
"""The shared reference machine."""
