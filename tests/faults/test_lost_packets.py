"""Every control packet of a 2,000-token room is lost once, by its number, in both directions.

One room per packet, all at the same time: the k-th of the connections loses its k-th packet. Those that carry
messages go by the numbers of these, which are the same in every run; bare ones (heartbeats, acknowledgements)
are counted apart.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.harness import PATIENT, Cluster

SMALL = {"hidden": 16, "block_tokens": 128, "blocks": 64}
ROOMS = 8
"""More than there are packets in either direction."""
SAID = {
    "sender": {"Welcome", "Opened", "PartReport", "PartOutcome"},
    "receiver": {"Hello", "Reserve", "PartAck", "Resume"},
}


@pytest.mark.parametrize("kind", ["message", "bare"])
@pytest.mark.parametrize("whose", ["sender", "receiver"])
def test_pain_07_each_packet_lost_once(cluster: Cluster, whose: str, kind: str) -> None:
    """The room ends in Success with all its bytes, whichever packet is lost. Pains 7, 15."""
    tx, rx = cluster.start("tx"), cluster.start("rx")
    loss: dict[str, Any] = {kind: 0, "spread": True} if whose == "sender" else {}
    tx.open(**SMALL, deadlines=PATIENT, loss=loss)
    names = [f"rx{number}" for number in range(ROOMS)]
    for number, name in enumerate(names):
        loss = {kind: number} if whose == "receiver" else {}
        rx("open", name=name, **{**SMALL, "blocks": 8}, deadlines=PATIENT, loss=loss)
    for number, name in enumerate(names):
        tx("sender", room=number)
        rx("receiver", name=name, room=number, peer=tx.address, tokens=1024)
    if kind == "bare":  # as many heartbeats as it takes
        for worker, name, count in [(tx, "main", ROOMS)] if whose == "sender" else [(rx, name, 1) for name in names]:
            assert worker("until_lost", name=name, count=count)
    for number in range(ROOMS):
        tx("send", room=number, tokens=2000)
    for number, name in enumerate(names):
        assert rx("data", name=name, room=number, tokens=2000)
        assert rx("until", name=name, side="receiver", room=number)["parts"] == [1024, 976]
        assert tx.end_of("sender", number)["parts"] == [1024, 976]
    lost = tx("lost") if whose == "sender" else [kinds for name in names for kinds in rx("lost", name=name)]
    assert {name for kinds in lost for name in kinds.split("+")} >= (SAID[whose] if kind == "message" else {"Frame"})


def test_a_third_of_all_packets_lost(cluster: Cluster) -> None:
    """In both directions, every third one: slower, but all of it arrives. Pain 7.

    A message and its acknowledgement get through 4 times in 9, and are tried again after up to 2 s.
    """
    deadlines = {**PATIENT, "stall_s": 40.0}
    tx, rx = cluster.open("tx", "rx", **SMALL, deadlines=deadlines, loss={"every": 3})
    empty = tx("counts")
    for room in range(4):
        tx("sender", room=room, tokens=2000)
        rx("receiver", room=room, peer=tx.address, tokens=1024)
    for room in range(4):
        assert rx("data", room=room, tokens=2000, timeout=40.0)
        assert tx.end_of("sender", room)["state"] == "Success"
    tx("clear")
    rx("close")
    assert tx("until_counts", wanted=empty, timeout=40.0) == {}  # its farewell may be lost, too
