"""`kvpoll config` and `kvpoll transports`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvpoll_fsm import cli_config
from kvpoll_fsm.cli import command
from kvpoll_fsm.probing import Probe
from kvpoll_fsm.settings import SETTINGS


def invoke(*arguments: object, **environ: str) -> Result:
    return CliRunner().invoke(command(), [str(argument) for argument in arguments], env=environ)


def settings(done: Result) -> dict[str, Any]:
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)["settings"]
    return found


# config


def test_every_setting_its_value_and_where_it_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "kvpoll.toml"
    file.write_text(
        'workers = 4\n[transport_options.mooncake]\npassword = "hunter2"\nmetadata = "http://me:hunter2@host/x"\n'
        'more = ["http://hunter2@host", "etcd://me:hunter2@me:hunter2@host/a"]'
    )
    done = invoke("config", "--json", KVPOLL_CONFIG=str(file), KVPOLL_WORKERS="3", KVPOLL_DEADLINES_STALL_S="2")
    found = settings(done)
    assert found.keys() >= {".".join(key) for key in SETTINGS}
    assert found["workers"] == {"value": 4, "source": f"file {file}"}
    assert found["deadlines.stall_s"] == {"value": 2.0, "source": "variable KVPOLL_DEADLINES_STALL_S"}
    assert found["transports"] == {"value": "prefer:shm,tcp", "source": "default"}
    assert found["transport_options.mooncake.password"]["value"] == "(hidden)"
    assert found["transport_options.mooncake.metadata"]["value"] == "http://(hidden)@host/x"
    assert found["transport_options.mooncake.more"]["value"] == ["http://(hidden)@host", "etcd://(hidden)@host/a"]
    assert "hunter2" not in done.output


def test_for_people(tmp_path: Path) -> None:
    file = tmp_path / "kvpoll.toml"
    file.write_text("workers = 4")
    done = invoke("config", "--file", file, KVPOLL_CONFIG="/nowhere", KVPOLL_WROKERS="3")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert f"workers = 4  (file {file})" in lines
    assert 'transports = "prefer:shm,tcp"  (default)' in lines
    assert "KVPOLL_WROKERS is none of kvpoll-fsm's and is ignored; did you mean KVPOLL_WORKERS?" in done.stderr


@pytest.mark.parametrize("program", ["config", "transports"])
def test_what_cannot_be_used(program: str) -> None:
    done = invoke(program, KVPOLL_WORKERS="many")
    assert done.exit_code == 2
    assert "environment: KVPOLL_WORKERS = 'many': give an integer" in done.output


def test_unknown_variables_are_in_the_document() -> None:
    (line,) = json.loads(invoke("config", "--json", KVPOLL_X="1").stdout)["unknown"]
    assert "KVPOLL_X" in line


# transports

GOOD = Probe(
    "swift", True, True, "", "", "birds", "1.2", "birds:Swift", {"fence": "token", "cuda": False, "listens": True}
)
BAD = Probe("dodo", True, False, "no longer flies", "take swift", "birds", "1.2", "birds:Dodo")


def test_which_are_usable_and_why_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_config, "probe_all", lambda: [BAD, GOOD])
    done = invoke("transports")
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        "dodo   no longer flies  (birds 1.2)",
        "       take swift",
        "swift  usable  (birds 1.2)",
        "       fence=token, listens",
    ]
    document = json.loads(invoke("transports", "--json").stdout)
    assert [entry["name"] for entry in document["transports"]] == ["dodo", "swift"]
    assert document["transports"][1] == {
        "name": "swift",
        "installed": True,
        "usable": True,
        "problem": "",
        "hint": "",
        "distribution": "birds",
        "version": "1.2",
        "entry_point": "birds:Swift",
        "capabilities": GOOD.capabilities,
    }


def test_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_config, "probe_all", lambda: [BAD])
    assert invoke("transports").exit_code == 1
