"""Whatever is thrown at the ports of a live endpoint changes nothing of the transfer that is under way."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
import zmq

from kvpoll_fsm import Address
from kvpoll_fsm.messages import MAX_PACKET_NBYTES, Hello, encode
from kvpoll_fsm.security import generate_keys
from tests.faults.harness import BIG, BIG_PART_NBYTES, GRANT, PATIENT, Cluster, Worker, arrive, join, through, transfer
from tests.faults.proxy import Proxy

SEED = 20250101
STRANGERS = 40
"""More silent connections than the tcp transport keeps at a time."""
ZMTP = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00NULL" + bytes(48)


def _raw() -> Iterator[bytes]:
    """Bytes for any port: nothing, noise, half a greeting, a greeting and noise, another protocol."""
    noise = random.Random(SEED)
    yield b""
    yield noise.randbytes(1)
    yield noise.randbytes(100_000)
    yield ZMTP[:10]
    yield ZMTP + b"\x04\xff" + noise.randbytes(500)
    yield ZMTP + b"\x02" + struct.pack(">Q", (1 << 63) - 1) + noise.randbytes(500)
    yield b"GET / HTTP/1.1\r\n\r\n"
    yield b"KVPOLTCP" + struct.pack("<H", 99) + noise.randbytes(48)
    yield b"KVPOLTCP" + struct.pack("<H", 1) + noise.randbytes(48 + 32 + 4096)
    yield (b"KVPOLTCP" + struct.pack("<H", 1) + noise.randbytes(48))[:30]


def _packets(genuine: list[bytes]) -> Iterator[list[bytes]]:
    """Messages for a control port: none of ours, nearly ours, and ours from before."""
    noise = random.Random(SEED)
    yield [b""]
    yield [b"a", b"b", b"c"]
    yield [noise.randbytes(1000)]
    yield [bytes(MAX_PACKET_NBYTES + 1)]
    yield [msgspec.msgpack.encode({"kind": "Nonsense"})]
    yield [msgspec.msgpack.encode({"kind": "Frame", "source": b"short", "target": bytes(16), "outgoing": True})]
    yield [b"\x81" * 5000]
    yield [encode(Hello(incarnation=noise.randbytes(16), min_version=90, max_version=99))]
    yield [encode(Hello(incarnation=bytes(16), min_version=0, max_version=99))]
    for packet in genuine:
        yield [packet]
        yield [packet[: len(packet) // 2]]
    for packet in reversed(genuine):
        yield [packet]


def throw_bytes(port: int, pieces: Iterable[bytes]) -> None:
    """Send each over a connection of its own."""
    for piece in pieces:
        with socket.create_connection(("127.0.0.1", port)) as sock:
            try:
                sock.sendall(piece)
                sock.shutdown(socket.SHUT_WR)
            except OSError:
                continue  # thrown out before it was over


def throw_packets(context: zmq.Context[zmq.Socket[bytes]], address: str, genuine: list[bytes]) -> None:
    """Send each to a control port. Whatever zmq itself ends the connection for comes in good company twice."""
    for packets in (_packets(genuine), _packets([])):
        with context.socket(zmq.DEALER) as dealer:
            dealer.setsockopt(zmq.LINGER, 2000)
            dealer.connect(Address.parse(address).place)
            for parts in packets:
                dealer.send_multipart(parts)


def recorded(worker: Worker) -> list[bytes]:
    return [bytes.fromhex(text) for text in worker("recorded")]


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    with zmq.Context() as made:
        yield made


@pytest.fixture
def silent() -> Iterator[ExitStack]:
    """Connections that stay open and say nothing."""
    with ExitStack() as stack:
        yield stack


def test_pain_05_garbage_and_replays_on_all_ports(
    cluster: Cluster, proxy: Proxy, context: zmq.Context[zmq.Socket[bytes]], silent: ExitStack
) -> None:
    """In the middle of a part and after it, from strangers and from a listener on the wire. Pains 5, 12, 24."""
    tx, rx = cluster.start("tx"), cluster.start("rx")
    wire = proxy.record()
    through(proxy, rx, **BIG, deadlines=PATIENT, loss={"record": True})
    tx.open(**BIG, deadlines=PATIENT, loss={"record": True})
    proxy.hold(BIG_PART_NBYTES + (1 << 20))
    tx("sender", room=1, tokens=2000)
    rx("receiver", room=1, peer=tx.address, tokens=1024)
    rx.until("receiver", 1, parts=1, gate="moving")
    said = recorded(tx) + recorded(rx)
    assert len(said) > 5

    for worker in (tx, rx):
        for port in (Address.parse(worker.address).port, worker.data_port):
            throw_bytes(port, [*_raw(), bytes(wire[: 2 << 20])])
            for _ in range(STRANGERS):
                silent.enter_context(socket.create_connection(("127.0.0.1", port)))
        before = worker("malformed")
        throw_packets(context, worker.address, said)
        assert worker("until_malformed", count=before + len(said))
        assert worker.until("sender" if worker is tx else "receiver", 1)["state"] == "Transferring"
    proxy.release()
    arrive(tx, {rx: (0,)}, 1, 2000)

    said = recorded(tx) + recorded(rx)
    for worker in (tx, rx):
        worker("clear")  # a room that was cleared stays so, and its number may be used again
        before = worker("malformed")
        throw_packets(context, worker.address, said)
        assert worker("until_malformed", count=before + len(said))
        assert worker("dump") == []
    throw_bytes(rx.data_port, [bytes(wire)])
    transfer(tx, {rx: (0,)}, 1, 2000)
    silent.close()
    for worker in (tx, rx):
        worker("clear")
        assert worker("until_free")["free"] == 16
    assert rx("until_strangers", count=0)
    assert tx("until_strangers", count=0)


def _forged(genuine: list[bytes]) -> Iterator[bytes]:
    """What somebody could say who has read everything: the genuine packets, and each with one bit flipped."""
    noise = random.Random(SEED)
    for packet in genuine:
        yield packet
        at = noise.randrange(len(packet))
        yield packet[:at] + bytes([packet[at] ^ 1 << noise.randrange(8)]) + packet[at + 1 :]


@pytest.mark.parametrize("with_key", [False, True], ids=["no key", "untrusted key"])
def test_forgeries_where_keys_are_wanted(
    cluster: Cluster, proxy: Proxy, context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path, with_key: bool
) -> None:
    """With CURVE keys nobody else is heard, not even somebody who knows every incarnation. Pain 24."""
    tx, rx = cluster.start("tx"), cluster.start("rx")
    settings = {"authorized": str(tmp_path / "trusted"), "deadlines": PATIENT, "loss": {"record": True}}
    secrets = {name: str(generate_keys(tmp_path / "trusted", name)[1]) for name in ("tx", "rx")}
    tx.open(keys=secrets["tx"], **settings)
    through(proxy, rx, keys=secrets["rx"], **settings)
    proxy.hold(2048)
    tx("sender", room=1, tokens=3 * GRANT)
    join(rx, tx, 1, (0,), 1)
    rx.until("receiver", 1, gate="moving")
    said = recorded(tx) + recorded(rx)
    for worker in (tx, rx):
        place = Address.parse(worker.address)
        with context.socket(zmq.DEALER) as dealer:
            dealer.setsockopt(zmq.LINGER, 0)
            if with_key:
                dealer.curve_publickey, dealer.curve_secretkey = zmq.curve_keypair()
                dealer.curve_serverkey = place.key
            dealer.connect(place.place)
            for packet in _forged(said):
                dealer.send(packet)
            if with_key:
                assert worker("until_refused", count=1)
            else:
                throw_bytes(place.port, [ZMTP + b"\x00\x05hello"])
        assert worker("malformed") == 0
    proxy.release()
    arrive(tx, {rx: (0,)}, 1, 3 * GRANT)
    transfer(tx, {rx: (0,)}, 2, 3 * GRANT)
    assert tx("malformed") == rx("malformed") == 0
