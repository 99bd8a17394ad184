"""The machine and its deadlines, drawn for people and for other programs.

Everything here is read from `lifecycle.ROWS`, `deadlines.GATES` and the defaults of `Deadlines`, so a
drawing cannot differ from what runs. The first state is the one no row leads to; the last ones are those no
row leads from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from kvpoll_fsm.deadlines import GATES, Deadlines
from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.lifecycle import ROWS

__all__ = [
    "FORMATS",
    "deadlines_markdown",
    "dot",
    "markdown",
    "mermaid",
    "render",
    "rows_json",
    "text",
]


def rows_json() -> list[dict[str, str | bool | None]]:
    """The rows as plain values, one object per source state.

    Returns:
        Objects with the keys `source`, `event` and `dest` (names), and `is_last` and `all_ok` (the flags
        of `PartDone`; None for every other event).
    """
    return [
        {
            "source": source.name,
            "event": type(row.event).__name__,
            "is_last": getattr(row.event, "is_last", None),
            "all_ok": getattr(row.event, "all_ok", None),
            "dest": row.dest.name,
        }
        for row in ROWS
        for source in row.sources
    ]


def text() -> str:
    """The machine as aligned columns."""
    lines = [_HEAD, *(_cells(line) for line in _lines())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(line).rstrip() for line in padded)


def markdown() -> str:
    """The machine as a Markdown table."""
    return _markdown_table(_HEAD, [_cells(line) for line in _lines()])


def mermaid() -> str:
    """The machine as a Mermaid state diagram."""
    first, last = _ends()
    edges = [f"{source} --> {dest}: {' / '.join(labels)}" for (source, dest), labels in _edges().items()]
    lines = [*(f"[*] --> {state}" for state in first), *edges, *(f"{state} --> [*]" for state in last)]
    return "\n".join(["stateDiagram-v2", *(f"    {line}" for line in lines)])


def dot() -> str:
    """The machine as a Graphviz digraph."""
    first, last = _ends()
    lines = ["rankdir=LR;", "node [shape=box, style=rounded];", "start [shape=point];"]
    lines += [f"{state} [peripheries=2];" for state in last]
    lines += [f"start -> {state};" for state in first]
    for (source, dest), labels in _edges().items():
        lines.append(f'{source} -> {dest} [label="{_NEWLINE.join(labels)}"];')
    return "\n".join(["digraph lifecycle {", *(f"    {line}" for line in lines), "}"])


def deadlines_markdown() -> str:
    """Two Markdown tables: the deadline of each gate a room can wait at, then all other settings."""
    defaults = Deadlines()
    gates = [
        (state.name, gate.value, f"`{clock.value}`", _seconds(defaults.of(state, gate)))
        for (state, gate), clock in GATES.items()
    ]
    clocks = {clock.value for clock in GATES.values()}
    others = [
        (f"`{setting.name}`", _seconds(getattr(defaults, setting.name)))
        for setting in fields(Deadlines)
        if setting.name not in clocks
    ]
    return "\n\n".join(
        [
            _markdown_table(("state", "gate", "setting", "default"), gates),
            _markdown_table(("setting", "default"), others),
        ]
    )


def render(format: str) -> str:
    """Draw the machine in one of `FORMATS`, without a newline at the end.

    Raises:
        InvalidInput: There is no such format.
    """
    if format not in FORMATS:
        raise InvalidInput(f"format {format!r}: choose one of {', '.join(FORMATS)}")
    return FORMATS[format]()


FORMATS: dict[str, Callable[[], str]] = {
    "text": text,
    "markdown": markdown,
    "mermaid": mermaid,
    "dot": dot,
    "json": lambda: json.dumps(rows_json(), indent=2),
}
"""What `render` can draw, by name."""

_HEAD = ("source", "event", "is_last", "all_ok", "destination")
_NEWLINE = r"\n"


@dataclass(slots=True)
class _Line:
    """Rows that differ in nothing but `is_last`, as one line for people."""

    sources: list[str]
    event: str
    is_last: str
    all_ok: str
    dest: str


def _lines() -> list[_Line]:
    lines: dict[tuple[object, ...], _Line] = {}
    for row in ROWS:
        event, dest = type(row.event).__name__, row.dest.name
        is_last, all_ok = (_word(getattr(row.event, flag, None)) for flag in ("is_last", "all_ok"))
        sources = [source.name for source in row.sources]
        line = lines.setdefault((row.sources, event, all_ok, dest), _Line(sources, event, is_last, all_ok, dest))
        if line.is_last != is_last:
            line.is_last = "any"
    return list(lines.values())


def _cells(line: _Line) -> tuple[str, ...]:
    return (", ".join(line.sources), line.event, line.is_last, line.all_ok, line.dest)


def _word(flag: bool | None) -> str:
    return "" if flag is None else "yes" if flag else "no"


def _edges() -> dict[tuple[str, str], list[str]]:
    """Label of each event, by (source, destination)."""
    edges: dict[tuple[str, str], list[str]] = {}
    for line in _lines():
        for source in line.sources:
            edges.setdefault((source, line.dest), []).append(_label(line))
    return edges


def _label(line: _Line) -> str:
    last = {"yes": "last", "no": "not last"}.get(line.is_last)
    all_ok = {"yes": "all ok", "no": "not all ok"}.get(line.all_ok)
    flags = ", ".join(flag for flag in (last, all_ok) if flag)
    return f"{line.event} {flags}".rstrip()


def _ends() -> tuple[list[str], list[str]]:
    """The states no row leads to, and those no row leads from, in the order of the rows."""
    sources = dict.fromkeys(source.name for row in ROWS for source in row.sources)
    dests = dict.fromkeys(row.dest.name for row in ROWS)
    return [name for name in sources if name not in dests], [name for name in dests if name not in sources]


def _markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _seconds(value: float) -> str:
    return f"{value:,g} s"
