"""The sender is gone, by death or with its network; what it had sent is still in kernels and on the way."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kvpoll_fsm import Address
from tests.faults.harness import BIG, FAST, PATIENT, Cluster, Worker, join
from tests.faults.proxy import Proxy

TOKENS, SMALL = 1024, 32
LOSING = {**FAST, "stall_s": 20.0}
"""Only silence ends a room."""


def unread_nbytes(port: int) -> int:
    """Bytes in this machine's kernel that were sent to a port and that nobody has read yet."""
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    return sum(
        int(row[4].split(":")[1], 16) for row in rows if int(row[1].split(":")[1], 16) == port and row[3] != "0A"
    )


def until_unread(port: int, nbytes: int) -> None:
    ends_s = time.monotonic() + 10
    while unread_nbytes(port) < nbytes:
        assert time.monotonic() < ends_s, f"only {unread_nbytes(port)} of {nbytes} bytes have come"
        time.sleep(0.005)


def settled(spare: Worker, receivers: dict[Worker, tuple[int, ...]], room: int, tokens: int) -> None:
    """The readers have read everything; the blocks' next room is unharmed, and works."""
    for rx in receivers:
        rx("brake")
        assert rx("until_readers", count=1)  # that of the room to come
        assert rx("untouched", room=room)
    spare("send", room=room, tokens=tokens)
    for rx, own in receivers.items():
        assert all(rx("data", room=room, rank=rank, tokens=tokens) for rank in own)
        assert rx("until_free")["free"] == rx("load")["total"]
        assert rx("problems") == []
    assert spare.end_of("sender", room)["state"] == "Success"


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("tokens", [SMALL, TOKENS])
def test_pain_01_sender_killed_with_bytes_in_kernel_buffers(cluster: Cluster, ranks: int, tokens: int) -> None:
    """The kernel hands out what the dead process had sent, long after its room was given up.

    A small part is there whole, of a large one there are megabytes.
    """
    tx, spare, near, far = cluster.open("tx", "spare", "near", "far", **BIG, role="sender", deadlines=LOSING)
    places = {near: tuple(range(ranks // 2)), far: tuple(range(ranks // 2, ranks))}
    for rx, own in places.items():
        rx("close")
        rx.open(**{**BIG, "blocks": max(1, len(own)) * -(-tokens // 128)}, deadlines=LOSING)
        rx("brake", nbytes=64, pause_s=0.02)  # 3 kB/s: a small part would take a minute
    tx("sender", room=1, ranks=ranks, tokens=tokens)
    spare("sender", room=2, ranks=ranks)
    for rx, own in places.items():
        join(rx, tx, 1, own, ranks, tokens=tokens)
    for rx, own in places.items():
        for _ in own[:1]:
            assert rx("until_landing", room=1)
            until_unread(rx.data_port, (1 << 20) if tokens == TOKENS else 100_000)
            join(rx, spare, 2, own, ranks, tokens=tokens)
    tx.kill()
    for rx, own in places.items():
        for rank in own:
            end = rx.end_of("receiver", 1, rank)
            assert (end["code"], end["retryable"]) == ("PeerLost", True)
            assert rx.until("receiver", 2, rank, state="WaitingForInput")["reached"]
            moves = rx("moves", room=1, rank=rank)
            assert moves == ["take", "quarantine", "fenced", "release"]
        assert not own or rx("shares_blocks", first=1, second=2)
        assert rx("untouched", room=2)
    settled(spare, {rx: own for rx, own in places.items() if own}, 2, tokens)


def gone_mid_part(tx: Worker, proxy: Proxy, control: Proxy, rx: Worker) -> None:
    """Room 1 is in the middle of its part when the network stops: no end, no reset, nothing."""
    address = Address.parse(tx.address)
    control.target, tx.address = address.port, str(address.with_port(control.port))
    proxy.hold(1 << 20)
    tx("sender", room=1, tokens=TOKENS)
    rx("receiver", room=1, peer=tx.address, tokens=TOKENS)
    assert rx("until_landing", room=1)
    assert proxy.wait_held(1 << 20)
    proxy.hold_down()
    control.hold()
    control.hold_down()


def test_pain_01_senders_host_gone_for_good(cluster: Cluster, proxy: Proxy, control: Proxy) -> None:
    """A token can be fenced alone: the blocks are free at once, and nobody else is harmed."""
    tx, healthy, spare, rx = (cluster.start(name) for name in ("tx", "healthy", "spare", "rx"))
    for worker in (tx, healthy, spare):
        worker.open(**BIG, role="sender", deadlines=LOSING)
    rx.open(**BIG, deadlines={**LOSING, "quarantine_max_s": 60.0}, tcp={"advertise": f"127.0.0.1:{proxy.port}"})
    proxy.target = rx.data_port
    rx("sample")
    healthy("sender", room=3, tokens=TOKENS)
    spare("sender", room=2)
    gone_mid_part(tx, proxy, control, rx)
    assert rx.end_of("receiver", 1)["code"] == "PeerLost"
    assert rx("moves", room=1) == ["take", "quarantine", "fenced", "release"]
    rx("receiver", room=2, peer=spare.address, tokens=2 * TOKENS)  # the whole pool
    proxy.release()  # all that was on the way comes now
    rx.until("receiver", 2, state="WaitingForInput")
    assert rx("untouched", room=2)
    spare("send", room=2, tokens=TOKENS)
    assert rx("data", room=2, tokens=TOKENS)
    rx("receiver", room=3, peer=healthy.address, tokens=TOKENS)
    assert rx("data", room=3, tokens=TOKENS)
    assert rx("until_free")["free"] == 16
    sampled = rx("sampled")
    assert sampled["looks"] > 10
    assert sampled["wrong"] == rx("problems") == []
    control.release()  # the two find that they have lost each other
    assert tx.end_of("sender", 1)["code"] == "PeerLost"
    assert tx("until_free")["free"] == 16
    assert tx("problems") == []


def test_senders_host_gone_for_good_and_a_fence_that_hurts_others(
    cluster: Cluster, proxy: Proxy, control: Proxy
) -> None:
    """Then it is used only when `quarantine_max_s` has passed; the others' rooms fail with a reason, and try again."""
    tx, healthy, spare, rx = (cluster.start(name) for name in ("tx", "healthy", "spare", "rx"))
    for worker in (tx, healthy, spare):
        worker.open(**BIG, role="sender", deadlines={**PATIENT, "quarantine_max_s": 1.0})
    rx.open(
        **BIG,
        costly=True,
        deadlines={**LOSING, "quarantine_max_s": 2.5},
        tcp={"advertise": f"127.0.0.1:{proxy.port}"},
    )
    proxy.target = rx.data_port
    rx("sample")
    for worker, room in ((spare, 5), (healthy, 6)):  # their links stand when the network stops
        worker("sender", room=room, tokens=SMALL)
        rx("receiver", room=room, peer=worker.address, tokens=SMALL)
        assert rx("data", room=room, tokens=SMALL)
    for worker, room in ((spare, 2), (healthy, 3), (healthy, 4)):
        worker("sender", room=room)
    gone_mid_part(tx, proxy, control, rx)
    rx("receiver", room=3, peer=healthy.address, tokens=512)
    rx("receiver", room=4, peer=healthy.address, tokens=512)
    rx("receiver", room=2, peer=spare.address, tokens=TOKENS)  # for these blocks it has to wait
    assert rx.until("receiver", 1, ended=True)["code"] == "PeerLost"
    rx.until("receiver", 3, state="WaitingForInput")
    rx.until("receiver", 2, gate="waiting_blocks")
    assert rx("load")["quarantined"] == 8
    assert rx("moves", room=1) == ["take", "quarantine"]
    proxy.release()  # the token is as good as ever: bytes land, in blocks that nobody has
    assert rx("until_moved", room=2, what="take")
    assert rx("moves", room=1) == ["take", "quarantine", "fenced", "release"]
    assert rx("shares_blocks", first=1, second=2)
    assert rx("untouched", room=2)
    for worker, room in ((spare, 2), (healthy, 3), (healthy, 4)):
        worker("send", room=room, tokens=500)
        assert rx("data", room=room, tokens=500)
    assert rx("until_free")["free"] == 16
    sampled = rx("sampled")
    assert sampled["most_quarantined"] == 8
    assert sampled["wrong"] == rx("problems") == []


def test_a_fence_that_hurts_others_fails_their_parts_with_a_reason(cluster: Cluster, proxy: Proxy) -> None:
    """A healthy peer's part is under way when another's blocks are fenced by force."""
    tx, healthy, rx = (cluster.start(name) for name in ("tx", "healthy", "rx"))
    tx.open(**BIG, role="sender", deadlines=PATIENT)
    healthy.open(**BIG, role="sender", deadlines=PATIENT)
    rx.open(**BIG, costly=True, deadlines={**LOSING, "quarantine_max_s": 0.5})
    rx("brake", nbytes=4096, pause_s=0.02)
    for worker, room in ((tx, 1), (healthy, 2)):
        worker("sender", room=room, tokens=TOKENS)
        rx("receiver", room=room, peer=worker.address, tokens=TOKENS)
        assert rx("until_landing", room=room)
    tx.kill()
    end = healthy.end_of("sender", 2)
    assert (end["code"], end["retryable"]) == ("TransportFailed", True)
    assert rx.end_of("receiver", 2)["code"] == "TransportFailed"
    assert rx.end_of("receiver", 1)["code"] == "PeerLost"
    rx("brake")
    for worker in (healthy, rx):
        assert worker("until_free")["free"] == 16
        assert worker("problems") == []
    healthy("sender", room=3, tokens=TOKENS)
    rx("receiver", room=3, peer=healthy.address, tokens=TOKENS)
    assert rx("data", room=3, tokens=TOKENS)
