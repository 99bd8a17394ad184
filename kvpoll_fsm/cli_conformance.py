"""The command `kvpoll conformance`: what every transport must do, tested on one that is installed here."""

from __future__ import annotations

import json
import sys
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from kvpoll_fsm.errors import InvalidInput, TransportUnavailable

if TYPE_CHECKING:
    from rich.console import Console

    from kvpoll_fsm.testing.conformance.run import Report, Result
    from kvpoll_fsm.testing.conformance.spec import Spec

__all__ = ["conformance"]

_MARKS = {"passed": "green", "failed": "bold red", "skipped": "yellow", "not run": "bold red"}


@click.command()
@click.argument("name")
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting of the transport; the value as JSON, or as it is. May be given again.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
def conformance(name: str, options: tuple[str, ...], as_json: bool) -> None:
    """Test what every transport must do on the transport NAME, which is installed here.

    The promises are those of kvpoll_fsm/spi.py. It takes some seconds, or a minute if the transport starts slowly.

    Exit status 0 if nothing failed, 1 if something did, 2 if the transport cannot be made or started here.
    """
    from kvpoll_fsm.testing.conformance.run import run
    from kvpoll_fsm.testing.conformance.spec import Spec

    spec = Spec(name, dict(map(_read, options)))
    try:
        report = run(spec) if as_json else _run_visibly(spec)
    except (TransportUnavailable, InvalidInput) as error:
        click.echo(f"kvpoll: {error}", err=True)
        sys.exit(2)
    if as_json:
        click.echo(json.dumps(report.as_json()))
    sys.exit(0 if report.ok else 1)


def _read(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise click.UsageError(f"--option {text}: give KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _run_visibly(spec: Spec) -> Report:
    from rich.console import Console

    from kvpoll_fsm.testing.conformance.run import run

    console = Console(highlight=False)
    with console.status(f"{spec.factory}: starting") as status:

        def show(report: Report, name: str) -> None:
            done = len(report.results) - report.count("not run")
            status.update(f"{done} of {len(report.results)}, {report.count('failed')} failed: {name}")

        report = run(spec, show)
    _print(console, report)
    return report


def _print(console: Console, report: Report) -> None:
    """A row for each theme; then what failed, and what was skipped for which reason."""
    from rich.table import Table

    claims = ", ".join(f"{key}={value}" for key, value in report.capabilities.items())
    console.print(f"{report.transport} claims: {claims}", soft_wrap=True, markup=False)
    table = Table("theme", "passed", "failed", "skipped", "seconds")
    for theme, results in groupby(report.results.values(), key=lambda result: result.theme):
        rows = list(results)
        counts = [sum(row.outcome in outcomes for row in rows) for outcomes in _COLUMNS]
        table.add_row(theme, *map(_shown, counts), f"{sum(row.seconds for row in rows):.1f}")
    console.print(table)
    failed = [result for result in report.results.values() if result.outcome in ("failed", "not run")]
    _list(console, failed)
    _list(console, [result for result in report.results.values() if result.outcome == "skipped"])
    if report.trouble:
        console.print(report.trouble, soft_wrap=True, markup=False)
    verdict = "conforms" if report.ok else "does not conform"
    console.print(f"{report.transport} {verdict}, in {report.seconds:.0f} s", soft_wrap=True, markup=False)


_COLUMNS = (("passed",), ("failed", "not run"), ("skipped",))


def _shown(count: int) -> str:
    return str(count) if count else ""


def _list(console: Console, results: list[Result]) -> None:
    """Each with its reason; those of one theme and reason together."""
    for (outcome, theme, reason), alike in groupby(results, lambda each: (each.outcome, each.theme, each.reason)):
        group = list(alike)
        console.print(f"{outcome}: ", style=_MARKS[outcome], end="")
        name = group[0].name if len(group) == 1 else f"{len(group)} tests"
        console.print(f"{theme}, {name}: {reason}".removesuffix(": "), soft_wrap=True, markup=False)
        if outcome == "failed":
            console.print(f"    {group[0].promise}", soft_wrap=True, markup=False)
