"""A part is given up while the receiver reads it slowly, or not at all: its blocks are the next room's, unharmed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.harness import BIG, FAST, Cluster, Worker

TOKENS = 1024
ONE_GRANT = {**BIG, "blocks": 8}
"""A pool that one room takes whole: the next gets the very same blocks."""
CALM = {**FAST, "peer_lost_s": 20.0, "stall_s": 20.0}
SLOW = {"nbytes": 1 << 12, "pause_s": 0.02}
"""A part of 7.3 MB would take half a minute."""


def mid_part(
    cluster: Cluster, tx_deadlines: dict[str, float], rx_deadlines: dict[str, float], **both: Any
) -> tuple[Worker, Worker]:
    """Room 1 has begun to land; room 2 waits for its blocks."""
    tx, rx = cluster.start("tx"), cluster.start("rx")
    tx.open(**BIG, **both, role="sender", deadlines=tx_deadlines)
    rx.open(**ONE_GRANT, **both, deadlines=rx_deadlines)
    rx("brake", **SLOW)
    tx("sender", room=2)
    tx("sender", room=1, tokens=TOKENS)
    rx("receiver", room=1, peer=tx.address, tokens=TOKENS)
    assert rx("until_landing", room=1)
    rx("receiver", room=2, peer=tx.address, tokens=TOKENS)
    return tx, rx


def released_only_behind_the_fence(rx: Worker) -> None:
    """Room 2 gets the blocks of room 1 once nothing can land there any more, and not a byte lands."""
    assert rx("until_moved", room=2, what="take")
    # The sender's word that all is over may come before the fence holds.
    assert [move for move in rx("moves", room=1) if move != "fenced"] == ["take", "quarantine", "release"]
    assert rx("shares_blocks", first=1, second=2)
    assert rx("untouched", room=2)


def settled(tx: Worker, rx: Worker) -> None:
    """The slow reader has read everything; room 2 is unharmed, and works."""
    rx("brake")
    tx.until("sender", 2, gate="queued")
    assert rx("untouched", room=2)
    tx("send", room=2, tokens=TOKENS)
    assert rx("data", room=2, tokens=TOKENS)
    assert tx.end_of("sender", 2)["state"] == "Success"
    for worker in (tx, rx):
        assert worker("until_free")["free"] == worker("load")["total"]
        assert worker("problems") == []


@pytest.mark.parametrize("how", ["abort", "clear"])
@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_pain_01_given_up_by_a_host_while_the_receiver_is_slow(cluster: Cluster, who: str, how: str) -> None:
    tx, rx = mid_part(cluster, CALM, CALM)
    giver, other, side = (tx, rx, "receiver") if who == "sender" else (rx, tx, "sender")
    giver(how, side=who, room=1)
    assert other.end_of(side, 1)["code"] == "Aborted"
    released_only_behind_the_fence(rx)
    settled(tx, rx)


@pytest.mark.inside  # the SSL context is an object of the process that has the driver
@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_given_up_while_records_wait_to_be_decrypted(cluster: Cluster, who: str) -> None:
    """With TLS bytes of the part are in this process too, read from the kernel and not yet in place."""
    tx, rx = mid_part(cluster, CALM, CALM, tls=True)
    giver, other, side = (tx, rx, "receiver") if who == "sender" else (rx, tx, "sender")
    giver("abort", side=who, room=1)
    assert other.end_of(side, 1)["code"] == "Aborted"
    released_only_behind_the_fence(rx)
    settled(tx, rx)


@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_given_up_by_a_deadline_while_the_receiver_is_slow(cluster: Cluster, who: str) -> None:
    """No frame is answered before the stall deadline of one side."""
    hasty = {**CALM, "stall_s": 0.4}
    tx, rx = mid_part(cluster, hasty if who == "sender" else CALM, hasty if who == "receiver" else CALM)
    for worker, side in ((tx, "sender"), (rx, "receiver")):
        assert worker.end_of(side, 1)["code"] == "DeadlinePassed"
    released_only_behind_the_fence(rx)
    settled(tx, rx)


@pytest.mark.parametrize("how", ["abort", "clear", "deadline"])
def test_given_up_by_the_sender_while_the_receiver_is_stopped(cluster: Cluster, how: str) -> None:
    """The socket's buffers are full; the process finds out when it goes on, with megabytes still to be read."""
    tx, rx = mid_part(cluster, {**CALM, "stall_s": 0.4} if how == "deadline" else CALM, CALM)
    rx.stop()
    if how != "deadline":
        tx(how, side="sender", room=1)
    else:
        assert tx.until("sender", 1, ended=True)["code"] == "DeadlinePassed"
    rx.resume()
    assert rx.end_of("receiver", 1)["code"] == ("DeadlinePassed" if how == "deadline" else "Aborted")
    released_only_behind_the_fence(rx)
    settled(tx, rx)


def test_given_up_by_the_receiver_after_it_was_stopped(cluster: Cluster) -> None:
    """It gives up at once when it goes on, before it has read what came meanwhile."""
    tx, rx = mid_part(cluster, CALM, CALM)
    rx.stop()
    order = rx.post("abort", side="receiver", room=1)
    rx.resume()
    rx.answer(order)
    assert tx.end_of("sender", 1)["code"] == "Aborted"
    released_only_behind_the_fence(rx)
    settled(tx, rx)


def test_a_connection_given_up_fails_the_other_parts_on_it_with_a_reason(cluster: Cluster) -> None:
    """The receiver stands still while a part is to end early: what shares the connection can be tried again."""
    tx, rx = cluster.start("tx"), cluster.start("rx")
    tx.open(**BIG, role="sender", deadlines=CALM, tcp={"cancel_patience_s": 0.3})
    rx.open(**BIG, deadlines=CALM)
    rx("brake", **SLOW)
    for room in (1, 2):
        tx("sender", room=room)
        rx("receiver", room=room, peer=tx.address, tokens=TOKENS)
    tx("send", room=1, tokens=TOKENS)
    assert rx("until_landing", room=1)
    tx("send", room=2, tokens=TOKENS)  # behind it
    assert tx("until_tickets", count=2)
    rx.stop()
    tx("abort", side="sender", room=1)
    assert tx("until_links", count=0)
    rx.resume()
    assert rx.end_of("receiver", 1)["code"] == tx.end_of("sender", 1)["code"] == "Aborted"
    for worker, side in ((tx, "sender"), (rx, "receiver")):
        end = worker.end_of(side, 2)
        assert (end["code"], end["retryable"]) == ("TransportFailed", True)
        assert worker("until_free")["free"] == 16
    rx("brake")
    tx("sender", room=3, tokens=TOKENS)
    rx("receiver", room=3, peer=tx.address, tokens=TOKENS)
    assert rx("data", room=3, tokens=TOKENS)
    for worker in (tx, rx):
        assert worker("until_free")["free"] == 16
        assert worker("problems") == []
