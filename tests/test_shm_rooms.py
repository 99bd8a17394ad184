"""Rooms over shared memory: chosen by itself, left alone where it cannot work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvpoll_fsm import BlockPool, Endpoint, Field, KVPoll, Layout, TransportUnavailable
from kvpoll_shm import hosts
from tests.helpers import in_process

LAYOUT = Layout(4, [Field("x", "int64", (5,)), Field("ids", "int32"), Field("aux", "int8", (3,), per_room=True)])
DATA: dict[str, Any] = {
    "x": np.arange(50 * 5, dtype=np.int64).reshape(50, 5),
    "ids": np.arange(50, dtype=np.int32),
    "aux": np.array([1, 2, 3], np.int8),
}


def endpoint(policy: str, adopted: bool = False, **settings: Any) -> Endpoint:
    isolation = "process" if in_process() and not adopted else "thread"
    pool = adopted_pool() if adopted else BlockPool(LAYOUT, 16)
    return Endpoint(pool=pool, transports=policy, isolation=isolation, **settings)


def adopted_pool() -> BlockPool:
    arrays = {
        "x": np.zeros((16, 4, 5), np.int64),
        "ids": np.zeros((16, 4), np.int32),
        "aux": np.zeros((16, 3), np.int8),
    }
    return BlockPool.adopt(LAYOUT, arrays)


@pytest.fixture
def rx() -> Iterator[Endpoint]:
    with endpoint("prefer:shm,tcp") as rx:
        yield rx


def carry(tx: Endpoint, rx: Endpoint, room: int = 1) -> list[str]:
    """Carry a room, and say by which transports its parts went."""
    sender = tx.sender(room, required_ranks=1)
    sender.send(DATA)
    receiver = rx.receiver(room, peer=str(tx.address), tokens=16)
    result = receiver.result(timeout=20)
    for name, sent in DATA.items():
        assert np.array_equal(np.asarray(result[name]), sent)
    assert sender.wait(timeout=20) is KVPoll.Success
    return [part.transport for part in sender.parts]


@pytest.mark.both
def test_a_room_over_shared_memory_in_parts(rx: Endpoint) -> None:
    with endpoint("require:shm") as tx:
        assert carry(tx, rx) == ["shm"] * 4
        assert tx.load().quarantined == rx.load().quarantined == 0


@pytest.mark.both
def test_a_policy_may_do_without(rx: Endpoint) -> None:
    with endpoint("require:tcp") as tx:
        assert carry(tx, rx) == ["tcp"] * 4


def test_no_checksum_is_made_unless_asked_for(rx: Endpoint) -> None:
    with endpoint("shm") as tx:
        carry(tx, rx)
        assert not tx.driver._hashes("shm")
    with endpoint("shm", checksum=True) as tx:
        carry(tx, rx, 2)
        assert tx.driver._hashes("shm")


def test_an_engine_s_own_memory_goes_by_the_next_transport(rx: Endpoint) -> None:
    with endpoint("prefer:shm,tcp", adopted=True) as tx:
        for name, sent in DATA.items():
            flat = tx.pool.view(name)
            if name == "aux":
                flat[0] = sent
            else:
                flat.reshape(-1, *sent.shape[1:])[:50] = sent
        sender = tx.sender(3, required_ranks=1)
        sender.open(50)
        sender.send_blocks(range(13), 50)
        receiver = rx.receiver(3, peer=str(tx.address))
        result = receiver.result(timeout=20)
        assert np.array_equal(np.asarray(result["x"]), DATA["x"])
        assert {part.transport for part in sender.parts} == {"tcp"}


def test_an_engine_s_own_memory_alone_cannot_be_sent_from(rx: Endpoint) -> None:
    with endpoint("require:shm", adopted=True) as tx:
        sender = tx.sender(3, required_ranks=1)
        sender.open(50)
        receiver = rx.receiver(3, peer=str(tx.address))
        assert sender.wait(timeout=20) is KVPoll.Failed
        assert receiver.wait(timeout=20) is KVPoll.Failed
        assert "not in shared memory" in str(sender.failure)


def test_an_engine_s_own_memory_can_be_received_into() -> None:
    with endpoint("require:shm") as tx, endpoint("require:shm", adopted=True) as rx:
        sender = tx.sender(4, required_ranks=1)
        sender.send(DATA)
        receiver = rx.receiver(4, peer=str(tx.address), blocks=range(3, 16), resume="manual")
        assert receiver.wait(timeout=20) is KVPoll.Success
        assert np.array_equal(rx.pool.view("x")[3:16].reshape(-1, 5)[:32], DATA["x"][:32])


@pytest.mark.inside
def test_a_peer_on_another_host_is_reached_by_the_next_transport(rx: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "boot_id", lambda: "another")
    with endpoint("prefer:shm,tcp") as tx:
        assert carry(tx, rx) == ["tcp"] * 4


@pytest.mark.inside
def test_where_it_cannot_start_the_next_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise OSError("no /proc")

    monkeypatch.setattr(hosts, "boot_id", missing)
    with endpoint("prefer:shm,tcp") as tx:
        assert list(tx.driver.transports) == ["tcp"]
    with pytest.raises(TransportUnavailable, match="no /proc"):
        endpoint("require:shm").start()
