"""The whole main job, as `kvpoll demo` does it: arrays in one process, 1,024 tokens at a time, arrays in the other."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.peers.ours_rooms import ISOLATIONS
from benchmarks.peers.ours_writes import names
from benchmarks.results import Results
from kvpoll_fsm import demo
from kvpoll_fsm.demos.plan import Plan

__all__ = ["measure"]


def measure(results: Results, tokens: tuple[int, ...], rounds: int) -> Iterator[None]:
    """Each size over each transport in turn; from the data being given to the last byte's Success."""
    for round_ in range(rounds):
        for size in tokens:
            for transport in names():
                for isolation in ISOLATIONS:
                    plan = Plan(tokens=size, transport=f"require:{transport}", isolation=isolation)
                    _one(results, round_, f"main job, {size} tokens, {transport} {isolation}", plan)
                    yield


def _one(results: Results, round_: int, name: str, plan: Plan) -> None:
    report = demo.run(plan)
    room = next(iter(report.rooms.values()))
    if report.ok and room.seconds is not None:
        series = results.call(name)
        series.nbytes = plan.room_nbytes
        series.add(round_, [room.seconds])
    else:
        results.missing[name] = "; ".join([*report.trouble, *room.problems()]) or "it did not end well"
