"""The network of our own does to packets what it is told, and the same again for the same seed."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from tests.faults.relay import Relay, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "it can be made")
PORT = 5000
LIMIT_S = 20.0
AT_ONCE = 50
"""Packets that the device's own queue may hold (it drops what is over 500)."""


@pytest.fixture
def relay() -> Iterator[Relay]:
    with Relay(hosts=3, seed=1) as made:
        yield made


def udp(relay: Relay, host: int) -> socket.socket:
    def make() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        sock.bind((relay.hosts[host].address, PORT))
        sock.settimeout(LIMIT_S)
        return sock

    return relay.hosts[host].run(make)


def numbers_through(relay: Relay, count: int, a: int = 0, b: int = 1) -> list[int]:
    """Send that many numbered packets from host a to host b, and one more in fine weather; what arrived before it."""
    with udp(relay, a) as here, udp(relay, b) as there:
        before = relay.counts(a, b)[0]
        for number in range(count):
            here.sendto(b"%d" % number, there.getsockname())
            if number % AT_ONCE == 0:
                wait(lambda sent=before + number + 1: relay.counts(a, b)[0] == sent)
        wait(lambda: relay.counts(a, b)[0] == before + count)
        wait(lambda: relay.under_way(a, b) == 0)
        relay.heal()
        here.sendto(b"end", there.getsockname())
        got = []
        while (packet := there.recv(100)) != b"end":
            got.append(int(packet))
        return got


def wait(condition: Callable[[], bool]) -> None:
    ends_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < ends_s
        time.sleep(0.001)


def test_fine_weather_loses_nothing_and_keeps_the_order(relay: Relay) -> None:
    assert numbers_through(relay, 300) == list(range(300))
    assert numbers_through(relay, 30, 2, 0) == list(range(30))


def test_loss_is_random_and_the_same_for_the_same_seed() -> None:
    runs = []
    for seed in (5, 5, 6):
        with Relay(seed=seed) as relay:
            relay.set(0, 1, loss=0.2)
            runs.append(numbers_through(relay, 500))
            assert relay.counts(0, 1) == (501, 500 - len(runs[-1]))
    assert runs[0] == runs[1] != runs[2]
    assert 350 < len(runs[0]) < 450
    assert runs[0] == sorted(runs[0])


def test_repeats(relay: Relay) -> None:
    relay.set(0, 1, duplicate=0.5)
    got = numbers_through(relay, 200)
    assert set(got) == set(range(200))
    assert 50 < len(got) - 200 < 150


def test_delay_holds_back_and_jitter_reorders(relay: Relay) -> None:
    relay.set(0, 1, delay_s=0.05, jitter_s=0.02)
    started_s = time.monotonic()
    got = numbers_through(relay, 100)
    assert time.monotonic() - started_s > 0.05
    assert sorted(got) == list(range(100))
    assert got != list(range(100))


def test_rate(relay: Relay) -> None:
    relay.set(0, 1, rate_nbytes_s=50_000.0)
    started_s = time.monotonic()
    assert numbers_through(relay, 100) == list(range(100))  # of 29 or 30 bytes, headers included
    assert time.monotonic() - started_s > 2_900 / 50_000


def test_cut_one_way_also_swallows_what_is_under_way(relay: Relay) -> None:
    with udp(relay, 0) as here, udp(relay, 1) as there:
        relay.set(0, 1, delay_s=0.2)
        here.sendto(b"under way", there.getsockname())
        wait(lambda: relay.counts(0, 1) == (1, 0))
        relay.set(0, 1, cut=True)
        here.sendto(b"lost", there.getsockname())
        wait(lambda: relay.counts(0, 1) == (2, 2))
        there.sendto(b"the other way", here.getsockname())
        assert here.recv(100) == b"the other way"
        relay.heal()
        here.sendto(b"healed", there.getsockname())
        assert there.recv(100) == b"healed"


def test_large_packets_vanish_without_a_word(relay: Relay) -> None:
    relay.between(0, 1, largest_nbytes=1000)
    with udp(relay, 0) as here, udp(relay, 1) as there:
        here.connect(there.getsockname())
        here.send(bytes(1400))
        here.send(bytes(900))
        assert len(there.recv(2000)) == 900
        assert relay.counts(0, 1) == (2, 1)
        here.send(b"no error was told")


def test_blocked_port_takes_no_connection_and_the_next_port_does(relay: Relay) -> None:
    here, there = relay.hosts[:2]
    relay.set(0, 1, blocked_ports=frozenset({PORT}))
    servers = [there.run(lambda port=port: socket.create_server((there.address, port))) for port in (PORT, PORT + 1)]
    with servers[0], servers[1]:
        with pytest.raises(TimeoutError):
            here.run(lambda: socket.create_connection((there.address, PORT), timeout=0.1))
        here.run(lambda: socket.create_connection((there.address, PORT + 1), timeout=LIMIT_S)).close()


def test_a_host_without_its_device_reaches_nobody_and_comes_back(relay: Relay) -> None:
    with udp(relay, 0) as here, udp(relay, 1) as there:
        relay.hosts[0].plug(False)
        with pytest.raises(OSError, match="unreachable"):
            here.sendto(b"?", there.getsockname())
        there.sendto(b"lost", here.getsockname())
        wait(lambda: relay.counts(1, 0) == (1, 1))
        relay.hosts[0].plug()
        here.sendto(b"back", there.getsockname())
        assert there.recv(100) == b"back"
        there.sendto(b"again", here.getsockname())
        assert here.recv(100) == b"again"


def test_nothing_is_left_of_a_network() -> None:
    Relay(hosts=2).close()
    before = set(os.listdir("/proc/self/fd"))
    Relay(hosts=2).close()
    assert set(os.listdir("/proc/self/fd")) == before
