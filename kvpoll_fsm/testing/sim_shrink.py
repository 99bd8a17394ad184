"""Makes a plan that breaks a law smaller: leaves out rooms and faults as long as the same law breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from msgspec.structs import replace

from kvpoll_fsm.testing.sim_plan import Event, Open, Plan
from kvpoll_fsm.testing.simulate import Violation, simulate

__all__ = ["shrink"]

MOST_RUNS = 400
SLACK_S = 100.0
"""How much later than at first the law may break in a smaller plan."""


class _Shrinker:
    """The smallest plan so far that breaks the law, and how many runs may still be spent."""

    def __init__(self, plan: Plan, violation: Violation, runs: int) -> None:
        self.plan = plan
        self.where = violation.where
        self.until_s = violation.at_s + SLACK_S
        self.runs = runs

    def try_events(self, events: Sequence[Event]) -> bool:
        """Whether the law still breaks with these events; if so they are kept."""
        if self.runs <= 0 or not events:
            return False
        self.runs -= 1
        plan = self.plan.with_events(tuple(events))
        violation = simulate(plan, self.until_s).violation
        if violation is None or violation.where != self.where:
            return False
        self.plan = plan
        return True

    def drop(self) -> None:
        """Leave out as much as possible: halves, quarters, and so on down to single events."""
        size = max(1, len(self.plan.events) // 2)
        while True:
            at = 0
            while at < len(self.plan.events):
                events = self.plan.events
                if not self.try_events(events[:at] + events[at + size :]):
                    at += size
            if size == 1:
                return
            size = max(1, size // 2)

    def simplify(self) -> None:
        """Make each room that is left simpler, one thing at a time."""
        for at in range(len(self.plan.events)):
            for change in _simpler():
                events = self.plan.events
                event = events[at]
                if isinstance(event, Open) and change(event) != event:
                    self.try_events((*events[:at], change(event), *events[at + 1 :]))


def shrink(plan: Plan, violation: Violation, runs: int = MOST_RUNS) -> Plan:
    """A smaller plan that breaks the same law.

    Args:
        plan: One that breaks it.
        violation: How.
        runs: How many simulations this may cost.
    """
    shrinker = _Shrinker(plan, violation, runs)
    shrinker.try_events([event for event in plan.events if event.at_s <= violation.at_s])
    before = None
    while before != shrinker.plan and shrinker.runs > 0:
        before = shrinker.plan
        shrinker.drop()
        shrinker.simplify()
    used = {name for event in shrinker.plan.events for name in event.hosts}
    fewer = replace(shrinker.plan, machines=tuple(m for m in plan.machines if m.name in used))
    again = simulate(fewer).violation
    return fewer if again is not None and again.where == violation.where else shrinker.plan


def _simpler() -> Iterator[Callable[[Open], Open]]:
    yield lambda room: replace(room, ranks=room.ranks[:1])
    yield lambda room: replace(room, tokens=1, supply=((0.0, 1),))
    yield lambda room: replace(room, supply=((0.0, room.tokens),))
    yield lambda room: replace(room, after_s=0.0, clear_s=0.0)
    yield lambda room: replace(room, ranks=tuple(replace(rank, after_s=0.0, think_s=0.0) for rank in room.ranks))
