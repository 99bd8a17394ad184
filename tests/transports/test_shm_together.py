"""Orders of shm that are submitted together travel together, and so do their ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpoll_fsm import BlockPool, Deadlines, Endpoint, Field, Layout
from kvpoll_fsm.jobs import SMALL_NBYTES
from kvpoll_fsm.spi import Done, Failed, Gathers, Link, Write
from kvpoll_fsm.testing.conformance.sides import Pair, Side
from kvpoll_shm import ShmTransport, wire
from kvpoll_shm.pipe import Pipe
from tests.transports.shm_raw import Gate


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair(Side(ShmTransport(), filled=True), Side(ShmTransport()))
    yield pair
    pair.close()


def up(pair: Pair) -> Link:
    link = pair.tx.connect(pair.rx)
    pair.up(link)
    return link


def flush(pair: Pair) -> None:
    assert isinstance(pair.tx.transport, Gathers)
    pair.tx.transport.flush()


def test_orders_of_one_turn_go_together_and_so_do_their_ends(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    link, token, gate, sent = up(pair), pair.rx.grant(), Gate(monkeypatch), []
    send = Pipe.send

    def noted(self: Pipe, packet: bytes, fds: Sequence[int] = ()) -> None:
        sent.append(type(wire.decode(packet)).__name__)
        send(self, packet, fds)

    monkeypatch.setattr(Pipe, "send", noted)
    flush(pair)
    tickets = [link.submit([Write(0, at, at, 100)], token) for at in range(0, 1000, 100)]
    assert sent == []
    flush(pair)
    assert gate.reached.wait(20)
    gate.opened.set()
    pair.done(*tickets)
    assert sent == ["Orders", "Ends"]
    assert pair.rx.arenas[0][:1001] == pair.tx.arenas[0][:1000] + b"\0"


def test_what_is_kept_can_be_cancelled(pair: Pair) -> None:
    link = up(pair)
    flush(pair)
    first, second = (link.submit([Write(0, 0, at, 100)], pair.rx.grant()) for at in (0, 100))
    link.cancel(first)
    flush(pair)
    assert pair.ended(first, second) == [Failed(first, "cancelled", quiescent=True), Done(second)]
    assert pair.rx.arenas[0][:101] == bytes(100) + pair.tx.arenas[0][:1]


def test_who_asks_for_completions_has_everything_sent(pair: Pair) -> None:
    link = up(pair)
    flush(pair)
    pair.done(link.submit([Write(0, 0, 0, 100)], pair.rx.grant()))


def test_orders_that_wait_for_a_worker_wait_for_nothing_else() -> None:
    """No message, timer or heartbeat comes after the worker's answer and would have them sent by chance."""
    layout = Layout(block_tokens=1, fields=[Field("x", "uint8", (2 * SMALL_NBYTES,))])
    deadlines = Deadlines(heartbeat_s=50, peer_lost_s=200, stall_s=40)
    tx, rx = (
        Endpoint(pool=BlockPool(layout, blocks=1), transports="shm", isolation="thread", deadlines=deadlines)
        for _ in range(2)
    )
    with tx, rx:
        for number in range(6):
            sender, receiver = tx.sender(number), rx.receiver(number, peer=tx.address, tokens=1)
            sender.send({"x": np.full((1, 2 * SMALL_NBYTES), number, np.uint8)})
            assert (receiver.result(20)["x"] == number).all()
            for room in (sender, receiver):
                room.clear()


@given(st.lists(st.integers(1, wire.MAX_ENTRIES), min_size=1, max_size=40))
def test_orders_are_packed_into_packets_that_can_be_read(counts: list[int]) -> None:
    entry = wire.pack_entries([Write(1, 2, 3, 4)])
    orders = [wire.Order((1 << 63) - 1 - n, b"t" * 16, entry * count) for n, count in enumerate(counts)]
    packets = [wire.encode(message) for message in wire.pack_orders(orders)]
    assert all(len(packet) <= wire.PACKET_NBYTES for packet in packets)
    read: list[wire.Order] = []
    for packet in packets:
        message = wire.decode(packet)
        assert isinstance(message, (wire.Order, wire.Orders))
        read += [message] if isinstance(message, wire.Order) else message.orders
    assert read == orders
