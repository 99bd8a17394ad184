"""A process of either side is frozen at every gate and in the middle of a part, for long or for a moment."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.gates import BLOCKS, ReceiversScene, SenderScene, receivers_at_every_gate, sender_at_every_gate
from tests.faults.harness import (
    BIG,
    BIG_PART_NBYTES,
    FAST,
    GRANT,
    PATIENT,
    Cluster,
    Worker,
    arrive,
    join,
    through,
    transfer,
)
from tests.faults.proxy import Proxy

TOKENS = 2000


def freeze_mid_part(
    cluster: Cluster, proxy: Proxy, which: str, deadlines: dict[str, Any]
) -> tuple[Worker, Worker, dict[str, int]]:
    """Room 1 in the middle of its second part, one of its processes frozen and the network free.

    Returns the sender, the receiver, and what the sender's tables were before.
    """
    tx, rx = cluster.start("tx"), cluster.start("rx")
    through(proxy, rx, **BIG, deadlines=deadlines)
    tx.open(**BIG, deadlines=deadlines)
    empty = tx("counts")
    proxy.hold(BIG_PART_NBYTES + (1 << 20))
    tx("sender", room=1, tokens=TOKENS)
    rx("receiver", room=1, peer=tx.address, tokens=1024)
    rx.until("receiver", 1, parts=1, gate="moving")
    assert proxy.wait_held(1 << 20)
    (rx if which == "receiver" else tx).stop()
    proxy.release()
    return tx, rx, empty


def settled(tx: Worker, rx: Worker, empty: dict[str, int]) -> None:
    """The next room works, and nothing is left of what happened."""
    transfer(tx, {rx: (0,)}, 1000, TOKENS)
    for worker in (tx, rx):
        worker("clear")
        assert worker("until_free")["free"] == 16
    rx("close")
    assert tx("until_counts", wanted=empty) == {}


SILENCE, STALL = {**FAST, "stall_s": 20.0}, {**FAST, "peer_lost_s": 20.0}
CODE = {"silence": "PeerLost", "stall": "DeadlinePassed"}


@pytest.mark.parametrize("by", ["silence", "stall"])
def test_receiver_frozen_for_long(cluster: Cluster, proxy: Proxy, by: str) -> None:
    """The sender gives up by either deadline and never takes sent for received. Pains 1, 2, 8, 9."""
    tx, rx, empty = freeze_mid_part(cluster, proxy, "receiver", SILENCE if by == "silence" else STALL)
    end = tx.until("sender", 1, ended=True)
    assert end["state"] == "Failed"
    assert end["code"] == CODE[by]
    assert end["parts"] == [1024]
    rx.resume()
    told = rx.end_of("receiver", 1)
    assert told["state"] == "Failed"
    assert told["detail"]
    assert tx.end_of("sender", 1)["quiescent"]
    if by == "silence":
        assert rx("until_connections", count=0)  # it has found out that it was given up
    settled(tx, rx, empty)


@pytest.mark.parametrize("by", ["silence", "stall"])
def test_pain_01_sender_frozen_for_long(cluster: Cluster, proxy: Proxy, by: str) -> None:
    """The receiver gives up by either deadline; what the thawed sender still sends lands nowhere. Pains 1, 2, 8, 9."""
    tx, rx, empty = freeze_mid_part(cluster, proxy, "sender", SILENCE if by == "silence" else STALL)
    end = rx.end_of("receiver", 1)
    assert end["code"] == CODE[by]
    assert rx("until_free")["free"] == 16
    rx("canary")
    tx.resume()
    told = tx.end_of("sender", 1)
    assert told["state"] == "Failed"
    assert told["detail"]
    assert rx("canary_lives")
    settled(tx, rx, empty)


@pytest.mark.parametrize("which", ["receiver", "sender"])
def test_pain_09_frozen_for_a_moment(cluster: Cluster, proxy: Proxy, which: str) -> None:
    """A pause shorter than the deadlines costs nothing but time. Pain 9."""
    tx, rx, empty = freeze_mid_part(cluster, proxy, which, PATIENT)
    frozen, awake = (rx, tx) if which == "receiver" else (tx, rx)
    assert awake("until_silent", ticks=3)
    frozen.resume()
    arrive(tx, {rx: (0,)}, 1, TOKENS)
    settled(tx, rx, empty)


# At every gate


def all_is_well(scene: SenderScene | ReceiversScene) -> None:
    """The next room works, and nothing is left of what happened."""
    receivers = {scene.near: scene.near_ranks, scene.far: scene.far_ranks}
    transfer(scene.tx, receivers, 1000, 3 * GRANT)
    scene.tx("clear")
    assert scene.tx("until_free")["free"] == scene.tx("load")["total"]
    for worker in receivers:
        worker("clear")
        assert worker("until_free")["free"] == worker("load")["total"]


@pytest.mark.parametrize("ranks", [1, 4])
def test_receiver_frozen_for_long_at_every_gate_of_the_sender(cluster: Cluster, proxy: Proxy, ranks: int) -> None:
    """All rooms but the one that has not opened are given up; the thawed receiver finds out. Pains 1, 2, 3, 8, 9."""
    scene = sender_at_every_gate(cluster, proxy, ranks, SILENCE)
    tx, near, far = scene.tx, scene.near, scene.far
    far.stop()
    for room in scene.gates.values():
        end = tx.until("sender", room, ended=True)
        assert (end["code"], end["retryable"]) == ("PeerLost", True)
        assert end["cause_rank"] in scene.far_ranks
        for rank in scene.near_ranks:
            told = near.end_of("receiver", room, rank)
            assert (told["code"], told["cause_rank"]) == ("PeerLost", end["cause_rank"])
    far.resume()
    far("lose_no_more")
    proxy.release()
    for room in (*scene.gates.values(), scene.early):
        for rank in scene.far_ranks:
            told = far.end_of("receiver", room, rank)
            assert (told["state"], bool(told["detail"])) == ("Failed", True)
    for room in scene.gates.values():
        assert tx.end_of("sender", room)["quiescent"]
    assert tx("state", side="sender", room=scene.early)["state"] == "Bootstrapping"
    all_is_well(scene)


@pytest.mark.parametrize("ranks", [1, 4])
def test_receiver_frozen_for_a_moment_at_every_gate_of_the_sender(cluster: Cluster, proxy: Proxy, ranks: int) -> None:
    """Every room goes on from where it was. Pain 9."""
    scene = sender_at_every_gate(cluster, proxy, ranks, PATIENT)
    tx, near, far = scene.tx, scene.near, scene.far
    far.stop()
    assert tx("until_silent", ticks=3)
    far.resume()
    far("lose_no_more")
    proxy.release()
    tx("send", room=11, tokens=GRANT)
    join(near, tx, scene.early, (ranks,), ranks + 1)
    tx("send", room=scene.early, tokens=GRANT)
    for room, tokens in scene.tokens.items():
        arrive(tx, {near: scene.near_ranks, far: scene.far_ranks}, room, tokens)
    arrive(tx, {near: (*scene.near_ranks, ranks), far: scene.far_ranks}, scene.early, GRANT)
    all_is_well(scene)


@pytest.mark.parametrize("ranks", [1, 4])
def test_sender_frozen_for_long_at_every_gate_of_the_receivers(cluster: Cluster, proxy: Proxy, ranks: int) -> None:
    """All rooms are given up, all blocks come back, and what the thawed sender still sends lands nowhere.

    Pains 1, 2, 8, 9.
    """
    scene = receivers_at_every_gate(cluster, proxy, ranks, SILENCE)
    tx, near, far = scene.tx, scene.near, scene.far
    tx.stop()
    for worker, rank in scene.places:
        codes = {room: worker.end_of("receiver", room, rank)["code"] for room in scene.gates}
        assert codes == {room: "OutcomeUnknown" if room == 23 else "PeerLost" for room in scene.gates}
    for room in scene.engine:
        assert far.end_of("receiver", room, name="engine")["code"] == "PeerLost"
    for worker in (near, far):
        assert worker("until_free")["free"] == BLOCKS
        worker("canary")
    tx.resume()
    tx("lose_no_more")
    proxy.release()
    for room in (22, 24, 25, 26):
        told = tx.end_of("sender", room)
        assert (told["state"], bool(told["detail"])) == ("Failed", True)
    assert tx.end_of("sender", 23)["state"] == "Success"
    assert near("canary_lives")
    assert far("canary_lives")
    all_is_well(scene)


@pytest.mark.parametrize("ranks", [1, 4])
def test_sender_frozen_for_a_moment_at_every_gate_of_the_receivers(cluster: Cluster, proxy: Proxy, ranks: int) -> None:
    """Every room goes on from where it was. Pain 9."""
    scene = receivers_at_every_gate(cluster, proxy, ranks, PATIENT)
    tx, far = scene.tx, scene.far
    tx.stop()
    silent = [worker for worker, own in scene.receivers.items() if own]
    assert all(worker("until_silent", ticks=3) for worker in silent)
    tx.resume()
    tx("lose_no_more")
    proxy.release()
    for room in (20, 21):
        tx("sender", room=room, ranks=ranks, tokens=GRANT)
    tx("send", room=22, tokens=GRANT)
    for room in scene.gates:
        arrive(tx, scene.receivers, room, GRANT)
    for room, blocks in ((24, [3, 1]), (26, [2, 0])):
        far.until("receiver", room, name="engine", gate="waiting_resume")
        far("resume", name="engine", room=room, blocks=blocks)
        assert far.end_of("receiver", room, name="engine")["state"] == "Success"
        assert tx.end_of("sender", room)["parts"] == [GRANT, GRANT]
    all_is_well(scene)
