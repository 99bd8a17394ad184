from __future__ import annotations

import gc
import hashlib
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

import kvpoll_fsm.driver
import kvpoll_fsm.incoming
import kvpoll_fsm.outgoing
import kvpoll_fsm.session
from kvpoll_fsm import BlockError, Endpoint, EndpointClosed, FailureCode, InvalidInput, KVPoll, TransportUnavailable
from kvpoll_fsm.commands import Expose, Preflight
from kvpoll_fsm.connection import introduction
from kvpoll_fsm.driver import POLL_INTERVAL_S
from kvpoll_fsm.messages import Hello, TransportOffer, encode
from kvpoll_fsm.staging import stage
from kvpoll_memory import Faults, MemoryTransport
from tests.helpers import (
    LAYOUT,
    SOON_S,
    TRANSPORTS,
    deadlines,
    driver_stopped,
    endpoint,
    failed,
    make_data,
    on_driver,
    open_fds,
    open_pair,
    pair,
    pool,
    run_script,
    same,
    transfer,
    until,
)

W, S = KVPoll.WaitingForInput, KVPoll.Success


@contextmanager
def nothing_left() -> Iterator[None]:
    """No thread and no open file is left of what happens inside, but what pools and rooms have in memory."""
    gc.collect()
    threads, fds = set(threading.enumerate()), open_fds()
    yield
    assert set(threading.enumerate()) <= threads
    assert {fd for fd in open_fds() - fds if "kvpoll-" not in fd} == set()


# Start and end


@pytest.mark.inside
@pytest.mark.parametrize("transport", [*TRANSPORTS, "prefer:memory,tcp"])
def test_close_leaves_no_thread_no_file_and_no_socket(transport: str) -> None:
    with nothing_left(), pair(transport) as (tx, rx):
        names = {thread.name.rstrip("0123456789.-_") for thread in threading.enumerate()}
        assert "kvpoll-driver" in names
        transfer(tx, rx, 1)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("first", ["tx", "rx"])
def test_close_with_live_rooms_tells_peers_and_leaves_nothing(transport: str, first: str) -> None:
    with nothing_left(), pair(transport) as (tx, rx):
        handles: list[Any] = []
        for room in range(4):
            sender, receiver = open_pair(tx, rx, room, tokens=16)
            handles += [sender, receiver]
            if room % 2:
                sender.send(make_data(10_000))
        waiting = handles[:2]
        until(lambda: all(handle.poll() is W for handle in waiting))
        until(lambda: KVPoll.Bootstrapping not in [handle.poll() for handle in handles])  # each is known there
        (tx if first == "tx" else rx).close()
        for handle in handles:
            failure = failed(handle)
            assert failure.code is FailureCode.Aborted, failure
            assert failure.detail == "the endpoint was closed"
            assert handle.wait_quiescent(SOON_S)


def test_close_with_a_write_that_hangs() -> None:
    faults = Faults()
    faults.hold()
    with nothing_left(), pair(faults=faults) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(make_data(10))
        until(lambda: faults.submitted)
        tx.close()
        assert failed(sender).code is FailureCode.Aborted
        assert sender.wait_quiescent(0)
        assert failed(receiver).code is FailureCode.Aborted


def test_close_with_a_transport_that_never_ends_a_ticket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers are given `FLUSH_S`; then the transport is closed, and what it read is free."""
    monkeypatch.setattr(kvpoll_fsm.driver, "FLUSH_S", 0.1)
    with nothing_left(), pair() as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        until(lambda: receiver.poll() is W)
        on_driver(tx, lambda: monkeypatch.setattr(tx.driver.transports["memory"], "completions", list))
        sender.send(make_data(10))
        with driver_stopped(rx):  # and its peer acknowledges nothing
            tx.close()
            assert failed(sender).code is FailureCode.Aborted
            assert sender.wait_quiescent(0)
        assert failed(receiver).code in (FailureCode.Aborted, FailureCode.PeerLost)


def test_close_with_a_worker_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can say what it will do, should it ever move: what it was given is given to nobody else."""
    go_on = threading.Event()
    monkeypatch.setattr(kvpoll_fsm.outgoing, "stage", lambda *_: go_on.wait())
    monkeypatch.setattr("kvpoll_fsm.workers.HUNG_S", 0.1)
    monkeypatch.setattr("kvpoll_fsm.jobs.SMALL_NBYTES", 0)
    with pair() as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(make_data(64))
        until(lambda: sender.poll() is W and tx.load().leased)
        waiting = threading.Thread(target=sender.wait_quiescent)
        waiting.start()
        workers, ours = tx.driver._workers, tx.pool
        tx.close()
        waiting.join()
        assert failed(sender).detail == "the endpoint was closed"
        assert not sender.wait_quiescent()
        assert receiver.wait_quiescent(SOON_S)
        with pytest.raises(BlockError, match="another endpoint uses this pool"):
            endpoint(pool=ours).start()
        go_on.set()
        assert workers.close()


def test_a_burst_of_requests_keeps_no_timer_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvpoll_fsm.driver, "TURN_S", 0)
    seen: list[str] = []
    with pair() as (tx, _):
        due = tx.driver._timers.due
        with driver_stopped(tx):
            for number in range(3):
                tx.driver.post(lambda number=number: seen.append(str(number)))  # type: ignore[misc]
            monkeypatch.setattr(tx.driver._timers, "due", lambda: [seen.append("timers"), *due()][1:])  # type: ignore[func-returns-value]
        until(lambda: "2" in seen)
    first, last = seen.index("0"), seen.index("2")
    assert seen[first : last + 1] == ["0", "timers", "1", "timers", "2"]


def test_close_does_not_wait_for_a_peer_that_never_said_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """It introduced itself and went; there is no room that it would have to hear of."""
    monkeypatch.setattr(kvpoll_fsm.driver, "FLUSH_S", 60.0)
    with nothing_left(), raw_dealer() as dealer:
        tx = endpoint().start()
        dealer.connect(tx.address.place)
        dealer.send(encode(Hello(**introduction(b"m" * 16, LAYOUT, ()))))
        until(lambda: tx.driver.core.connections)
        closing = threading.Thread(target=tx.close, daemon=True)
        closing.start()
        closing.join(SOON_S)
        assert not closing.is_alive()


@contextmanager
def raw_dealer() -> Iterator[Any]:
    context: zmq.Context[Any] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    try:
        yield dealer
    finally:
        dealer.close()
        context.term()


def test_closing_twice_and_from_many_threads_at_once() -> None:
    with nothing_left():
        tx = endpoint().start()
        closers = [threading.Thread(target=tx.close) for _ in range(4)]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join(SOON_S)
        tx.close()
        with pytest.raises(EndpointClosed):
            tx.load()


def test_closing_while_rooms_are_opened() -> None:
    """Whoever got a handle gets an end."""
    with nothing_left(), endpoint(deadlines=deadlines(peer_lost_s=0.5)) as rx:
        for _ in range(3):
            tx = endpoint().start()
            handles: list[Any] = []

            def open_rooms(tx: Endpoint = tx, handles: list[Any] = handles) -> None:
                try:
                    for room in range(300):
                        handles.append(tx.sender(room))
                        handles.append(tx.receiver(room, peer=rx.address))
                except EndpointClosed:
                    pass

            opening = threading.Thread(target=open_rooms)
            opening.start()
            until(lambda: len(handles) > 20)  # noqa: B023
            tx.close()
            opening.join(SOON_S)
            for handle in handles:
                assert handle.wait(SOON_S) is KVPoll.Failed
                assert handle.wait_quiescent(SOON_S)
        until(lambda: not rx.driver.core.connections, "peers that went without a word are lost")


def test_a_room_asked_for_at_the_very_end_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver has ended between the look at it and the request."""
    with endpoint() as tx:
        engine, driver = tx.engine, tx.driver
    monkeypatch.setattr(Endpoint, "engine", property(lambda self: engine))
    sender = tx.sender(1)
    failure = failed(sender)
    assert "the endpoint has ended: closed" in failure.detail
    assert sender.wait_quiescent(0)
    with pytest.raises(EndpointClosed):
        driver.call(lambda: None)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_start_that_fails_leaves_nothing(transport: str, tmp_path: Path) -> None:
    with nothing_left(), socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        for settings in (
            {"listen": f"tcp://127.0.0.1:{port}"},
            {"trace": tmp_path / "no such folder" / "trace"},
        ):
            with pytest.raises(InvalidInput):
                endpoint(transport, **settings).start()


@pytest.mark.inside
def test_a_start_without_a_thread_for_the_driver_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == "kvpoll-driver":
            raise RuntimeError("can't start new thread")
        real(thread)

    with nothing_left():
        ours = pool()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(RuntimeError, match="can't start"):
                endpoint(pool=ours).start()
        endpoint(pool=ours).start().close()


def test_a_start_whose_last_transport_fails_closes_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> None:
        raise OSError("out of memory regions")

    monkeypatch.setattr(MemoryTransport, "start", fail)
    with nothing_left(), pytest.raises(OSError, match="out of memory regions"):
        endpoint("prefer:tcp,memory").start()


def test_a_transport_that_cannot_start_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Any] = []

    def fail(self: Any) -> None:
        raise TransportUnavailable("memory", "not here")

    monkeypatch.setattr(MemoryTransport, "start", fail)
    monkeypatch.setattr(MemoryTransport, "close", lambda self: closed.append(self))
    with endpoint("prefer:tcp,memory") as tx:
        assert len(closed) == 1
        assert list(tx.driver.transports) == ["tcp"]


EXIT = """
import gc, sys
from tests.helpers import endpoint, make_data, open_pair, until
from kvpoll_fsm import KVPoll
def use(transport, how):
    tx, rx = endpoint(transport).start(), endpoint(transport).start()
    sender, receiver = open_pair(tx, rx, 1)
    waiting, _ = open_pair(tx, rx, 2)
    sender.send(make_data(100))
    receiver.result(10)
    until(lambda: waiting.poll() is KVPoll.WaitingForInput)
    print("done", flush=True)
    if how == "exit":
        sys.exit(7)
    if how == "raise":
        raise ZeroDivisionError("on purpose")
    return tx, rx, sender, receiver, waiting
kept = use(*sys.argv[1:])
if sys.argv[2] == "drop":
    del kept
    gc.collect()
"""


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("how", "code"), [("keep", 0), ("drop", 0), ("exit", 7), ("raise", 1)])
def test_an_endpoint_that_is_never_closed_does_not_keep_the_program(transport: str, how: str, code: int) -> None:
    done = run_script(EXIT, transport, how)
    assert (done.returncode, done.stdout) == (code, "done\n"), done.stderr
    errors = [line for line in done.stderr.splitlines() if not line.startswith("room ended")]
    assert errors == [] or (how == "raise" and errors[-1] == "ZeroDivisionError: on purpose"), done.stderr


FORK = """
import asyncio, os, sys
from kvpoll_fsm import EndpointClosed, ForkedError, KVPoll
from tests.helpers import endpoint, make_data, open_pair, pair, same, transfer, until
transport = sys.argv[1]
tx, rx = endpoint(transport).start(), endpoint(transport).start()
sender, receiver = open_pair(tx, rx, 1)
until(lambda: receiver.poll() is KVPoll.WaitingForInput)
child = os.fork()
if not child:
    for use in (sender.poll, receiver.wait, receiver.result, sender.wait_quiescent, sender.abort, sender.clear,
                lambda: sender.send(make_data(5)), tx.load, tx.dump, lambda: tx.sender(9), lambda: tx.driver,
                lambda: rx.receiver(9, peer=tx.address), lambda: tx.drain(1),
                lambda: asyncio.run(receiver._result_async())):
        try:
            use()
        except ForkedError as error:
            assert error.owner_pid == os.getppid() and error.pid == os.getpid()
        else:
            raise AssertionError(use)
    tx.close()
    rx.close()
    with pair(transport) as (one, two):  # one of its own works
        transfer(one, two, 1)
    sys.exit(5)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
data = make_data(100)
sender.send(data)
assert same(receiver.result(10), data)
transfer(tx, rx, 2)
tx.close()
rx.close()
print("done")
"""


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_forked_child_may_not_use_it_and_harms_nothing(transport: str) -> None:
    done = run_script(FORK, transport)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


# poll()


def test_pain_23_poll_needs_no_lock_and_no_driver() -> None:
    """Whatever the driver does and whoever holds which lock."""
    with pair() as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        until(lambda: receiver.poll() is W)
        polls: list[KVPoll] = []
        with driver_stopped(tx), driver_stopped(rx):
            for handle, owner in ((sender, tx), (receiver, rx)):
                with owner._lock, owner.driver._inbox._lock:
                    polling = threading.Thread(target=lambda h=handle: polls.append(h.poll()), daemon=True)
                    polling.start()
                    polling.join(SOON_S)
        assert polls == [W, W]


def test_poll_asks_nothing_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    with pair() as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        until(lambda: receiver.poll() is W)
        asked: list[str] = []
        for name in ("post", "call"):
            monkeypatch.setattr(kvpoll_fsm.driver.Driver, name, lambda *args, name=name: asked.append(name))
        for _ in range(1000):
            sender.poll()
            receiver.poll()
        monkeypatch.undo()
        assert asked == []


def test_pain_23_a_stopped_peer_stops_nobody_else() -> None:
    with pair() as (tx, rx), endpoint() as other:
        sender = tx.sender(1)
        stopped = rx.receiver(1, peer=tx.address)
        until(lambda: stopped.poll() is W)
        with driver_stopped(rx):
            sender.send(make_data(100))
            transfer(tx, other, 2)
            assert not sender.poll().is_terminal
        assert same(stopped.result(SOON_S), make_data(100))


# What raises stays in its room


def raises_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but for its first call."""
    calls: list[int] = []

    def maybe(*args: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("native crash")
        return function(*args, **settings)

    return maybe


@pytest.mark.parametrize("what", ["connect", "grant", "submit", "stage", "verify", "checksum", "destination"])
def test_pain_13_an_exception_fails_one_room_and_the_next_succeeds(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pair() as (tx, rx):
        places: dict[str, tuple[Any, str]] = {
            "connect": (tx.driver.transports["memory"], "connect"),
            "grant": (rx.driver.transports["memory"], "grant"),
            "stage": (kvpoll_fsm.outgoing, "stage"),
            "checksum": (kvpoll_fsm.outgoing, "checksum_runs"),
            "verify": (kvpoll_fsm.incoming, "verify"),
            "destination": (kvpoll_fsm.driver, "new_arrays"),
        }
        if what == "submit":
            transfer(tx, rx, 0)
            places["submit"] = (next(iter(tx.driver._links._links.values())).link, "submit")
        owner, name = places[what]
        monkeypatch.setattr(owner, name, raises_once(getattr(owner, name)))
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(make_data(100))
        for handle in (sender, receiver):
            assert "native crash" in failed(handle).detail
            assert handle.wait_quiescent(SOON_S)
        transfer(tx, rx, 2)
        sender.clear()
        receiver.clear()
        transfer(tx, rx, 1)
        until(lambda: tx.load().free == rx.load().free == 64, f"{tx.load()} {rx.load()}")
        assert tx.is_idle()


@pytest.mark.parametrize("command", [Preflight, Expose])
def test_what_an_action_itself_raises_fails_its_room(command: type[Any]) -> None:
    with pair() as (tx, rx):
        ways = (tx if command is Preflight else rx).driver._actions._ways
        ways[command] = raises_once(ways[command])
        sender, receiver = open_pair(tx, rx, 1)
        for handle in (sender, receiver):
            failure = failed(handle)
            assert (failure.code, failure.detail) == (FailureCode.InternalError, "RuntimeError: native crash")
            assert handle.wait_quiescent(SOON_S)
        transfer(tx, rx, 2)
        until(lambda: tx.load().free == rx.load().free == 64)


def test_an_exception_of_a_room_leaves_those_in_flight_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = Faults()
    faults.hold(0)
    with pair(faults=faults) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(make_data(64))
        until(lambda: faults.submitted)
        monkeypatch.setattr(kvpoll_fsm.outgoing, "stage", raises_once(stage))
        poisoned, _ = open_pair(tx, rx, 2)
        poisoned.send(make_data(64))
        assert "native crash" in failed(poisoned).detail
        faults.release()
        assert receiver.wait(SOON_S) is S


def test_why_the_receiver_gave_up_is_told_though_its_fence_is_met_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The write fails at once, the receiver's word takes its time: the word is the cause."""
    faults, deaf = Faults(), threading.Event()
    faults.hold()
    with pair(faults=faults) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(make_data(10))
        until(lambda: faults.submitted)
        read = tx.driver._control.read
        monkeypatch.setattr(tx.driver._control, "read", lambda: iter(()) if deaf.is_set() else read())
        deaf.set()
        receiver.abort("worker 7 is out of memory")
        assert receiver.wait_quiescent(SOON_S)
        faults.release()
        until(lambda: on_driver(tx, lambda: tx.driver.outgoing.idle))
        assert not sender.poll().is_terminal
        deaf.clear()
        failure = failed(sender)
        assert (failure.code, failure.rank) == (FailureCode.Aborted, 0)
        assert failure.detail == "worker 7 is out of memory"
        assert sender.wait_quiescent(SOON_S)


def test_a_request_that_raises_is_the_hosts_own(caplog: pytest.LogCaptureFixture) -> None:
    with pair() as (tx, rx):
        with pytest.raises(ZeroDivisionError):
            on_driver(tx, lambda: 1 // 0)
        tx.driver.post(lambda: 1 // 0)  # type: ignore[arg-type]
        transfer(tx, rx, 1)
        assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == [
            "request failed"
        ]


def test_a_driver_that_fails_ends_every_room_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """No room hangs, the endpoint says what happened, and peers find out."""
    with nothing_left(), pair(deadlines=deadlines(peer_lost_s=0.5)) as (tx, rx):
        rooms = [open_pair(tx, rx, room) for room in range(3)]
        until(lambda: all(receiver.poll() is W for _, receiver in rooms))

        def explode() -> list[Any]:
            raise MemoryError("native heap")

        on_driver(tx, lambda: monkeypatch.setattr(tx.driver.transports["memory"], "completions", explode))
        for sender, _ in rooms:
            failure = failed(sender)
            assert failure.code is FailureCode.InternalError
            assert failure.detail.startswith(
                "driver failed: TransportUnavailable: transport 'memory': given up after MemoryError: native heap"
            )
            assert sender.wait_quiescent(SOON_S)
        for _, receiver in rooms:
            assert failed(receiver).code is FailureCode.PeerLost
        with pytest.raises(EndpointClosed, match="given up after MemoryError: native heap"):
            tx.sender(9)
        first = rooms[0][0]
        first.clear()
        assert failed(first).code is FailureCode.InternalError, "the first cause stays"
        tx.close()
        tx.close()


@pytest.mark.parametrize("side", ["tx", "rx"])
def test_pain_13_a_transport_that_breaks_is_given_up_and_the_others_go_on(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the receiver the write is known to be over; the sender has to ask it, as it cannot say. The part goes on."""
    faults = Faults()
    faults.hold(0)
    with nothing_left(), pair("prefer:memory,tcp", faults=faults) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(make_data(64))
        until(lambda: faults.submitted)
        broken = tx if side == "tx" else rx

        def explode() -> list[Any]:
            raise MemoryError("native heap")

        on_driver(broken, lambda: monkeypatch.setattr(broken.driver.transports["memory"], "completions", explode))
        assert same(receiver.result(SOON_S), make_data(64))
        assert [part.transport for part in sender.parts] == ["tcp"]
        for handle in (sender, receiver):
            assert handle.wait_quiescent(SOON_S)
            handle.clear()
        assert list(broken.driver.transports) == ["tcp"]
        until(lambda: tx.load().free == rx.load().free == 64, f"{tx.load()} {rx.load()}")
        transfer(tx, rx, 2)


@pytest.mark.parametrize("what", ["fence", "revoke"])
def test_a_transport_that_cannot_stop_writes_is_closed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing it is the last fence there is; only then are the blocks free."""
    faults = Faults()
    with nothing_left(), pair("prefer:memory,tcp", faults=faults) as (tx, rx):
        if what == "fence":
            faults.hold(0)
        sender, receiver = open_pair(tx, rx, 1)
        memory = rx.driver.transports["memory"]

        def explode(token: bytes) -> int:
            assert rx.driver.core.load().free < 64
            raise RuntimeError("native crash")

        on_driver(rx, lambda: monkeypatch.setattr(memory, what, explode))
        sender.send(make_data(100))  # two parts: the first's token is revoked
        if what == "fence":
            until(lambda: faults.submitted)
            receiver.abort("enough")
            assert failed(sender).code is FailureCode.Aborted
        else:
            assert same(receiver.result(SOON_S), make_data(100))
            assert [part.transport for part in sender.parts] == ["memory", "tcp"]
        assert receiver.wait_quiescent(SOON_S)
        assert list(rx.driver.transports) == ["tcp"]
        until(lambda: rx.load().free == 64, "the blocks")
        transfer(tx, rx, 2)


def test_what_can_be_neither_fenced_nor_closed_ends_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that may be written to are given to nobody, and the pool to no other endpoint."""
    faults = Faults()
    faults.hold()
    with pair("prefer:memory,tcp", faults=faults, deadlines=deadlines(peer_lost_s=0.5)) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        waiting = rx.receiver(2, peer=tx.address, tokens=61 * 16)  # for the blocks that room 1 has
        memory = rx.driver.transports["memory"]
        close = memory.close

        def explode(token: bytes = b"") -> int:
            raise RuntimeError("native crash")

        sender.send(make_data(64))
        until(lambda: faults.submitted)
        on_driver(rx, lambda: [monkeypatch.setattr(memory, name, explode) for name in ("fence", "close")])
        pool = rx.pool
        receiver.abort("enough")
        failure = failed(waiting)
        assert failure.code is FailureCode.InternalError
        assert "nor can it be closed" in failure.detail
        assert waiting.gate is kvpoll_fsm.Gate.closed
        assert waiting.history[-1] is KVPoll.Failed
        assert not waiting.parts
        assert failed(sender).code in (FailureCode.Aborted, FailureCode.PeerLost)
        rx.close()
        with pytest.raises(BlockError, match="another endpoint uses this pool"):
            endpoint(pool=pool).start()
        close()


@pytest.mark.parametrize("then", ["lands", "the peer goes"])
def test_a_source_that_may_be_read_is_given_back_to_nobody(then: str) -> None:
    """Neither the end of the room nor that of the peer frees it; only the transport's word."""
    faults = Faults()
    faults.fail_late(0, reading=True)
    with nothing_left(), pair(faults=faults) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(make_data(64))
        assert failed(sender).code is FailureCode.TransportFailed
        assert receiver.wait_quiescent(SOON_S)  # it has fenced
        assert tx.load().leased == 4
        assert not sender.wait_quiescent(0.1)
        if then == "lands":
            faults.land(0)
        else:
            link = next(iter(tx.driver._links._links.values())).link
            close, hung_up = link.close, threading.Event()
            link.close = hung_up.set  # as with an engine that takes its time
            rx.close()
            assert hung_up.wait(SOON_S)
            assert not sender.wait_quiescent(0.1)
            assert tx.load().leased == 4
            on_driver(tx, close)
        assert sender.wait_quiescent(SOON_S)
        until(lambda: tx.load().free == 64)


def test_a_pool_serves_one_endpoint_at_a_time() -> None:
    """Each would give out every block."""
    shared = pool()
    with nothing_left():
        with endpoint(pool=shared):
            second = endpoint("tcp", pool=shared)
            with pytest.raises(BlockError, match="another endpoint uses this pool"):
                second.start()
        with endpoint(pool=shared) as tx, endpoint() as rx:
            transfer(tx, rx, 1)


@pytest.mark.parametrize("side", ["tx", "rx"])
@pytest.mark.parametrize("work", ["busy", "hung"])
def test_pain_09_waiting_for_a_busy_worker_is_no_standstill_and_for_a_hung_one_it_is(
    side: str, work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Staging at the sender and copying at the receiver wait their turn; both sides know."""
    monkeypatch.setattr("kvpoll_fsm.jobs.SMALL_NBYTES", 0)
    brisk = deadlines(stall_s=0.8)
    over = threading.Event()

    def toil() -> None:
        while not over.is_set():
            hashlib.sha256(bytes(1 << 20))  # without the interpreter's lock, which the drivers need

    with pair(deadlines=brisk, workers=1) as (tx, rx):
        late = tx if side == "tx" else rx
        key = kvpoll_fsm.session.RoomKey("sender", 99, 0, 99)
        begun = threading.Event()
        hog = lambda: (begun.set(), toil() if work == "busy" else over.wait(SOON_S))  # noqa: E731
        sender, receiver = open_pair(tx, rx, 1)
        until(lambda: receiver.poll() is W)
        on_driver(late, lambda: late.driver._jobs.submit(key, hog, lambda result: None, 1))
        assert begun.wait(SOON_S)
        sender.send(make_data(64))
        if work == "busy":
            quiet = threading.Event()
            until(
                lambda: (
                    "moving" in (str(sender.gate), str(receiver.gate)) or sender.gate is kvpoll_fsm.Gate.waiting_outcome
                )
            )
            quiet.wait(2 * brisk.stall_s)  # longer than the deadline, which is what is tested
            over.set()
            assert same(receiver.result(SOON_S), make_data(64))
        else:
            for handle in (sender, receiver):
                assert failed(handle).code is FailureCode.DeadlinePassed
            over.set()
        for handle in (sender, receiver):
            assert handle.wait_quiescent(SOON_S)
        until(lambda: tx.load().free == rx.load().free == 64)


@pytest.mark.parametrize("what", ["transport", "control", "recorder"])
def test_what_cannot_be_closed_keeps_nobody(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything else is given back, and whoever asks is answered."""
    tx = endpoint("prefer:memory,tcp").start()
    driver, sender = tx.driver, tx.sender(1)
    owner: Any = {"transport": driver.transports["memory"], "control": driver._control, "recorder": driver.recorder}[
        what
    ]
    close = owner.close

    def explode() -> None:
        close()
        raise OSError("disk full")

    monkeypatch.setattr(owner, "close", explode)
    tx.close()
    assert failed(sender).detail == "the endpoint was closed"
    assert sender.wait_quiescent(0)
    assert driver._inbox._fd == -1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvpoll")]
    with pytest.raises(EndpointClosed):
        tx.load()


def test_a_trace_that_cannot_be_written_harms_no_room() -> None:
    with pair(rx={"trace": "/dev/full"}) as (tx, rx):
        transfer(tx, rx, 1)


# Nothing grows


def leftovers(endpoint: Endpoint) -> dict[str, Any]:
    """Every table of an endpoint that has an entry for a room, if it is not empty."""
    driver = endpoint.driver
    core, out, into = driver.core, driver.outgoing, driver.incoming

    def look() -> dict[str, Any]:
        tables = {
            "sessions": core.sessions,
            "parked": len(core.parking),
            "views": driver.views,
            "sources": out.sources,
            "landed": out._landed,
            "writings": out._writings,
            "tickets": out._by_ticket,
            "lanes": out._lanes,
            "tokens": into._exposed,
            "fences": into._fences,
            "destinations": into._destinations,
            "timers": [owner for owner in driver._timers._of if not isinstance(owner, str)],
            "handles": endpoint._open,
            "leases": core.accounts.leases(),
            "queued": core.accounts.load().queued,
            "unacked": core.unacked,
            "metered": driver.meter._runs,
            "inbox": len(driver._inbox),
        }
        return {name: table for name, table in tables.items() if table}

    found: dict[str, Any] = on_driver(endpoint, look)
    return found


def test_a_room_that_failed_keeps_no_arrays_though_its_handle_is_kept() -> None:
    faults = Faults()
    faults.hold(1)
    with pair(faults=faults) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1, tokens=16)
        sender.send(make_data(40))
        until(lambda: faults.submitted == 2)
        assert rx.driver.incoming._destinations
        sender.abort("enough")
        for handle in (sender, receiver):
            failed(handle)
            assert handle.wait_quiescent(SOON_S)
        until(lambda: not rx.driver.incoming._destinations and not tx.driver.outgoing.sources)


def test_pain_14_a_thousand_rooms_leave_nothing_behind() -> None:
    with pair(rx={"pool": pool(256)}) as (tx, rx):
        data = make_data(20)
        for first in range(0, 1000, 100):
            handles: list[Any] = []
            for room in range(first, first + 100):
                if room % 5 != 4:
                    handles.append(tx.sender(room))
                    if room % 5 in (0, 3):
                        handles[-1].send(data)
                if room % 5 != 3:
                    handles.append(rx.receiver(room, peer=tx.address, tokens=32))
            for handle in handles:
                if handle.room % 5 == 0:  # the others are alone, without data, or aborted
                    assert handle.wait(SOON_S) is S
                elif handle.room % 5 == 1:
                    handle.abort("enough")
                handle.clear()
        until(lambda: not leftovers(tx) and not leftovers(rx), "tables are empty")
        transports = [end.driver.transports["memory"] for end in (tx, rx)]
        assert [transport._host._grants for transport in transports] == [{}, {}]  # type: ignore[attr-defined]
        assert len(tx.driver._timers._heap) + len(rx.driver._timers._heap) < 200
        assert (tx.load().free, rx.load().free) == (64, 256)


def test_a_room_that_ends_before_what_it_ordered_is_carried_out_leaves_nothing_behind() -> None:
    """Its receiver waits for it already, so its opening orders a preflight."""
    with pair() as (tx, rx):
        receiver = rx.receiver(1, peer=tx.address, tokens=16)
        until(lambda: on_driver(tx, lambda: len(tx.driver.core.parking)), "the reservation")
        with driver_stopped(tx):
            tx.sender(1).clear()
        assert failed(receiver).code is FailureCode.Aborted
        until(lambda: not on_driver(tx, lambda: tx.driver.core.sessions), "the end")
        on_driver(tx, lambda: None)
        assert not tx.driver.meter._runs


# Turns


def test_a_transport_without_a_file_is_polled_while_it_may_have_news() -> None:
    with pair() as (tx, rx):
        assert on_driver(tx, tx.driver._wait_s) > POLL_INTERVAL_S
        transport = rx.driver.transports["memory"]
        regions = tuple(b"kvpoll-memory:%d" % number for number in range(3))
        offer = TransportOffer("memory", transport.descriptor(), regions)

        def reach() -> float | None:
            tx.driver._links.reach(99, offer, "memory", lambda ok, why: None)
            return tx.driver._wait_s()

        waits_s = on_driver(tx, reach)
        assert waits_s is not None
        assert waits_s <= POLL_INTERVAL_S
        until(lambda: tx.driver._links.idle)


def test_a_driver_at_rest_sleeps() -> None:
    with endpoint() as tx:
        turns: list[int] = []

        def count() -> None:
            turn = tx.driver._turn

            def counted() -> None:
                turns.append(1)
                turn()

            tx.driver._turn = counted  # type: ignore[method-assign]

        on_driver(tx, count)
        threading.Event().wait(0.3)
        assert len(turns) < 50


def test_what_hosts_ask_is_done_in_their_order() -> None:
    with endpoint() as tx:
        done: list[int] = []
        for number in range(1000):
            tx.driver.post(lambda number=number: done.append(number))  # type: ignore[misc]
        on_driver(tx, lambda: None)
        assert done == list(range(1000))
