"""What somebody who reaches the adapter's port cannot do."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import msgspec
import pytest

from kvpoll_common.handshake import said_in
from kvpoll_fsm.errors import InvalidInput, TransportUnavailable
from kvpoll_fsm.spi import Range, Write
from kvpoll_fsm.testing.conformance.sides import SIZES, Pair, Side, untouched
from kvpoll_mooncake import MooncakeTransport, handshake, wire
from kvpoll_mooncake.framing import LENGTH
from kvpoll_mooncake.keeper import OUT_OF_RANGE, UNKNOWN_TOKEN
from tests.transports import mooncake_raw as raw
from tests.transports import raw as by_hand

pytestmark = raw.needs_mooncake


@pytest.fixture(scope="module")
def rx() -> Iterator[Side]:
    side = Side(MooncakeTransport(max_strangers=3, connect_s=1.0))
    yield side
    untouched(side)
    side.close()


@pytest.fixture
def writer(rx: Side) -> Iterator[raw.Writer]:
    writer = raw.Writer(rx.transport)
    yield writer
    writer.close()


def refusals(rx: Side) -> int:
    return sum(rx.transport.refused().values())  # type: ignore[attr-defined]


def is_turned_away(rx: Side, writer: raw.Writer, before: int) -> None:
    while writer.hear() is not None:
        pass
    rx.until(lambda: refusals(rx) > before, "the count")


def ask(ticket: int, token: bytes, *ranges: wire.Range) -> wire.Ask:
    return wire.Ask(ticket, token, wire.pack_ranges(ranges or [(0, 0, 1)]))


def test_one_who_does_not_know_the_secret(rx: Side, writer: raw.Writer) -> None:
    before = refusals(rx)
    writer.introduce()
    writer.prove(b"s" * 32)
    is_turned_away(rx, writer, before)


def test_ones_own_proof_played_back(rx: Side, writer: raw.Writer) -> None:
    before = refusals(rx)
    writer.introduce()
    other = raw.Writer(rx.transport)
    other.introduce()
    writer.hellos = other.hellos
    writer.prove()
    is_turned_away(rx, writer, before)
    other.close()


def test_the_other_sides_proof(rx: Side, writer: raw.Writer) -> None:
    before = refusals(rx)
    writer.introduce()
    writer.prove(role=b"kvpoll-mooncake receiver")
    is_turned_away(rx, writer, before)


@pytest.mark.parametrize("change", [{"version": 2}, {"incarnation": b"i" * 16}])
def test_one_who_means_another(rx: Side, writer: raw.Writer, change: dict[str, object]) -> None:
    before = refusals(rx)
    writer.introduce(**change)
    is_turned_away(rx, writer, before)


@pytest.mark.parametrize(
    "frame", [b"", b"garbage", b"\x92\x01", wire.encode(wire.Ping()), wire.encode(wire.Sound(1)), b"\xff" * 60_000]
)
def test_one_who_does_not_say_hello(rx: Side, writer: raw.Writer, frame: bytes) -> None:
    before = refusals(rx)
    writer.say(frame)
    is_turned_away(rx, writer, before)


def test_a_frame_that_is_too_long(rx: Side, writer: raw.Writer) -> None:
    before = refusals(rx)
    writer.socket.sendall(LENGTH.pack(wire.FRAME_NBYTES + 1))
    is_turned_away(rx, writer, before)


def test_one_who_says_nothing(rx: Side, writer: raw.Writer) -> None:
    before = refusals(rx)
    is_turned_away(rx, writer, before)


def test_more_strangers_than_there_may_be(rx: Side) -> None:
    before = refusals(rx)
    strangers = [raw.Writer(rx.transport) for _ in range(4)]
    is_turned_away(rx, strangers[0], before)
    strangers[-1].join()
    for stranger in strangers:
        stranger.close()


@pytest.mark.parametrize(
    "message",
    [
        wire.Go(1, 1),
        wire.No(1, "no"),
        wire.Gone(1, (), False),
        wire.Opening(b"p" * 32),
        wire.Ask(1, b"t" * 16, b"r" * 17),
        wire.Ask(1, b"t" * 16, bytes(16)),
        b"nonsense",
    ],
)
def test_one_who_breaks_the_rules_later(rx: Side, writer: raw.Writer, message: wire.Message | bytes) -> None:
    before = refusals(rx)
    writer.join()
    writer.say(message)
    is_turned_away(rx, writer, before)


def test_one_who_asks_twice_for_a_ticket(rx: Side, writer: raw.Writer) -> None:
    before = refusals(rx)
    writer.join()
    token = rx.grant()
    writer.say(ask(1, token), ask(1, token))
    assert isinstance(writer.hear(), wire.Go)
    is_turned_away(rx, writer, before)


def test_what_is_not_granted_is_not_admitted(rx: Side, writer: raw.Writer) -> None:
    writer.join()
    token = rx.grant(Range(0, 100, 50))
    cases = [
        (ask(1, b"t" * 16), UNKNOWN_TOKEN),
        (ask(2, token, (0, 99, 2)), OUT_OF_RANGE),
        (ask(3, token, (0, 100, 10), (0, 149, 2)), OUT_OF_RANGE),
        (ask(4, token, (1, 100, 1)), OUT_OF_RANGE),
        (ask(5, rx.grant(), (0, SIZES[0] - 1, 2)), OUT_OF_RANGE),
    ]
    for message, reason in cases:
        writer.say(message)
        answer = writer.hear()
        assert isinstance(answer, wire.No)
        assert (answer.ticket, answer.reason) == (message.ticket, reason)
    writer.say(ask(6, token, (0, 100, 50)))
    assert writer.hear() == wire.Go(6, 1)
    writer.say(wire.Over(6, quiescent=True), wire.Over(77, quiescent=False), wire.Doubt(1), wire.Doubt(99))
    assert writer.hear() == wire.Sound(1)
    rx.transport.revoke(token)
    writer.say(ask(7, token, (0, 100, 50)))
    assert writer.hear() == wire.No(7, UNKNOWN_TOKEN)


def test_a_token_is_its_first_writers(rx: Side, writer: raw.Writer) -> None:
    writer.join()
    token = rx.grant()
    writer.say(ask(1, token))
    assert writer.hear() == wire.Go(1, 1)
    thief = raw.Writer(rx.transport)
    thief.introduce(writer=b"x" * 16)
    thief.prove()
    thief.hear(), thief.hear()
    thief.say(ask(1, token))
    assert thief.hear() == wire.No(1, UNKNOWN_TOKEN)
    thief.close()
    writer.say(wire.Over(1, quiescent=True))


def test_a_writer_that_goes_leaves_its_token_to_the_fence() -> None:
    """Nobody knows what it had under way: the engine is killed, which ends that."""
    rx = Side(MooncakeTransport())
    writer = raw.Writer(rx.transport)
    engine = writer.join()
    token, other = rx.grant(), rx.grant()
    writer.say(ask(1, token))
    assert isinstance(writer.hear(), wire.Go)
    writer.close()
    pid = raw.receiving_pid(rx)
    fence = rx.transport.fence(other)
    rx.until(lambda: fence in rx.fenced, "the fence of a token at rest")
    assert raw.is_alive(pid)
    fence = rx.transport.fence(token)
    rx.until(lambda: fence in rx.fenced, "the fence")
    assert not raw.is_alive(pid)
    again = raw.Writer(rx.transport)
    again.introduce()
    again.prove()
    assert isinstance(again.hear(), wire.Opening)
    rx.until(lambda: raw.receiving_pid(rx), "the next engine")
    news = again.hear()
    assert isinstance(news, wire.Engine)
    assert news.number == engine.number + 1
    again.close()
    rx.close()


def test_a_destination_outside_the_receivers_memory_is_refused_by_its_engine(rx: Side) -> None:
    """Should an adapter allow what it has not: Mooncake's words are in the reason."""
    writer = raw.Writer(rx.transport)
    engine = writer.join()
    writer.close()
    beyond = wire.Engine(
        1, engine.segment, tuple(wire.Base(b.region, b.address + (1 << 32), b.nbytes) for b in engine.bases)
    )

    def act(peer: raw.Peer) -> None:
        peer.say(beyond)
        message = peer.hear()
        assert isinstance(message, wire.Ask)
        peer.say(wire.Go(message.ticket, 1))
        assert isinstance(peer.hear(), wire.Doubt)
        peer.say(wire.Sound(1))

    liar = raw.Impostor(act)
    tx = Side(MooncakeTransport(), filled=True)
    link = tx.transport.connect(liar.descriptor, [])
    ticket = link.submit([Write(0, 0, 0, 1000)], b"t" * 16)
    end = Pair(tx, rx).failed(ticket)
    assert (end.quiescent, end.source_free, end.collateral) == (False, True, False)
    assert "Mooncake failed a write" in end.reason
    assert "tcp_transport" in end.reason
    liar.close()
    tx.close()


def test_a_peer_whose_engines_speak_otherwise(rx: Side) -> None:
    for change, word in ({"protocol": "rdma"}, "speak rdma"), ({"metadata": "etcd://h:1"}, "found through etcd"):
        with pytest.raises(TransportUnavailable, match=word):
            rx.transport.connect(raw.changed(rx.transport, **change), rx.regions)
    for change in {"version": 9}, {"host": "example.org"}, {"secret": b"short"}:
        with pytest.raises(InvalidInput):
            rx.transport.connect(raw.changed(rx.transport, **change), rx.regions)


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_receiver_that_does_not_know_the_secret_is_asked_nothing(mirrored: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        host, port = listening.getsockname()
        identity = handshake.new_identity(host, port, "tcp", "P2PHANDSHAKE")
        tx = Side(MooncakeTransport(protocol="tcp"), filled=True)
        link = tx.transport.connect(msgspec.msgpack.encode(identity), [])
        link.submit([Write(0, 0, 0, 10)], b"t" * 16)
        impostor = raw.Peer(listening.accept()[0])
        impostor.hear()
        impostor.say(wire.Opening(by_hand.hello(identity.incarnation, magic=wire.KIND.magic)))
        proof = said_in(impostor.hear())
        impostor.say(wire.Opening(proof if mirrored else b"p" * 32))
        assert impostor.hear() is None
        tx.until(lambda: raw.reasons(tx, link), "the link to go down")
        assert "does not know the peer's secret" in raw.reasons(tx, link)[0]
        impostor.close()
        tx.close()
