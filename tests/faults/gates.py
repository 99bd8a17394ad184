"""Rooms at every gate at once, so that one fault befalls all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvpoll_fsm.deadlines import Gate
from tests.faults.harness import GRANT, Cluster, Worker, join, through
from tests.faults.proxy import Proxy

__all__ = ["BLOCKS", "ReceiversScene", "SenderScene", "receivers_at_every_gate", "sender_at_every_gate"]

EVERY_GATE = {*Gate} - {Gate.closed}
BLOCKS = 24
"""The receivers' pools, where those are what rooms wait for."""
PASSES_NBYTES = 1500
"""How much of a part gets through before the rest is held."""


@dataclass
class SenderScene:
    """A sender with a room at each of its gates, all of them with ranks on the receiver that something befalls.

    Attributes:
        tx: The sender.
        near: The receiver that nothing befalls; with one rank it has none.
        far: The other one.
        near_ranks: The ranks on `near`.
        far_ranks: The ranks on `far`.
        empty: What the sender's tables were before.
        gates: The rooms that have opened, by the gate they wait at.
        early: The room that has not: a rank is missing.
    """

    tx: Worker
    near: Worker
    far: Worker
    near_ranks: tuple[int, ...]
    far_ranks: tuple[int, ...]
    empty: dict[str, int]
    gates: dict[str, int]
    early: int = 10

    @property
    def ranks(self) -> int:
        """How many ranks a room has."""
        return len(self.near_ranks) + len(self.far_ranks)

    @property
    def tokens(self) -> dict[int, int]:
        """What the rooms that have opened carry, once the one that is queued has data."""
        return {room: (2 if gate == "waiting_resume" else 1) * GRANT for gate, room in self.gates.items()}


def sender_at_every_gate(
    cluster: Cluster, proxy: Proxy, ranks: int, deadlines: dict[str, float], **far_settings: Any
) -> SenderScene:
    """Bring a sender's rooms to every gate."""
    scene = _sender_opened(cluster, proxy, ranks, deadlines, far_settings)
    tx, far = scene.tx, scene.far
    far("lose", hold="Resume")  # the first that is lost holds up all later messages: acknowledgements too
    tx("send", room=12, tokens=2 * GRANT)
    tx.until("sender", 12, state="Transferring", gate="waiting_resume")
    tx("send", room=13, tokens=GRANT)
    tx.until("sender", 13, gate="waiting_outcome")
    proxy.hold(PASSES_NBYTES)
    for room, gate in ((14, "moving"), (15, "waiting_blocks")):
        tx("send", room=room, tokens=GRANT)
        tx.until("sender", room, gate=gate)
    assert proxy.wait_held(1)
    assert {*scene.gates, Gate.waiting_ranks} == EVERY_GATE
    return scene


def _sender_opened(
    cluster: Cluster, proxy: Proxy, ranks: int, deadlines: dict[str, float], far_settings: dict[str, Any]
) -> SenderScene:
    """All rooms open but the early one, and none with data."""
    tx, near, far = cluster.start("tx"), cluster.start("near"), cluster.start("far")
    through(proxy, far, deadlines=deadlines, **far_settings)
    tx.open(blocks=4, deadlines=deadlines)
    near.open(deadlines=deadlines)
    gates = {"queued": 11, "waiting_resume": 12, "waiting_outcome": 13, "moving": 14, "waiting_blocks": 15}
    near_ranks, far_ranks = tuple(range(ranks // 2)), tuple(range(ranks // 2, ranks))
    scene = SenderScene(tx, near, far, near_ranks, far_ranks, tx("counts"), gates)
    tx("sender", room=scene.early, ranks=ranks + 1)
    join(near, tx, scene.early, near_ranks, ranks + 1)
    join(far, tx, scene.early, far_ranks, ranks + 1)
    for room in gates.values():
        tx("sender", room=room, ranks=ranks)
        join(near, tx, room, near_ranks, ranks)
        join(far, tx, room, far_ranks, ranks)
    for room in gates.values():
        tx.until("sender", room, state="WaitingForInput", gate="queued")
    return scene


@dataclass
class ReceiversScene:
    """Receivers with a room at each of their gates, all of them of the sender that something befalls.

    Attributes:
        tx: The sender.
        near: A receiver whose data port is reached directly; with one rank it has none.
        far: A receiver whose data port is reached through the proxy, and which is an engine's, too.
        near_ranks: The ranks on `near`.
        far_ranks: The ranks on `far`.
        empty: What the receivers' tables were before.
        gates: The rooms, by number, and the gates their ranks wait at.
        engine: The rooms whose blocks are the engine's own, and their gates.
    """

    tx: Worker
    near: Worker
    far: Worker
    near_ranks: tuple[int, ...]
    far_ranks: tuple[int, ...]
    empty: dict[Worker, dict[str, int]]
    gates: dict[int, str]
    engine: dict[int, str]

    @property
    def ranks(self) -> int:
        """How many ranks a room has."""
        return len(self.near_ranks) + len(self.far_ranks)

    @property
    def places(self) -> list[tuple[Worker, int]]:
        """Every rank and where it is."""
        return [(self.near, rank) for rank in self.near_ranks] + [(self.far, rank) for rank in self.far_ranks]

    @property
    def receivers(self) -> dict[Worker, tuple[int, ...]]:
        """The same, by receiver."""
        return {self.near: self.near_ranks, self.far: self.far_ranks}


def receivers_at_every_gate(
    cluster: Cluster, proxy: Proxy, ranks: int, deadlines: dict[str, float], **tx_settings: Any
) -> ReceiversScene:
    """Bring the receivers' rooms to every gate."""
    scene = _receivers_opened(cluster, proxy, ranks, deadlines, tx_settings)
    tx, far = scene.tx, scene.far
    tx("sender", room=26, tokens=2 * GRANT)
    far("receiver", name="engine", room=26, peer=tx.address, resume="manual", blocks=[2, 0])
    far.until("receiver", 26, name="engine", gate="waiting_resume")
    tx("sender", room=24)
    far("receiver", name="engine", room=24, peer=tx.address, resume="manual", blocks=[3, 1])
    tx.until("sender", 24, gate="queued")
    tx("lose", hold="PartOutcome")  # lost once per connection, and with it all that follows there
    tx("send", room=23, tokens=GRANT)
    tx("send", room=24, tokens=2 * GRANT)
    tx.until("sender", 23, state="Success")
    tx.until("sender", 24, gate="waiting_resume")
    proxy.hold(PASSES_NBYTES)
    tx("send", room=25, tokens=GRANT)
    for worker, rank in scene.places:
        for room, gate in scene.gates.items():
            worker.until("receiver", room, rank, gate=gate)
    for room, gate in scene.engine.items():
        far.until("receiver", room, name="engine", gate=gate)
    assert proxy.wait_held(1)
    assert {*scene.gates.values(), *scene.engine.values()} == EVERY_GATE
    return scene


def _receivers_opened(
    cluster: Cluster, proxy: Proxy, ranks: int, deadlines: dict[str, float], tx_settings: dict[str, Any]
) -> ReceiversScene:
    """The rooms that need nobody's data are where they are to be, the others are open."""
    tx, near, far = cluster.start("tx"), cluster.start("near"), cluster.start("far")
    through(proxy, far, blocks=BLOCKS, deadlines=deadlines)
    tx.open(deadlines=deadlines, **tx_settings)
    near.open(blocks=BLOCKS, deadlines=deadlines)
    far("open", name="engine", adopt=True, blocks=4, deadlines=deadlines)
    near_ranks, far_ranks = tuple(range(ranks // 2)), tuple(range(ranks // 2, ranks))
    empty = {worker: worker("counts") for worker in (near, far)}
    gates = {20: "waiting_ranks", 21: "waiting_blocks", 22: "queued", 23: "waiting_outcome", 25: "moving"}
    engine = {24: "waiting_outcome", 26: "waiting_resume"}
    scene = ReceiversScene(tx, near, far, near_ranks, far_ranks, empty, gates, engine)
    for room in (22, 23, 25):
        tx("sender", room=room, ranks=ranks)
    share = BLOCKS * 16 // len(far_ranks)  # room 21 wants all of a pool, and the others have some of it
    for room, tokens in ((22, GRANT), (23, GRANT), (25, GRANT), (20, GRANT), (21, share)):
        for worker, own in scene.receivers.items():
            join(worker, tx, room, own, ranks, tokens=tokens)
    for room in (22, 23, 25):
        tx.until("sender", room, gate="queued")
    return scene
