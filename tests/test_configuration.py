"""Where settings come from, and which holds: constructor, file, environment, default."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from kvpoll_fsm import ConfigError, Deadlines, Endpoint, InvalidInput, Limits
from kvpoll_fsm.configuration import FILE_VARIABLE, PROTECTING, Given, Resolved, resolve
from kvpoll_fsm.settings import SETTINGS
from tests.helpers import pool

Environ = dict[str, str]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "kvpoll.toml"


def from_file(file: Path, text: str, environ: Environ | None = None, **given: Any) -> Resolved:
    file.write_text(text)
    return resolve(given, file, environ or {})


def refused(file: Path, text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        from_file(file, text)
    assert caught.value.source == f"file {file}"
    return caught.value


# Which one holds


def test_without_anything_the_defaults_hold() -> None:
    resolved = resolve({}, None, {})
    assert {given.source for given in resolved.given.values()} == {"default"}
    assert str(resolved.config.policy) == "prefer:shm,tcp"
    assert resolved.config.deadlines == Deadlines()
    assert resolved.unknown == ()


STRENGTHS = [
    (False, False, 2, "default"),
    (True, False, 3, "variable KVPOLL_WORKERS"),
    (True, True, 4, "file"),
    (False, True, 4, "file"),
]


@pytest.mark.parametrize(("in_environ", "in_file", "workers", "source"), STRENGTHS)
def test_the_file_is_stronger_than_the_environment(
    file: Path, in_environ: bool, in_file: bool, workers: int, source: str
) -> None:
    environ = {"KVPOLL_WORKERS": "3"} if in_environ else {}
    resolved = from_file(file, "workers = 4" if in_file else "", environ)
    assert resolved.config.workers == workers
    assert resolved.given["workers",].source == (f"file {file}" if source == "file" else source)


@pytest.mark.parametrize(("in_environ", "in_file", "workers", "source"), STRENGTHS)
def test_the_constructor_is_stronger_than_all(
    file: Path, in_environ: bool, in_file: bool, workers: int, source: str
) -> None:
    environ = {"KVPOLL_WORKERS": "3"} if in_environ else {}
    resolved = from_file(file, "workers = 4" if in_file else "", environ, workers=2)
    assert resolved.config.workers == 2
    assert resolved.given["workers",].source == "constructor"


def test_none_in_the_constructor_is_not_given(file: Path) -> None:
    assert from_file(file, "workers = 4", None, workers=None).config.workers == 4


def test_parts_of_a_setting_come_from_where_they_are_given(file: Path) -> None:
    text = """
        [deadlines]
        stall_s = 3
        [limits]
        orphans = 7
        [transport_options.tcp]
        streams = 2
        host = "127.0.0.2"
    """
    environ = {
        "KVPOLL_DEADLINES_STALL_S": "4",
        "KVPOLL_DEADLINES_RESUME_S": "5.5",
        "KVPOLL_LIMITS_CALLERS": "6",
        "KVPOLL_TRANSPORT_OPTIONS_TCP_STREAMS": "3",
        "KVPOLL_TRANSPORT_OPTIONS_TCP_DATA_PORTS": "[20000, 29999]",
        "KVPOLL_TRANSPORT_OPTIONS_TCP_ADVERTISE": "10.0.0.1",
        "KVPOLL_TRANSPORT_OPTIONS_SHM_ANY_UID": "true",
    }
    config = from_file(file, text, environ, transport_options={"tcp": {"host": "127.0.0.3"}}).config
    assert config.deadlines == Deadlines(stall_s=3, resume_s=5.5)
    assert config.limits == Limits(orphans=7, callers=6)
    tcp = {"host": "127.0.0.3", "streams": 2, "data_ports": [20000, 29999], "advertise": "10.0.0.1"}
    assert config.transport_options == {"tcp": tcp, "shm": {"any_uid": True}}


def test_deadlines_of_the_constructor_are_all_the_constructors(file: Path) -> None:
    deadlines = Deadlines(resume_s=7)
    assert from_file(file, "[deadlines]\nstall_s = 3", None, deadlines=deadlines).config.deadlines == deadlines


def test_every_kind_of_value(file: Path) -> None:
    text = """
        transports = "require:tcp"
        standby = ["memory", "shm"]
        checksum = true
        insecure = true
        mover_cpus = [0]
    """
    environ = {
        "KVPOLL_TRANSPORTS": "require:tcp",
        "KVPOLL_STANDBY": "memory, shm",
        "KVPOLL_CHECKSUM": "TRUE",
        "KVPOLL_INSECURE": "1",
        "KVPOLL_MOVER_CPUS": "0",
    }
    here, there = from_file(file, text).config, resolve({}, None, environ).config
    assert here == there
    assert (here.standby, here.checksum, here.mover_cpus) == (("memory", "shm"), True, (0,))
    assert here.names == ("tcp", "memory", "shm")
    assert resolve({}, None, {"KVPOLL_CHECKSUM": "auto", "KVPOLL_STANDBY": ""}).config.names == ("shm", "tcp")


# Which file


def test_the_file_is_named_by_the_constructor_or_by_a_variable(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text("workers = 9")
    environ = {FILE_VARIABLE: str(other)}
    assert resolve({}, None, environ).config.workers == 9
    assert from_file(file, "workers = 4", environ).config.workers == 4


def test_an_endpoint_reads_both(file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text("workers = 4\n[deadlines]\nstall_s = 3")
    monkeypatch.setenv(FILE_VARIABLE, str(file))
    monkeypatch.setenv("KVPOLL_WORKERS", "5")
    monkeypatch.setenv("KVPOLL_CHEKSUM", "true")
    monkeypatch.setenv("KVPOLL_ARRAYS", "numpy")
    with caplog.at_level(logging.WARNING, "kvpoll_fsm"):
        config = Endpoint(pool=pool(1), deadlines=Deadlines(stall_s=2)).config
    assert (config.workers, config.arrays, config.deadlines.stall_s) == (4, "numpy", 2)
    assert "KVPOLL_CHEKSUM is none of kvpoll-fsm's and is ignored; did you mean KVPOLL_CHECKSUM?" in caplog.text
    other = file.with_name("other.toml")
    other.write_text("workers = 6")
    assert Endpoint(pool=pool(1), config=other).config.workers == 6


# What cannot be used


@pytest.mark.parametrize(
    ("text", "key", "value", "problem"),
    [
        ("workers = 0", "workers", 0, "give 1 to 64"),
        ('workers = "2"', "workers", "2", "give an integer"),
        ("workers = true", "workers", True, "give an integer"),
        ("insecure = 1", "insecure", 1, "give true or false"),
        ('standby = "tcp"', "standby", "tcp", "give a list of names"),
        ('standby = ["a b"]', "standby", ["a b"], "names of transports"),
        ('transports = "fastest:tcp"', "transports", "fastest:tcp", "unknown mode 'fastest'"),
        ('listen = "127.0.0.1:0"', "listen", "127.0.0.1:0", "write tcp://host:port"),
        ('listen = "tcp://10.0.0.1:0"', "listen", "tcp://10.0.0.1:0", "pass keys="),
        ('keys = "/nowhere/me.key_secret"', "keys", "/nowhere/me.key_secret", "go together"),
        ('checksum = "on"', "checksum", "on", "choose one of"),
        ("wrokers = 2", "wrokers", 2, r"did you mean workers\?"),
        ("qqq = 2", "qqq", 2, "kvpoll config"),
        ("deadlines = 5", "deadlines", 5, r"give a table: \[deadlines\]"),
        ("[deadlines]\nstal_s = 1", "deadlines.stal_s", 1, r"did you mean .*deadlines\.stall_s"),
        ("[deadlines]\nstall_s = -1", "deadlines.stall_s", -1, "above 0"),
        ("[deadlines]\nheartbeat_s = 9", "deadlines.heartbeat_s", 9, "peer_lost_s"),
        ("[limits]\norphans = 1.5", "limits.orphans", 1.5, "give an integer"),
        ("[limits]\norphans = 0", "limits.orphans", 0, "give a number from 1"),
        ("[transport_options]\ntcp = 1", "transport_options.tcp", 1, r"give a table: \[transport_options.tcp\]"),
        ("[transport_options.tpc]\nx = 1", "transport_options.tpc.x", 1, "settings for: .*tcp"),
    ],
)
def test_the_file_the_key_the_value_and_what_helps_are_named(
    file: Path, text: str, key: str, value: object, problem: str
) -> None:
    error = refused(file, text)
    assert (error.key, error.value) == (key, value)
    assert str(error).startswith(f"file {file}: {key} = {value!r}: ")
    with pytest.raises(ConfigError, match=problem):
        raise error


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("KVPOLL_WORKERS", "two", "give an integer"),
        ("KVPOLL_WORKERS", "65", "give 1 to 64"),
        ("KVPOLL_INSECURE", "yes", "give true or false"),
        ("KVPOLL_CHECKSUM", "on", "give .auto., true or false"),
        ("KVPOLL_MOVER_CPUS", "0,x", "give a list of integers"),
        ("KVPOLL_DEADLINES_STALL_S", "soon", "give a number"),
        ("KVPOLL_DEADLINES_STALL_S", "0", "above 0"),
        ("KVPOLL_TRANSPORTS", "", "names no transport"),
    ],
)
def test_the_variable_the_value_and_what_helps_are_named(name: str, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        resolve({}, None, {name: text})
    assert (caught.value.source, caught.value.key) == ("environment", name)
    assert isinstance(caught.value, InvalidInput)
    assert str(caught.value).startswith(f"environment: {name} = ")


@pytest.mark.parametrize("content", [b"workers = ", b"\xff\xfe", b"x = 1\n" * (1 << 18), b"[" * 100_000])
def test_a_file_that_is_none(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"is not TOML|is longer"):
        resolve({}, file, {})


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match=r"cannot be read: (No such file|Is a directory)"):
            resolve({}, path, {})
        with pytest.raises(ConfigError, match="cannot be read"):
            resolve({}, None, {FILE_VARIABLE: str(path)})


def test_what_is_wrong_in_the_constructor_is_not_blamed_on_others(file: Path) -> None:
    file.write_text("workers = 4")
    with pytest.raises(InvalidInput, match="checksum='on'") as caught:
        resolve({"checksum": "on"}, file, {"KVPOLL_ARRAYS": "numpy"})
    assert not isinstance(caught.value, ConfigError)


def test_of_two_mistakes_one_is_named(file: Path) -> None:
    error = refused(file, 'workers = 0\ntransports = "require:"')
    assert error.key in ("workers", "transports")


def test_a_secret_is_not_shown(file: Path) -> None:
    error = refused(file, '[transport_options.tpc]\npassword = "hunter2"')
    assert error.value == "(hidden)"


# Doing without

NONE_BY_DEFAULT = [key for key, setting in SETTINGS.items() if setting.default is None and key not in PROTECTING]


def test_what_is_empty_is_none_again(file: Path) -> None:
    """Whichever place says so; a stronger one may."""
    file.write_text('advertise = "tcp://h:1"\nmover_cpus = [0]\ntrace = "t"\ncontrol_socket = "auto"')
    empty: dict[str, Any] = {key[0]: () if key[0] == "mover_cpus" else "" for key in NONE_BY_DEFAULT}
    resolved = resolve(empty, file, {})
    assert len(NONE_BY_DEFAULT) == 4
    assert all(resolved.given[key] == Given(None, "constructor") for key in NONE_BY_DEFAULT)
    assert (resolved.config.mover_cpus, resolved.config.advertise) == (None, None)

    file.write_text('mover_cpus = []\ntrace = ""')
    environ = {"KVPOLL_MOVER_CPUS": "0", "KVPOLL_TRACE": "t", "KVPOLL_CONTROL_SOCKET": ""}
    resolved = resolve({}, file, environ)
    assert resolved.given["control_socket",] == Given(None, "variable KVPOLL_CONTROL_SOCKET")
    assert {resolved.given[key,].source for key in ("mover_cpus", "trace")} == {f"file {file}"}
    config = resolved.config
    assert (config.mover_cpus, config.trace, config.control_socket) == (None, None, None)


def test_keys_are_not_taken_away_by_what_is_empty(file: Path) -> None:
    """Neither by a variable that expanded to nothing, nor by the constructor."""
    keys = 'keys = "k"\nauthorized = "a"'
    file.write_text(keys)
    with pytest.raises(InvalidInput, match="is empty"):
        resolve({"keys": "", "authorized": ""}, file, {})
    with pytest.raises(ConfigError, match="is empty"):
        resolve({}, None, {"KVPOLL_KEYS": "", "KVPOLL_AUTHORIZED": ""})
    error = refused(file, 'keys = ""\nauthorized = ""')
    assert (error.key, error.problem[:20]) == ("keys", "keys= or authorized="), error


def test_what_is_not_none_by_default_is_not_so_when_empty(file: Path) -> None:
    file.write_text('standby = ["tcp"]')
    assert resolve({"standby": ()}, file, {}).config.standby == ()
    with pytest.raises(InvalidInput, match="transport policy ''"):
        resolve({"transports": ""}, file, {})


# Variables that are none of ours


def test_unknown_variables_are_told_and_others_left_alone() -> None:
    environ = {"KVPOLL_TEST_X": "1", "HOME": "/", "KVPOLL_TRANSPORT_OPTIONS_XYZ_A": "1", "KVPOLL_": "1"}
    unknown = resolve({}, None, environ).unknown
    assert [line.split()[2] for line in unknown] == ["KVPOLL_TRANSPORT_OPTIONS_XYZ_A", "KVPOLL_"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("5", 5), ("5.5", 5.5), ("true", True), ("[1, 2]", [1, 2]), ('"5"', "5"), ("eth0", "eth0"), ("", ""),
     ("10.0.0.1", "10.0.0.1"), ("1\nother = 2", "1\nother = 2"), ("[" * 5000, "[" * 5000)],
)  # fmt: skip
def test_transports_settings_are_read_as_toml_where_they_are_toml(text: str, value: object) -> None:
    options = resolve({}, None, {"KVPOLL_TRANSPORT_OPTIONS_SHM_X": text}).config.transport_options
    assert options == {"shm": {"x": value}}


@pytest.mark.both
def test_what_was_read_is_not_read_again(isolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPOLL_WORKERS", "3")
    end = Endpoint(pool=pool(4), transports="shm", isolation=isolation)
    monkeypatch.setenv("KVPOLL_WORKERS", "many")
    monkeypatch.setenv(FILE_VARIABLE, "/nowhere")
    with end:
        assert end.load().total == 4
    assert end.config.workers == 3
