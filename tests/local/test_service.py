"""The control socket of a running endpoint."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from kvpoll_fsm import Endpoint, InvalidInput
from kvpoll_fsm.local.client import Refused, ask
from kvpoll_fsm.local.places import is_dead
from kvpoll_fsm.local.words import Report, Status, Switch
from tests.helpers import SOON_S, endpoint, on_driver, open_pair, pair, transfer, until
from tests.mover.movers import kill


def socket_of(end: Endpoint) -> Path:
    path = end.control_socket
    assert path is not None
    return path


def said(path: Path, line: bytes) -> dict[str, Any]:
    """The answer to a line as it comes."""
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(SOON_S)
        caller.connect(str(path))
        caller.sendall(line)
        answer: dict[str, Any] = json.loads(caller.makefile("rb").readline())
    return answer


@pytest.mark.both
def test_switch_report_and_status(isolation: str, tmp_path: Path) -> None:
    settings = {"standby": ("tcp",), "control_socket": tmp_path / "socket"}
    with pair("shm", tx=settings, rx={"standby": ("tcp",)}) as (tx, rx):
        path = socket_of(tx)
        before = ask(path, Status())
        assert (before["policy"], before["usable"], before["endpoint"]) == (
            "require:shm",
            ["shm", "tcp"],
            str(tx.address),
        )
        assert os.getpid() == before["pid" if isolation == "thread" else "parent_pid"]
        assert before["load"]["total"] == tx.load().total
        transfer(tx, rx, 1)
        after = ask(path, Switch("tcp", 0.25))
        assert (after["policy"], after["canary"], after["share"]) == ("require:shm", "require:tcp", 0.25)
        assert ask(path, Switch("tcp"))["policy"] == tx.transports().policy == "require:tcp"
        transfer(tx, rx, 2)
        report = ask(path, Report())
        assert {name: row["succeeded"] for name, row in report["sent"].items()} == {"shm": 1, "tcp": 1}
        assert {name: row["parts"] for name, row in rx.report()["received"].items()} == {"shm": 2, "tcp": 2}
        assert tx.report()["sent"] == report["sent"]
    assert not path.exists()


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b'{"do":"switch","policy":"memory"}', "TransportUnavailable"),
        (b'{"do":"switch","policy":"fastest:shm"}', "PolicyError"),
        (b'{"do":"switch","policy":"shm","canary":2}', "InvalidInput"),
        (b'{"do":"switch","policy":7}', "ValidationError"),
        (b'{"do":"switch"}', "ValidationError"),
        (b'{"do":"switch","policy":"shm","now":true}', "ValidationError"),
        (b'{"do":"close"}', "ValidationError"),
        (b"{}", "ValidationError"),
        (b"", "DecodeError"),
        (b"\xff\x00", "DecodeError"),
        (b'{"do":"\xf2("}', "UnicodeDecodeError"),
        (b"[" * 4000, "ValidationError"),
    ],
)
def test_what_cannot_be_done_is_answered(end: Endpoint, line: bytes, error: str) -> None:
    answer = said(socket_of(end), line + b"\n")
    assert (answer["ok"], answer["error"]) == (False, error)
    assert answer["detail"]
    assert end.transports().policy == "require:shm"


@pytest.fixture(scope="module")
def end(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("control") / "socket"
    with endpoint("shm", isolation="thread", control_socket=path) as end:
        yield end


def test_a_bug_of_ours_is_answered_too(end: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end.driver.requests, "report", lambda: 1 / 0)
    with pytest.raises(Refused, match="division by zero"):
        ask(socket_of(end), Report())
    monkeypatch.undo()
    assert ask(socket_of(end), Report())["live"] == 0


@pytest.mark.both
def test_callers_who_misbehave_hold_no_room_up(isolation: str, tmp_path: Path) -> None:
    with pair("shm", tx={"control_socket": tmp_path / "socket"}) as (tx, rx):
        path, callers = socket_of(tx), []
        for number in range(30):
            caller = socket.socket(socket.AF_UNIX)
            caller.connect(str(path))
            caller.sendall((b"", b"x" * 5000, b'{"do":"report"}\n')[number % 3])
            callers.append(caller)
            transfer(tx, rx, number)
        assert ask(path, Status())["load"]["leased"] == 0
        for caller in callers:
            caller.close()


def test_another_mover_listens_at_the_same_place(tmp_path: Path) -> None:
    with endpoint("shm", isolation="process", standby=("tcp",), control_socket=tmp_path / "socket") as end:
        ask(socket_of(end), Switch("tcp"))
        kill(end)
        status = ask(socket_of(end), Status())
        assert status["policy"] == "require:tcp", "what came over the socket is kept, too"


@pytest.mark.both
def test_auto_is_a_place_of_its_own(isolation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with endpoint("shm", control_socket="auto") as one, endpoint("shm", control_socket="auto") as two:
        assert {socket_of(one).parent, socket_of(two).parent} == {tmp_path / "kvpoll"}
        assert ask(socket_of(one), Status())["endpoint"] == str(one.address)
        assert ask(socket_of(two), Status())["endpoint"] == str(two.address)
    assert list((tmp_path / "kvpoll").iterdir()) == []


def test_without_it_there_is_none() -> None:
    with endpoint("shm", isolation="thread") as end:
        assert end.control_socket is None


def test_an_endpoint_whose_socket_cannot_be_made_does_not_start(tmp_path: Path) -> None:
    for isolation in ("thread", "process"):
        end = endpoint("shm", isolation=isolation, control_socket=tmp_path / "none" / "socket")
        with pytest.raises(InvalidInput, match=r"control_socket=.*No such file"):
            end.start()


def test_a_forked_child_does_not_keep_it(tmp_path: Path) -> None:
    end = endpoint("shm", isolation="thread", control_socket=tmp_path / "socket").start()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    os.close(read)
    path = socket_of(end)
    listener = end.driver._console._listener
    assert listener is not None
    on_driver(end, listener.close)  # as at the death of this process: nothing is tidied up
    until(lambda: is_dead(path), "nobody has it any more")
    os.close(write)
    os.waitpid(child, 0)
    end.close()


def test_open_rooms_are_counted(end: Endpoint) -> None:
    with endpoint("shm", isolation="thread") as rx:
        sender, receiver = open_pair(end, rx, 5)
        assert ask(socket_of(end), Report())["live"] == 1
        sender.clear()
        receiver.clear()
        until(lambda: ask(socket_of(end), Report())["live"] == 0)
        sent = ask(socket_of(end), Report())["sent"]  # under shm or "none": had it come that far?
        assert [each["failures"] for each in sent.values() if each["failures"]] == [{"Aborted": 1}]


@pytest.mark.parametrize("breaker", ["open", "half-open"])
def test_breakers_that_are_not_closed_are_shown(tmp_path: Path, breaker: str) -> None:
    with pair("shm", isolation="thread", rx={"control_socket": tmp_path / "socket"}) as (tx, rx):
        transfer(tx, rx, 1)
        assert ask(socket_of(rx), Status())["breakers"] == []
        core = rx.driver.core

        def fail() -> None:
            (conn,) = core.connections
            core.breakers._open((conn, "shm"), "it hung")
            core.breakers.of(conn)["shm"].half_open = breaker == "half-open"

        on_driver(rx, fail)
        (shown,) = ask(socket_of(rx), Status())["breakers"]
    assert shown == {"peer": str(tx.address), "transport": "shm", "state": breaker, "cause": "it hung"}
