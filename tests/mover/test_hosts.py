"""Hosts of every kind, and how they end: the mover tells peers and is gone, whatever its host did."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvpoll_fsm import Endpoint, FailureCode, KVPoll, Sender
from tests.helpers import SOON_S, failed, make_data, pool, run_script, until
from tests.mover.movers import LOSABLE, away, moved

ROOT = Path(__file__).resolve().parents[2]

HOST = """
import os, sys, threading, time
from tests.helpers import failed, make_data, pool, same
from tests.mover.movers import LOSABLE, moved, pid
rx = moved(deadlines=LOSABLE, pool=pool(512)).start()
receiver = rx.receiver(1, peer=sys.argv[1], tokens=4096)
print(os.getpid(), pid(rx), flush=True)
"""


@pytest.fixture
def tx() -> Iterator[Endpoint]:
    with moved(deadlines=LOSABLE, pool=pool(512)) as made:
        yield made


class Hosted:
    """A host with one receiver's room of `tx`, which waits for input."""

    def __init__(self, tx: Endpoint, then: str) -> None:
        self.sender: Sender = tx.sender(1, required_ranks=1)
        command = [sys.executable, "-W", "error", "-W", "ignore:.*fork.*:DeprecationWarning", "-c", HOST + then]
        self.process = subprocess.Popen(
            [*command, str(tx.address)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.pid, self.mover = map(int, self.process.stdout.readline().split())
        until(lambda: self.sender.poll() is KVPoll.WaitingForInput)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=3 * SOON_S)
        until(lambda: away(self.mover), "the mover's end")
        return self.process.returncode, errors


ENDS = {
    "returns from main": "input()",
    "sys.exit": "input(); sys.exit(3)",
    "os._exit": "input(); os._exit(4)",
    "raises": "input(); raise LookupError('of the host')",
    "exits by SIGKILL": "import signal; input(); os.kill(os.getpid(), signal.SIGKILL)",
    "has a child that lives on": """
import signal
child = os.fork()
if not child:
    signal.pause()
print(child, flush=True)
input()
os.kill(os.getpid(), signal.SIGKILL)
""",
}


@pytest.mark.parametrize("end", ENDS)
def test_the_peer_is_told_and_nothing_is_left(tx: Endpoint, end: str) -> None:
    host = Hosted(tx, ENDS[end])
    child = int(host.line()) if "child" in end else 0
    host.tell("go")
    failure = failed(host.sender)
    until(lambda: away(host.mover), "the mover's end")
    if child:
        assert not away(child)
        os.kill(child, signal.SIGKILL)
    _, errors = host.end()
    orderly = "KILL" not in end and "child" not in end and end != "os._exit"
    assert failure.code is (FailureCode.Aborted if orderly else FailureCode.PeerLost), failure
    assert failure.detail == ("the endpoint was closed" if orderly else "the host process is gone")
    assert host.sender.wait_quiescent(SOON_S)
    assert errors.count("Traceback") == (1 if end == "raises" else 0), errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_to_all_are_the_hosts_to_decide_on(tx: Endpoint, number: signal.Signals) -> None:
    then = f"""
import signal
signal.signal({int(number)}, lambda *_: print("heard", flush=True))
print("ready", flush=True)
input()
assert rx.load().total == 512
assert same(receiver.result(20), make_data(100))
rx.close()
"""
    host = Hosted(tx, then)
    assert host.line() == "ready"
    os.killpg(host.pid, number)
    assert host.line() == "heard"
    assert not away(host.mover)
    host.sender.send(make_data(100))
    host.tell("go")
    assert host.end() == (0, "")
    assert host.sender.wait(SOON_S) is KVPoll.Success


def test_a_stopped_host_does_not_stop_the_room(tx: Endpoint) -> None:
    """Its mover goes on, for as long as no input of the host is needed; the host finds its data when it goes on."""
    host = Hosted(tx, "input(); assert same(receiver.result(20), make_data(60_000)); rx.close()")
    os.kill(host.pid, signal.SIGSTOP)
    host.sender.send(make_data(60_000))
    assert host.sender.wait(3 * SOON_S) is KVPoll.Success
    os.kill(host.pid, signal.SIGCONT)
    host.tell("go")
    assert host.end() == (0, "")


def test_a_host_that_never_lets_go_does_not_stop_the_room(tx: Endpoint) -> None:
    then = """
sys.setswitchinterval(1.0)
while not receiver.poll().is_terminal:
    sum(range(1000))
assert same(receiver.result(20), make_data(60_000))
rx.close()
"""
    host = Hosted(tx, then)
    host.sender.send(make_data(60_000))
    assert host.sender.wait(3 * SOON_S) is KVPoll.Success
    assert host.end() == (0, "")


FORKED = """
import multiprocessing as mp
from kvpoll_fsm import ForkedError
def child():
    refused = 0
    for use in (receiver.poll, receiver.abort, receiver.clear, rx.load, rx.is_idle, rx.dump, lambda: rx.sender(9),
                lambda: rx.receiver(9, peer=sys.argv[1]), lambda: receiver.result(1), lambda: receiver.history,
                lambda: receiver.gate, lambda: receiver.parts, lambda: receiver.bytes_done, lambda: receiver.failure):
        try:
            use()
        except ForkedError:
            refused += 1
    rx.close()
    assert repr(receiver) == "<Receiver room=1 rank=0 of another process>"
    print("refused", refused, flush=True)
ctx = mp.get_context("fork")
for leave in (child, lambda: (child(), os._exit(0))):
    process = ctx.Process(target=leave)
    process.start()
    process.join()
    assert process.exitcode == 0
input()
assert same(receiver.result(20), make_data(100))
rx.close()
"""


def test_forked_children_are_refused_and_harm_nothing(tx: Endpoint) -> None:
    host = Hosted(tx, FORKED)
    assert [host.line(), host.line()] == ["refused 14"] * 2
    host.sender.send(make_data(100))
    host.tell("go")
    assert host.end() == (0, "")


# Where a host may be

WORK = """
from kvpoll_fsm import BlockPool, Endpoint, Field, Layout
import numpy as np
pool = lambda: BlockPool(Layout(16, [Field("x", "int32")]), blocks=8)
def work(**settings):
    with Endpoint(pool=pool(), isolation="process", **settings) as tx, Endpoint(pool=pool(), isolation="process") as rx:
        tx.sender(1, required_ranks=1).send({"x": np.arange(100, dtype="i4")})
        assert rx.receiver(1, peer=tx.address).result(20)["x"].tolist() == list(range(100))
    print("fine", flush=True)
"""

PLACES = {
    "the main module": "work()",
    "a thread": "import threading; t = threading.Thread(target=work); t.start(); t.join()",
    "a daemon process": """
import multiprocessing as mp
p = mp.get_context("fork").Process(target=work, daemon=True)
p.start(); p.join(); assert p.exitcode == 0
""",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_host_may_be(place: str) -> None:
    done = run_script(WORK + PLACES[place])
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


def _python(*args: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **more}
    command = [sys.executable, *args]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=50, check=False)


def test_a_script_without_a_guard(tmp_path: Path) -> None:
    """Beside files that are named like modules of the standard library, which only the script itself would find."""
    (tmp_path / "script.py").write_text(WORK + "import sys; sys.path.remove(sys.path[0]); work()")
    for name in ("socket", "logging", "selectors", "numpy", "zmq", "msgspec"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not meant')")
    source = "import sys; del sys.path[0]\n" + WORK + "work()"
    (tmp_path / "script.py").write_text(source)
    done = _python("script.py", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


def test_a_prompt(tmp_path: Path) -> None:
    typed = WORK.strip() + "\n\nwork()\nexit()\n"
    done = subprocess.run(
        [sys.executable, "-i", "-q"], input=typed, cwd=tmp_path, capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "fine" in done.stdout, done.stderr


def test_a_trace_of_a_relative_path(tmp_path: Path) -> None:
    done = _python("-c", WORK + "work(trace='room.trace')", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")
    assert (tmp_path / "room.trace").stat().st_size


def test_a_transport_that_only_this_host_finds(tmp_path: Path) -> None:
    """Its folder came into `sys.path` after the start."""
    plugin = tmp_path / "plugins"
    info = plugin / "other-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvpoll_fsm.transports]\nother = other_transport:OtherTransport\n")
    (plugin / "other_transport.py").write_text(
        "from kvpoll_tcp import TcpTransport\nclass OtherTransport(TcpTransport):\n    name = 'other'\n"
    )
    then = f"""
import sys; sys.path.append({str(plugin)!r})
with Endpoint(pool=pool(), transports="other", isolation="process") as tx:
    tx.load()
    print("fine")
"""
    done = _python("-c", WORK + then, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr
