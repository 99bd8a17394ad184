"""What is sent stays as it is while anybody may read it, and is the host's again as soon as it is said to be."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.harness import BIG, FAST, Cluster, Worker

TOKENS = 1024
CALM = {**FAST, "peer_lost_s": 1.0, "stall_s": 20.0}
SLOW = {"nbytes": 1 << 18, "pause_s": 0.005}
STUCK = {"nbytes": 1 << 12, "pause_s": 0.02}
"""A part of 7.3 MB would take half a minute."""


def open_two(cluster: Cluster, brake: dict[str, float], **tx_settings: Any) -> tuple[Worker, Worker]:
    tx, rx = cluster.start("tx"), cluster.start("rx")
    tx.open(**{**BIG, **tx_settings}, role="sender", deadlines=CALM)
    rx.open(**BIG, deadlines=CALM)
    rx("brake", **brake)
    tx("sender", room=1)
    return tx, rx


def nothing_wrong(tx: Worker, rx: Worker) -> None:
    assert rx("scorched") == []
    for worker in (tx, rx):
        assert worker("problems") == []


@pytest.mark.parametrize("lent", ["arrays", "blocks"])
def test_pain_18_what_was_lent_is_overwritten_the_moment_it_is_given_back(cluster: Cluster, lent: str) -> None:
    """Borrowed arrays, and an engine's own blocks that the kernel reads from: a parallel part still has every byte."""
    tx, rx = open_two(cluster, SLOW, adopt=lent == "blocks")
    tx("lend", room=1, tokens=TOKENS, blocks=8 if lent == "blocks" else 0)
    rx("receiver", room=1, peer=tx.address, tokens=TOKENS)
    assert rx("data", room=1, tokens=TOKENS)
    assert tx("until_overwritten", room=1)
    nothing_wrong(tx, rx)


def test_a_copy_is_nobody_elses(cluster: Cluster) -> None:
    """With copy=True the arrays are the host's own again when send() returns."""
    tx, rx = open_two(cluster, SLOW)
    tx("lend", room=1, tokens=2 * TOKENS, copy=True)
    rx("receiver", room=1, peer=tx.address, tokens=TOKENS)
    assert rx("data", room=1, tokens=2 * TOKENS)
    nothing_wrong(tx, rx)


@pytest.mark.parametrize("how", ["abort", "peer aborts", "peer is killed", "link is closed"])
@pytest.mark.parametrize("lent", ["arrays", "blocks"])
def test_nothing_of_what_comes_after_is_ever_sent(cluster: Cluster, lent: str, how: str) -> None:
    """The part is given up in the middle of a frame, which the kernel has taken only a piece of."""
    tx, rx = open_two(cluster, STUCK, adopt=lent == "blocks")
    tx("lend", room=1, tokens=TOKENS, blocks=8 if lent == "blocks" else 0)
    rx("receiver", room=1, peer=tx.address, tokens=TOKENS)
    assert rx("until_landing", room=1)
    if how == "abort":
        tx("abort", side="sender", room=1)
    elif how == "peer aborts":
        rx("abort", side="receiver", room=1)
    elif how == "peer is killed":
        rx.kill()
    else:
        tx("close_links")
    assert tx("until_overwritten", room=1)
    assert tx("until_free")["free"] == 16
    if how != "peer is killed":
        rx("brake")
        rx.end_of("receiver", 1)
        assert rx("until_free")["free"] == 16
        nothing_wrong(tx, rx)
