"""These tests would notice: what keeps blocks and sources safe is taken away, piece by piece."""

from __future__ import annotations

import pytest

from tests.faults.harness import BIG, Cluster
from tests.fences.test_slow_receiver import CALM, ONE_GRANT, SLOW, TOKENS, mid_part


@pytest.mark.parametrize("how", ["early", "no fence"])
def test_blocks_that_are_free_before_the_fence(cluster: Cluster, how: str) -> None:
    """The reader is still at it when the blocks are the next room's."""
    tx, rx = mid_part(cluster, CALM, CALM)
    assert rx("hold")
    rx("sabotage", how=how)
    rx("abort", side="receiver", room=1)
    assert rx("until_moved", room=2, what="take")
    rx("let_go")
    assert rx("until_touched", room=2)
    tx.until("sender", 1, ended=True)  # without a fence nobody tells it that nothing lands any more


def test_sources_that_are_free_while_they_are_read(cluster: Cluster) -> None:
    """What is written there next is sent to the room that was given up."""
    tx, rx = cluster.start("tx"), cluster.start("rx")
    tx.open(**BIG, role="sender", deadlines=CALM)
    rx.open(**BIG, costly=True, deadlines=CALM)  # what comes after the end of the room lands, in quarantine
    rx("brake", **SLOW)
    tx("sabotage", how="source")
    tx("sender", room=1, tokens=TOKENS)
    rx("receiver", room=1, peer=tx.address, tokens=TOKENS)
    assert rx("until_landing", room=1)
    tx("abort", side="sender", room=1)
    rx("brake")
    assert rx("until_moved", room=1, what="release")
    assert "a source was read after it had been given back" in " ".join(rx("problems"))


def test_slow_is_slow_and_one_grant_is_the_pool() -> None:
    """What the tests rest on."""
    nbytes = TOKENS * 3584 * 2
    assert nbytes / SLOW["nbytes"] * SLOW["pause_s"] > 30
    assert ONE_GRANT["blocks"] * 128 == TOKENS
