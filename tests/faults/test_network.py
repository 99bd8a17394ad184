"""The network between two live processes fails: connections cut, stalled, delayed, refused, bits flipped."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from kvpoll_fsm import Address
from tests.faults.harness import (
    BIG,
    BIG_PART_NBYTES,
    FAST,
    GRANT,
    PATIENT,
    Cluster,
    Worker,
    arrive,
    join,
    through,
    transfer,
)
from tests.faults.proxy import Proxy

QUICK = {"connect_s": 0.5, "handshake_s": 0.5, "cancel_patience_s": 0.5}
"""A tcp transport that gives up soon."""
STALL = {**FAST, "peer_lost_s": 20.0}
"""Only a part that does not move ends a room."""


@pytest.fixture
def control() -> Iterator[Proxy]:
    with Proxy() as made:
        yield made


def called_through(control: Proxy, tx: Worker) -> None:
    """Let receivers reach the sender's control port through a proxy."""
    address = Address.parse(tx.address)
    control.target, tx.address = address.port, str(address.with_port(control.port))


def settled(tx: Worker, receivers: dict[Worker, tuple[int, ...]], empty: dict[str, int], tokens: int) -> None:
    """The next room works, and nothing is left of what happened."""
    transfer(tx, receivers, 1000, tokens)
    for worker in (tx, *receivers):
        worker("clear")
        assert worker("until_free")["free"] == worker("load")["total"]
    for worker in receivers:
        worker("close")
    assert tx("until_counts", wanted=empty) == {}


@pytest.mark.parametrize("how", ["cut", "refused", "stalled"])
def test_control_connection_lost_for_a_moment(cluster: Cluster, proxy: Proxy, control: Proxy, how: str) -> None:
    """In the middle of a part; shorter than the silence that counts as loss. Pain 7."""
    tx, rx = cluster.start("tx"), cluster.start("rx")
    through(proxy, rx, **BIG, deadlines=PATIENT)
    called_through(control, tx.open(**BIG, deadlines=PATIENT))
    empty = tx("counts")
    proxy.hold(BIG_PART_NBYTES + (1 << 20))
    tx("sender", room=1, tokens=2000)
    rx("receiver", room=1, peer=tx.address, tokens=1024)
    rx.until("receiver", 1, parts=1, gate="moving")
    if how == "stalled":
        control.hold()
        control.hold_down()
    else:
        control.refuse(how == "refused")
        assert control.cut() == 1
    if how != "cut":
        assert tx("until_silent", ticks=3)
    proxy.release()  # the part lands while nobody can say so
    control.refuse(False)
    control.release()
    arrive(tx, {rx: (0,)}, 1, 2000)
    settled(tx, {rx: (0,)}, empty, 2000)


def test_control_connection_cut_again_and_again(cluster: Cluster, control: Proxy) -> None:
    """Whatever was on its way is sent again. Pain 7."""
    tx, rx = cluster.open("tx", "rx", deadlines=PATIENT)
    empty = tx("counts")
    called_through(control, tx)
    for room in range(8):
        tx("sender", room=room, tokens=4 * GRANT)
        join(rx, tx, room, (0,), 1)
        control.cut()
    for room in range(8):
        arrive(tx, {rx: (0,)}, room, 4 * GRANT)
    settled(tx, {rx: (0,)}, empty, 3 * GRANT)


def test_control_connection_lost_for_long(cluster: Cluster, control: Proxy) -> None:
    """Both sides find out by themselves; with the network, the next room is back. Pains 2, 8, 10, 11."""
    tx, rx = cluster.open("tx", "rx", deadlines=FAST)
    empty = tx("counts")
    called_through(control, tx)
    tx("sender", room=1)
    join(rx, tx, 1, (0,), 1)
    rx.until("receiver", 1, state="WaitingForInput")
    control.refuse()
    control.cut()
    assert tx.end_of("sender", 1)["code"] == "PeerLost"
    assert rx.end_of("receiver", 1)["code"] == "PeerLost"
    control.refuse(False)
    settled(tx, {rx: (0,)}, empty, 3 * GRANT)


def test_control_connection_lost_one_way(cluster: Cluster, control: Proxy) -> None:
    """Only the receiver hears nothing, gives up and comes anew, while the sender still knows it. Pains 5, 11."""
    tx, rx = cluster.open("tx", "rx", deadlines=FAST)
    empty = tx("counts")
    called_through(control, tx)
    transfer(tx, {rx: (0,)}, 1, 3 * GRANT)
    for room in (2, 3):
        tx("sender", room=room)
    join(rx, tx, 2, (0,), 1)
    rx.until("receiver", 2, state="WaitingForInput")
    control.hold_down()
    assert rx.end_of("receiver", 2)["code"] == "PeerLost"
    join(rx, tx, 3, (0,), 1)
    control.release()
    assert tx.end_of("sender", 2)["state"] == "Failed"
    tx("send", room=3, tokens=3 * GRANT)
    arrive(tx, {rx: (0,)}, 3, 3 * GRANT)
    settled(tx, {rx: (0,)}, empty, 3 * GRANT)


@pytest.mark.parametrize("ranks", [1, 4])
def test_pain_10_data_connection_cut_in_the_middle_of_a_part(cluster: Cluster, proxy: Proxy, ranks: int) -> None:
    """With `require` there is no other way; all ranks are told, and the next room connects anew.

    Pains 1, 2, 3, 10, 21, 25.
    """
    tx, near, far = cluster.start("tx"), cluster.start("near"), cluster.start("far")
    through(proxy, far, **BIG, deadlines=PATIENT)
    tx.open(**BIG, deadlines=PATIENT)
    near.open(**BIG, deadlines=PATIENT)
    empty = tx("counts")
    near_ranks, far_ranks = tuple(range(ranks // 2)), tuple(range(ranks // 2, ranks))
    proxy.hold(1 << 20)
    tx("sender", room=1, ranks=ranks, tokens=500)
    join(near, tx, 1, near_ranks, ranks, tokens=512)
    join(far, tx, 1, far_ranks, ranks, tokens=512)
    assert proxy.wait_held(1 << 20)
    assert proxy.cut() == 1
    end = tx.until("sender", 1, ended=True)
    assert (end["code"], end["retryable"]) == ("TransportFailed", True)
    assert end["cause_rank"] in far_ranks
    for worker, own in ((near, near_ranks), (far, far_ranks)):
        for rank in own:
            told = worker.end_of("receiver", 1, rank)
            assert (told["code"], told["cause_rank"]) == ("TransportFailed", end["cause_rank"])
        assert worker("until_free")["free"] == 16
    tx.end_of("sender", 1)
    proxy.release()
    settled(tx, {near: near_ranks, far: far_ranks}, empty, 500)


def test_sender_is_idle_after_its_data_connection_was_cut(cluster: Cluster, proxy: Proxy) -> None:
    """The receiver has fenced what was on its way, so the room is over on both sides. Pains 14, 26."""
    tx, rx = cluster.start("tx"), cluster.start("rx")
    through(proxy, rx, **BIG, deadlines=PATIENT)
    tx.open(**BIG, deadlines=PATIENT)
    proxy.hold(1 << 20)
    tx("sender", room=1, tokens=500)
    join(rx, tx, 1, (0,), 1, tokens=512)
    assert proxy.wait_held(1 << 20)
    proxy.cut()
    assert rx.end_of("receiver", 1)["code"] == "TransportFailed"
    tx.end_of("sender", 1, timeout=2.0)
    assert tx("is_idle")


@pytest.mark.parametrize("ranks", [1, 4])
def test_pain_25_flipped_bit_of_the_payload(cluster: Cluster, proxy: Proxy, ranks: int) -> None:
    """The checksum finds it, and every rank learns on which it was. Pains 3, 4, 25."""
    tx, near, far = cluster.start("tx"), cluster.start("near"), cluster.start("far")
    through(proxy, far, **BIG, deadlines=PATIENT)
    tx.open(**BIG, deadlines=PATIENT)
    near.open(**BIG, deadlines=PATIENT)
    empty = tx("counts")
    near_ranks, far_ranks = tuple(range(ranks // 2)), tuple(range(ranks // 2, ranks))
    proxy.flip(1 << 20)
    tx("sender", room=1, ranks=ranks, tokens=500)
    join(near, tx, 1, near_ranks, ranks, tokens=512)
    join(far, tx, 1, far_ranks, ranks, tokens=512)
    end = tx.end_of("sender", 1)
    assert (end["code"], end["parts"]) == ("ChecksumMismatch", [])
    assert end["cause_rank"] in far_ranks
    for worker, own in ((near, near_ranks), (far, far_ranks)):
        for rank in own:
            told = worker.end_of("receiver", 1, rank)
            assert (told["code"], told["cause_rank"]) == ("ChecksumMismatch", end["cause_rank"])
    settled(tx, {near: near_ranks, far: far_ranks}, empty, 500)


HELLO_NBYTES, PROOF_NBYTES, HEAD_NBYTES = 58, 32, 40
FIRST_FRAME = HELLO_NBYTES + PROOF_NBYTES


def test_flipped_bit_of_the_frames(cluster: Cluster, proxy: Proxy) -> None:
    """Wherever the bit is, the room fails on both sides and the next one, on a new connection, does not. Pain 10."""
    tx, rx = cluster.start("tx"), cluster.start("rx")
    through(proxy, rx, deadlines=PATIENT, tcp=QUICK)
    tx.open(deadlines=PATIENT, tcp=QUICK)
    entries = FIRST_FRAME + HEAD_NBYTES
    places = {
        "the sender's incarnation": 20,
        "the sender's proof": HELLO_NBYTES + 5,
        "the frame's kind": FIRST_FRAME + 2,
        "the token": FIRST_FRAME + HEAD_NBYTES - 3,
        "the number of entries": FIRST_FRAME + 20,
        "an entry's region": entries,
        "an entry's size": entries + 5,
        "an entry's offset": entries + 9,
    }
    for room, (place, at) in enumerate(places.items()):
        proxy.flip(at)
        tx("sender", room=room, tokens=GRANT)
        join(rx, tx, room, (0,), 1)
        codes = {tx.until("sender", room, ended=True)["code"], rx.end_of("receiver", room)["code"]}
        assert codes <= {"TransportUnavailable", "TransportFailed", "ChecksumMismatch"}, place
        assert rx("until_free")["free"] == 64, place
        proxy.cut()  # let the next connection start to count at 0
        assert tx("until_links", count=0)
        transfer(tx, {rx: (0,)}, 100 + room, GRANT)
        proxy.cut()
        assert tx("until_links", count=0)


@pytest.mark.parametrize("how", ["refused", "silent", "unreachable"])
def test_pain_22_data_port_out_of_reach(cluster: Cluster, proxy: Proxy, how: str) -> None:
    """The preflight finds it before anything is promised. Pains 8, 10, 22."""
    tx, rx = cluster.start("tx"), cluster.start("rx")
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        if how == "unreachable":  # a queue that is full: whoever comes now gets no answer at all
            rx.open(deadlines=PATIENT, tcp={"advertise": f"127.0.0.1:{hole.getsockname()[1]}"})
            fill = [socket.socket() for _ in range(4)]
            for sock in fill:
                sock.setblocking(False)
                sock.connect_ex(hole.getsockname())
        else:
            fill = []
            through(proxy, rx, deadlines=PATIENT)
            proxy.refuse(how == "refused")
            proxy.hold()
        tx.open(deadlines=PATIENT, tcp=QUICK)
        empty = tx("counts")
        tx("sender", room=1, tokens=GRANT)
        join(rx, tx, 1, (0,), 1)
        end, told = tx.end_of("sender", 1), rx.end_of("receiver", 1)
        assert (end["code"], end["history"]) == ("TransportUnavailable", ["Bootstrapping", "Failed"])
        assert (told["code"], told["cause_rank"]) == ("TransportUnavailable", 0)
        assert "tcp to rank 0" in told["detail"]
        for sock in fill:
            sock.close()
    if how == "unreachable":
        tx("clear")
        rx("close")
        assert tx("until_counts", wanted=empty) == {}
    else:
        proxy.refuse(False)
        proxy.release()
        settled(tx, {rx: (0,)}, empty, 3 * GRANT)


@pytest.mark.parametrize("back", [True, False], ids=["comes back", "stays away"])
def test_pain_28_data_connection_stalled_in_the_middle_of_a_part(cluster: Cluster, proxy: Proxy, back: bool) -> None:
    """Control goes on, so both sides are alive; the part is not. Pains 1, 2, 8, 28."""
    tx, rx = cluster.start("tx"), cluster.start("rx")
    through(proxy, rx, **BIG, deadlines=STALL)
    tx.open(**BIG, deadlines=STALL, tcp={"cancel_patience_s": 20.0 if back else 0.3})
    empty = tx("counts")
    proxy.hold(BIG_PART_NBYTES + (1 << 20))
    tx("sender", room=1, tokens=2000)
    rx("receiver", room=1, peer=tx.address, tokens=1024)
    rx.until("receiver", 1, parts=1, gate="moving")
    (seen,) = tx("dump")
    assert (seen["state"], seen["gate"]) == ("Transferring", "moving")
    assert "part 1" in seen["waits_for"]
    end, told = tx.until("sender", 1, ended=True), rx.end_of("receiver", 1)
    assert end["code"] == told["code"] == "DeadlinePassed"
    assert rx("until_free")["free"] == 16  # fenced: the token is dead
    rx("canary")
    if back:
        proxy.release()
    else:
        assert tx("until_links", count=0)
        proxy.release()  # too late
        assert rx("until_unread")
    tx.end_of("sender", 1)
    assert rx("canary_lives")
    settled(tx, {rx: (0,)}, empty, 2000)


def test_slow_network(cluster: Cluster, proxy: Proxy, control: Proxy) -> None:
    """20 ms each way, for data and control: slow, but all there. Pain 9."""
    tx, rx = cluster.start("tx"), cluster.start("rx")
    for each in (proxy, control):
        each.delay(0.02)
    through(proxy, rx, **BIG, deadlines=FAST)
    called_through(control, tx.open(**BIG, deadlines=FAST))
    empty = tx("counts")
    transfer(tx, {rx: (0,)}, 1, 2000)
    settled(tx, {rx: (0,)}, empty, 2000)
