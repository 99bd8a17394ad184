"""The commands of `kvpoll` that show how an endpoint would be set up here: config and transports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from kvpoll_fsm.configuration import Resolved, resolve, shown
from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.probing import Probe, as_plain, probe_all

__all__ = ["config", "transports"]

_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")


@click.command()
@click.option("--file", type=click.Path(path_type=Path), help="Instead of the file that KVPOLL_CONFIG names.")
@_json
def config(file: Path | None, as_json: bool) -> None:
    """Show every setting an endpoint would have here, and where it comes from: the file, the environment, a default.

    What a constructor is given is stronger than all of these, and is not known here. Secrets are not shown.

    Exit status 0 if all can be used, 2 if something cannot.
    """
    try:
        resolved = resolve({}, file)
    except InvalidInput as error:
        raise click.UsageError(str(error)) from None
    if as_json:
        click.echo(json.dumps(_plain(resolved)))
        return
    for name, row in _plain(resolved)["settings"].items():
        click.echo(f"{name} = {json.dumps(row['value'])}  ({row['source']})")
    for line in resolved.unknown:
        click.echo(line, err=True)


def _plain(resolved: Resolved) -> dict[str, Any]:
    settings = {
        ".".join(key): {"value": shown(key, found.value), "source": found.source}
        for key, found in sorted(resolved.given.items(), key=lambda each: (len(each[0]), each[0]))
    }
    return {"settings": settings, "unknown": list(resolved.unknown)}


@click.command()
@_json
def transports(as_json: bool) -> None:
    """Show which transports are installed, whether each works here or why not, and what it can do.

    Each is started and ended, with the settings of the file and the environment.

    Exit status 0 if one can be used, 1 if none can, 2 if the file or the environment cannot be used.
    """
    try:
        resolve({}, None)
    except InvalidInput as error:
        raise click.UsageError(str(error)) from None
    probes = probe_all()
    if as_json:
        click.echo(json.dumps({"transports": [as_plain(probe) for probe in probes]}))
    else:
        click.echo("\n".join(_lines(probes)))
    raise SystemExit(0 if any(probe.usable for probe in probes) else 1)


def _lines(probes: list[Probe]) -> list[str]:
    width = max(len(probe.name) for probe in probes)
    lines = []
    for probe in probes:
        state = "usable" if probe.usable else probe.problem
        source = f"  ({probe.distribution} {probe.version})" if probe.distribution else ""
        lines.append(f"{probe.name:<{width}}  {state}{source}")
        lines += [f"{'':<{width}}  {line}" for line in (probe.hint, _abilities(probe.capabilities)) if line]
    return lines


def _abilities(capabilities: dict[str, Any] | None) -> str:
    given = (capabilities or {}).items()
    return ", ".join(name if value is True else f"{name}={value}" for name, value in given if value is not False)
