"""The command line as its users run it: real processes, real signals."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvpoll_fsm import __version__, cli
from kvpoll_fsm.lifecycle import ROWS
from kvpoll_fsm.tables import FORMATS, render

ONE_PART = ["Bootstrapping", "WaitingForInput", "Success"]
PARTS = ["Bootstrapping", "WaitingForInput", "Transferring", "Success"]
KVPOLL = [sys.executable, "-m", "kvpoll_fsm.cli"]
LONG = ["--tokens", "50000", "--blocks", "1", "--block-tokens", "1", "--hidden", "4"]
"""A transfer of 50,000 parts, which nothing but its end can outrun."""
LIMIT_S = 40.0
THREAD = ["--isolation", "thread"]
"""Processes of their own take longer to start than the demo lasts; the others have them."""


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.command(), arguments)


def demo(*arguments: str) -> dict[str, Any]:
    """Run a demo that must succeed; standard output is one JSON document and nothing else."""
    ended = subprocess.run([*KVPOLL, "demo", "--json", *arguments], capture_output=True, timeout=LIMIT_S)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert ended.stdout.count(b"\n") == 1
    document: dict[str, Any] = json.loads(ended.stdout)
    assert document["ok"] is True
    assert document["problems"] == []
    return document


def tokens_of(parts: list[dict[str, Any]], transport: str = "shm") -> list[int]:
    """The sizes of the parts, whose numbers and flags must be right."""
    assert [part["part"] for part in parts] == list(range(len(parts)))
    assert [part["is_last"] for part in parts] == [False] * (len(parts) - 1) + [True]
    assert {part["transport"] for part in parts} == {transport}
    return [part["tokens"] for part in parts]


# The demo that succeeds


@pytest.mark.parametrize(
    ("arguments", "states", "tokens"),
    [
        (["--tokens", "500"], ONE_PART, [500]),
        ([], PARTS, [1024, 976]),
        (["--tokens", "2048", "--hidden", "64", *THREAD], PARTS, [1024, 1024]),
        (["--tokens", "5000", "--hidden", "64", *THREAD], PARTS, [1024] * 4 + [904]),
        (["--tokens", "5000", "--hidden", "64", "--resume", "extend"], PARTS, [1024] * 4 + [904]),
        (["--hidden", "64", "--dtype", "float32", "--transport", "require:tcp"], PARTS, [1024, 976]),
        (["--tokens", "7", "--blocks", "1", "--block-tokens", "3", "--hidden", "1", *THREAD], PARTS, [3, 3, 1]),
    ],
)
def test_a_room(arguments: list[str], states: list[str], tokens: list[int]) -> None:
    document = demo(*arguments)
    (room,) = document["rooms"]
    (receiver,) = room["receivers"]
    assert room["room"] == 42
    assert room["total_tokens"] == sum(tokens)
    assert room["sender_states"] == receiver["states"] == states
    forced = "require:tcp" in arguments
    assert tokens_of(receiver["parts"], "tcp" if forced else "shm") == tokens
    chosen = "tcp: as required" if forced else "shm: the first of prefer:shm,tcp, and it works between these processes"
    assert room["transport_choices"] == [chosen]
    assert receiver["rank"] == 0
    assert receiver["sha256_equal"] is True
    assert sorted(receiver["sha256"]) == ["aux", "embeddings", "fill_ids"]
    assert all(len(bytes.fromhex(digest)) == 32 for digest in receiver["sha256"].values())


@pytest.mark.parametrize(("ranks", "resume"), [(2, "drain"), (4, "extend")])
def test_ranks(ranks: int, resume: str) -> None:
    document = demo("--hidden", "64", "--ranks", str(ranks), "--resume", resume)
    (room,) = document["rooms"]
    assert room["sender_states"] == PARTS
    assert [receiver["rank"] for receiver in room["receivers"]] == list(range(ranks))
    for receiver in room["receivers"]:
        assert receiver["states"] == PARTS
        assert tokens_of(receiver["parts"]) == [1024, 976]
        assert receiver["sha256_equal"] is True


def test_many_rooms_at_once() -> None:
    rooms = demo("--hidden", "64", "--rooms", "20", "--ranks", "2")["rooms"]
    assert [room["room"] for room in rooms] == list(range(42, 62))
    for room in rooms:
        assert room["sender_states"] == PARTS
        assert [tokens_of(receiver["parts"]) for receiver in room["receivers"]] == [[1024, 976]] * 2
        assert all(receiver["sha256_equal"] for receiver in room["receivers"])
    assert len({room["sender_sha256"]["embeddings"] for room in rooms}) == 20


def test_for_people() -> None:
    command = [*KVPOLL, "demo", "--hidden", "64"]
    ended = subprocess.run(command, capture_output=True, timeout=LIMIT_S, text=True)
    assert ended.returncode == 0
    for side in ("sender", "receiver 0"):
        path = " → ".join(PARTS)
        assert [line for line in ended.stdout.splitlines() if side in line and line.endswith(path)]
    assert "part 0: 1,024 tokens, not last, shm" in ended.stdout
    assert "part 1: 976 tokens, last, shm" in ended.stdout
    assert "over shm: the first of prefer:shm,tcp, and it works between these processes" in ended.stdout
    assert "OK: 1 room ended in Success on all sides" in ended.stdout


# The demo that does not


@contextmanager
def transferring() -> Iterator[tuple[subprocess.Popen[str], dict[str, int]]]:
    """A demo in the middle of a long transfer, and the process ids of its sender and its receiver."""
    with subprocess.Popen([*KVPOLL, "demo", *LONG], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert any("Transferring" in line for line in iter(process.stdout.readline, ""))
            yield process, children_of(process.pid)
        finally:
            process.kill()


def children_of(pid: int) -> dict[str, int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    arguments = {int(child): Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0") for child in children}
    sides = {line[3].decode(): child for child, line in arguments.items() if b"kvpoll_fsm.demo_worker" in line}
    assert sorted(sides) == ["receiver", "sender"]
    return sides


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    ("victim", "witness", "reason"),
    [("receiver", "sender", "PeerLost"), ("sender", "receiver 0", "PeerLost")],
)
def test_a_process_is_killed_in_the_middle(victim: str, witness: str, reason: str) -> None:
    with transferring() as (process, children):
        os.kill(children[victim], signal.SIGKILL)
        text, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    text = " ".join(text.split())
    assert f"process {children[victim]} was killed by SIGKILL" in text
    assert re.search(f"room 42, {witness}, Failed: ({reason}) on (rank 0|sender) .* the host process is gone", text)
    assert "FAILED: 0 of 1 room" in text
    assert not any(map(is_running, children.values()))


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 128 + signal.SIGINT), (signal.SIGTERM, 128 + signal.SIGTERM)],
)
def test_it_ends_what_it_started_when_told_to_end(number: signal.Signals, status: int) -> None:
    with transferring() as (process, children):
        process.send_signal(number)
        process.communicate(timeout=LIMIT_S)
    assert process.returncode == status
    assert not any(map(is_running, children.values()))


def test_the_others_end_when_it_is_killed() -> None:
    with transferring() as (process, children):
        handles = [os.pidfd_open(child) for child in children.values()]
        process.kill()
        for handle in handles:  # readable once the process has ended
            assert select.select([handle], [], [], LIMIT_S)[0]
            os.close(handle)


# Usage


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--tokens", "0"], "'--tokens': 0 is not in the range"),
        (["--tokens", "2.5"], "'--tokens': '2.5' is not a valid integer"),
        (["--blocks", "0"], "'--blocks': 0 is not in the range"),
        (["--blocks", "65537"], "'--blocks': 65537 is not in the range"),
        (["--block-tokens", "0"], "'--block-tokens': 0 is not in the range"),
        (["--hidden", "0"], "'--hidden': 0 is not in the range"),
        (["--ranks", "0"], "'--ranks': 0 is not in the range"),
        (["--rooms", "-1"], "'--rooms': -1 is not in the range"),
        (["--dtype", "bool"], "'--dtype': 'bool' is not one of 'bfloat16'"),
        (["--resume", "manual"], "'--resume': 'manual' is not one of 'drain', 'extend'"),
        (["--transport", "tpc"], "--transport: transport 'tpc': is not installed; did you mean 'tcp'?"),
        (["--transport", "prefer:nosuch,neither"], "transport 'nosuch': is not installed"),
        (["--transport", "require:tcp,memory"], "require takes exactly one transport"),
        (["--transport", "fastest:tcp"], "unknown mode 'fastest'"),
        (["--transport", ""], "names no transport"),
        (["--tokens", "1000000000"], "use fewer tokens, blocks or ranks, or a smaller hidden size"),
        (["--colour"], "No such option"),
    ],
)
def test_usage_errors(arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)  # no process may be started
    result = invoke("demo", "--json", *arguments)
    assert result.exit_code == 2
    assert complaint in " ".join(result.stderr.split())
    assert result.stdout == ""


@pytest.mark.parametrize("format_", sorted(FORMATS))
def test_table(format_: str) -> None:
    result = invoke("table", "--format", format_)
    assert result.exit_code == 0
    assert result.stdout == render(format_) + "\n"
    for row in ROWS:
        assert type(row.event).__name__ in result.stdout
        assert row.dest.name in result.stdout


def test_table_as_json() -> None:
    rows = json.loads(invoke("table", "--format", "json").stdout)
    assert len(rows) == sum(len(row.sources) for row in ROWS)
    assert all(list(row) == ["source", "event", "is_last", "all_ok", "dest"] for row in rows)
    last = {"source": "Transferring", "event": "PartDone", "is_last": True, "all_ok": True, "dest": "Success"}
    assert last in rows


def test_table_as_diagrams() -> None:
    edges = {(source.name, row.dest.name, type(row.event).__name__) for row in ROWS for source in row.sources}
    mermaid, dot = (invoke("table", "--format", name).stdout.splitlines() for name in ("mermaid", "dot"))
    for source, dest, event in edges:
        assert [line for line in mermaid if f"{source} --> {dest}: " in line and event in line]
        assert [line for line in dot if f"{source} -> {dest} [" in line and event in line]


def test_table_default_is_text() -> None:
    assert invoke("table").stdout == render("text") + "\n"


def test_unknown_table_format() -> None:
    result = invoke("table", "--format", "svg")
    assert result.exit_code == 2
    assert "'svg' is not one of" in result.stderr


def test_version() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"kvpoll {__version__}\n")


def test_installed_as_kvpoll() -> None:
    (entry,) = metadata.entry_points(group="console_scripts", name="kvpoll")
    assert entry.load() is cli.main


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_extra(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from kvpoll_fsm.cli import main; main()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S)
    assert ended.returncode == 1
    assert ended.stderr == cli.HINT + "\n"


def test_the_library_needs_neither_click_nor_rich() -> None:
    code = "import sys, kvpoll_fsm, kvpoll_fsm.cli, kvpoll_fsm.demo, kvpoll_fsm.demo_worker; "
    code += "sys.exit(sorted({'click', 'rich'} & set(sys.modules)) or 0)"
    assert subprocess.run([sys.executable, "-c", code], timeout=LIMIT_S).returncode == 0
