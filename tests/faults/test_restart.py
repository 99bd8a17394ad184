"""A process of either side is replaced by a new one at the same address and port."""

from __future__ import annotations

from tests.faults.harness import FAST, GRANT, PATIENT, Cluster, free_port, join, transfer


def test_sender_restarted_on_its_address(cluster: Cluster) -> None:
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


def test_receiver_restarted_on_its_ports(cluster: Cluster) -> None:
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
