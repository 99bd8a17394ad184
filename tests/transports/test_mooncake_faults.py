"""What goes wrong with Mooncake: each ends in time and says why, and hurts nobody else."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator

import msgspec
import pytest

from kvpoll_fsm.errors import KvpollError
from kvpoll_fsm.spi import Done, Range, Write
from kvpoll_fsm.testing.conformance.sides import CANARY, HUGE, MIB, SIZES, Pair, Side, footprint, same, until
from kvpoll_mooncake import MooncakeTransport, wire
from tests.transports import mooncake_raw as raw

pytestmark = raw.needs_mooncake

QUICK = {"stall_s": 1.5, "answer_s": 1.5, "connect_s": 1.5, "probe_s": 1.5}
"""Deadlines that a test can wait for."""


def new_side(filled: bool = False) -> Side:
    return Side(MooncakeTransport(**QUICK), filled=filled)


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair(new_side(filled=True), new_side())
    yield pair
    pair.close()


@pytest.fixture
def bystander(pair: Pair) -> Iterator[Pair]:
    """Another receiver of the same sender, and a write that lands there whatever becomes of the first one."""
    other = Pair(pair.tx, new_side())
    link = other.tx.connect(other.rx)
    other.up(link)
    yield other
    # It went on as if nothing had been: over the link that was made before.
    assert pair.tx.links[link.number] == [True]
    other.done(link.submit([Write(0, 0, 0, MIB)], other.rx.grant()))
    same([Write(0, 0, 0, MIB)], pair.tx, other.rx)
    other.rx.close()


class Calm(Pair):
    """A pair and a bystander that nothing happens to, for tests in which somebody else is the trouble."""

    def __init__(self) -> None:
        super().__init__(new_side(filled=True), new_side())
        self.bystander = Pair(self.tx, new_side())
        self.link = self.tx.connect(self.bystander.rx)
        self.bystander.up(self.link)

    def reset(self) -> None:
        for side in (self.tx, self.rx, self.bystander.rx):
            side.forget()
        for side in (self.rx, self.bystander.rx):
            side.paint(b"\0")

    def check(self) -> None:
        """The bystander went on as if nothing had been, over the link that was made before."""
        assert self.link.number not in self.tx.links
        self.bystander.done(self.link.submit([Write(0, 0, 0, MIB)], self.bystander.rx.grant()))
        same([Write(0, 0, 0, MIB)], self.tx, self.bystander.rx)


@pytest.fixture(scope="module")
def kept() -> Iterator[Calm]:
    calm = Calm()
    yield calm
    calm.bystander.rx.close()
    calm.close()


@pytest.fixture
def calm(kept: Calm) -> Iterator[Calm]:
    kept.reset()
    yield kept
    kept.check()


def first_byte(pair: Pair) -> None:
    pair.until(lambda: pair.rx.arenas[0][0] == pair.tx.arenas[0][0], "the first byte")


# Peers that are not there, or do not answer


def test_nobody_listens_where_the_adapter_was(calm: Pair) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    link, reason = raw.down(calm.tx, raw.changed(calm.rx.transport, port=port))
    assert "Connection refused" in reason
    assert calm.failed(link.submit([Write(0, 0, 0, 1)], calm.rx.grant())).quiescent


def test_another_process_answers_at_the_adapters_port(calm: Pair) -> None:
    _, reason = raw.down(calm.tx, raw.changed(calm.rx.transport, incarnation=b"i" * 16))
    assert "another transport answers" in reason
    _, reason = raw.down(calm.tx, raw.changed(calm.rx.transport, secret=b"s" * 32))
    assert "ended the connection" in reason
    assert sum(calm.rx.transport.refused().values()) == 2  # type: ignore[attr-defined]


def test_an_adapter_that_accepts_and_says_nothing(calm: Pair) -> None:
    mute = raw.Impostor(lambda peer: None, speaks=False)
    _, reason = raw.down(calm.tx, mute.descriptor)
    assert "did not answer within 1.5 s" in reason
    mute.close()


def test_an_adapter_that_has_no_engine_and_falls_silent(calm: Pair) -> None:
    silent = raw.Impostor(lambda peer: None)
    _, reason = raw.down(calm.tx, silent.descriptor)
    assert "silent for 1.5 s" in reason
    silent.close()


def test_an_engine_that_never_existed(calm: Pair) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    liar = raw.Impostor(lambda peer: peer.say(raw.engine_at(port)))
    link, reason = raw.down(calm.tx, liar.descriptor)
    assert "the receiver's engine cannot be reached" in reason
    assert calm.failed(link.submit([Write(0, 0, 0, 1)], b"t" * 16)).quiescent
    liar.close()


def test_an_engine_that_accepts_and_never_answers(calm: Pair) -> None:
    """Mooncake itself would wait for 61 s, and everybody with it."""
    with socket.create_server(("127.0.0.1", 0)) as hung:
        liar = raw.Impostor(lambda peer: peer.say(raw.engine_at(hung.getsockname()[1])))
        _, reason = raw.down(calm.tx, liar.descriptor)
        assert "did not answer a probe within 1.5 s" in reason
        liar.close()


def test_an_adapter_that_is_silent_when_asked(calm: Pair) -> None:
    writer = raw.Writer(calm.rx.transport)
    engine = writer.join()
    writer.close()
    silent = raw.Impostor(lambda peer: peer.say(engine))
    link = calm.tx.transport.connect(silent.descriptor, [])
    calm.up(link)
    end = calm.failed(link.submit([Write(0, 0, 0, 1)], b"t" * 16))
    assert end.quiescent
    assert "silent for 1.5 s" in end.reason
    assert any(isinstance(message, wire.Ping) for message in silent.heard)
    silent.close()


@pytest.mark.parametrize("lie", ["engine", "number", "nonsense"])
def test_an_adapter_that_lies(calm: Pair, lie: str) -> None:
    """Nothing is written that its own words do not cover."""
    writer = raw.Writer(calm.rx.transport)
    engine = writer.join()
    writer.close()

    def act(peer: raw.Peer) -> None:
        peer.say(wire.Engine(engine.number, engine.segment, engine.bases[1:]) if lie == "engine" else engine)
        ask = peer.hear()
        assert isinstance(ask, wire.Ask)
        number = engine.number + (lie == "number")
        peer.say(b"nonsense" if lie == "nonsense" else wire.Go(ask.ticket, number))

    liar = raw.Impostor(act)
    link = calm.tx.transport.connect(liar.descriptor, [])
    calm.up(link)
    assert calm.failed(link.submit([Write(0, 0, 0, 1)], b"t" * 16)).quiescent
    same([], calm.tx, calm.rx)
    liar.close()


def test_idle_connections_on_the_engines_port(calm: Pair) -> None:
    """They keep a first contact waiting for 15 s; we do not wait for it so long, and it works once they are gone."""
    writer = raw.Writer(calm.rx.transport)
    host, _, port = writer.join().segment.rpartition(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(3)]
    link = calm.tx.connect(calm.rx)
    calm.until(lambda: calm.tx.links.get(link.number), "the link to come up or go down")
    for sock in idle:
        sock.close()
    writer.close()
    _reach_again(calm)


def _reach_again(pair: Pair) -> None:
    """Write over new links until one works."""

    def try_again() -> bool:
        link = pair.tx.connect(pair.rx)
        token = pair.rx.grant()
        (end,) = pair.calm(token, link.submit([Write(1, 0, 0, 100)], token))
        return isinstance(end, Done)

    until(try_again, "a write to get through")
    assert pair.rx.arenas[1][:100] == pair.tx.arenas[1][:100]


# Engines that are killed or stopped


@pytest.mark.parametrize("when", ["before", "between", "mid"])
def test_the_receiving_engine_is_killed(pair: Pair, bystander: Pair, when: str) -> None:
    """Its adapter has the next one soon; what was under way has ended quiescent."""
    first = raw.receiving_pid(pair.rx)
    if when == "before":
        os.kill(first, signal.SIGKILL)
    link = pair.tx.connect(pair.rx)
    pair.up(link)
    token = pair.rx.grant()
    if when == "mid":
        tickets = [link.submit(HUGE, token) for _ in range(4)]
        first_byte(pair)
        os.kill(first, signal.SIGKILL)
        for end in pair.ended(*tickets):
            assert isinstance(end, Done) or (end.quiescent and end.source_free and not end.collateral), end
    elif when == "between":
        pair.done(link.submit([Write(0, 0, 0, 10)], token))
        os.kill(first, signal.SIGKILL)
    pair.until(lambda: raw.receiving_pid(pair.rx) not in (0, first), "the next engine")
    fresh = pair.rx.grant()
    pair.rx.arenas[0][:] = CANARY * SIZES[0]
    pair.done(link.submit([Write(0, 1, 1, 1000)], fresh))
    assert pair.rx.arenas[0][:1002] == CANARY + pair.tx.arenas[0][1:1001] + CANARY
    assert pair.tx.links[link.number] == [True]


def test_the_receiving_engine_is_stopped_before_first_contact(pair: Pair, bystander: Pair) -> None:
    pid = raw.receiving_pid(pair.rx)
    raw.stop(pid)
    link = pair.tx.connect(pair.rx)
    pair.until(lambda: pair.tx.links.get(link.number) == [False], "the link to go down")
    assert any("did not answer a probe" in reason for reason in raw.reasons(pair.tx, link))
    os.kill(pid, signal.SIGCONT)
    _reach_again(pair)


def test_a_receiving_engine_that_hangs_before_first_contact_is_replaced(pair: Pair) -> None:
    """Nothing was under way there, so only the writer's probe can show it."""
    pid = raw.receiving_pid(pair.rx)
    raw.stop(pid)
    link = pair.tx.connect(pair.rx)
    pair.until(lambda: pair.tx.links.get(link.number) == [False], "the link to go down")
    link.close()
    pair.until(lambda: not raw.is_alive(pid), "the engine's end")
    _reach_again(pair)


def test_the_receiving_engine_is_stopped_after_first_contact(pair: Pair, bystander: Pair) -> None:
    """The ticket ends by the stall deadline; its adapter finds the engine dead, ends it, and then nothing can land."""
    link = pair.tx.connect(pair.rx)
    pair.up(link)
    pair.done(link.submit([Write(1, 0, 0, 100)], pair.rx.grant()))
    pid = raw.receiving_pid(pair.rx)
    raw.stop(pid)
    ticket = link.submit(HUGE, pair.rx.grant())
    end = pair.failed(ticket)
    assert (end.quiescent, end.source_free, end.collateral) == (False, True, False)
    assert "no progress within 1.5 s" in end.reason
    pair.until(lambda: ticket in pair.tx.quiesced, "the ticket to come to rest")
    assert not raw.is_alive(pid)
    pair.rx.arenas[0][:] = CANARY * SIZES[0]
    _reach_again(pair)
    assert pair.rx.arenas[0][:] == CANARY * SIZES[0]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_sending_engine_is_killed_or_stopped(pair: Pair, bystander: Pair, how: signal.Signals) -> None:
    """Its tickets end and read their source no more; what is on its way lands before a fence or never."""
    link = pair.tx.connect(pair.rx)
    pair.up(link)
    token = pair.rx.grant()
    tickets = [link.submit(HUGE, token) for _ in range(16)]
    first_byte(pair)
    pid = raw.sending_pid(link)
    os.kill(pid, how)
    ends = pair.ended(*tickets)
    bad = [end for end in ends if not isinstance(end, Done)]
    assert bad
    assert all(end.source_free for end in bad)
    assert next(end.collateral for end in bad) is False
    pair.until(lambda: not raw.is_alive(pid), "the engine's end")
    pair.fence(token)
    pair.rx.arenas[0][:] = CANARY * SIZES[0]
    pair.until(lambda: all(end.quiescent or end.ticket in pair.tx.quiesced for end in bad), "the tickets' rest")
    pair.done(link.submit([Write(1, 0, 0, 100)], pair.rx.grant()))
    assert pair.rx.arenas[0][:] == CANARY * SIZES[0]


def test_a_fence_ends_the_tickets_of_others_as_collateral(pair: Pair, bystander: Pair) -> None:
    link = pair.tx.connect(pair.rx)
    other = Pair(new_side(filled=True), pair.rx)
    second = other.tx.connect(pair.rx)
    pair.up(link)
    other.up(second)
    mine = [pair.rx.grant(Range(0, 0, 4 * MIB)) for _ in range(2)]
    tickets = [link.submit(HUGE, mine[n % 2]) for n in range(8)]
    theirs = [second.submit(HUGE, pair.rx.grant(Range(0, 0, 4 * MIB))) for _ in range(8)]
    first_byte(pair)
    before = raw.receiving_pid(pair.rx)
    pair.fence(mine[0])
    pair.rx.arenas[0][:] = CANARY * SIZES[0]
    for number, end in enumerate(pair.ended(*tickets)):
        assert isinstance(end, Done) or (end.quiescent and end.collateral is bool(number % 2)), end
    for end in other.ended(*theirs):
        assert isinstance(end, Done) or (end.quiescent and end.collateral), end
    assert not all(isinstance(end, Done) for end in (*pair.ended(*tickets), *other.ended(*theirs)))
    assert pair.rx.arenas[0][:] == CANARY * SIZES[0]
    pair.until(lambda: raw.receiving_pid(pair.rx) not in (0, before), "the next engine")
    other.done(second.submit([Write(1, 0, 0, 9)], pair.rx.grant()))
    pair.done(link.submit([Write(1, 9, 9, 9)], pair.rx.grant()))
    assert pair.tx.links[link.number] == other.tx.links[second.number] == [True]
    other.tx.close()


def test_a_fence_of_a_token_that_is_at_rest_hurts_nobody(pair: Pair) -> None:
    link = pair.tx.connect(pair.rx)
    pair.up(link)
    token, other = pair.rx.grant(Range(1, 0, 10)), pair.rx.grant(Range(0, 0, SIZES[0]))
    pair.done(link.submit([Write(1, 0, 0, 10)], token))
    tickets = [link.submit(HUGE, other) for _ in range(4)]
    first_byte(pair)
    before = raw.receiving_pid(pair.rx)
    pair.fence(token)
    pair.done(*tickets)
    assert raw.receiving_pid(pair.rx) == before


def test_the_next_engine_has_its_memory_elsewhere(pair: Pair) -> None:
    """What was meant for the one before is refused there, should it come to the same port."""
    pieces: list[tuple[int, int]] = []
    for _ in range(4):
        writer = raw.Writer(pair.rx.transport)
        engine = writer.join()
        writer.close()
        for base in engine.bases:
            start, end = base.address, base.address + base.nbytes
            assert all(end <= other or start >= other_end for other, other_end in pieces)
            pieces.append((start, end))
        os.kill(raw.receiving_pid(pair.rx), signal.SIGKILL)
        pair.until(lambda old=engine.number: _current(pair.rx) not in (0, old), "the next engine")


def _current(side: Side) -> int:
    engine = side.transport._inside.keeper.current  # type: ignore[attr-defined]
    return 0 if engine is None else int(engine.number)


# Crowds


def test_more_transfers_at_once_than_mooncake_takes(pair: Pair) -> None:
    """8,192 of them; from about 2,048 on it would refuse some and carry on with the rest."""
    link = pair.tx.connect(pair.rx)
    token = pair.rx.grant()
    writes = [[Write(0, 64 * (1024 * n + k), 64 * (8192 - 1024 * n - k), 33) for k in range(1024)] for n in range(8)]
    pair.done(*[link.submit(each, token) for each in writes])
    same([write for each in writes for write in each], pair.tx, pair.rx)


def test_more_peers_than_there_may_be_senders(pair: Pair) -> None:
    tx = Side(MooncakeTransport(max_senders=1), filled=True)
    first = Pair(tx, pair.rx)
    link = tx.connect(pair.rx)
    first.up(link)
    second = tx.connect(pair.rx)
    tx.until(lambda: raw.reasons(tx, second), "the news")
    assert "max_senders" in raw.reasons(tx, second)[0]
    link.close()
    second.close()
    first.until(lambda: link.lane.is_over, "the first one's end")  # type: ignore[attr-defined]
    third = tx.connect(pair.rx)
    first.done(third.submit([Write(0, 0, 0, 1)], pair.rx.grant()))
    tx.close()


def test_many_regions() -> None:
    sizes = [4096 + number for number in range(150)]
    pair = Pair(Side(MooncakeTransport(), sizes=sizes, filled=True), Side(MooncakeTransport(), sizes=sizes))
    link = pair.tx.connect(pair.rx)
    writes = [Write(number, number, 0, 1000) for number in range(150)]
    pair.done(link.submit(writes, pair.rx.grant()))
    same(writes, pair.tx, pair.rx)
    pair.close()


# Addresses


def test_ports_are_in_their_range() -> None:
    side = Side(MooncakeTransport(engine_ports=(22_000, 22_100), data_ports=(22_200, 22_300)))
    descriptor = msgspec.msgpack.decode(side.transport.descriptor())
    assert 22_200 <= descriptor["port"] <= 22_300
    ports = raw.listening_ports(raw.receiving_pid(side))
    assert len(ports) == 2
    assert all(22_000 <= port <= 22_100 for port in ports)
    side.close()


def test_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    pair = Pair(Side(MooncakeTransport(host="::1"), filled=True), Side(MooncakeTransport(host="::1")))
    link = pair.tx.connect(pair.rx)
    pair.done(link.submit([Write(0, 1, 2, 3 * MIB)], pair.rx.grant()))
    same([Write(0, 1, 2, 3 * MIB)], pair.tx, pair.rx)
    pair.close()


# The end


def test_a_thread_of_ours_that_fails_takes_its_engines_along() -> None:
    before = footprint()
    pair = Pair(new_side(filled=True), new_side())
    link = pair.tx.connect(pair.rx)
    pair.up(link)
    pids = [raw.receiving_pid(pair.tx), raw.sending_pid(link)]
    loop = pair.tx.transport._loop  # type: ignore[attr-defined]
    loop.post(lambda: 1 / 0)
    until(lambda: loop.failure is not None, "the thread's end")
    with pytest.raises(KvpollError, match="thread failed"):
        pair.tx.transport.completions()
    with pytest.raises(KvpollError, match="thread failed"):
        pair.tx.close()
    assert not any(map(raw.is_alive, pids))
    for arena in pair.tx.arenas:
        arena.close()
    pair.rx.close()
    for fd in pair.tx._fds:
        os.close(fd)
    assert footprint() == before


def test_engines_end_with_their_adapter() -> None:
    pair = Pair(new_side(filled=True), new_side())
    link = pair.tx.connect(pair.rx)
    pair.up(link)
    pids = [raw.receiving_pid(pair.tx), raw.receiving_pid(pair.rx), raw.sending_pid(link)]
    assert all(map(raw.is_alive, pids))
    raw.stop(pids[1])
    pair.close()
    assert not any(map(raw.is_alive, pids))
