from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from kvpoll_fsm import (
    Endpoint,
    EndpointClosed,
    InvalidInput,
    KVPoll,
    PolicyError,
    TransportStatus,
    TransportUnavailable,
)
from kvpoll_fsm.selection import Policy
from kvpoll_fsm.switching import Choice, place_of, read_share
from tests.helpers import SOON_S, make_data, pair, pool, same, until
from tests.mover.movers import kill

SHM, TCP = Policy.parse("shm"), Policy.parse("require:tcp")
ROOMS = range(10_000)


# Which policy a room has


def test_a_switch_is_for_all_rooms_or_for_a_share() -> None:
    first = Choice(SHM)
    assert {first.of(room) for room in ROOMS} == {SHM}
    canary = first.switched(TCP, 0.05)
    assert (canary.policy, canary.canary, canary.share) == (SHM, TCP, 0.05)
    assert {canary.of(room) for room in ROOMS} == {SHM, TCP}
    assert canary.switched(TCP, None) == Choice(TCP), "a later switch without a share ends the canary"
    assert canary.switched(SHM, None) == first
    other = Policy.parse("memory")
    assert canary.switched(other, 0.5) == Choice(SHM, other, 0.5)
    assert (str(first), str(canary)) == ("require:shm", "require:shm, canary require:tcp for 5.00%")


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5, 0.95])
def test_about_so_many_rooms_are_in_a_share_and_stay_in_a_larger_one(share: float) -> None:
    here = {room for room in ROOMS if Choice(SHM, TCP, share).of(room) is TCP}
    assert abs(len(here) / len(ROOMS) - share) < 0.01
    larger = Choice(SHM, TCP, min(0.99, share * 2))
    assert all(larger.of(room) is TCP for room in here)


def test_where_a_room_lies_is_written_in_stone() -> None:
    assert [round(place_of(room), 6) for room in (0, 1, 42, 2**63 - 1)] == PLACES
    program = "from kvpoll_fsm.switching import place_of; print(place_of(42))"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(said.stdout) == place_of(42)


PLACES = [0.206198, 0.621731, 0.708351, 0.997815]


@pytest.mark.parametrize("share", [0, 1, 1.5, -0.1, True, "0.05", float("nan"), float("inf")])
def test_what_is_no_share(share: Any) -> None:
    with pytest.raises(InvalidInput, match="above 0 and below 1"):
        read_share(share)
    assert read_share(None) is None


# Endpoints


@pytest.fixture
def ends(isolation: str, caplog: pytest.LogCaptureFixture) -> Iterator[tuple[Endpoint, Endpoint]]:
    caplog.set_level(logging.INFO, "kvpoll_fsm")  # a mover tells what its host wants to hear at its start
    with pair("shm", tx={"standby": ("tcp",), "pool": pool(256)}, rx={"standby": ("tcp",), "pool": pool(256)}) as both:
        yield both


def carried_by(tx: Endpoint, rx: Endpoint, room: int, policy: str | None = None) -> str:
    """The transport that carries a new room."""
    sender, data = tx.sender(room, required_ranks=1, transports=policy), make_data(20, seed=room)
    receiver = rx.receiver(room, peer=str(tx.address), tokens=32)
    sender.send(data)
    assert same(receiver.result(timeout=SOON_S), data)
    assert sender.wait(SOON_S) is KVPoll.Success
    (part,) = sender.parts
    sender.clear()
    receiver.clear()
    return part.transport


@pytest.mark.both
def test_new_rooms_at_once_old_ones_as_they_began(
    ends: tuple[Endpoint, Endpoint], caplog: pytest.LogCaptureFixture
) -> None:
    tx, rx = ends
    assert tx.transports() == TransportStatus("require:shm", None, 0.0, ("shm", "tcp"), {})
    assert carried_by(tx, rx, 1) == "shm"
    old, data = tx.sender(2, required_ranks=1), make_data(100)
    assert tx.switch_transport("tcp") == TransportStatus("require:tcp", None, 0.0, ("shm", "tcp"), {})
    assert tx.transports().policy == "require:tcp"
    until(lambda: "from=require:shm to=require:tcp" in caplog.text, "a line in the log")
    assert carried_by(tx, rx, 3) == "tcp"
    assert carried_by(tx, rx, 4, "shm") == "shm", "a policy of the room's own wins"
    receiver = rx.receiver(2, peer=str(tx.address), tokens=32)
    old.send(data)
    assert same(receiver.result(timeout=SOON_S), data)
    assert old.wait(SOON_S) is KVPoll.Success
    assert {part.transport for part in old.parts} == {"shm"}
    assert len(old.parts) == 4
    assert tx.switch_transport("prefer:shm,tcp").policy == "prefer:shm,tcp"
    assert carried_by(tx, rx, 5) == "shm"


@pytest.mark.both
def test_a_canary_has_its_share_by_the_rooms_number(ends: tuple[Endpoint, Endpoint]) -> None:
    tx, rx = ends
    status = tx.switch_transport("tcp", canary=0.3)
    assert (status.policy, status.canary, status.share) == ("require:shm", "require:tcp", 0.3)
    used = {room: carried_by(tx, rx, room) for room in range(40)}
    assert used == {room: "tcp" if place_of(room) < 0.3 else "shm" for room in range(40)}
    assert set(used.values()) == {"shm", "tcp"}
    assert tx.switch_transport("shm").canary is None
    assert {carried_by(tx, rx, room) for room in range(40) if used[room] == "tcp"} == {"shm"}


@pytest.mark.both
def test_what_is_not_at_hand_is_refused_and_nothing_changes(ends: tuple[Endpoint, Endpoint]) -> None:
    tx, _ = ends
    with pytest.raises(
        TransportUnavailable, match=r"'memory': is not loaded.*standby=\('memory',\).*shm, tcp"
    ) as caught:
        tx.switch_transport("prefer:tcp,memory")
    assert caught.value.name == "memory"
    with pytest.raises(TransportUnavailable, match="did you mean 'tcp'"):
        tx.switch_transport("tpc")
    with pytest.raises(PolicyError, match="unknown mode"):
        tx.switch_transport("fastest:tcp")
    with pytest.raises(InvalidInput, match="canary=1"):
        tx.switch_transport("tcp", canary=1)
    assert tx.transports().policy == "require:shm"


def test_another_mover_goes_on_with_what_was_switched() -> None:
    with pair("shm", isolation="process", standby=("tcp",)) as (tx, rx):
        tx.switch_transport("tcp")
        tx.switch_transport("shm", canary=0.5)
        before = tx.transports()
        kill(tx)
        assert tx.transports() == before
        used = {room: carried_by(tx, rx, room) for room in range(8)}
        assert used == {room: "shm" if place_of(room) < 0.5 else "tcp" for room in range(8)}
        tx.switch_transport("tcp")
        kill(tx)
        assert tx.transports().policy == "require:tcp"
        assert set(tx.transports().usable) == {"shm", "tcp"}


@pytest.mark.inside
def test_one_that_has_broken_is_not_switched_to() -> None:
    with pair("shm", standby=("tcp",), isolation="thread") as (tx, rx):
        broken = OSError("no route")
        tx.driver.call(lambda: tx.driver.carriers.give_up("tcp", broken)).result(SOON_S)
        with pytest.raises(TransportUnavailable, match="was left out: given up after OSError: no route"):
            tx.switch_transport("prefer:tcp,shm")
        assert tx.transports().unusable == {"tcp": "given up after OSError: no route"}
        assert carried_by(tx, rx, 1) == "shm"


def test_one_on_standby_that_cannot_be_loaded_is_left_out_and_told_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "kvpoll_fsm"), pair("shm", standby=("nixl",), isolation="thread") as (tx, _):
        assert "transport left out: transport 'nixl'" in caplog.text
        with pytest.raises(TransportUnavailable, match="'nixl': was left out: is not installed"):
            tx.switch_transport("nixl")


def test_standby_alone_does_not_carry_an_endpoint() -> None:
    settings: dict[str, Any] = {"transports": "nixl", "standby": ("tcp",), "isolation": "thread"}
    with pytest.raises(TransportUnavailable, match="nixl"):
        Endpoint(pool=pool(1), **settings).start()


def test_before_the_start_and_after_the_end_there_is_nothing_to_switch() -> None:
    end = Endpoint(pool=pool(1), isolation="thread")
    with pytest.raises(EndpointClosed):
        end.switch_transport("tcp")
    with end:
        pass
    with pytest.raises(EndpointClosed):
        end.switch_transport("tcp")
