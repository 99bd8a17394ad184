"""Every limit, exceeded: what is too much is refused and counted, the honest go on, and nothing is left behind."""

from __future__ import annotations

import dataclasses
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvpoll_fsm import (
    Address,
    Endpoint,
    FailureCode,
    Field,
    InvalidInput,
    KVPoll,
    Layout,
    LimitReached,
    Limits,
)
from kvpoll_fsm.connection import check_introduction
from kvpoll_fsm.control import Control
from kvpoll_fsm.limits import RANGES
from kvpoll_fsm.messages import MAX_PACKET_NBYTES, MAX_SENT_NBYTES, Abort, TransportOffer
from kvpoll_fsm.zap import UNFINISHED
from kvpoll_memory import MemoryTransport
from tests.helpers import (
    BRISK,
    SOON_S,
    endpoint,
    failed,
    make_data,
    on_driver,
    open_fds,
    open_pair,
    pair,
    parked,
    pool,
    transfer,
    until,
)
from tests.security.scene import ByHand, hello, key_settings, many, reserve

MADE_PLACE = "a peer that said nothing but Hello: another took its place"


def limited(tx: Endpoint, reason: str) -> int:
    """How often something was refused for a reason that begins like this."""
    return sum(count for why, count in tx.refused()["control"].items() if reason in why)


def callers(tx: Endpoint) -> int:
    return on_driver(tx, lambda: len(tx.driver.core.connections))  # type: ignore[no-any-return]


# The settings


def test_every_limit_has_a_range_and_a_default_within_it() -> None:
    assert {field.name for field in dataclasses.fields(Limits)} == RANGES.keys()
    for name, (least, most) in RANGES.items():
        kind = float if name.endswith("_s") else int
        for value in (least, most):
            assert getattr(Limits(**{name: kind(value)}), name) == value


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("value", [0, -1, True, None, "9", float("nan"), float("inf"), 1 << 40])
def test_a_limit_out_of_its_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=f"{name}=.*give a number from"):
        Limits(**{name: value})


def test_a_count_is_a_whole_number() -> None:
    with pytest.raises(InvalidInput, match=r"orphans=1\.5"):
        Limits(orphans=1.5)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="limits=5: give Limits"):
        endpoint(limits=5)


# What is read, and what is said


def test_a_packet_longer_than_allowed_is_not_read_and_the_rest_is() -> None:
    with pair(limits=Limits(message_nbytes=MAX_SENT_NBYTES)) as (tx, rx), ByHand(tx) as eve:
        eve.hello()
        eve.say(bytes(MAX_SENT_NBYTES + 1))  # ZeroMQ ends the connection before anything of it is kept
        until(lambda: eve.say(b"small") or limited(tx, "malformed"), "a packet over the next connection")
        eve.hello()
        before = limited(tx, "malformed")
        eve.say(bytes(MAX_SENT_NBYTES))
        until(lambda: limited(tx, "malformed") == before + 1, "a packet that is just within")
        transfer(tx, rx, 1)


def test_what_an_endpoint_says_of_itself_must_be_what_peers_take() -> None:
    layout = Layout(8, [Field("x", "int8")])
    for offers, why in (
        ((TransportOffer("a", bytes(1 << 16), (bytes(1 << 16),) * 16),), f"at most {MAX_SENT_NBYTES} are taken"),
        ((TransportOffer("a", bytes((1 << 16) + 1)),), "peers would not take"),
        (
            tuple(TransportOffer(f"t{number}", bytes(1 << 16), (bytes(1 << 16),) * 6) for number in range(16)),
            str(MAX_PACKET_NBYTES),
        ),
    ):
        with pytest.raises(InvalidInput, match=why):
            check_introduction(bytes(16), layout, offers)
    check_introduction(bytes(16), layout, (TransportOffer("a", bytes(1 << 16)),))


@pytest.mark.inside
def test_an_endpoint_whose_introduction_is_too_long_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = pool(2)
    before = open_fds()
    monkeypatch.setattr(MemoryTransport, "descriptor", lambda _: bytes((1 << 16) + 1))
    with pytest.raises(InvalidInput, match="peers would not take what this endpoint says of itself"):
        endpoint(pool=blocks).start()
    assert open_fds() <= before  # those of an earlier test may be closed only now


# Connections


def test_a_flood_of_hellos_makes_place_for_the_honest() -> None:
    with pair(limits=Limits(callers=4)) as (tx, rx), ExitStack() as stack:
        sender, receiver = open_pair(tx, rx, 1)
        until(lambda: callers(tx) == 1, "the honest peer")
        for eve in many(stack, tx, 30):
            eve.hello()  # each is welcomed: the oldest of the others goes
            assert callers(tx) <= 4
        assert limited(tx, MADE_PLACE) == 27
        sender.send(make_data(10))
        assert receiver.wait(SOON_S) is KVPoll.Success
        with endpoint() as late:
            transfer(tx, late, 2)


def test_peers_that_have_spoken_are_not_crowded_out() -> None:
    with pair(tx={"limits": Limits(callers=3)}) as (tx, rx), ExitStack() as stack:
        sender, receiver = open_pair(tx, rx, 1)
        until(lambda: callers(tx) == 1, "the honest peer")
        spoken = many(stack, tx, 2)
        for room, eve in enumerate(spoken, start=100):
            eve.hello()
            eve.frame(reserve(room))
        until(lambda: parked(tx) == len(spoken), "both have spoken")
        last = stack.enter_context(ByHand(tx, name=b"z" * 16))
        last.say(hello(last.name))
        until(lambda: limited(tx, "callers=3") == 1, "the refusal")
        assert callers(tx) == 3
        assert receiver.poll() is not KVPoll.Failed
        sender.send(make_data(10))
        assert receiver.wait(SOON_S) is KVPoll.Success


def test_one_key_cannot_take_all_places(tmp_path: Path) -> None:
    own = key_settings(tmp_path / "k", "tx", "rx", "eve")
    with endpoint(limits=Limits(callers_per_peer=2), **own["tx"]) as tx, ExitStack() as stack:
        crowd = many(stack, tx, 3, own["eve"])
        for eve in crowd[:2]:
            eve.hello()
            eve.frame(reserve(100))
        until(lambda: on_driver(tx, lambda: all(c.channel.received for c in tx.driver.core.connections.values())))
        crowd[2].say(hello(crowd[2].name))
        until(lambda: limited(tx, "callers_per_peer=2") == 1, "the refusal")
        assert callers(tx) == 2
        with endpoint(**own["rx"]) as rx:
            transfer(tx, rx, 1)


def test_more_endpoints_to_connect_to_than_allowed_are_a_failed_room() -> None:
    with ExitStack() as stack:
        senders = [stack.enter_context(endpoint()) for _ in range(3)]
        rx = stack.enter_context(endpoint(limits=Limits(callees=2)))
        transfer(senders[0], rx, 1)
        transfer(senders[1], rx, 2)
        failure = failed(rx.receiver(3, peer=str(senders[2].address)))
        assert (failure.code, failure.retryable) == (FailureCode.LimitReached, True)
        assert "callees=2" in failure.detail
        transfer(senders[1], rx, 4)


@pytest.fixture
def files() -> Iterator[None]:
    """As many files as this process may have at most."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("files")
def test_there_can_be_more_peers_than_zeromq_has_sockets_by_default() -> None:
    control = Control(Address.parse("tcp://127.0.0.1:0"), limits=Limits(callees=1100))
    control.start()
    nobody = Address("127.0.0.1", 1)
    try:
        for conn in range(1100):
            control.connect(conn, nobody)
        with pytest.raises(LimitReached, match="sockets"):
            _connect_all(control, nobody)
    finally:
        control.close()


def _connect_all(control: Control, address: Address) -> None:
    for conn in range(1100, 1200):
        control.connect(conn, address)


def test_a_socket_that_cannot_be_had_fails_the_room_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with endpoint() as tx, endpoint() as rx:
        transfer(tx, rx, 1)
        with endpoint() as other, monkeypatch.context() as patch:
            patch.setattr(rx.driver._control, "connect", lambda *_: _raise(LimitReached("sockets", 7)))
            failure = failed(rx.receiver(2, peer=str(other.address)))
            assert (failure.code, "sockets=7" in failure.detail) == (FailureCode.LimitReached, True)
            assert callers(rx) == 1
        transfer(tx, rx, 3)


def _raise(error: Exception) -> None:
    raise error


def test_whoever_dawdles_in_the_handshake_is_put_out() -> None:
    with pair(limits=Limits(handshake_s=0.3)) as (tx, rx):
        with socket.create_connection((tx.address.host, tx.address.port)) as silent:
            silent.settimeout(SOON_S)
            while silent.recv(4096):  # ZeroMQ greets first
                pass
        until(lambda: limited(tx, UNFINISHED), "the count")
        transfer(tx, rx, 1)


# Rooms and reservations


def test_one_peer_takes_part_in_no_more_rooms_than_allowed() -> None:
    with endpoint(limits=Limits(rooms_per_peer=2)) as tx, ByHand(tx) as eve:
        for room in (1, 2, 3):
            tx.sender(room, required_ranks=2)
        eve.hello()
        eve.frame(*(reserve(room, ranks=2) for room in (1, 2, 3)))
        told = eve.told(Abort)
        assert (told.room, told.failure.code) == (3, FailureCode.LimitReached)
        assert "rooms_per_peer=2" in told.failure.detail
        eve.frame(reserve(1, rank=1, ranks=2))  # of a room it is in: no room more
        until(lambda: on_driver(tx, lambda: [c.channel.received for c in tx.driver.core.connections.values()]) == [4])
        assert limited(tx, "rooms_per_peer") == 1
        with endpoint() as rx:
            receiver = [rx.receiver(3, peer=str(tx.address), rank=rank, ranks=2, dummy=bool(rank)) for rank in (0, 1)]
            until(lambda: all(each.poll() is KVPoll.WaitingForInput for each in receiver), "the honest room")


def test_one_peer_leaves_no_more_orphans_than_allowed() -> None:
    with pair(tx={"limits": Limits(orphans_per_peer=5)}) as (tx, rx), ByHand(tx) as eve:
        early = [rx.receiver(room, peer=str(tx.address)) for room in (1, 2)]
        until(lambda: parked(tx) == 2)
        eve.hello()
        eve.frame(*(reserve(room) for room in range(100, 200)))
        assert [eve.told(Abort).room for _ in range(95)] == list(range(105, 200))
        assert parked(tx) == 7
        assert limited(tx, "orphans_per_peer=5") == 95
        eve.close()
        for receiver in early:
            sender = tx.sender(receiver.room, required_ranks=1)
            sender.send(make_data(10))
            assert receiver.wait(SOON_S) is KVPoll.Success


def test_orphans_of_one_do_not_crowd_out_another(tmp_path: Path) -> None:
    """With keys it makes no difference how many connections the one has."""
    own = key_settings(tmp_path / "k", "tx", "rx", "eve")
    limits = Limits(orphans=10)
    with endpoint(limits=limits, **own["tx"]) as tx, endpoint(**own["rx"]) as rx, ExitStack() as stack:
        crowd = many(stack, tx, 5, own["eve"])
        for number, eve in enumerate(crowd):
            eve.hello()
            eve.frame(reserve(100 + 2 * number), reserve(101 + 2 * number))
        until(lambda: parked(tx) == 10)
        early = [rx.receiver(room, peer=str(tx.address)) for room in (1, 2, 3, 4)]
        until(lambda: limited(tx, "orphans=10") == 4, "four of eve's to make place")
        crowd[4].frame(reserve(200))
        assert [told.room for told in (crowd[4].told(Abort),)] == [200]
        assert parked(tx) == 10
        for receiver in early:
            tx.sender(receiver.room, required_ranks=1).send(make_data(10))
            assert receiver.wait(SOON_S) is KVPoll.Success


def test_pain_14_an_orphan_expires_and_its_receiver_is_told() -> None:
    with pair(tx={"limits": Limits(orphan_s=0.3)}, deadlines=BRISK) as (tx, rx), ByHand(tx) as eve:
        eve.hello()
        eve.frame(reserve(7))
        failure = failed(rx.receiver(1, peer=str(tx.address)))
        assert (failure.code, failure.retryable) == (FailureCode.LimitReached, True)
        assert "no sender opened the room within 0.3 s" in failure.detail
        until(lambda: parked(tx) == 0, "both to be gone")
        transfer(tx, rx, 2)


def test_pain_14_100_000_orphans_leave_nothing_behind() -> None:
    """Over the wire, by a peer that takes no answer; meanwhile and afterwards others are served. Pain 14."""
    limits = Limits(orphans_per_peer=1000)
    with pair(tx={"limits": limits}, deadlines=BRISK) as (tx, rx):
        with ByHand(tx) as eve:
            eve.hello()
            for first in range(0, 100_000, 250):
                eve.frame(*(reserve(1000 + first + number) for number in range(250)))
                if not first % 20_000:
                    transfer(tx, rx, 1)
            until(lambda: limited(tx, "orphans_per_peer") == 99_000, "all of them", within_s=40)
            assert parked(tx) == 1000
            transfer(tx, rx, 2)
        until(lambda: not parked(tx) and callers(tx) == 1, "eve to be gone")
        assert on_driver(tx, lambda: tx.driver.core.parking.key()) == ((), ())
        transfer(tx, rx, 3)


def test_refusals_reach_a_user_by_plane_and_reason(caplog: pytest.LogCaptureFixture) -> None:
    with pair("tcp") as (tx, rx), ByHand(tx) as eve:
        assert tx.refused() == {"control": {}, "tcp": {}}
        for _ in range(100):
            eve.say(b"nonsense")
        with socket.create_connection(("127.0.0.1", _data_port(tx))) as visitor:
            visitor.sendall(b"GET / HTTP/1.1\r\n".ljust(74, b"."))
            assert visitor.recv(1) == b""
        until(lambda: tx.refused()["control"] == {"malformed packet": 100})
        until(lambda: tx.refused()["tcp"] == {"does not speak our protocol": 1})
        lines = [record.getMessage() for record in caplog.records if "refused plane=" in record.getMessage()]
        assert len(lines) == 7 + 1
        assert any("plane=tcp" in line and "127.0.0.1" in line for line in lines)
        transfer(tx, rx, 1)


def _data_port(end: Endpoint) -> int:
    transport: Any = end.driver.transports["tcp"]
    return int(transport._identity.port)
