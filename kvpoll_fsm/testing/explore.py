"""Explores every interleaving of small scenes of the production code, breadth first.

A state is known by a 64-bit fingerprint of its canonical key. Each law is checked in each state, and from each
state an end must be reachable without further faults. The shortest run to a broken law is kept as the list of
its actions, which `replay()` performs again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from kvpoll_fsm.testing.laws import broken_law, is_end
from kvpoll_fsm.testing.scene import Scene
from kvpoll_fsm.testing.universe import Action, Universe

__all__ = ["NO_END", "Finding", "Report", "explore", "reaches_end", "replay", "tell"]


NO_END = "from here no end can be reached"


@dataclass
class Finding:
    """A law that does not hold, and the shortest run that shows it.

    Attributes:
        law: What is broken.
        run: For each step the number of the action taken, of those possible in that state.
        text: The run for people, a line a step.
    """

    law: str
    run: list[int]
    text: list[str]


@dataclass
class Report:
    """What the exploration of one scene found.

    Attributes:
        states: Distinct states.
        transitions: Steps between them.
        ends: States in which everything is over.
        complete: Every state within the scene's budget of faults was expanded.
    """

    scene: str
    states: int = 0
    transitions: int = 0
    ends: int = 0
    complete: bool = True
    findings: list[Finding] = field(default_factory=list)


class _Search:
    """The graph so far: for each state its parent, the action that led to it, and its healing successors."""

    def __init__(self, scene: Scene, limit: int) -> None:
        self.scene = scene
        self.limit = limit
        self.ids: dict[int, int] = {}
        self.parents: list[tuple[int, int]] = []
        self.heals_into: list[list[int]] = []
        self.ends: list[int] = []
        self.report = Report(scene.name)

    def add(self, universe: Universe, parent: int, action: int) -> tuple[int, bool]:
        """The number of a state, and whether it is new."""
        fingerprint = hash(universe.key())
        known = self.ids.get(fingerprint)
        if known is not None:
            return known, False
        number = self.ids[fingerprint] = len(self.parents)
        self.parents.append((parent, action))
        self.heals_into.append([])
        return number, True

    def finding(self, law: str, number: int) -> None:
        """Keep a broken law with the run that leads to it."""
        run: list[int] = []
        while number > 0:
            number, action = self.parents[number]
            run.append(action)
        run.reverse()
        self.report.findings.append(Finding(law, run, tell(self.scene, run)))


def explore(scene: Scene, limit: int = 1_000_000, stop_at_first: bool = True) -> Report:
    """Explore one scene.

    Args:
        scene: What to explore.
        limit: Most states; a report that met it is not complete.
        stop_at_first: End at the first finding.
    """
    search = _Search(scene, limit)
    first = Universe.begin(scene)
    search.add(first, 0, -1)
    queue: deque[tuple[int, Universe]] = deque([(0, first)])
    while queue:
        if len(search.parents) > limit:
            search.report.complete = False
            break
        number, universe = queue.popleft()
        _expand(search, number, universe, queue)
        if search.report.findings and stop_at_first:
            break
    else:
        _check_liveness(search)
    search.report.states = len(search.parents)
    search.report.ends = len(search.ends)
    return search.report


def _expand(search: _Search, number: int, universe: Universe, queue: deque[tuple[int, Universe]]) -> None:
    if is_end(universe):
        search.ends.append(number)
    healing = len(universe.progress())
    for at, action in enumerate(universe.actions()):
        after = universe.step(action)
        search.report.transitions += 1
        reached, new = search.add(after, number, at)
        if at < healing:
            search.heals_into[reached].append(number)
        if not new:
            continue
        law = broken_law(after)
        if law:
            search.finding(law, reached)
            return
        queue.append((reached, after))


def _check_liveness(search: _Search) -> None:
    """From every state an end can be reached by progress and deadlines alone."""
    reaching = set(search.ends)
    queue = deque(search.ends)
    while queue:
        for before in search.heals_into[queue.popleft()]:
            if before not in reaching:
                reaching.add(before)
                queue.append(before)
    for number in range(len(search.parents)):
        if number not in reaching:
            search.finding(NO_END, number)
            return


def reaches_end(universe: Universe, limit: int = 1_000_000) -> bool:
    """Whether an end can be reached from here by progress and deadlines alone, within `limit` states."""
    seen = {hash(universe.key())}
    queue = deque([universe])
    while queue and len(seen) <= limit:
        here = queue.popleft()
        if is_end(here):
            return True
        for action in here.progress():
            after = here.step(action)
            fingerprint = hash(after.key())
            if fingerprint not in seen:
                seen.add(fingerprint)
                queue.append(after)
    return False


def replay(scene: Scene, run: Iterable[int]) -> Universe:
    """Perform a run again and return the state it leads to."""
    universe = Universe.begin(scene)
    for action in run:
        universe = universe.step(universe.actions()[action])
    return universe


def tell(scene: Scene, run: Iterable[int]) -> list[str]:
    """A run for people: a line a step."""
    universe, lines = Universe.begin(scene), []
    for number, at in enumerate(run, 1):
        action = universe.actions()[at]
        lines.append(f"{number:3} {_describe(universe, action)}")
        universe = universe.step(action)
    return lines


def _describe(universe: Universe, action: Action) -> str:
    kind, *rest = action
    if kind in ("deliver", "lose", "repeat"):
        source, dest = rest
        packet = universe.lanes[source, dest][0]
        said = ", ".join(_short(message) for message in getattr(packet, "messages", ())) or type(packet).__name__
        return f"{kind} {_name(universe, source)} -> {dest}: {said}"
    return f"{kind} " + " ".join(_short(item) for item in rest)


def _name(universe: Universe, incarnation: int) -> str:
    return next((n.name for n in universe.nodes.values() if n.incarnation == incarnation), "(gone)")


def _short(item: Any) -> str:
    name = type(item).__name__
    if name == "Ticket":
        loose = " loose" if item.loose else ""
        return f"ticket of room {item.key.room} part {item.command.part} to rank {item.target.rank}{loose}"
    if name == "Job":
        return f"{type(item.command).__name__} at {item.node} for room {item.key.room}"
    if name == "RoomKey":
        return f"{item.side} of room {item.room} rank {item.rank} generation {item.generation}"
    facts = [f"{f}={getattr(item, f)}" for f in ("room", "rank", "part", "is_last", "state") if hasattr(item, f)]
    return f"{name}({', '.join(facts)})" if facts else str(item)
