"""Many rooms, given up at random while their parts are under way, and a sender that is killed in the middle."""

from __future__ import annotations

import random

from tests.faults.harness import FAST, Cluster, Worker

ROOMS = 120
LAYOUT = {"hidden": 1024, "block_tokens": 32, "blocks": 24}
GRANT = 128
"""Tokens of a grant: 4 blocks, of 24, so that rooms queue for those that others leave."""
TOKENS = 300
"""Three parts."""


def weather(rng: random.Random, rx: Worker) -> None:
    """Reading is fast, slow or very slow for a while."""
    nbytes = rng.choice((0, 0, 1 << 16, 1 << 13))
    rx("brake", nbytes=nbytes, pause_s=0.003 if nbytes else 0.0)


def open_room(rng: random.Random, tx: Worker, rx: Worker, room: int) -> None:
    first, second = rng.sample(("sender", "receiver"), 2)
    for side in (first, second):
        if side == "sender":
            tx("sender", room=room, tokens=TOKENS)
        else:
            rx("receiver", room=room, peer=tx.address, tokens=GRANT, resume=rng.choice(("drain", "extend")))


def test_a_storm_leaves_every_block_in_its_place(cluster: Cluster) -> None:
    """At every move and at every look free, leased and quarantined blocks are the pool; in the end all are free."""
    rng = random.Random(7)
    tx, doomed, rx = cluster.start("tx"), cluster.start("doomed"), cluster.start("rx")
    for worker in (tx, doomed):
        worker.open(**LAYOUT, role="sender", deadlines={**FAST, "bootstrap_s": 60.0, "stall_s": 20.0})
    rx.open(**LAYOUT, deadlines={**FAST, "bootstrap_s": 60.0, "stall_s": 20.0})
    for worker in (tx, rx):
        worker("sample")
    lost: set[int] = set()
    gave_up: set[int] = set()
    for room in range(ROOMS):
        owner = doomed if room % 4 == 0 and not doomed.process.has_ended() else tx
        lost |= {room} if owner is doomed else set()
        open_room(rng, owner, rx, room)
        if room % 5 == 0:
            weather(rng, rx)
        if rng.random() < 0.5:
            victim = rng.randrange(max(0, room - 6), room + 1)
            gave_up.add(victim)
            side = rng.choice(("sender", "receiver"))
            worker = rx if side == "receiver" else doomed if victim in lost else tx
            if not worker.process.has_ended():
                worker("abort", side=side, room=victim)
        if room == ROOMS // 2:
            doomed.kill()
    rx("brake")
    for room in gave_up:  # one side may have given up before the other came
        rx("abort", side="receiver", room=room)
    ends = {room: rx.end_of("receiver", room) for room in range(ROOMS)}
    odd = [end for end in ends.values() if end["code"] not in (None, "Aborted", "PeerLost", "OutcomeUnknown")]
    assert [end["detail"] for end in odd] == []
    whole = [room for room, end in ends.items() if end["state"] == "Success"]
    assert len(whole) > ROOMS // 10
    assert {end["state"] for end in ends.values()} == {"Success", "Failed"}
    assert all(rx("data", room=room, tokens=TOKENS) for room in whole)
    for worker in (tx, rx):
        assert worker("until_free")["free"] == LAYOUT["blocks"]
        sampled = worker("sampled")
        assert sampled["looks"] > 50
        assert sampled["wrong"] == worker("problems") == []
    assert rx("scorched") == []
