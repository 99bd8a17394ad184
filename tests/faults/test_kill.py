"""A process of either side dies without a word, at every gate and in the middle of a part."""

from __future__ import annotations

import pytest

from tests.faults.gates import BLOCKS, receivers_at_every_gate, sender_at_every_gate
from tests.faults.harness import BIG, BIG_PART_NBYTES, FAST, GRANT, Cluster, join, through, transfer
from tests.faults.proxy import Proxy

LASTING = {**FAST, "stall_s": 20.0}
"""Nothing but the peer's silence, or the data connection's end, ends a room."""


@pytest.mark.parametrize("ranks", [1, 4])
def test_pain_02_receiver_killed_at_every_gate_of_the_sender(cluster: Cluster, proxy: Proxy, ranks: int) -> None:
    """Rooms at every gate of a sender lose one of their receivers. Pains 1, 2, 3, 8, 11, 14, 25."""
    scene = sender_at_every_gate(cluster, proxy, ranks, LASTING)
    tx, near, far, spare = scene.tx, scene.near, scene.far, cluster.start("spare")
    near_ranks, far_ranks, gates = scene.near_ranks, scene.far_ranks, scene.gates
    far.kill()

    for room in gates.values():
        end = tx.end_of("sender", room)
        assert end["code"] == "PeerLost"
        assert end["retryable"]
        assert end["cause_rank"] in far_ranks
        for rank in near_ranks:
            told = near.end_of("receiver", room, rank)
            assert (told["code"], told["cause_rank"]) == (end["code"], end["cause_rank"])
    assert tx("state", side="sender", room=10)["state"] == "Bootstrapping"

    spare.open(deadlines=LASTING)
    join(spare, tx, 10, (*far_ranks, ranks), ranks + 1)  # in time: others take the place of the dead ranks
    tx("send", room=10, tokens=3 * GRANT)
    assert all(near("data", room=10, rank=rank, tokens=3 * GRANT) for rank in near_ranks)
    assert all(spare("data", room=10, rank=rank, tokens=3 * GRANT) for rank in (*far_ranks, ranks))
    transfer(tx, {near: near_ranks, spare: far_ranks}, 20, 3 * GRANT)
    for worker in (tx, near, spare):
        worker("clear")
        assert worker("until_free")["free"] == worker("load")["total"]
    near("close")
    spare("close")
    assert tx("until_counts", wanted=scene.empty) == {}


@pytest.mark.parametrize("ranks", [1, 4])
def test_sender_killed_at_every_gate_of_the_receivers(cluster: Cluster, proxy: Proxy, ranks: int) -> None:
    """Rooms at every gate of the receivers lose their sender; what it left in the network lands nowhere.

    Pains 1, 2, 8, 11, 14.
    """
    scene = receivers_at_every_gate(cluster, proxy, ranks, LASTING)
    tx, near, far, spare = scene.tx, scene.near, scene.far, cluster.start("spare")
    tx.kill()

    for worker, rank in scene.places:
        codes = {room: worker.end_of("receiver", room, rank)["code"] for room in scene.gates}
        assert codes == {room: "OutcomeUnknown" if room == 23 else "PeerLost" for room in scene.gates}
    for room in scene.engine:
        assert far.end_of("receiver", room, name="engine")["code"] == "PeerLost"
    for worker in (near, far):
        assert worker("until_free")["free"] == BLOCKS
        worker("canary")
    assert far("load", name="engine")["leased"] == 2  # the engine has a part, and has not given it back
    assert proxy.wait_held(1)
    proxy.release()
    assert far("until_unread")
    assert near("until_unread")
    assert near("canary_lives")
    assert far("canary_lives")

    spare.open(deadlines=LASTING)
    transfer(spare, scene.receivers, 30, 3 * GRANT)
    far("clear", name="engine", side="receiver", room=26)
    assert far("until_free", name="engine")["free"] == 4
    spare("close")
    for worker in (near, far):
        worker("clear")
        assert worker("until_counts", wanted=scene.empty[worker]) == {}


def test_receiver_killed_in_the_middle_of_the_second_part(cluster: Cluster, proxy: Proxy) -> None:
    """The peer dies with megabytes on their way to it. Pains 1, 2, 11, 14, 15."""
    tx, rx, spare = cluster.start("tx"), cluster.start("rx"), cluster.start("spare")
    through(proxy, rx, **BIG, deadlines=LASTING)
    tx.open(**BIG, deadlines=LASTING)
    empty = tx("counts")
    proxy.hold(BIG_PART_NBYTES + (1 << 20))
    tx("sender", room=1, tokens=2000)
    rx("receiver", room=1, peer=tx.address, tokens=1024)
    tx.until("sender", 1, parts=1, gate="moving")
    assert proxy.wait_held(1 << 20)
    rx.kill()
    end = tx.end_of("sender", 1)
    assert (end["code"], end["parts"]) == (
        "PeerLost",
        [1024],
    )  # its silence, not the broken data connection, is the cause
    assert tx("until_free")["free"] == 16
    spare.open(**BIG, deadlines=LASTING)
    transfer(tx, {spare: (0,)}, 1000, 2000)
    spare("close")
    tx("clear")
    assert tx("until_counts", wanted=empty) == {}


@pytest.mark.parametrize("kept_by", ["kernel", "network"])
def test_sender_killed_in_the_middle_of_the_second_part(cluster: Cluster, proxy: Proxy, kept_by: str) -> None:
    """What a dead sender left in kernel buffers, or in the network, never reaches a block that is free again.

    Pains 1, 2, 11, 14, 15.
    """
    tx, rx, spare = cluster.start("tx"), cluster.start("rx"), cluster.start("spare")
    through(proxy, rx, **BIG, deadlines=LASTING)
    tx.open(**BIG, deadlines=LASTING)
    empty = rx("counts")
    proxy.hold(BIG_PART_NBYTES + (1 << 20))
    tx("sender", room=1, tokens=2000)
    rx("receiver", room=1, peer=tx.address, tokens=1024)
    rx.until("receiver", 1, parts=1, gate="moving")
    assert proxy.wait_held(4 << 20)
    if kept_by == "kernel":
        rx.stop()
        proxy.release()
        tx.kill()
        rx.resume()
    else:
        tx.kill()
    end = rx.end_of("receiver", 1)
    assert (end["code"], end["parts"]) == ("PeerLost", [1024])
    assert rx("until_free")["free"] == 16
    rx("canary")
    if kept_by == "network":
        assert proxy.wait_held(4 << 20)  # still there, and comes now
        proxy.release()
    assert rx("until_unread")
    assert proxy.wait_connections(0)
    assert rx("canary_lives")
    spare.open(**BIG, deadlines=LASTING)
    transfer(spare, {rx: (0,)}, 1000, 2000)
    spare("close")
    rx("clear")
    assert rx("until_counts", wanted=empty) == {}
