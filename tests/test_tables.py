"""Every drawing holds exactly the rows that run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields

import pytest

from kvpoll_fsm import tables
from kvpoll_fsm.deadlines import GATES, Deadlines
from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.events import Bootstrapped, PartDone, PeerLost
from kvpoll_fsm.lifecycle import EVENTS, ROWS, TABLE, Row
from kvpoll_fsm.poll import KVPoll

EDGES = {(source.name, dest.name) for (source, _), dest in TABLE.items()}
FLAGS: dict[str, list[bool | None]] = {"": [None], "yes": [True], "no": [False], "any": [False, True]}
_Key = tuple[str, str, "bool | None", "bool | None"]

BY_NAME: dict[_Key, str] = {
    (
        source.name,
        type(event).__name__,
        getattr(event, "is_last", None),
        getattr(event, "all_ok", None),
    ): dest.name
    for (source, event), dest in TABLE.items()
}
"""The table the rooms run on, in names."""


def expanded(lines: list[list[str]]) -> dict[_Key, str]:
    """Lines for people as single rows: several sources, and flags that may be any."""
    return {
        (source, event, last, ok): dest
        for sources, event, is_last, all_ok, dest in lines
        for source in sources.split(", ")
        for last in FLAGS[is_last]
        for ok in FLAGS[all_ok]
    }


def cells(markdown: str) -> tuple[list[str], list[list[str]]]:
    head, rule, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines())
    assert rule == ["---"] * len(head)
    assert all(len(row) == len(head) for row in rows)
    return head, rows


def test_json_rows_are_the_table() -> None:
    rows = tables.rows_json()
    assert all(list(row) == ["source", "event", "is_last", "all_ok", "dest"] for row in rows)
    assert len(rows) == len(TABLE)
    drawn = {(row["source"], row["event"], row["is_last"], row["all_ok"]): row["dest"] for row in rows}
    assert drawn == BY_NAME
    assert {row["event"] for row in rows} == {type(event).__name__ for event in EVENTS}
    for row in rows:
        flags = [row["is_last"], row["all_ok"]]
        assert all(isinstance(flag, bool) for flag in flags) if row["event"] == "PartDone" else flags == [None, None]


def test_json_format_is_those_rows() -> None:
    assert json.loads(tables.render("json")) == tables.rows_json()


def test_text_holds_every_row_once() -> None:
    head, rule, *lines = tables.text().splitlines()
    columns = [(match.start(), match.end()) for match in re.finditer("-+", rule)]
    split = [[line[start:end].strip() for start, end in columns] for line in lines]
    assert head.split() == ["source", "event", "is_last", "all_ok", "destination"]
    assert expanded(split) == BY_NAME
    assert len(split) == 9, "rows that differ only in is_last share a line"


def test_markdown_holds_every_row_once() -> None:
    head, rows = cells(tables.markdown())
    assert head == ["source", "event", "is_last", "all_ok", "destination"]
    assert expanded(rows) == BY_NAME


def test_the_rule_for_people() -> None:
    lines = [line.split("|")[2:6] for line in tables.markdown().splitlines() if "PartDone" in line]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["PartDone", "no", "yes", "Transferring"],
        ["PartDone", "yes", "yes", "Success"],
        ["PartDone", "any", "no", "Failed"],
    ]


def labels_of(edge: tuple[str, str]) -> set[str]:
    """What leads from one state to another, as it should be written on the arrow."""
    words = set()
    for (source, event), dest in TABLE.items():
        if (source.name, dest.name) != edge:
            continue
        if not isinstance(event, PartDone):
            words.add(type(event).__name__)
        elif event.all_ok:
            words.add(f"PartDone {'last' if event.is_last else 'not last'}, all ok")
        else:
            words.add("PartDone not all ok")
    return words


def test_mermaid_holds_every_edge() -> None:
    kind, *lines = tables.mermaid().splitlines()
    assert kind == "stateDiagram-v2"
    parsed = [re.fullmatch(r"    (\S+) --> (\w+|\[\*\])(?:: (.+))?", line) for line in lines]
    edges = {(edge[1], edge[2]): edge[3] for edge in parsed if edge}
    assert len(edges) == len(lines)
    ends = {("[*]", "Bootstrapping"), ("Success", "[*]"), ("Failed", "[*]")}
    assert edges.keys() == EDGES | ends
    assert {edge: set(edges[edge].split(" / ")) for edge in EDGES} == {edge: labels_of(edge) for edge in EDGES}


def test_dot_holds_every_edge() -> None:
    text = tables.dot()
    assert text.startswith("digraph lifecycle {\n")
    assert text.endswith("\n}")
    edges = {(a, b): label for a, b, label in re.findall(r'(\w+) -> (\w+) \[label="(.+)"\];', text)}
    assert {edge: set(label.split(r"\n")) for edge, label in edges.items()} == {edge: labels_of(edge) for edge in EDGES}
    assert re.findall(r"start -> (\w+);", text) == ["Bootstrapping"]
    assert set(re.findall(r"(\w+) \[peripheries=2\]", text)) == {"Success", "Failed"}


@pytest.mark.parametrize("name", tables.FORMATS)
def test_every_drawing_is_made_from_the_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = (
        Row((KVPoll.Success,), Bootstrapped(), KVPoll.Transferring),
        Row((KVPoll.Transferring,), PeerLost(), KVPoll.Failed),
    )
    before = tables.render(name)
    monkeypatch.setattr(tables, "ROWS", made_up)
    after = tables.render(name)
    assert after != before
    assert "Success" in after
    assert "WaitingForInput" not in after
    assert "PartDone" not in after


@pytest.mark.parametrize("name", tables.FORMATS)
def test_render_names_every_state_and_ends_without_a_newline(name: str) -> None:
    drawn = tables.render(name)
    assert all(state.name in drawn for state in KVPoll)
    assert drawn == drawn.strip()


def test_formats() -> None:
    assert list(tables.FORMATS) == ["text", "markdown", "mermaid", "dot", "json"]
    functions: list[Callable[[], str]] = [tables.text, tables.markdown, tables.mermaid, tables.dot]
    for function in functions:
        assert tables.render(function.__name__) == function()


@pytest.mark.parametrize("name", ["", "svg", "Markdown", "rows_json"])
def test_an_unknown_format_is_refused_with_the_choice(name: str) -> None:
    with pytest.raises(InvalidInput, match="text, markdown, mermaid, dot, json"):
        tables.render(name)


def test_deadlines_hold_every_gate_and_every_setting() -> None:
    gates, others = tables.deadlines_markdown().split("\n\n")
    head, rows = cells(gates)
    assert head == ["state", "gate", "setting", "default"]
    defaults = Deadlines()
    assert rows == [
        [state.name, gate.value, f"`{clock.value}`", f"{defaults.of(state, gate):,g} s"]
        for (state, gate), clock in GATES.items()
    ]
    head, rows = cells(others)
    assert head == ["setting", "default"]
    assert rows == [
        [f"`{field.name}`", f"{field.default:,g} s"]
        for field in fields(Deadlines)
        if field.name not in {clock.value for clock in GATES.values()}
    ]
    assert ["`room_timeout_s`", "1,800 s"] in rows


def test_rows_with_one_kind_of_part_are_not_called_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROWS", tuple(row for row in ROWS if row.event != PartDone(True, False)))
    assert "any" not in tables.markdown()
    assert "PartDone not last, not all ok" in tables.mermaid()
