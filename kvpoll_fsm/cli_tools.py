"""The commands of `kvpoll` for people who run endpoints or change the library: keygen, check-trace, explore."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvpoll_fsm.errors import InvalidInput, MalformedMessage
from kvpoll_fsm.security import generate_keys
from kvpoll_fsm.trace import EndpointRecord, Record, check, decode_line

if TYPE_CHECKING:
    from kvpoll_fsm.testing.explore import Report
    from kvpoll_fsm.testing.scene import Scene

__all__ = ["check_trace", "explore", "keygen"]


@click.command()
@click.argument("name")
@click.option("--out", "folder", default=".", show_default=True, help="Folder for the two files.")
def keygen(name: str, folder: str) -> None:
    """Make a key pair: NAME.key for peers, NAME.key_secret for the endpoint itself."""
    try:
        public, secret = generate_keys(folder, name)
    except InvalidInput as error:
        raise click.UsageError(str(error)) from None
    click.echo(f"{public}  give this to peers: it goes into their folder of authorized keys")
    click.echo(f"{secret}  keep this: it is the endpoint's keys=")


@click.command("check-trace")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
def check_trace(files: tuple[str, ...]) -> None:
    """Check traces of one or more endpoints: monotony, order and coverage of parts, agreement of both ends.

    Exit status 0 if all holds, 1 if not, 2 if a file is no trace.
    """
    records: list[Record] = []
    for name in files:
        records += _read(name)
    problems = check(records)
    for problem in problems:
        click.echo(problem)
    endpoints = sum(isinstance(record, EndpointRecord) for record in records)
    click.echo(f"{len(records)} records of {endpoints} endpoints: {len(problems)} problems")
    sys.exit(1 if problems else 0)


def _read(name: str) -> Iterator[Record]:
    for number, line in enumerate(Path(name).read_bytes().splitlines(), 1):
        try:
            yield decode_line(line)
        except MalformedMessage as error:
            raise click.UsageError(f"{name}, line {number}: {error}") from None


@click.command()
@click.option("--quick", is_flag=True, help="The short form that the test suite runs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
@click.option("--jobs", default=2, show_default=True, type=click.IntRange(1, 64), help="Processes.")
@click.option("--limit", default=1_000_000, show_default=True, help="Most states of one scene.")
@click.option("--out", default=".", show_default=True, type=click.Path(file_okay=False, exists=True),
              help="Folder for counterexamples.")  # fmt: skip
@click.option("--replay", "file", type=click.Path(dir_okay=False, exists=True),
              help="Perform a counterexample again instead.")  # fmt: skip
def explore(quick: bool, as_json: bool, jobs: int, limit: int, out: str, file: str | None) -> None:
    """Explore every interleaving of small scenes of the production code and check the laws in every state.

    Exit status 0 if every law holds and every scene was explored completely. A run that breaks a law is written
    into a file, which --replay performs again.
    """
    from kvpoll_fsm.testing.scenes import FULL, QUICK

    if file is not None:
        sys.exit(_replay(file))
    scenes = QUICK if quick else FULL
    reports = []
    for scene, report in zip(scenes, _explored(scenes, jobs, limit), strict=True):
        reports.append(report)
        if not as_json:
            _show(report)
        _keep(scene, report, out)
    whole = _summary(reports)
    click.echo(json.dumps(whole) if as_json else f"{whole['states']} states, {whole['violations']} violations")
    sys.exit(0 if whole["complete"] and not whole["violations"] else 1)


def _keep(scene: Scene, report: Report, folder: str) -> None:
    from kvpoll_fsm.testing.counterexample import Counterexample

    for finding in report.findings:
        path = Counterexample.of(scene, finding).write(folder)
        click.echo(f"{path}: perform it again with kvpoll explore --replay {path}", err=True)


def _replay(file: str) -> int:
    from kvpoll_fsm.testing.counterexample import Counterexample

    try:
        found = Counterexample.read(file)
        law, steps = found.replay()
    except InvalidInput as error:
        raise click.UsageError(str(error)) from None
    click.echo("\n".join(steps))
    click.echo(f"broken: {law}" if law else f"every law holds here; broken was: {found.law}")
    return 1 if law else 0


def _explored(scenes: tuple[Scene, ...], jobs: int, limit: int) -> Iterator[Report]:
    from kvpoll_fsm.testing.explore import explore as explore_scene

    if jobs == 1:
        yield from (explore_scene(scene, limit) for scene in scenes)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        for future in [pool.submit(explore_scene, scene, limit) for scene in scenes]:
            yield future.result()


def _show(report: Report) -> None:
    ends = f"{report.ends} ends" + ("" if report.complete else ", NOT complete")
    click.echo(f"{report.scene}: {report.states} states, {report.transitions} transitions, {ends}")
    for finding in report.findings:
        click.echo(f"  broken: {finding.law}\n  " + "\n  ".join(finding.text) + f"\n  run: {finding.run}")


def _summary(reports: list[Report]) -> dict[str, Any]:
    return {
        "configurations": [
            {
                "name": report.scene,
                "states": report.states,
                "transitions": report.transitions,
                "ends": report.ends,
                "violations": len(report.findings),
                "complete": report.complete,
            }
            for report in reports
        ],
        "states": sum(report.states for report in reports),
        "transitions": sum(report.transitions for report in reports),
        "violations": sum(len(report.findings) for report in reports),
        "complete": all(report.complete for report in reports),
    }
