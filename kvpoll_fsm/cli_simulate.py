"""The command `kvpoll simulate`: seeds to plans, plans to runs, a run that breaks a law to a file."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import click

from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.testing.sim_draw import draw
from kvpoll_fsm.testing.sim_plan import MODES, Plan
from kvpoll_fsm.testing.sim_shrink import shrink
from kvpoll_fsm.testing.simulate import Outcome, Violation
from kvpoll_fsm.testing.simulate import simulate as run_plan

__all__ = ["simulate"]


@click.command()
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Decides everything.")
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(1), help="So many, counting up.")
@click.option(
    "--rooms", default=200, show_default=True, type=click.IntRange(1, 100_000), help="Under faults, per seed."
)
@click.option("--hours", default=24.0, show_default=True, type=click.FloatRange(0.05, 10_000), help="Virtual ones.")
@click.option("--mode", default="safety", show_default=True, type=click.Choice(MODES), help="Faults never stop, or do.")
@click.option("--minutes", default=0.0, type=click.FloatRange(0), help="Begin no seed after so many real minutes.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1, 64), help="Processes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
@click.option("--out", default=".", show_default=True, type=click.Path(file_okay=False, exists=True),
              help="Folder for plans that break a law.")  # fmt: skip
@click.option("--replay", "file", type=click.Path(dir_okay=False, exists=True),
              help="Run the plan in this file instead.")  # fmt: skip
def simulate(seeds: int, minutes: float, jobs: int, as_json: bool, out: str, file: str | None, **drawn: Any) -> None:
    """Simulate days of rooms and faults in minutes: the production code in virtual time, by a seed.

    Exit status 0 if every law holds. If one does not, 1: the plan is made as small as it gets and written into a
    file, which --replay runs again.
    """
    if file is not None:
        outcomes = [run_plan(_read(file))]
    else:
        first = drawn.pop("seed")
        outcomes = list(_many(range(first, first + seeds), drawn, jobs, minutes, None if as_json else _show))
    if as_json:
        click.echo(json.dumps(summary(outcomes)))
    elif file is not None:
        _show(outcomes[0])
    elif len(outcomes) > 1:
        _show_sum(summary(outcomes))
    broken = [outcome for outcome in outcomes if outcome.violation]
    for outcome in broken:
        _tell(outcome, None if file else Path(out))
    sys.exit(1 if broken else 0)


def _read(file: str) -> Plan:
    try:
        return Plan.read(Path(file))
    except InvalidInput as error:
        raise click.UsageError(str(error)) from None


def run_seed(seed: int, drawn: dict[str, Any]) -> Outcome:
    """Draw and run one plan; one that breaks a law is made smaller first."""
    outcome = run_plan(draw(seed, **drawn))
    if outcome.violation is None:
        return outcome
    small = run_plan(shrink(outcome.plan, outcome.violation))
    return small if small.violation is not None else outcome


def _many(seeds: range, drawn: dict[str, Any], jobs: int, minutes: float, show: Any) -> Iterator[Outcome]:
    end = time.monotonic() + minutes * 60 if minutes else float("inf")
    for outcome in _outcomes(seeds, drawn, jobs, end):
        if show is not None:
            show(outcome)
        yield outcome


def _outcomes(seeds: range, drawn: dict[str, Any], jobs: int, end: float) -> Iterator[Outcome]:
    left = iter(seeds)
    if jobs == 1:
        for seed in left:
            yield run_seed(seed, drawn)
            if time.monotonic() > end:
                return
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending: set[Future[Outcome]] = set()
        while True:
            few = max(0, 2 * jobs - len(pending)) if time.monotonic() < end else 0
            pending |= {pool.submit(run_seed, seed, drawn) for seed in itertools.islice(left, few)}
            if not pending:
                return
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """One JSON document about one seed, or the sums over several."""
    one = outcomes[0]
    return {
        "seed": min(outcome.plan.seed for outcome in outcomes),
        "seeds": len(outcomes),
        "mode": one.plan.mode,
        "rooms": sum(outcome.plan.rooms for outcome in outcomes),
        "virtual_hours": round(sum(outcome.virtual_hours for outcome in outcomes), 3),
        "events": sum(outcome.steps for outcome in outcomes),
        "faults": dict(sorted(sum((outcome.faults for outcome in outcomes), Counter[str]()).items())),
        "outcomes": {state: sum(outcome.outcomes[state] for outcome in outcomes) for state in ("Success", "Failed")},
        "failure_codes": dict(sorted(sum((outcome.failure_codes for outcome in outcomes), Counter[str]()).items())),
        "violations": sum(outcome.violation is not None for outcome in outcomes),
        "digest": one.digest if len(outcomes) == 1 else "",
    }


def _show(outcome: Outcome) -> None:
    ended = ", ".join(f"{count} {state}" for state, count in sorted(outcome.outcomes.items()))
    rooms, hours = outcome.plan.rooms, outcome.virtual_hours
    struck = len(outcome.plan.events) - rooms
    text = f"seed {outcome.plan.seed}: {rooms} rooms, {struck} faults, {hours:.1f} h, {outcome.steps} events: {ended}"
    click.echo(text)


def _show_sum(told: dict[str, Any]) -> None:
    ended, faults = told["outcomes"], told["faults"]
    text = f"{told['seeds']} seeds: {told['rooms']} rooms, {told['virtual_hours']} h, {told['events']} events, {ended}"
    click.echo(f"{text}, {told['violations']} violations")
    click.echo(f"faults: {faults}")
    click.echo(f"failures: {told['failure_codes']}")


def _tell(outcome: Outcome, folder: Path | None) -> None:
    """What broke, where, what came before, and how to see it again."""
    violation: Violation = outcome.violation  # type: ignore[assignment]
    plan = outcome.plan
    click.echo(f"broken: {violation.law}", err=True)
    click.echo(f"  by: {violation.where}", err=True)
    click.echo(f"  seed {plan.seed}, mode {plan.mode}, at {violation.at_s:.6f} s", err=True)
    click.echo("  the last events:", err=True)
    for line in violation.recent:
        click.echo(f"    {line}", err=True)
    if folder is not None:
        path = folder / f"simulation-{plan.mode}-{plan.seed}.json"
        plan.write(path)
        events = f"{len(plan.events)} events left"
        click.echo(f"{path}: {events}; run it again with kvpoll simulate --replay {path}", err=True)
