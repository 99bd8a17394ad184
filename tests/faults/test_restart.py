"""A process of either side is replaced by a new one at the same address and port."""

from __future__ import annotations

import pytest

from tests.faults.gates import BLOCKS, receivers_at_every_gate, sender_at_every_gate
from tests.faults.harness import FAST, GRANT, PATIENT, Cluster, arrive, free_port, join, through, transfer
from tests.faults.proxy import Proxy

LASTING = {**FAST, "stall_s": 20.0}
"""Nothing but the peer's silence, or the data connection's end, ends a room."""


def test_pain_11_sender_restarted_on_its_address(cluster: Cluster) -> None:
    """The receiver knows the new one for a stranger long before the silence would tell. Pain 11."""
    listen = f"tcp://127.0.0.1:{free_port()}"
    rx, old, new = cluster.start("rx"), cluster.start("old"), cluster.start("new")
    rx.open(deadlines=PATIENT)
    old.open(listen=listen, deadlines=PATIENT)
    empty = rx("counts")
    transfer(old, {rx: (0,)}, 1, 3 * GRANT)
    for room in (2, 3):
        old("sender", room=room)
        join(rx, old, room, (0,), 1)
        rx.until("receiver", room, state="WaitingForInput")
    join(rx, old, 4, (0,), 1)
    old.kill()
    new.open(listen=listen, deadlines=PATIENT)
    assert new.address == old.address
    for room in (2, 3, 4):
        end = rx.end_of("receiver", room)
        assert (end["code"], end["retryable"]) == ("PeerLost", True)
        assert "restarted" in end["detail"]
    rx("clear")
    for room in (2, 3, 4):
        transfer(new, {rx: (0,)}, room, 3 * GRANT)
    rx("clear")
    new("close")
    assert rx("until_counts", wanted=empty) == {}


def test_pain_11_receiver_restarted_on_its_ports(cluster: Cluster) -> None:
    """The new receiver is not taken for the old one, whose rooms fail. Pain 11."""
    port = free_port()
    tx, old, new = cluster.start("tx"), cluster.start("old"), cluster.start("new")
    listen = f"tcp://127.0.0.1:{free_port()}"
    settings = {"listen": listen, "tcp": {"data_ports": [port, port]}, "deadlines": {**FAST, "stall_s": 20.0}}
    tx.open(deadlines=FAST)
    empty = tx("counts")
    old.open(**settings)
    transfer(tx, {old: (0,)}, 1, 3 * GRANT)
    for room in (2, 3):
        tx("sender", room=room)
        join(old, tx, room, (0,), 1)
        tx.until("sender", room, state="WaitingForInput")
    old.kill()
    new.open(**settings)
    assert (new.address, new.data_port) == (old.address, port)
    join(new, tx, 2, (0,), 1)  # for the room's next life: this one was another's
    for room in (2, 3):
        assert tx.end_of("sender", room)["code"] == "PeerLost"
    tx("clear", side="sender", room=2)
    tx("sender", room=2, tokens=3 * GRANT)
    assert new("data", room=2, tokens=3 * GRANT)
    transfer(tx, {new: (0,)}, 5, 3 * GRANT)
    tx("clear")
    new("close")
    assert tx("until_counts", wanted=empty) == {}


def test_same_process_opens_its_endpoint_again(cluster: Cluster) -> None:
    """An endpoint that was closed in order is followed by one at the same place. Pains 2, 11."""
    rx, tx = cluster.open("rx", "tx", deadlines=PATIENT)
    tx("close")
    listen = f"tcp://127.0.0.1:{free_port()}"
    for room in (1, 2, 3):
        tx.open(listen=listen, deadlines=PATIENT)
        transfer(tx, {rx: (0,)}, room, 3 * GRANT)
        tx("sender", room=10 + room)
        join(rx, tx, 10 + room, (0,), 1)
        rx.until("receiver", 10 + room, state="WaitingForInput")
        tx("close")
        assert rx.end_of("receiver", 10 + room)["code"] == "Aborted"


@pytest.mark.parametrize("ranks", [1, 4])
def test_receiver_restarted_at_every_gate_of_the_sender(cluster: Cluster, proxy: Proxy, ranks: int) -> None:
    """The old one's rooms fail with the reason; the new one, on the same ports, takes part in the next. Pains 3, 11."""
    port = free_port()
    ports = {"listen": f"tcp://127.0.0.1:{free_port()}", "tcp": {"data_ports": [port, port]}}
    scene = sender_at_every_gate(cluster, proxy, ranks, LASTING, **ports)
    tx, near, new = scene.tx, scene.near, cluster.start("new")
    scene.far.kill()
    proxy.cut()
    proxy.release()
    through(proxy, new, deadlines=LASTING, **ports)
    assert (new.address, new.data_port) == (scene.far.address, port)
    join(new, tx, 11, scene.far_ranks, ranks)  # for the room's next life: this one has lost its rank
    for room in scene.gates.values():
        end = tx.end_of("sender", room)
        assert (end["code"], end["retryable"]) == ("PeerLost", True)
        assert end["cause_rank"] in scene.far_ranks
        for rank in scene.near_ranks:
            assert near.end_of("receiver", room, rank)["code"] == "PeerLost"
    join(new, tx, scene.early, (*scene.far_ranks, ranks), ranks + 1)  # in time
    tx("send", room=scene.early, tokens=GRANT)
    arrive(tx, {near: scene.near_ranks, new: (*scene.far_ranks, ranks)}, scene.early, GRANT)
    tx("clear", side="sender", room=11)
    for rank in scene.near_ranks:
        near("clear", side="receiver", room=11, rank=rank)
    tx("sender", room=11, ranks=ranks, tokens=GRANT)
    join(near, tx, 11, scene.near_ranks, ranks)
    arrive(tx, {near: scene.near_ranks, new: scene.far_ranks}, 11, GRANT)
    for worker in (tx, near, new):
        worker("clear")
        assert worker("until_free")["free"] == worker("load")["total"]
    near("close")
    new("close")
    assert tx("until_counts", wanted=scene.empty) == {}


@pytest.mark.parametrize("ranks", [1, 4])
def test_sender_restarted_at_every_gate_of_the_receivers(cluster: Cluster, proxy: Proxy, ranks: int) -> None:
    """All rooms fail as soon as the new one says it is another; the same rooms work with it. Pains 1, 2, 5, 11."""
    listen = f"tcp://127.0.0.1:{free_port()}"
    scene = receivers_at_every_gate(cluster, proxy, ranks, PATIENT, listen=listen)
    near, far, new = scene.near, scene.far, cluster.start("new")
    scene.tx.kill()
    new.open(listen=listen, deadlines=PATIENT)
    assert new.address == scene.tx.address
    for worker, rank in scene.places:
        for room in scene.gates:
            end = worker.end_of("receiver", room, rank)
            assert end["code"] == ("OutcomeUnknown" if room == 23 else "PeerLost")
            assert "restarted" in end["detail"]
    for room in scene.engine:
        assert "restarted" in far.end_of("receiver", room, name="engine")["detail"]
    for worker in (near, far):
        assert worker("until_free")["free"] == BLOCKS
        worker("clear")
    far("clear", name="engine")
    proxy.release()  # what the dead one had sent
    for room in scene.gates:
        transfer(new, scene.receivers, room, 3 * GRANT)
    new("close")
    for worker in (near, far):
        worker("clear")
        assert worker("until_counts", wanted=scene.empty[worker]) == {}
