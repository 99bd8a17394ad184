"""Peers that are stopped, killed and started again."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvpoll_fsm.spi import Done, Failed, Link, LinkDown, Write
from kvpoll_fsm.testing.conformance.sides import HUGE, MIB, SIZES, Pair, Side, until
from kvpoll_tcp import TcpTransport, inbox, wire
from kvpoll_tcp.receiver import Reader
from tests.transports import raw

ARENA_NBYTES = SIZES[0]
CANARY = b"\xc5"


class Child:
    """A process that runs `child.py`."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, str(Path(__file__).with_name("child.py")), *arguments]
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

    def __init__(self, path: Path, port: int = 0) -> None:
        path.write_bytes(bytes(ARENA_NBYTES))
        super().__init__("receiver", str(path), str(port))
        offered = self.hear()
        self.descriptor, self.region, self.token = (
            bytes.fromhex(offered[key]) for key in ("descriptor", "region", "token")
        )
        self.port = int(raw.read_descriptor(self.descriptor)["port"])
        with path.open("r+b") as file:
            self.arena = mmap.mmap(file.fileno(), 0)

    def waiting_nbytes(self) -> int:
        return waiting_nbytes(self.port)

    def close(self) -> None:
        super().close()
        self.arena.close()


def waiting_nbytes(port: int) -> int:
    """Bytes in the kernel's receive buffers of a port's connections, which nobody has read yet."""
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    return sum(
        int(row[4].split(":")[1], 16) for row in rows if int(row[1].split(":")[1], 16) == port and row[3] != "0A"
    )


def connect(tx: Side, receiver: Receiver) -> Link:
    return tx.transport.connect(receiver.descriptor, [receiver.region])


@pytest.fixture
def tx() -> Iterator[Side]:
    side = Side(TcpTransport(cancel_patience_s=0.2), filled=True)
    yield side
    side.close()


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    receiver = Receiver(tmp_path / "arena")
    yield receiver
    receiver.close()


def ended(tx: Side, *tickets: int) -> list[Done | Failed]:
    tx.until(lambda: tx.ends.keys() >= set(tickets), "the end of the tickets")
    return [tx.ends[ticket] for ticket in tickets]


def test_a_paused_receiver_never_gives_done(tx: Side, receiver: Receiver) -> None:
    link = connect(tx, receiver)
    ended(tx, link.submit([Write(0, 0, 0, 1)], receiver.token))
    receiver.pause()
    ticket = link.submit([Write(0, 0, 0, 100_000)], receiver.token)
    # All of it is with the receiver's kernel, which has told ours so; a transport that trusts that is wrong.
    until(lambda: receiver.waiting_nbytes() >= 100_000, "the bytes to reach the receiver's kernel")
    tx.pump()
    assert ticket not in tx.ends
    assert receiver.arena[1:100_000] == bytes(99_999)
    receiver.signal(signal.SIGCONT)
    assert ended(tx, ticket) == [Done(ticket)]
    assert receiver.arena[:100_000] == tx.arenas[0][:100_000]


def test_cancelled_tickets_end_although_the_receiver_is_paused(tx: Side, receiver: Receiver) -> None:
    link = connect(tx, receiver)
    ended(tx, link.submit([Write(0, 0, 0, 1)], receiver.token))
    receiver.pause()
    tickets = [link.submit(HUGE, receiver.token) for _ in range(3)]
    until(lambda: receiver.waiting_nbytes() > 0, "the first bytes")
    link.cancel(tickets[2])
    (never_sent,) = ended(tx, tickets[2])
    assert never_sent == Failed(tickets[2], "cancelled", quiescent=True)
    link.cancel(tickets[0])
    first, second = ended(tx, *tickets[:2])
    assert first == Failed(tickets[0], "cancelled", quiescent=False, source_free=True)
    assert isinstance(second, Failed)
    assert second.quiescent  # nothing of it had left
    tx.until(lambda: tx.links[link.number] == [True, False], "the news")
    receiver.signal(signal.SIGCONT)
    again = link.submit([Write(0, 7, 0, 1000)], receiver.token)
    assert ended(tx, again) == [Done(again)]
    assert tx.links[link.number] == [True, False, True]


def test_a_cancelled_ticket_that_waits_for_its_answer_ends_too(tx: Side, receiver: Receiver) -> None:
    link = connect(tx, receiver)
    ended(tx, link.submit([Write(0, 0, 0, 1)], receiver.token))
    receiver.pause()
    ticket = link.submit([Write(0, 0, 0, 1000)], receiver.token)
    until(lambda: receiver.waiting_nbytes() >= 1000, "the bytes to reach the receiver's kernel")
    link.cancel(ticket)
    assert ended(tx, ticket) == [Failed(ticket, "cancelled", quiescent=False, source_free=True)]


def test_close_is_not_held_up_by_a_paused_receiver(receiver: Receiver) -> None:
    tx = Side(TcpTransport(), filled=True)
    link = connect(tx, receiver)
    ended(tx, link.submit([Write(0, 0, 0, 1)], receiver.token))
    receiver.pause()
    tickets = [link.submit(HUGE, receiver.token) for _ in range(2)]
    until(lambda: receiver.waiting_nbytes() > 0, "the first bytes")
    tx.close()
    assert [tx.ends[ticket].quiescent for ticket in tickets] == [False, True]  # type: ignore[union-attr]


def test_a_killed_receiver_fails_its_tickets_and_a_new_one_is_told_apart(
    tx: Side, receiver: Receiver, tmp_path: Path
) -> None:
    link = connect(tx, receiver)
    receiver.pause()  # so that it dies with the ticket at hand
    ticket = link.submit(HUGE, receiver.token)
    until(lambda: receiver.waiting_nbytes() > 0, "the first bytes")
    receiver.kill()
    (end,) = ended(tx, ticket)
    assert isinstance(end, Failed)
    again = Receiver(tmp_path / "second", receiver.port)
    late = link.submit([Write(0, 0, 0, 100)], receiver.token)
    assert isinstance(ended(tx, late)[0], Failed)
    assert any("restarted" in seen.reason for seen in tx.seen if isinstance(seen, LinkDown))
    fresh = connect(tx, again)
    ticket = fresh.submit([Write(0, 0, 0, 100)], again.token)
    assert ended(tx, ticket) == [Done(ticket)]
    assert again.arena[:100] == tx.arenas[0][:100]
    again.close()


class Gate:
    """Holds the receiver's reading thread where a test wants it."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def wait(self) -> None:
        self.reached.set()
        assert self.opened.wait(20)


@pytest.fixture
def rx() -> Iterator[Side]:
    side = Side(TcpTransport(buffer_nbytes=4 * MIB))
    yield side
    side.close()


def start_writer(rx: Side, token: bytes) -> Child:
    writer = Child("writer")
    writer.tell(descriptor=rx.transport.descriptor().hex(), token=token.hex(), buffer_nbytes=4 * MIB)
    writer.hear()
    return writer


def kill_with_bytes_on_their_way(rx: Side, writer: Child, gate: Gate) -> None:
    assert gate.reached.wait(20)
    port = int(raw.read_descriptor(rx.transport.descriptor())["port"])
    until(lambda: waiting_nbytes(port) >= MIB, "a MiB in the kernel's buffers")
    writer.kill()
    assert waiting_nbytes(port) >= MIB


def paint_and_wait_for_the_reader(rx: Side, gate: Gate) -> None:
    """Lease the memory to somebody else; then let the reader see what the dead writer left."""
    rx.arenas[0][:] = CANARY * len(rx.arenas[0])
    gate.opened.set()
    until(lambda: not any("read-" in thread.name for thread in threading.enumerate()), "the reader's end")
    assert rx.arenas[0][:] == CANARY * len(rx.arenas[0])


def test_bytes_of_a_killed_writer_do_not_land_behind_a_fence(rx: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, land = Gate(), Reader._land

    def held(self: Reader, *arguments: Any) -> Any:
        gate.wait()
        return land(self, *arguments)

    monkeypatch.setattr(Reader, "_land", held)
    token = rx.grant()
    writer = start_writer(rx, token)
    kill_with_bytes_on_their_way(rx, writer, gate)
    fence = rx.transport.fence(token)
    rx.pump()
    assert rx.fenced == [fence]
    paint_and_wait_for_the_reader(rx, gate)
    writer.close()


def test_a_frame_that_was_half_read_does_not_land_behind_a_fence(rx: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, receive = Gate(), Reader._receive

    def in_the_middle(self: Reader, views: list[memoryview]) -> int:
        got = receive(self, [views[0][:1000]])
        gate.wait()
        return got

    monkeypatch.setattr(inbox, "INBOX_NBYTES", wire.HEAD_NBYTES + wire.ENTRY_NBYTES)  # no more than the head
    monkeypatch.setattr(Reader, "_receive", in_the_middle)
    token = rx.grant()
    writer = start_writer(rx, token)
    kill_with_bytes_on_their_way(rx, writer, gate)
    assert rx.arenas[0][:1001] == b"\xaa" * 1000 + b"\0"
    fence = rx.transport.fence(token)
    rx.pump()
    assert rx.fenced == []  # the reader may still write, as far as anybody knows
    gate.opened.set()
    rx.until(lambda: rx.fenced == [fence], "the fence")
    paint_and_wait_for_the_reader(rx, gate)
    writer.close()


def test_a_program_that_forgets_to_close_ends_all_the_same() -> None:
    program = (
        "import atexit, threading; from kvpoll_tcp import TcpTransport\n"
        "atexit.register(lambda: print('left at the end:', threading.active_count()))\n"
        "a, b = TcpTransport(), TcpTransport(); a.start(); b.start()\n"
        "link = a.connect(b.descriptor(), [])\n"
        "while not a.completions(): pass\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "left at the end: 1\n", "")


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
