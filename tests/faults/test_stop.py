"""A process of either side is frozen in the middle of a part, for long or for a moment."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.harness import (
    BIG,
    BIG_PART_NBYTES,
    FAST,
    PATIENT,
    Cluster,
    Worker,
    arrive,
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
def test_sender_frozen_for_long(cluster: Cluster, proxy: Proxy, by: str) -> None:
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
def test_frozen_for_a_moment(cluster: Cluster, proxy: Proxy, which: str) -> None:
    """A pause shorter than the deadlines costs nothing but time. Pain 9."""
    tx, rx, empty = freeze_mid_part(cluster, proxy, which, PATIENT)
    frozen, awake = (rx, tx) if which == "receiver" else (tx, rx)
    assert awake("until_silent", ticks=3)
    frozen.resume()
    arrive(tx, {rx: (0,)}, 1, TOKENS)
    settled(tx, rx, empty)
