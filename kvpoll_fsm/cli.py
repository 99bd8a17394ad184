"""The command `kvpoll`.

It needs the extra "cli" (click and rich), which nothing else in the library imports.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kvpoll_fsm import __version__
from kvpoll_fsm.demos.plan import (
    DTYPES,
    FIRST_ROOM,
    ISOLATIONS,
    LIMITS,
    RESUMES,
    Plan,
    available_nbytes,
    require_transport,
)
from kvpoll_fsm.errors import InvalidInput, PolicyError, TransportUnavailable
from kvpoll_fsm.tables import FORMATS, render

if TYPE_CHECKING:
    import click

    from kvpoll_fsm.demos.report import Report

__all__ = ["command", "main"]

BRIEFLY = {
    "bench": "Measure the library beside others (in a checkout).",
    "check-trace": "Check traces of endpoints for what must not happen.",
    "config": "Show every setting and where it comes from.",
    "conformance": "Test what every transport must do on one.",
    "demo": "Carry rooms between processes and compare the bytes.",
    "explore": "Perform every interleaving of small scenes.",
    "keygen": "Make a key pair for an endpoint.",
    "report": "Show how an endpoint's rooms fare, by transport.",
    "simulate": "Simulate days of rooms and faults by a seed.",
    "switch": "Give an endpoint's new rooms another transport.",
    "table": "Print the transitions of a room.",
    "transports": "Show which transports work here, and why others do not.",
}
"""What `kvpoll --help` says of each command."""
HINT = "kvpoll: the command line needs click and rich: pip install 'kvpoll-fsm[cli]'"


def main() -> None:
    """Run the command that the arguments name, and exit."""
    try:
        import click  # noqa: F401
        import rich  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        sys.exit(HINT)
    command().main(prog_name="kvpoll")


def command() -> click.Command:
    """The whole command, as click has it."""
    import click

    from kvpoll_fsm import cli_bench, cli_config, cli_conformance, cli_local, cli_simulate, cli_tools

    group = click.Group("kvpoll", help="The status of a transfer as an explicit state machine.")
    group.add_command(_demo_command())
    group.add_command(_table_command())
    for tool in (cli_tools.keygen, cli_tools.check_trace, cli_tools.explore, cli_simulate.simulate, cli_bench.bench):
        group.add_command(tool)
    for tool in (cli_local.switch, cli_local.report, cli_config.config, cli_config.transports):
        group.add_command(tool)
    group.add_command(cli_conformance.conformance)
    for name, each in group.commands.items():
        each.short_help = BRIEFLY[name]
    return click.version_option(__version__, message="kvpoll %(version)s")(group)


def _table_command() -> click.Command:
    import click

    choice = click.Option(
        ["--format", "format_"],
        type=click.Choice(list(FORMATS)),
        default="text",
        show_default=True,
        help="What to draw it as.",
    )
    return click.Command(
        "table",
        params=[choice],
        callback=lambda format_: click.echo(render(format_)),
        help="Print the transitions of a room: the very rows that run.",
    )


def _demo_command() -> click.Command:
    import click

    return click.Command(
        "demo",
        params=_demo_options(),
        callback=_demo,
        help="Send rooms from one process to others, show every state they go through, compare the bytes.\n\n"
        "Exit status 0 only if every room ends in Success on all sides with equal bytes, 1 if not.",
    )


def _demo_options() -> list[click.Parameter]:
    import click

    plan = Plan()
    return [
        _number("tokens", plan.tokens, "Tokens of every room."),
        _number("blocks", plan.blocks, "Blocks of one reservation: what one part can fill."),
        _number("block-tokens", plan.block_tokens, "Tokens per block."),
        _number("hidden", plan.hidden, "Elements of a token's embedding."),
        _word("dtype", plan.dtype, DTYPES, "Of the embeddings."),
        _number("ranks", plan.ranks, "Receiver processes; each gets every room."),
        _number("rooms", plan.rooms, f"Rooms, all open at once, numbered from {FIRST_ROOM}."),
        click.Option(
            ["--transport"],
            default=plan.transport,
            show_default=True,
            metavar="POLICY",
            help="shm, require:tcp, or prefer:a,b with the best first.",
        ),
        _word("resume", plan.resume, RESUMES, "How receivers make room for the next part."),
        _word("isolation", plan.isolation, ISOLATIONS, "Where data is moved: in a process beside each, or a thread."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON document and nothing else."),
    ]


def _number(name: str, default: int, text: str) -> click.Option:
    import click

    kind = click.IntRange(*LIMITS[name.replace("-", "_")])
    return click.Option([f"--{name}"], type=kind, default=default, show_default=True, help=text)


def _word(name: str, default: str, choices: tuple[str, ...], text: str) -> click.Option:
    import click

    kind = click.Choice(choices)
    return click.Option([f"--{name}"], type=kind, default=default, show_default=True, help=text)


def _demo(as_json: bool, **sizes: Any) -> None:
    plan = _checked(sizes)
    try:
        with _orderly_end():
            report = _run(plan, as_json)
    except KeyboardInterrupt:
        print("kvpoll: interrupted; the demo's processes have ended", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    sys.exit(0 if report.ok else 1)


def _run(plan: Plan, as_json: bool) -> Report:
    from kvpoll_fsm import demo

    if as_json:
        report = demo.run(plan)
        print(json.dumps(report.as_json()))
        return report
    from rich.console import Console

    from kvpoll_fsm.demos.screen import Screen, print_report

    console = Console(highlight=False)
    with Screen(console, plan) as screen:
        report = demo.run(plan, screen)
    print_report(console, report)
    return report


def _checked(sizes: dict[str, Any]) -> Plan:
    """The plan, or a usage error that says what is wrong with it."""
    import click

    try:
        plan = Plan(**sizes).fitted(available_nbytes())
        require_transport(plan.transport)
    except (PolicyError, TransportUnavailable) as error:
        raise click.BadParameter(str(error), param_hint="--transport") from None
    except InvalidInput as error:
        raise click.UsageError(str(error)) from None
    return plan


@contextlib.contextmanager
def _orderly_end() -> Iterator[None]:
    """Let a signal that asks us to end do so through all `finally` clauses, as Ctrl-C does."""

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
