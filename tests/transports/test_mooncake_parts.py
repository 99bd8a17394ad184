"""The pieces of the transport mooncake: settings, what is installed, engines that do not start, pieces of transfers."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from kvpoll_common.grants import Grants
from kvpoll_common.loop import Reactor
from kvpoll_common.outbox import Outbox
from kvpoll_fsm.errors import AddressError, InvalidInput, TransportUnavailable
from kvpoll_fsm.spi import Done, Range, Region, Write
from kvpoll_fsm.testing.conformance.sides import CANARY, HUGE, SIZES, Pair, Side, footprint, same, sealed_memfd, until
from kvpoll_mooncake import (
    MooncakeSettings,
    MooncakeTransport,
    environment,
    frames,
    handshake,
    installed,
    memory,
    process,
    wire,
)
from kvpoll_mooncake import transport as transport_module
from kvpoll_mooncake.flight import CHUNK_NBYTES, MAX_OUTSTANDING, WINDOW_NBYTES, Flights, cut
from kvpoll_mooncake.handshake import read_descriptor
from kvpoll_mooncake.keeper import Keeper, Visit
from kvpoll_mooncake.link import MooncakeLink
from tests.transports import mooncake_raw as raw

# Settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"metadata": "redis://127.0.0.1:6379"},
        {"metadata": "p2phandshake"},
        {"metadata": ""},
        {"metadata": "http://"},
        {"metadata": "http://me:a/b@h:1/x"},
        {"protocol": "xgmi"},
        {"protocol": None},
        {"engine": "thread"},
        {"device": "mlx5_0; rm"},
        {"gid_index": -1},
        {"mtu": 1500},
        {"lanes": 0},
        {"lanes": True},
        {"lanes": None},
        {"stall_s": 0},
        {"stall_s": "1"},
        {"transfer_timeout_s": 4},
        {"transfer_timeout_s": 30, "progress_timeout_s": 16},
        {"engine_ports": (0, 10)},
        {"engine_ports": None},
        {"data_ports": (10, 9)},
        {"host": 7},
        {"max_senders": 0},
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="|".join(wrong)):
        MooncakeTransport(**wrong)


def test_settings_that_do() -> None:
    MooncakeSettings(metadata="http://10.0.0.7:8080/metadata", device="mlx5_0,mlx5_1", gid_index=3, mtu=4096)
    MooncakeSettings(metadata="etcd://10.0.0.7:2379", host="0.0.0.0", advertise="10.0.0.8:7000")


@pytest.mark.parametrize(
    ("metadata", "directory"),
    [
        ("P2PHANDSHAKE", "P2PHANDSHAKE"),
        ("http://10.0.0.7:8080/metadata", "http://10.0.0.7:8080/metadata"),
        ("http://me:hunter2@10.0.0.7:8080/metadata?as=hunter2", "http://10.0.0.7:8080/metadata"),
        ("https://hunter2@h/a/b", "https://h/a/b"),
        ("etcd://me:hun@ter2@[::1]:2379", "etcd://[::1]:2379"),
        ("etcd://me:hunter2@h1:1;me:hunter2@h2:2", "etcd://h2:2"),
    ],
)
def test_what_peers_are_told_of_the_server(metadata: str, directory: str) -> None:
    assert MooncakeSettings(metadata=metadata).directory == directory


def test_a_url_that_cannot_be_used_does_not_show_its_password() -> None:
    with pytest.raises(InvalidInput, match=r"metadata='ftp://\(hidden\)@h:1/x': give") as caught:
        MooncakeSettings(metadata="ftp://me:hunter2@h:1/x")
    assert "hunter2" not in str(caught.value)


class NoEngine:
    """In place of what a transport runs."""

    def __init__(self, *_: object) -> None: ...

    def start(self, listening: Any) -> None:
        listening.close()

    def sources(self, outbox: object) -> Any:
        return None

    def stop(self, lanes: object) -> None: ...


def test_a_password_stays_where_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers that log in as somebody else, or not at all, find the same engines."""
    monkeypatch.setattr(transport_module, "_Inside", NoEngine)
    monkeypatch.setattr(transport_module.installed, "require_one_wheel", lambda: None)
    descriptors = []
    for login in ("me:hunter2@", "you:other@", ""):
        transport = MooncakeTransport(protocol="tcp", metadata=f"http://{login}10.0.0.7:8080/metadata")
        transport.start()
        descriptors.append(transport.descriptor())
        for descriptor in descriptors:
            transport_module._check_match(transport._identity, read_descriptor(descriptor))  # type: ignore[arg-type]
        transport.close()
    assert not [each for each in descriptors if b"hunter2" in each or b"other" in each or b"me:" in each]
    ours, theirs = read_descriptor(descriptors[0]), handshake.new_identity("10.0.0.8", 1, "tcp", "http://h:1/x")
    with pytest.raises(TransportUnavailable) as caught:
        transport_module._check_match(ours, theirs)
    assert "hunter2" not in str(caught.value)


def test_an_address_nobody_can_reach() -> None:
    with pytest.raises(AddressError):
        MooncakeTransport(host="0.0.0.0")


def test_settings_reach_the_engine_in_its_environment() -> None:
    settings = MooncakeSettings(transfer_timeout_s=60, progress_timeout_s=7, lanes=2, gid_index=3, traffic_class=96)
    found = environment.variables(settings, "tcp", "127.0.0.1")
    assert found["MC_FORCE_TCP"] == "1"
    assert "MC_FORCE_HCA" not in found
    assert (found["MC_TRANSFER_TIMEOUT"], found["MC_TCP_PROGRESS_TIMEOUT_SEC"]) == ("60", "7")
    assert (found["MC_TCP_LANES_PER_PEER"], found["MC_GID_INDEX"], found["MC_IB_TC"]) == ("2", "3", "96")
    assert "MC_MTU" not in found
    found = environment.variables(MooncakeSettings(metadata="etcd://h:1", host="::1"), "rdma", "::1")
    assert found["MC_FORCE_HCA"] == found["MC_USE_IPV6"] == "1"
    assert found["MC_TCP_BIND_ADDRESS"] == "::1"
    assert "MC_FORCE_TCP" not in found


def test_framing_without_acknowledgements_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MC_TCP_PROTO", "1")
    with pytest.raises(TransportUnavailable, match="MC_TCP_PROTO"):
        MooncakeTransport().start()


# Forks


def test_a_forked_child_that_closes_a_link_posts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Posting takes a lock and wakes the parent's thread; whoever held the lock at the fork is not in the child."""
    post = Mock()
    link = MooncakeLink(1, Mock(), {}, Outbox(), itertools.count(), post)
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: 0)
        link.close()
    assert not post.called
    link.close()
    assert post.called


# What is installed


def wheels(monkeypatch: pytest.MonkeyPatch, *names: str, cuda: bool = False) -> None:
    def version(name: str) -> str:
        if name not in names:
            raise metadata.PackageNotFoundError(name)
        return "0.3.13"

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(installed, "has_cuda", lambda: cuda)


@pytest.mark.parametrize(("cuda", "extra"), [(False, "'kvpoll-fsm[mooncake]'"), (True, "'kvpoll-fsm[mooncake-cuda]'")])
def test_without_a_wheel_the_fitting_one_is_named(monkeypatch: pytest.MonkeyPatch, cuda: bool, extra: str) -> None:
    wheels(monkeypatch, cuda=cuda)
    with pytest.raises(TransportUnavailable, match="is not installed") as caught:
        MooncakeTransport().start()
    assert f"pip install {extra}" in caught.value.hint


def test_both_wheels_are_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    wheels(monkeypatch, installed.PLAIN, installed.CUDA)
    with pytest.raises(TransportUnavailable, match="both installed") as caught:
        MooncakeTransport().start()
    assert caught.value.hint.startswith("pip uninstall")
    assert caught.value.hint.endswith(installed.PLAIN)


def test_rdma_is_required_and_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheels(monkeypatch, installed.PLAIN)
    monkeypatch.setattr(installed, "_DEVICES", tmp_path / "infiniband")
    with pytest.raises(TransportUnavailable, match="no RDMA device under"):
        MooncakeTransport(protocol="rdma").start()
    assert installed.protocol_of(MooncakeSettings()) == "tcp"
    (tmp_path / "infiniband" / "mlx5_0").mkdir(parents=True)
    assert installed.protocol_of(MooncakeSettings()) == "rdma"
    assert installed.protocol_of(MooncakeSettings(protocol="tcp")) == "tcp"
    assert installed.protocol_of(MooncakeSettings(protocol="rdma", device="mlx5_0")) == "rdma"
    with pytest.raises(TransportUnavailable, match="mlx5_7 is not among mlx5_0"):
        MooncakeTransport(protocol="rdma", device="mlx5_0,mlx5_7").start()


# Engines that do not start


@pytest.fixture
def imitation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A `mooncake.engine` of our own, for the processes that engines run in; the test writes it."""
    wheels(monkeypatch, installed.PLAIN)
    package = tmp_path / "mooncake"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    before = footprint()
    yield package / "engine.py"
    assert footprint() == before


ENGINE = """
import os, time
class TransferEngine:
    def initialize(self, *settings): {initialize}
    def get_rpc_port(self): return 7
    def register_memory(self, address, nbytes): {register}
"""


@pytest.mark.parametrize(
    ("program", "problem", "hint"),
    [
        ("raise ImportError('libibverbs.so.1: cannot open shared object file')", "libibverbs.so.1", "apt-get install"),
        ("raise ImportError('libcudart.so.12: cannot open shared object file')", "libcudart", "'kvpoll-fsm[mooncake]'"),
        (ENGINE.format(initialize="return -1", register="return 0"), "does not initialize", ""),
        (
            ENGINE.format(initialize="print('E why', file=__import__('sys').stderr); os.abort()", register="..."),
            "E why",
            "",
        ),
        (ENGINE.format(initialize="time.sleep(60)", register="..."), "no engine within 2 s", ""),
    ],
)
def test_an_engine_that_does_not_start(imitation: Path, program: str, problem: str, hint: str) -> None:
    imitation.write_text(program)
    transport = MooncakeTransport(engine_s=2 if "sleep" in program else 20)
    with pytest.raises(TransportUnavailable) as caught:
        transport.start()
    assert problem in str(caught.value)
    assert hint in caught.value.hint
    transport.close()


def test_memory_that_mooncake_does_not_take(imitation: Path) -> None:
    imitation.write_text(ENGINE.format(initialize="return 0", register="return -7"))
    transport = MooncakeTransport()
    transport.start()
    fd = sealed_memfd(4096)
    with pytest.raises(TransportUnavailable, match=r"region 0: Mooncake does not register it: -7"):
        transport.register(Region(0, memoryview(bytearray(4096)), fd))
    transport.close()
    os.close(fd)


# Where memory is mapped


def test_addresses_are_not_given_twice() -> None:
    addresses = memory.Addresses()
    taken = [(addresses.take(nbytes), nbytes) for nbytes in (1, 4096, 5 << 20, 1 << 30, 7) * 20]
    taken.sort()
    assert all(start + nbytes < following for (start, nbytes), (following, _) in itertools.pairwise(taken))
    assert all(start % memory.STEP_NBYTES == 0 for start, _ in taken)


def test_a_place_that_is_taken_is_refused() -> None:
    fd = sealed_memfd(8192)
    place = memory.Addresses().take(8192)
    assert memory.map_at(place, fd, 0, 8192) == place
    with pytest.raises(OSError, match="no place"):
        memory.map_at(place, fd, 0, 8192)
    with pytest.raises(OSError, match="shorter file"):
        memory.map_at(place, fd, 4096, 8192)
    assert memory.map_at(place + (1 << 30), fd, 4100, 10) == place + (1 << 30) + 4
    os.close(fd)


# Pieces of transfers


class Engine:
    """Takes what it is given, and ends what the test says; complains if it is asked about what has ended."""

    def __init__(self) -> None:
        self.begun: dict[int, tuple[int, int, int]] = {}
        self.status: dict[int, int] = {}
        self.refuses = False

    def transfer_submit_write(self, peer: str, source: int, destination: int, nbytes: int) -> int:
        if self.refuses:
            return 0
        number = len(self.begun) + 1
        self.begun[number] = (source, destination, nbytes)
        self.status[number] = 0
        return number

    def transfer_check_status(self, number: int) -> int:
        status = self.status[number]
        if status:
            del self.status[number]  # a number that is free again: to ask about it would be a KeyError
        return status

    def end_all(self) -> None:
        self.status = dict.fromkeys(self.status, 1)


def flights() -> tuple[Engine, Flights, list[frames.Event]]:
    engine, said = Engine(), []
    return engine, Flights(engine, said.append), said


def test_entries_are_joined_cut_and_checked() -> None:
    def sources(region: int) -> tuple[int, int]:
        return (1000, 5 << 20) if region == 0 else (0, 0)

    assert cut([(0, 10, 0, 7000), (0, 20, 10, 7010), (0, 5, 40, 7030)], sources) == [(1000, 7000, 30), (1040, 7030, 5)]
    pieces = cut([(0, 3 * CHUNK_NBYTES + 1, 5, 0)], sources)
    assert [nbytes for _, _, nbytes in pieces] == [CHUNK_NBYTES] * 3 + [1]
    for wrong in ((0, 0, 0, 0), (0, (5 << 20) + 1, 0, 0), (0, 1, 5 << 20, 0), (1, 1, 0, 0)):
        with pytest.raises(ValueError, match="of region"):
            cut([wrong], sources)


def test_so_much_is_begun_at_a_time_and_no_more() -> None:
    engine, under_way, said = flights()
    under_way.add(1, "peer", [(n, n, 1) for n in range(3 * MAX_OUTSTANDING)])
    under_way.turn()
    assert len(engine.begun) == MAX_OUTSTANDING
    while not said or not isinstance(said[-1], frames.Ended):
        engine.end_all()
        under_way.turn()
        assert len(engine.status) <= MAX_OUTSTANDING
    assert said[-1] == frames.Ended(1, 3 * MAX_OUTSTANDING)
    assert under_way.idle
    under_way.add(2, "peer", [(n, n, CHUNK_NBYTES) for n in range(100)])
    under_way.turn()
    assert len(engine.status) == WINDOW_NBYTES // CHUNK_NBYTES


def test_a_cancelled_ticket_ends_with_what_had_begun() -> None:
    engine, under_way, said = flights()
    under_way.add(1, "peer", [(n, n, CHUNK_NBYTES) for n in range(100)])
    under_way.add(2, "peer", [(0, 0, 1)])
    under_way.turn()
    begun = len(engine.begun)
    under_way.cancel(1)
    under_way.cancel(77)
    assert said == []
    engine.end_all()
    while frames.Ended(1, begun * CHUNK_NBYTES) not in said:
        under_way.turn()
    under_way.turn()
    engine.end_all()
    under_way.turn()
    assert said[-1] == frames.Ended(2, 1)


def test_progress_is_told_and_the_end_once() -> None:
    engine, under_way, said = flights()
    under_way.add(1, "peer", [(n, n, CHUNK_NBYTES) for n in range(3)])
    under_way.turn()
    for number in (1, 2, 3):
        engine.status[number] = 1
        under_way.turn()
    assert said == [frames.Moved(1, CHUNK_NBYTES), frames.Moved(1, 2 * CHUNK_NBYTES), frames.Ended(1, 3 * CHUNK_NBYTES)]


@pytest.mark.parametrize("status", [-1, -2])
def test_after_a_failure_nothing_is_begun_or_asked_about(status: int) -> None:
    engine, under_way, said = flights()
    under_way.add(1, "peer", [(n, n, 1) for n in range(4)])
    under_way.add(2, "peer", [(0, 0, 1)])
    under_way.turn()
    engine.status[2] = status
    under_way.turn()
    (broke,) = said
    assert isinstance(broke, frames.Broke)
    assert (broke.ticket, str(status) in broke.problem) == (1, True)
    left = dict(engine.status)
    assert under_way.idle
    under_way.fail(2, "again")
    assert said == [broke]
    assert engine.status == left


def test_a_transfer_that_is_not_taken() -> None:
    engine, under_way, said = flights()
    engine.refuses = True
    under_way.add(1, "peer", [(0, 0, 1)])
    under_way.turn()
    assert isinstance(said[0], frames.Broke)
    assert "did not take" in said[0].problem


# Who asks while the engine is being replaced


class Leaver:
    """A writer's adapter whose connection turns out to be dead with the first answer."""

    writer = b"writer"

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper
        self.heard: list[wire.Message] = []

    def tell(self, message: wire.Message) -> None:
        self.heard.append(message)
        self.keeper.forget(self)

    def entered(self, visit: Visit) -> None: ...

    def left(self, visit: Visit) -> None: ...


def test_one_who_goes_with_questions_open_hurts_nobody() -> None:
    engine, settings = Mock(), MooncakeSettings()
    outbox = Outbox()
    grants = Grants(outbox, "mooncake")
    maker = Mock(settings=settings, start=lambda *of: engine)
    keeper = Keeper(Reactor(), maker, {0: Region(0, memoryview(bytearray(100)))}, grants, lambda message: None)
    leaver, token = Leaver(keeper), grants.add([Range(0, 0, 100)])
    keeper.start()
    for ticket in range(3):
        keeper.ask(leaver, wire.Ask(ticket, token, wire.pack_ranges([(0, 0, 10)])))
    keeper.heard(engine, frames.Ready("segment"))
    keeper.heard(engine, frames.Registered(0, 1 << 20))
    assert leaver.heard == [wire.Go(0, 1)]
    engine.kill.assert_not_called()
    keeper.fence(token)  # what he was let in with may be under way
    engine.kill.assert_called_once()


def new_keeper(reactor: Any, *engines: Mock) -> tuple[Keeper, list[wire.Message]]:
    """One that has no regions, with these engines one after the other; and what it tells all writers."""
    told: list[wire.Message] = []
    starts = iter(engines)
    maker = Mock(settings=MooncakeSettings(), start=lambda *of: next(starts))
    return Keeper(reactor, maker, {}, Grants(Outbox(), "mooncake"), told.append), told


def test_the_words_of_an_engine_that_is_gone_are_not_its_successors() -> None:
    first, second = Mock(), Mock()
    keeper, told = new_keeper(Mock(), first, second)
    keeper.start()
    keeper.heard(first, frames.Ready("first"))
    keeper.gone(first, "killed")
    keeper.start()
    keeper.heard(first, frames.Ready("first"))
    assert keeper.current is None
    keeper.heard(second, frames.Ready("second"))
    keeper.gone(first, "killed")
    assert keeper.current is not None
    assert keeper.current.segment == "second"
    assert [type(message) for message in told] == [wire.Engine, wire.Gone, wire.Engine]


def test_only_an_engine_that_leaves_a_doubt_unanswered_is_ended() -> None:
    engine, reactor, asker = Mock(), Mock(), Mock()
    keeper, _ = new_keeper(reactor, engine)
    keeper.start()
    keeper.heard(engine, frames.Ready("segment"))
    clocks = []
    for _ in range(2):
        keeper.doubt(asker)
        clocks.append(reactor.later.call_args.args[1])
        if len(clocks) == 1:
            keeper.heard(engine, frames.Pong())
    asker.tell.assert_called_once_with(wire.Sound(1))
    clocks[0]()
    engine.kill.assert_not_called()
    clocks[1]()
    engine.kill.assert_called_once()


# Engines in processes of their own


def test_without_file_descriptors_there_is_no_engine_and_none_is_left_over(
    imitation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imitation.write_text(ENGINE.format(initialize="return 0", register="return 0"))
    transport, fd = MooncakeTransport(), sealed_memfd(8192)
    transport.start()
    transport.register(Region(0, memoryview(bytearray(4096)), fd))
    side = Mock(transport=transport)
    first = raw.receiving_pid(side)
    with monkeypatch.context() as short:
        short.setattr(process.os, "dup", Mock(side_effect=OSError(24, "Too many open files")))
        with pytest.raises(TransportUnavailable, match=r"region 1: .*Too many open files"):
            transport.register(Region(1, memoryview(bytearray(4096)), fd, 4096))
        os.kill(first, signal.SIGKILL)
        until(lambda: process.os.dup.call_count > 2, "another try")  # type: ignore[attr-defined]
    until(lambda: raw.receiving_pid(side) not in (0, first), "the next engine")
    children = {pid for task in os.listdir("/proc/self/task") for pid in _children(task)}
    assert [pid for pid in children if "kvpoll_mooncake.child" in raw.command_of(pid)] == [raw.receiving_pid(side)]
    transport.close()
    os.close(fd)


def _children(task: str) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{task}/children").read_text().split()]


def test_an_engine_that_never_stops_talking_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = process._Errors("engine")
    monkeypatch.setattr(process.os, "read", lambda fd, nbytes: b"E something failed\n" * 100)
    assert errors.read() is False
    assert errors.last() == "E something failed | E something failed"


def test_what_an_engine_says_does_not_show_a_password(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    errors = process._Errors("engine")
    said = [b"E " + b"x" * 270 + b" cannot reach http://me:hun", b"ter2@h:1/x\n", b""]
    monkeypatch.setattr(process.os, "read", lambda fd, nbytes: said.pop(0))
    assert errors.read() is True
    assert errors.last().endswith("http://(hidden")
    monkeypatch.setattr(process.os, "read", lambda fd, nbytes: b"E cannot reach http://me:hunter2@h:1/x: refused\n")
    errors.read()
    assert errors.last().endswith("E cannot reach http://(hidden)@h:1/x: refused")
    assert "hun" not in caplog.text


def test_every_signal_has_a_name() -> None:
    assert [process._name_of(number) for number in (9, 40)] == ["SIGKILL", "signal 40"]


# Engines in this process


@pytest.fixture
def hosted() -> Iterator[Pair]:
    before = set(threading.enumerate())
    pair = Pair(
        Side(MooncakeTransport(engine="host"), filled=True, shared=False),
        Side(MooncakeTransport(engine="host", stall_s=1.0), shared=False),
    )
    yield pair
    pair.close()
    assert set(threading.enumerate()) <= before


@raw.needs_mooncake
def test_engines_in_threads_of_this_process(hosted: Pair) -> None:
    """They move the same bytes, and a fence ends the one that receives as well."""
    link = hosted.tx.connect(hosted.rx)
    token, spare = hosted.rx.grant(), hosted.rx.grant()
    writes = [Write(0, 3, 5, 4_000_000), Write(1, 0, 7, 1000)]
    hosted.done(link.submit(writes, token))
    same(writes, hosted.tx, hosted.rx)
    hosted.rx.paint(b"\0")
    tickets = [link.submit(HUGE, token) for _ in range(6)]
    hosted.until(lambda: hosted.rx.arenas[0][0] == hosted.tx.arenas[0][0], "the first byte")
    hosted.fence(token)
    hosted.rx.arenas[0][:] = CANARY * SIZES[0]
    for end in hosted.ended(*tickets):
        assert isinstance(end, Done) or end.quiescent
    hosted.done(link.submit([Write(1, 0, 0, 100)], hosted.rx.grant(Range(1, 0, 100))))
    assert hosted.rx.arenas[0][:] == CANARY * SIZES[0]
    cancelled = [link.submit(HUGE, spare) for _ in range(3)]
    for ticket in cancelled:
        link.cancel(ticket)
    for end in hosted.ended(*cancelled):
        assert isinstance(end, Done) or (end.quiescent and end.source_free)
    assert not raw.sending_pid(link) or raw.sending_pid(link) == os.getpid()
    assert any("receiving engine" in thread.name for thread in threading.enumerate())


@raw.needs_mooncake
def test_memory_of_the_engine_cannot_be_given_to_a_child() -> None:
    transport = MooncakeTransport(engine="child")
    transport.start()
    with pytest.raises(TransportUnavailable, match="region 0 is not in shared memory") as caught:
        transport.register(Region(0, memoryview(bytearray(4096))))
    assert "engine='host'" in caught.value.hint
    transport.close()
