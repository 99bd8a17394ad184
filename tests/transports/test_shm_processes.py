"""Peers in processes of their own that are stopped and killed, and what they leave behind."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvpoll_fsm.spi import Done, Failed, LinkDown, Write
from kvpoll_fsm.testing.conformance.sides import HUGE, SIZES, Pair, Side, footprint, until
from kvpoll_shm import ShmTransport
from kvpoll_shm.copying import SLICE_NBYTES
from tests.transports import shm_raw as raw

ARENA_NBYTES = SIZES[0]
CANARY = b"\xc5"


class Child:
    """A process that runs `shm_child.py`."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, str(Path(__file__).with_name("shm_child.py")), *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        words: dict[str, Any] = json.loads(self.process.stdout.readline())
        return words

    def tell(self, **words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def pause(self) -> None:
        """Stop it; no thread of it runs any more on return."""
        self.signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End it in good order, unless it is dead."""
        self.signal(signal.SIGCONT)
        self.process.communicate()


class Receiver(Child):
    """A receiver of one region, whose bytes this process sees too."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(ARENA_NBYTES))
        super().__init__("receiver", str(path))
        offered = self.hear()
        self.descriptor, self.region, self.token = (
            bytes.fromhex(offered[key]) for key in ("descriptor", "region", "token")
        )
        with path.open("r+b") as file:
            self.arena = mmap.mmap(file.fileno(), 0)

    def close(self) -> None:
        super().close()
        self.arena.close()


@pytest.fixture
def tx() -> Iterator[Side]:
    side = Side(ShmTransport(cancel_patience_s=0.1), filled=True)
    yield side
    side.close()


@pytest.fixture
def rx() -> Iterator[Side]:
    side = Side(ShmTransport())
    yield side
    side.close()


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    receiver = Receiver(tmp_path / "arena")
    yield receiver
    receiver.close()


@pytest.fixture
def writer(rx: Side) -> Iterator[Child]:
    child = Child("writer")
    yield child
    child.close()


def ended(tx: Side, *tickets: int) -> list[Done | Failed]:
    tx.until(lambda: tx.ends.keys() >= set(tickets), "the end of the tickets")
    return [tx.ends[ticket] for ticket in tickets]


def arena_maps() -> set[str]:
    """Memory of pools that is mapped here: of other processes, and what earlier tests left to the collector."""
    return {line for line in Path("/proc/self/maps").read_text().splitlines() if "kvpoll-arena" in line}


def sockets(transport: ShmTransport | Side) -> int:
    """Abstract sockets of this name that the system knows."""
    side = transport.transport if isinstance(transport, Side) else transport
    name = raw.read_descriptor(side.descriptor()).socket
    return Path("/proc/net/unix").read_text().count(name)


# The receiver stops or dies


def test_a_paused_receiver_never_gives_done(tx: Side, receiver: Receiver) -> None:
    link = tx.transport.connect(receiver.descriptor, [receiver.region])
    assert ended(tx, link.submit([Write(0, 0, 0, 1)], receiver.token)) == [Done(0)]
    receiver.pause()
    ticket = link.submit([Write(0, 0, 0, 100_000)], receiver.token)
    until(lambda: ticket in link.lane._sent, "the order to be sent")  # type: ignore[attr-defined]
    tx.pump()
    assert ticket not in tx.ends
    assert receiver.arena[1:100_000] == bytes(99_999)
    receiver.signal(signal.SIGCONT)
    assert ended(tx, ticket) == [Done(ticket)]
    assert receiver.arena[:100_000] == tx.arenas[0][:100_000]


def test_cancelled_tickets_end_although_the_receiver_is_paused(tx: Side, receiver: Receiver) -> None:
    link = tx.transport.connect(receiver.descriptor, [receiver.region])
    ended(tx, link.submit([Write(0, 0, 0, 1)], receiver.token))
    receiver.pause()
    tickets = [link.submit(HUGE, receiver.token) for _ in range(3)]
    until(lambda: link.lane._sent == set(tickets), "the orders to be sent")  # type: ignore[attr-defined]
    for ticket in tickets:
        link.cancel(ticket)
    for end in ended(tx, *tickets):
        assert isinstance(end, Failed)
        assert (end.quiescent, end.source_free) == (False, True)
    receiver.signal(signal.SIGCONT)
    tx.until(lambda: tx.quiesced == set(tickets), "the receiver's word")
    assert ended(tx, link.submit([Write(0, 7, 0, 1000)], receiver.token)) == [Done(4)]


def test_close_is_not_held_up_by_a_paused_receiver(receiver: Receiver) -> None:
    tx = Side(ShmTransport(cancel_patience_s=0.1), filled=True)
    link = tx.transport.connect(receiver.descriptor, [receiver.region])
    ended(tx, link.submit([Write(0, 0, 0, 1)], receiver.token))
    receiver.pause()
    tickets = [link.submit(HUGE, receiver.token) for _ in range(2)]
    tx.close()
    assert tx.ends.keys() >= set(tickets)


def test_a_killed_receiver_fails_its_tickets_for_good(tx: Side, receiver: Receiver) -> None:
    before = footprint()
    link = tx.transport.connect(receiver.descriptor, [receiver.region])
    ended(tx, link.submit([Write(0, 0, 0, 1)], receiver.token))
    receiver.pause()  # so that it dies with the tickets at hand
    tickets = [link.submit(HUGE, receiver.token) for _ in range(3)]
    until(lambda: link.lane._sent == set(tickets), "the orders to be sent")  # type: ignore[attr-defined]
    receiver.kill()
    assert all(isinstance(end, Failed) and end.quiescent for end in ended(tx, *tickets))
    assert footprint() == before
    late = link.submit([Write(0, 0, 0, 1)], receiver.token)
    assert isinstance(ended(tx, late)[0], Failed)
    assert any("refused" in seen.reason for seen in tx.seen if isinstance(seen, LinkDown))
    name = raw.read_descriptor(receiver.descriptor).socket
    assert name not in Path("/proc/net/unix").read_text()


# The writer stops or dies


def start(writer: Child, rx: Side, token: bytes) -> None:
    writer.tell(descriptor=rx.transport.descriptor().hex(), token=token.hex(), nbytes=ARENA_NBYTES)
    assert writer.hear() == {"submitted": 4}


def lease_to_somebody_else(rx: Side, token: bytes, gate: raw.Gate) -> None:
    """Fence, and paint the memory once that is said to be over."""
    fence = rx.transport.fence(token)
    rx.pump()
    assert rx.fenced == []  # a copy is at work
    gate.opened.set()
    rx.until(lambda: rx.fenced == [fence], "the fence")
    rx.arenas[0][:] = CANARY * len(rx.arenas[0])


def test_a_killed_writer_writes_nothing_behind_a_fence(
    rx: Side, writer: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, token = raw.Gate(monkeypatch, at=1), rx.grant()
    before, mapped = footprint(), arena_maps()
    start(writer, rx, token)
    assert gate.reached.wait(20)
    assert rx.arenas[0][:SLICE_NBYTES] == b"\xaa" * SLICE_NBYTES
    assert arena_maps() - mapped
    writer.kill()
    lease_to_somebody_else(rx, token, gate)
    until(lambda: not arena_maps() - mapped, "its memory to be let go of")
    assert rx.arenas[0][:] == CANARY * ARENA_NBYTES
    until(lambda: footprint() == before, "the end of its connection")


def test_a_stopped_writer_writes_nothing_behind_a_fence_and_cannot_hold_it_up(
    rx: Side, writer: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, token = raw.Gate(monkeypatch, at=1), rx.grant()
    start(writer, rx, token)
    assert gate.reached.wait(20)
    writer.pause()
    lease_to_somebody_else(rx, token, gate)
    writer.signal(signal.SIGCONT)
    assert writer.hear()["ended"]
    rx.transport.fence(token)
    assert rx.arenas[0][:] == CANARY * ARENA_NBYTES


def test_a_writer_that_goes_before_the_end_of_the_handshake_is_forgotten(rx: Side) -> None:
    caller = raw.Caller(rx.transport)
    caller.prove()
    caller.close()
    until(lambda: not rx.transport._listener.door.known, "its end")  # type: ignore[attr-defined]


def test_nothing_is_left_in_the_file_system(tx: Side, receiver: Receiver) -> None:
    link = tx.transport.connect(receiver.descriptor, [receiver.region])
    ended(tx, link.submit([Write(0, 0, 0, 1)], receiver.token))
    name = raw.read_descriptor(receiver.descriptor).socket
    receiver.kill()
    places = ("/dev/shm", "/tmp", os.environ.get("XDG_RUNTIME_DIR", "/run"))
    left = [entry for place in places for entry in os.listdir(place)]
    assert not [entry for entry in left if name in entry or "kvpoll-arena" in entry]
    assert name not in Path("/proc/net/unix").read_text()
    assert sockets(tx) == 1


# Other users, programs and forks


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_another_user_gets_nowhere(rx: Side) -> None:
    program = (
        "import os, socket, sys; os.setuid(65534)\n"
        "sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); sock.connect('\\0' + sys.argv[1])\n"
        "try: print(sock.recv(100))\n"
        "except ConnectionResetError: print(b'')\n"
    )
    name = raw.read_descriptor(rx.transport.descriptor()).socket
    ran = subprocess.run([sys.executable, "-I", "-S", "-c", program, name], capture_output=True, text=True, timeout=30)
    assert (ran.stdout, ran.stderr) == ("b''\n", "")
    assert rx.transport.refused() == {"another user": 1}  # type: ignore[attr-defined]


def test_a_program_that_forgets_to_close_ends_all_the_same() -> None:
    program = (
        "import atexit, threading; from kvpoll_shm import ShmTransport\n"
        "atexit.register(lambda: print('left at the end:', threading.active_count()))\n"
        "from kvpoll_fsm.segment import Segment; from kvpoll_fsm.spi import Region\n"
        "a, b, s = ShmTransport(), ShmTransport(), Segment(4096); a.start(); b.start()\n"
        "a.register(Region(0, s.buffer, s.fd))\n"
        "link = a.connect(b.descriptor(), [])\n"
        "while not (news := a.completions()): pass\n"
        "print(type(news[0]).__name__)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "LinkUp\nleft at the end: 1\n", "")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_leaves_the_connections_alone(tx: Side, rx: Side) -> None:
    pair = Pair(tx, rx)
    link = tx.connect(rx)
    pair.up(link)
    child = os.fork()
    if child == 0:
        tx.transport.close()
        rx.transport.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    pair.done(link.submit([Write(0, 0, 0, 10)], rx.grant()))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_does_not_keep_a_connection_open(tx: Side, rx: Side) -> None:
    pair = Pair(tx, rx)
    link = tx.connect(rx)
    pair.up(link)
    wait, done = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(wait, 1)
        os._exit(0)
    rx.transport.close()
    pair.tx.until(lambda: pair.tx.links[link.number][-1] is False, "the end of the connection")
    os.write(done, b"x")
    os.waitpid(child, 0)
    os.close(wait)
    os.close(done)
