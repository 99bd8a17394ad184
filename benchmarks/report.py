"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.cases import CASES
from benchmarks.figures import AIMS, Missing
from benchmarks.plane import LOOPS
from benchmarks.results import Results, Series, percentile

__all__ = ["BEGIN", "END", "into_page", "markdown"]

BEGIN, END = "<!-- measured -->", "<!-- end of measured -->"
NOT_THERE = "–"
CALM = 0.5
"""Load above which others were at work when the run began."""
HEADINGS = {
    "alone": "Data plane, GB/s, nothing else running",
    "busy": "Data plane, GB/s, with a busy Python loop at both ends",
}


def into_page(page: str, text: str) -> str:
    """The page with its measured part replaced, or added at the end."""
    part = f"{BEGIN}\n{text}\n{END}\n"
    before, marker, rest = page.partition(BEGIN)
    if not marker:
        return f"{page.rstrip()}\n\n{part}"
    return before + part + rest.partition(END)[2].lstrip("\n")


def markdown(results: Results, plots: Iterable[str]) -> str:
    """Everything that people read; `plots` are the pictures, as links from the page."""
    parts = [_head(results), _aims(results), *(_speeds(results, loop) for loop in LOOPS), _times(results)]
    parts += [_costs(results), _calls(results), _growth(results), _job(results)]
    parts += ["\n\n".join(f"![{path}]({path})" for path in plots), _peers(results), _missing(results)]
    return "\n\n".join(part for part in parts if part)


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _section(title: str, head: list[str], rows: list[list[str]]) -> str:
    return f"### {title}\n\n{_table(head, rows)}" if rows else ""


def _head(results: Results) -> str:
    lines = [f"- {name}: {value}" for name, value in results.machine.items() if not isinstance(value, list)]
    if results.machine.get("load at the start", 0) > CALM:
        lines.insert(0, "- **The machine had other work to do meanwhile: these figures say little.**")
    return "\n".join(lines)


def _aims(results: Results) -> str:
    rows = []
    for aim in AIMS:
        try:
            value = aim.value(results)
        except Missing as why:
            rows.append([aim.text, NOT_THERE, "not measured", _cell(str(why))])
        else:
            reached = aim.reached(value)
            rows.append([aim.text, _number(value), "yes" if reached else "no", "" if reached else aim.limit])
    return _section("Aims", ["aim", "measured", "reached", "why not"], rows)


def _speeds(results: Results, loop: str) -> str:
    cases = [case for case in CASES if case != "1KiB" and any(key[1:] == (case, loop) for key in results.plane)]
    rows = []
    for peer in results.settings:
        found = [results.plane.get((peer, case, loop)) for case in cases]
        if any(found):
            rows.append([peer, *(_number(each.gb_per_s) if each else NOT_THERE for each in found)])
    return _section(HEADINGS[loop], ["peer", *cases], rows)


def _times(results: Results) -> str:
    rows = [
        [peer, case, *(f"{1e6 * percentile(series.values, percent):,.0f}" for percent in (50, 99)), _spread(series)]
        for (peer, case, loop), series in results.plane.items()
        if loop == "alone" and case in ("1KiB", "64MiB")
    ]
    rows.sort(key=lambda row: (row[1], row[0]))
    return _section("Times of one transfer, alone", ["peer", "case", "p50 us", "p99 us", "medians of rounds, us"], rows)


def _spread(series: Series) -> str:
    medians = [1e6 * percentile(values, 50) for values in series.rounds.values()]
    return f"{min(medians):,.0f} to {max(medians):,.0f}"


def _costs(results: Results) -> str:
    rows = []
    for peer, nbytes in results.memory.items():
        series = results.plane.get((peer, "64MiB", "alone"))
        cpu = series.cpu_s_per_gb if series else None
        rows.append([peer, NOT_THERE if cpu is None else _number(cpu), f"{nbytes / 1e6:.0f}"])
    head = ["peer", "processor seconds per GB at 64 MiB", "resident MB without the payload"]
    return _section("Costs, both ends together", head, rows)


def _calls(results: Results) -> str:
    rows = [
        [name, *(f"{1e6 * value:,.3f}" for value in (series.median_s, percentile(series.values, 99)))]
        for name, series in results.calls.items()
        if not series.nbytes
    ]
    small = [
        [f"{peer}, {loop}", f"{1 / series.median_s:,.0f} rooms per second", NOT_THERE]
        for (peer, _, loop), series in results.plane.items()
        if peer.startswith("small rooms")
    ]
    return _section("Calls and small rooms", ["what", "median us", "p99 us"], rows + small)


def _growth(results: Results) -> str:
    names = ("bytes per room", "turn of the driver", "idle processor share", "opening a room")
    steps = [name.split()[3] for name in results.numbers if name.startswith(names[0])]
    rows = []
    for step in steps:
        memory, turn, idle, opening = (results.numbers[f"{name}, {step} rooms"] for name in names)
        rows.append(
            [f"{int(step):,}", f"{memory:,.0f}", f"{1e6 * turn:,.0f}", f"{100 * idle:.2f}", f"{1e6 * opening:,.0f}"]
        )
    head = ["open rooms", "bytes each", "turn of the driver, us", "idle, % of a processor", "opening one, us"]
    return _section("Growth", head, rows)


def _job(results: Results) -> str:
    rows = [
        [name.removeprefix("main job, "), f"{series.median_s:.3f}", _number(series.gb_per_s)]
        for name, series in results.calls.items()
        if series.nbytes
    ]
    return _section("The whole main job: 3,584 bfloat16 a token, through 1,024 tokens", ["job", "s", "GB/s"], rows)


def _peers(results: Results) -> str:
    rows = [[peer, *map(_cell, how.values())] for peer, how in results.settings.items()]
    return _section(
        "Settings", ["peer", "kind", "settings", "checksum", "busy loop: in the moving processes or beside"], rows
    )


def _missing(results: Results) -> str:
    rows = [[name, _cell(why)] for name, why in results.missing.items()]
    return _section("Missing", ["what", "why"], rows)


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ").replace("<", "&lt;")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
