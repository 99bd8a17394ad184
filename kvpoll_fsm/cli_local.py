"""The commands of `kvpoll` that talk to a running endpoint on this machine: switch and report."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.local.client import NoAnswer, Refused, ask
from kvpoll_fsm.local.places import folder, is_dead, sockets
from kvpoll_fsm.local.words import Report, Request, Status, Switch
from kvpoll_fsm.selection import Policy
from kvpoll_fsm.switching import read_share

__all__ = ["report", "switch"]

WIDTH = 120
"""Of a report, whatever the terminal's: no number is cut."""
LOOK_S = 2.0
"""How long each of several endpoints is given to say who it is."""

_socket = click.option(
    "--socket",
    type=click.Path(path_type=Path),
    help="The endpoint's control socket; without it the one endpoint of yours that has one.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")


@click.command()
@click.argument("policy")
@click.option("--canary", type=float, help="Only for this share of the rooms, such as 0.05.")
@_socket
@_json
def switch(policy: str, canary: float | None, socket: Path | None, as_json: bool) -> None:
    """Give the rooms that an endpoint opens from now on another POLICY: tcp, require:tcp or prefer:mooncake,tcp.

    Rooms that are open end as they began. All that the policy names must be loaded: named by the endpoint's own
    policy, or on standby. A switch without --canary is for all rooms, and ends a canary.

    Exit status 0 if it was done, 1 if the endpoint refuses or does not answer, 2 if it was not asked.
    """
    try:
        Policy.parse(policy)
        read_share(canary)
    except InvalidInput as error:
        raise click.UsageError(str(error)) from None
    status = _asked(socket, Switch(policy, canary))
    click.echo(json.dumps(status) if as_json else _held(status))


def _held(status: dict[str, Any]) -> str:
    text = f"new rooms of {status['endpoint']}: {status['policy']}"
    return text if status["canary"] is None else f"{text}; {status['share']:.2%} of them: {status['canary']}"


@click.command()
@_socket
@_json
def report(socket: Path | None, as_json: bool) -> None:
    """Compare how an endpoint's rooms have fared by transport: success, causes, bytes, durations.

    Exit status 0 if the endpoint answers, 1 if not, 2 if it was not asked.
    """
    found = _asked(socket, Report())
    if as_json:
        click.echo(json.dumps(found))
        return
    click.echo(f"{found['endpoint']}, {found['seconds']:,.0f} s, {found['live']:,} rooms open")
    rows = [(side, name, row) for side in ("sent", "received") for name, row in found[side].items()]
    _print([_cells(*row) for row in rows])
    for side, name, row in rows:
        causes = ", ".join(f"{cause} {count:,}" for cause, count in sorted(row["failures"].items()))
        if causes:
            click.echo(f"{side} by {name}, failures: {causes}")


def _print(rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("", "transport", "rooms", "success", "p50", "p90", "p99", "parts", "bytes", "again"):
        table.add_column(name, no_wrap=True, justify="left" if name in ("", "transport") else "right")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, width=WIDTH).print(table)


def _cells(side: str, name: str, row: dict[str, Any]) -> list[str]:
    latency = row.get("latency_s", {})
    times = [_time(latency.get(point)) for point in ("p50", "p90", "p99")]
    share = "" if row["success_share"] is None else f"{row['success_share']:.2%}"
    size = f"{row['nbytes'] / 1e6:,.1f} MB"
    return [side, name, f"{row['rooms']:,}", share, *times, f"{row['parts']:,}", size, f"{row.get('reissued', 0):,}"]


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


# Which endpoint


def _asked(socket: Path | None, request: Request) -> dict[str, Any]:
    """What the endpoint answers; the command ends here if it does not."""
    path = socket or _only_one()
    try:
        return ask(path, request)
    except Refused as error:
        _give_up(f"{error.error}: {error.detail}")
    except NoAnswer as error:
        _give_up(f"no endpoint answers at {error}")


def _only_one() -> Path:
    try:
        running = [path for path in sockets() if not _gone(path)]
    except InvalidInput as error:
        raise click.UsageError(str(error)) from None
    if len(running) == 1:
        return running[0]
    if not running:
        raise click.UsageError(
            f"no endpoint of yours with a control socket runs here ({folder()} has none): give endpoints "
            'control_socket="auto", or name the socket with --socket'
        )
    lines = "\n".join(f"  --socket {path}  {_who(path)}" for path in running)
    raise click.UsageError(f"{len(running)} endpoints run here; name one:\n{lines}")


def _gone(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return is_dead(path)
    return True


def _who(path: Path) -> str:
    try:
        status = ask(path, Status(), LOOK_S)
    except (NoAnswer, Refused) as error:
        return f"does not answer: {error}"
    return f"{status['endpoint']}, process {status['pid']}, {status['policy']}"


def _give_up(problem: str) -> NoReturn:
    click.echo(f"kvpoll: {problem}", err=True)
    sys.exit(1)
