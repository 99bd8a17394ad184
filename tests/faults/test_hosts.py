"""Endpoints on several hosts, each a network namespace, and the network between them fails in many ways."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvpoll_fsm.security import generate_keys
from tests.faults.harness import FAST, GRANT, PATIENT, Cluster, Worker, arrive, join, place, transfer
from tests.faults.relay import Relay

TX, RX = 0, 1
"""The hosts of most tests."""
WIDE = {"hidden": 512, "block_tokens": 64, "blocks": 32}
"""A layout whose parts of 1,024 tokens have 1 MB."""
SLOW = 4_000_000.0
"""Bytes in a second that let one watch such a part move."""
STALL = {**FAST, "peer_lost_s": 20.0}
"""Only a part that does not move ends a room."""
LASTING = {**FAST, "stall_s": 20.0}
"""Only the peer's silence ends a room."""
QUICK = {"connect_s": 0.5, "handshake_s": 0.5, "cancel_patience_s": 0.3}
"""A tcp transport that gives up soon."""
TOKENS = 4000
"""Four such parts, so that there is time to see one move."""


def pair(cluster: Cluster, relay: Relay, deadlines: dict[str, float], **settings: Any) -> tuple[Worker, Worker]:
    """A sender and a receiver on hosts of their own."""
    tx = place(relay, TX, cluster.start("tx"), deadlines=deadlines, **settings)
    return tx, place(relay, RX, cluster.start("rx"), deadlines=deadlines, **settings)


def mid_part(relay: Relay, tx: Worker, rx: Worker) -> None:
    """Room 1 in the middle of a part that is not the first, and room 2 without data as yet."""
    relay.set(TX, RX, rate_nbytes_s=SLOW)
    for room in (1, 2):
        tx("sender", room=room)
        join(rx, tx, room, (0,), 1, tokens=1024)
        tx.until("sender", room, gate="queued")
    tx("send", room=1, tokens=TOKENS)
    rx.until("receiver", 1, parts=1, gate="moving")
    tx.until("sender", 1, parts=1, gate="moving")


def settled(tx: Worker, receivers: dict[Worker, tuple[int, ...]], empty: dict[str, int], room: int = 1000) -> None:
    """The next room works, and nothing is left of what happened."""
    transfer(tx, receivers, room, 3 * GRANT)
    for worker in (tx, *receivers):
        worker("clear")
        assert worker("until_free")["free"] == worker("load")["total"]
    for worker in receivers:
        worker("close")
    assert tx("until_counts", wanted=empty) == {}


WEATHER: dict[str, dict[str, float]] = {
    "loss": {"loss": 0.05},
    "delay": {"delay_s": 0.04, "jitter_s": 0.005},
    "reordering": {"jitter_s": 0.02},
    "repeats": {"duplicate": 0.3},
    "all of it": {"loss": 0.05, "delay_s": 0.01, "jitter_s": 0.02, "duplicate": 0.1},
}


@pytest.mark.parametrize("kind", WEATHER)
def test_bad_weather_costs_time_and_nothing_else(cluster: Cluster, relay: Relay, kind: str) -> None:
    """One room and one of four ranks on two hosts, over a network that loses, delays, reorders, repeats. Pains 7, 9."""
    tx, rx = pair(cluster, relay, PATIENT)
    other = place(relay, 2, cluster.start("other"), deadlines=PATIENT)
    empty = tx("counts")
    relay.between(TX, RX, **WEATHER[kind])
    relay.between(TX, 2, **WEATHER[kind])
    rooms: list[dict[Worker, tuple[int, ...]]] = [{rx: (0,)}, {rx: (0, 2), other: (1, 3)}]
    for room, receivers in enumerate(rooms):
        ranks = sum(map(len, receivers.values()))
        tx("sender", room=room, ranks=ranks, tokens=3 * GRANT)
        for worker, own in receivers.items():
            join(worker, tx, room, own, ranks)
    for room, receivers in enumerate(rooms):
        arrive(tx, receivers, room, 3 * GRANT)
    taken, lost = relay.counts(TX, RX)
    assert taken > 20
    assert bool(lost) is ("loss" in WEATHER[kind])
    settled(tx, {rx: (0,), other: (1,)}, empty)


@pytest.mark.parametrize("ways", ["both", "to the receiver", "to the sender"])
def test_partition_that_heals_in_time(cluster: Cluster, relay: Relay, ways: str) -> None:
    """Shorter than the silence that counts as loss, in the middle of a part: the rooms go on. Pains 7, 9."""
    tx, rx = pair(cluster, relay, PATIENT, **WIDE)
    empty = tx("counts")
    mid_part(relay, tx, rx)
    cut(relay, ways)
    deaf = tx if ways == "to the sender" else rx
    assert deaf("until_silent", ticks=4)
    relay.heal()
    tx("send", room=2, tokens=TOKENS)
    for room in (1, 2):
        arrive(tx, {rx: (0,)}, room, TOKENS)
    settled(tx, {rx: (0,)}, empty)


@pytest.mark.parametrize("ways", ["both", "to the receiver", "to the sender"])
def test_partition_that_lasts(cluster: Cluster, relay: Relay, ways: str) -> None:
    """Both sides find out by themselves; when it has healed, new rooms work. Pains 2, 8, 10, 11."""
    tx, rx = pair(cluster, relay, LASTING, **WIDE, tcp=QUICK)
    empty = tx("counts")
    mid_part(relay, tx, rx)
    cut(relay, ways)
    for room in (1, 2):
        ends = tx.until("sender", room, ended=True), rx.end_of("receiver", room)
        assert {end["state"] for end in ends} == {"Failed"}
        assert all(end["retryable"] and end["detail"] for end in ends)
        if ways == "both":
            assert {end["code"] for end in ends} == {"PeerLost"}
    assert rx("until_free")["free"] == WIDE["blocks"]
    relay.heal()
    for room in (1, 2):
        assert tx.end_of("sender", room)["quiescent"]
    settled(tx, {rx: (0,)}, empty)


def cut(relay: Relay, ways: str) -> None:
    for a, b in {"both": ((TX, RX), (RX, TX)), "to the receiver": ((TX, RX),), "to the sender": ((RX, TX),)}[ways]:
        relay.set(a, b, cut=True)


def test_partition_from_one_of_two_hosts(cluster: Cluster, relay: Relay) -> None:
    """The ranks on the other host are told which one is gone, and can go on without it. Pains 3, 25."""
    tx, near = pair(cluster, relay, LASTING)
    far = place(relay, 2, cluster.start("far"), deadlines=LASTING)
    empty = tx("counts")
    tx("sender", room=1, ranks=4)
    join(near, tx, 1, (0, 1), 4)
    join(far, tx, 1, (2, 3), 4)
    tx.until("sender", 1, gate="queued")
    relay.between(TX, 2, cut=True)
    end = tx.end_of("sender", 1)
    assert end["code"] == "PeerLost"
    assert end["cause_rank"] in (2, 3)
    for rank in (0, 1):
        told = near.end_of("receiver", 1, rank)
        assert (told["code"], told["cause_rank"]) == ("PeerLost", end["cause_rank"])
    transfer(tx, {near: (0, 1)}, 2, 3 * GRANT)
    for rank in (2, 3):
        assert far.end_of("receiver", 1, rank)["code"] == "PeerLost"
    relay.heal()
    settled(tx, {near: (0, 1), far: (2, 3)}, empty)


def test_data_port_blocked_from_the_start(cluster: Cluster, relay: Relay) -> None:
    """Control works, so the room fails before anything is promised, and says which transport. Pains 8, 10, 22."""
    tx, rx = pair(cluster, relay, PATIENT, tcp=QUICK)
    empty = tx("counts")
    relay.between(TX, RX, blocked_ports=frozenset({rx.data_port}))
    tx("sender", room=1, tokens=GRANT)
    join(rx, tx, 1, (0,), 1)
    end, told = tx.end_of("sender", 1), rx.end_of("receiver", 1)
    assert (end["code"], end["history"]) == ("TransportUnavailable", ["Bootstrapping", "Failed"])
    assert (told["code"], told["cause_rank"]) == ("TransportUnavailable", 0)
    assert "tcp to rank 0" in told["detail"]
    relay.heal()
    settled(tx, {rx: (0,)}, empty)


def test_data_port_blocked_in_the_middle_of_a_part(cluster: Cluster, relay: Relay) -> None:
    """Both sides are alive and say so; the part is not. Pains 1, 8, 28."""
    tx, rx = pair(cluster, relay, STALL, **WIDE, tcp=QUICK)
    empty = tx("counts")
    mid_part(relay, tx, rx)
    relay.between(TX, RX, blocked_ports=frozenset({rx.data_port}))
    end, told = tx.until("sender", 1, ended=True), rx.end_of("receiver", 1)
    assert end["code"] == told["code"] == "DeadlinePassed"
    assert "moving" in end["detail"]
    assert rx("load")["quarantined"] == 0  # fenced: the token is dead
    relay.heal()
    assert tx.end_of("sender", 1)["quiescent"]
    tx("send", room=2, tokens=TOKENS)
    arrive(tx, {rx: (0,)}, 2, TOKENS)  # the other room was not harmed
    settled(tx, {rx: (0,)}, empty)


@pytest.mark.parametrize("when", ["from the start", "in the middle of a part"])
def test_large_packets_vanish(cluster: Cluster, relay: Relay, when: str) -> None:
    """An MTU black hole: small packets pass, so the peer lives; no error is ever told. Pains 1, 8, 22."""
    tx, rx = pair(cluster, relay, {**STALL, "bootstrap_s": 1.0}, **WIDE, tcp=QUICK)
    empty = tx("counts")
    if when == "from the start":
        relay.between(TX, RX, largest_nbytes=576)
        tx("sender", room=1, tokens=TOKENS)
        join(rx, tx, 1, (0,), 1, tokens=1024)
    else:
        mid_part(relay, tx, rx)
        relay.between(TX, RX, largest_nbytes=576)
    end, told = tx.until("sender", 1, ended=True), rx.end_of("receiver", 1)
    assert end["state"] == told["state"] == "Failed"
    assert end["code"] == "DeadlinePassed"
    assert told["code"] == "DeadlinePassed"
    assert end["detail"]
    assert told["detail"]
    assert rx("load")["quarantined"] == 0
    relay.heal()
    assert tx.end_of("sender", 1)["quiescent"]
    if when != "from the start":
        tx("abort", side="sender", room=2)
    settled(tx, {rx: (0,)}, empty)


@pytest.mark.parametrize("which", ["sender", "receiver"])
def test_host_gone_for_good(cluster: Cluster, relay: Relay, which: str) -> None:
    """In the middle of a part; what is left of it lands nowhere, and all blocks come back. Pains 1, 2, 11."""
    tx, rx = pair(cluster, relay, LASTING, **WIDE, tcp={**QUICK, "dead_peer_s": 1.0})
    gone, stays, side = (tx, rx, "receiver") if which == "sender" else (rx, tx, "sender")
    empty = stays("counts")
    mid_part(relay, tx, rx)
    relay.hosts[TX if which == "sender" else RX].plug(False)
    for room in (1, 2):
        assert stays.end_of(side, room)["code"] == "PeerLost"
        assert gone.end_of("sender" if which == "sender" else "receiver", room)["code"] == "PeerLost"
    assert stays("until_free")["free"] == WIDE["blocks"]
    spare = place(relay, 2, cluster.start("spare"), **WIDE, deadlines=LASTING)
    stays("canary")
    if which == "sender":
        assert stays("canary_lives")
        transfer(spare, {rx: (0,)}, 3, TOKENS)
    else:
        transfer(tx, {spare: (0,)}, 3, TOKENS)
    spare("close")
    stays("clear")
    assert stays("until_counts", wanted=empty) == {}


def test_hosts_with_keys(cluster: Cluster, relay: Relay, tmp_path: Path) -> None:
    """Encrypted control over a network that reorders packets; whoever has no trusted key is refused. Pain 24."""
    kvpoll = Path(sys.executable).with_name("kvpoll")
    subprocess.run([kvpoll, "keygen", "tx", "--out", tmp_path / "tx"], check=True, stdout=subprocess.DEVNULL)
    for name in ("rx", "stranger"):
        generate_keys(tmp_path / name, name)
    trusted = {"tx": ("rx",), "rx": ("tx",), "stranger": ("tx",)}
    workers = []
    for host, (name, peers) in enumerate(trusted.items()):
        authorized = tmp_path / name / "authorized"
        authorized.mkdir()
        for peer in peers:
            shutil.copy(tmp_path / peer / f"{peer}.key", authorized)
        keys = {"keys": str(tmp_path / name / f"{name}.key_secret"), "authorized": str(authorized)}
        deadlines = {**PATIENT, "bootstrap_s": 1.0} if name == "stranger" else PATIENT
        workers.append(place(relay, host, cluster.start(name), deadlines=deadlines, **keys))
    tx, rx, stranger = workers
    assert "?curve=" in tx.address
    empty = tx("counts")
    relay.between(TX, RX, **WEATHER["reordering"])
    transfer(tx, {rx: (0, 1)}, 1, 3 * GRANT)
    tx("sender", room=2, tokens=GRANT)
    join(stranger, tx, 2, (0,), 1)
    assert tx("until_refused", count=1)
    assert stranger.end_of("receiver", 2)["code"] == "DeadlinePassed"
    assert tx("state", side="sender", room=2)["state"] == "Bootstrapping"
    join(rx, tx, 2, (0,), 1)
    arrive(tx, {rx: (0,)}, 2, GRANT)
    stranger("close")
    settled(tx, {rx: (0,)}, empty)
