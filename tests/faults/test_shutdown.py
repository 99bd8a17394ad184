"""A process is asked to end, or just ends, in the middle of a part."""

from __future__ import annotations

import signal

import pytest

from tests.faults.harness import BIG, BIG_PART_NBYTES, PATIENT, Cluster, Worker, arrive, through, transfer
from tests.faults.proxy import Proxy

ROOM, TOKENS = 1, 2000


def mid_part(cluster: Cluster, proxy: Proxy, tokens: int = TOKENS) -> tuple[Worker, Worker]:
    """Room 1 in the middle of its second part."""
    tx, rx = cluster.start("tx"), cluster.start("rx")
    through(proxy, rx, **BIG, deadlines=PATIENT)
    tx.open(**BIG, deadlines=PATIENT)
    proxy.hold(BIG_PART_NBYTES + (1 << 20))
    tx("sender", room=ROOM, tokens=tokens)
    rx("receiver", room=ROOM, peer=tx.address, tokens=1024)
    rx.until("receiver", ROOM, parts=1, gate="moving")
    assert proxy.wait_held(1 << 20)
    return tx, rx


@pytest.mark.parametrize("which", ["sender", "receiver"])
def test_pain_26_sigterm_drains(cluster: Cluster, proxy: Proxy, which: str) -> None:
    """The handler calls `drain()`; the room ends in Success, no new one is taken. Pain 26."""
    tx, rx = mid_part(cluster, proxy)
    ends = tx if which == "sender" else rx
    ends("drain_on_sigterm", deadline_s=20.0)
    ends.process.signal(signal.SIGTERM)
    ends.event("draining")
    proxy.release()
    drained = ends.event("drained")
    assert drained["drained"] is True
    assert [state["state"] for state in drained["states"]] == ["Success"]
    arrive(tx, {rx: (0,)}, ROOM, TOKENS)
    with pytest.raises(AssertionError, match="EndpointClosed: the endpoint has ended: draining"):
        ends("sender", room=2)


def test_sigterm_while_the_main_thread_waits(cluster: Cluster, proxy: Proxy) -> None:
    """`drain()` in a handler that interrupts `result()`, whose lock is then this very thread's. Pain 26."""
    tx, rx = mid_part(cluster, proxy)
    rx("drain_on_sigterm", deadline_s=20.0)
    order = rx.post("result_for_ever", room=ROOM)
    rx.event("waiting")
    rx.process.signal(signal.SIGTERM)
    rx.event("draining")
    proxy.release()
    assert rx.event("drained")["drained"] is True
    rx.answer(order)
    arrive(tx, {rx: (0,)}, ROOM, TOKENS)


def test_signal_handler_interrupts_a_call(cluster: Cluster) -> None:
    """A handler may call the endpoint whatever call of the same thread it interrupts. Pain 26."""
    (tx,) = cluster.open("tx", deadlines=PATIENT)
    assert tx("load_in_handler_of_every_lock") > 2


def test_drain_has_a_deadline(cluster: Cluster, proxy: Proxy) -> None:
    """A room that does not end does not hold up the process for ever. Pain 26."""
    tx, rx = mid_part(cluster, proxy)
    assert tx("drain", deadline_s=0.3) is False
    tx("close")
    assert rx.end_of("receiver", ROOM)["code"] == "Aborted"


@pytest.mark.parametrize("how", ["returns", "interrupted"])
@pytest.mark.parametrize("which", ["sender", "receiver"])
def test_process_ends_without_close(cluster: Cluster, proxy: Proxy, which: str, how: str) -> None:
    """The main thread returns, or gets a KeyboardInterrupt; the peer is told, and can go on. Pains 2, 26."""
    tx, rx = mid_part(cluster, proxy)
    spare = cluster.start("spare")
    ends, stays, side = (tx, rx, "receiver") if which == "sender" else (rx, tx, "sender")
    if how == "returns":
        assert ends.exit() == 0
    else:
        ends.may_complain = True  # the KeyboardInterrupt, which nobody catches
        ends.process.signal(signal.SIGINT)
        assert ends.process.wait() != 0
        assert "KeyboardInterrupt" in ends.complaints()
        assert ends.complaints().count("Traceback") == 1
    end = stays.end_of(side, ROOM)
    assert end["code"] == "Aborted"
    assert stays("until_free")["free"] == 16
    proxy.release()
    spare.open(**BIG, deadlines=PATIENT)
    if which == "sender":
        transfer(spare, {rx: (0,)}, 2, TOKENS)
    else:
        transfer(tx, {spare: (0,)}, 2, TOKENS)
    spare("close")
    stays("clear")
    assert stays("until_connections", count=0)


@pytest.mark.parametrize("which", ["sender", "receiver"])
def test_drain_in_an_exit_handler(cluster: Cluster, proxy: Proxy, which: str) -> None:
    """A program whose main thread returns lets its rooms end first, with several parts to go. Pain 26."""
    tx, rx = mid_part(cluster, proxy, tokens=4000)
    ends = tx if which == "sender" else rx
    ends("drain_at_exit", deadline_s=20.0)
    ends.post("exit")
    ends.event("draining")
    proxy.release()
    drained = ends.event("drained")
    assert drained["drained"] is True
    (state,) = drained["states"]
    assert (state["state"], state["detail"], len(state["parts"])) == ("Success", None, 4)
    assert ends.process.wait() == 0
    if which == "sender":
        assert rx("data", room=ROOM, tokens=4000)
    else:
        assert tx.end_of("sender", ROOM)["state"] == "Success"
