from __future__ import annotations

import concurrent.futures
import logging
import threading
from contextlib import ExitStack
from typing import Any

import pytest

from kvpoll_fsm import (
    AddressError,
    BlockPool,
    Deadlines,
    DuplicateRoom,
    Endpoint,
    EndpointClosed,
    FailureCode,
    Field,
    ForeignBlock,
    Gate,
    InvalidInput,
    KVPoll,
    Layout,
    PolicyError,
    RequestTooLarge,
    TransportUnavailable,
    registry,
)
from kvpoll_fsm.errors import MAX_DETAIL
from kvpoll_fsm.spi import Region, Transport
from kvpoll_memory import Faults, MemoryTransport
from tests.helpers import (
    BLOCK_TOKENS,
    BRISK,
    FIELDS,
    ROOM_NBYTES,
    SOON_S,
    TOKEN_NBYTES,
    TRANSPORTS,
    adopted,
    deadlines,
    driver_stopped,
    endpoint,
    failed,
    make_data,
    on_driver,
    open_pair,
    pair,
    pool,
    same,
    transfer,
    until,
)

W, T, S = KVPoll.WaitingForInput, KVPoll.Transferring, KVPoll.Success
BEYOND = 1 << 63


# Bad input


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"room": -1}, r"room=-1: give an integer from 0 to 9223372036854775807"),
        ({"room": BEYOND}, "room=9223372036854775808"),
        ({"room": 1.0}, r"room=1\.0"),
        ({"room": "7"}, "room='7'"),
        ({"room": True}, "room=True"),
        ({"room": None}, "room=None"),
        ({"required_ranks": 0}, "required_ranks=0: give an integer from 1 to 4096"),
        ({"required_ranks": 4097}, "required_ranks=4097"),
        ({"required_ranks": True}, "required_ranks=True"),
        ({"transports": "fastest:tcp"}, "unknown mode 'fastest'"),
        ({"transports": ""}, "names no transport"),
    ],
)
def test_a_sender_that_cannot_work_is_not_opened(arguments: dict[str, Any], problem: str) -> None:
    with endpoint() as tx:
        with pytest.raises(InvalidInput, match=problem):
            tx.sender(**{"room": 1, **arguments})
        assert tx.dump() == []
        assert tx.sender(1).poll() is KVPoll.Bootstrapping


@pytest.mark.parametrize(
    ("arguments", "error", "problem"),
    [
        ({"room": -1}, InvalidInput, "room=-1"),
        ({"room": BEYOND}, InvalidInput, "room=9223372036854775808"),
        ({"ranks": 0}, InvalidInput, "ranks=0: give an integer from 1 to 4096"),
        ({"ranks": 4097}, InvalidInput, "ranks=4097"),
        ({"rank": 1}, InvalidInput, "rank=1: give an integer from 0 to 0"),
        ({"rank": -1, "ranks": 4}, InvalidInput, "rank=-1: give an integer from 0 to 3"),
        ({"tokens": 0}, InvalidInput, "tokens=0: give an integer from 1"),
        ({"tokens": -5}, InvalidInput, "tokens=-5"),
        ({"tokens": 1.5}, InvalidInput, r"tokens=1\.5"),
        ({"tokens": 65 * BLOCK_TOKENS}, RequestTooLarge, "65 blocks wanted but the pool has 64 in all"),
        ({"tokens": 1 << 40}, RequestTooLarge, "the pool has 64 in all"),
        ({"resume": "again"}, InvalidInput, "resume='again': choose 'drain', 'extend' or 'manual'"),
        ({"resume": "manual"}, InvalidInput, "belong together"),
        ({"blocks": [1]}, InvalidInput, "belong together"),
        ({"blocks": [1], "resume": "manual"}, InvalidInput, r"BlockPool\.adopt\(\) belong together"),
        ({"peer": "127.0.0.1:5555"}, AddressError, "write tcp://host:port"),
        ({"peer": "tcp://127.0.0.1:0"}, AddressError, "a peer needs a real port"),
        ({"peer": "tcp://0.0.0.0:5555"}, AddressError, "a wildcard is no address a peer can reach"),
        ({"peer": "tcp://[::]:5555"}, AddressError, "a wildcard"),
        ({"peer": "tcp://*:5555"}, AddressError, "a wildcard"),
        ({"peer": "tcp://::1:5555"}, AddressError, "IPv6 host in brackets"),
        ({"peer": "tcp://host:99999"}, AddressError, "the port is a number from 0 to 65535"),
        ({"peer": None}, AddressError, "write tcp://host:port"),
    ],
)
def test_a_receiver_that_cannot_work_is_not_opened(
    arguments: dict[str, Any], error: type[Exception], problem: str
) -> None:
    with endpoint() as rx:
        with pytest.raises(error, match=problem):
            rx.receiver(**{"room": 1, "peer": "tcp://127.0.0.1:9", **arguments})
        assert rx.dump() == []
        assert rx.load().free == 64
        assert rx.driver.core.connections == {}


def test_blocks_that_are_not_there_or_in_use_are_refused_at_once() -> None:
    ours, _ = adopted(8)
    with pair(rx={"pool": ours}) as (tx, rx):
        peer = str(tx.address)
        for blocks in ([], [8], [-1], ["x"]):
            with pytest.raises(ForeignBlock, match="0 to 7, and at least one is needed"):
                rx.receiver(1, peer=peer, resume="manual", blocks=blocks)  # type: ignore[arg-type]
        with pytest.raises(ForeignBlock, match=r"blocks \[2, 2\]: an id is named twice"):
            rx.receiver(1, peer=peer, resume="manual", blocks=[2, 2])
        with pytest.raises(InvalidInput, match="belong together"):
            rx.receiver(1, peer=peer)
        first = rx.receiver(1, peer=peer, resume="manual", blocks=[2, 3])
        with pytest.raises(ForeignBlock, match=r"blocks \[3\]: held by a room"):
            rx.receiver(2, peer=peer, resume="manual", blocks=[3, 4])
        assert rx.load().leased == 2
        second = rx.receiver(2, peer=peer, resume="manual", blocks=[4, 5])  # the room is none the worse
        sender = tx.sender(2)
        sender.send(make_data(20))
        assert second.wait(SOON_S) is S
        assert not first.poll().is_terminal


@pytest.mark.both
@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_pain_12_a_second_opening_is_refused_and_the_first_goes_on(side: str) -> None:
    with pair() as (tx, rx):
        sender, receiver = open_pair(tx, rx, 5, ranks=2)
        other = rx.receiver(5, peer=str(tx.address), tokens=64, rank=1, ranks=2)  # another rank is another room
        with pytest.raises(DuplicateRoom, match=f"{side} of room 5, rank 0 is open already: clear"):
            tx.sender(5) if side == "sender" else rx.receiver(5, peer=str(tx.address), ranks=2)
        data = make_data(100)
        sender.send(data)
        assert same(receiver.result(SOON_S), data)
        assert same(other.result(SOON_S), data)
        with pytest.raises(DuplicateRoom):  # also when it has ended, until it is cleared
            tx.sender(5) if side == "sender" else rx.receiver(5, peer=str(tx.address), ranks=2)
        for handle in (sender, receiver, other):
            handle.clear()
        transfer(tx, rx, 5)


def test_a_receiver_that_was_refused_leaves_its_room_free() -> None:
    with pair(rx={"pool": adopted(2)[0]}) as (tx, rx):
        for _ in range(3):
            with pytest.raises(ForeignBlock):
                rx.receiver(1, peer=str(tx.address), resume="manual", blocks=[9])
        assert rx.receiver(1, peer=str(tx.address), resume="manual", blocks=[1]).poll() is not KVPoll.Failed


# Transports


@pytest.mark.both
def test_an_unknown_transport_is_an_error_with_a_hint() -> None:
    for policy, hint in [
        ("tpc", "transport 'tpc': is not installed; did you mean 'tcp'?"),
        ("require:memroy", "did you mean 'memory'"),
        ("nixl", "it comes with a later release"),
        ("prefer:nixl,ucx", "transport 'nixl': is not installed"),
        ("zzz", "installed: memory, mooncake, shm, tcp"),
    ]:
        with pytest.raises(TransportUnavailable) as caught:
            endpoint(policy).start()
        assert hint in str(caught.value)


def test_preferred_transports_that_are_not_there_are_left_out() -> None:
    with pair("prefer:ucx,nixl,memory") as (tx, rx):
        assert list(tx.driver.transports) == ["memory"]
        transfer(tx, rx, 1)


def test_preferred_transports_that_cannot_start_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """No such hardware here, say. Under `require` it is an error."""

    class Unusable(MemoryTransport):
        name = "rdma"

        def start(self) -> None:
            raise TransportUnavailable("rdma", "no such device", "use tcp")

    load = registry.load

    def loads(name: str) -> type[Transport]:
        return Unusable if name == "rdma" else load(name)

    monkeypatch.setattr(registry, "load", loads)
    with pair("prefer:rdma,memory") as (tx, rx):
        assert list(tx.driver.transports) == ["memory"]
        transfer(tx, rx, 1)
    with pytest.raises(TransportUnavailable, match="'rdma': no such device; use tcp"):
        endpoint("rdma").start()


def test_pain_21_no_common_transport_fails_the_room_and_says_so() -> None:
    with endpoint("memory") as tx, endpoint("tcp") as rx:
        sender, receiver = open_pair(tx, rx, 1)
        for handle in (sender, receiver):
            failure = failed(handle)
            assert failure.code is FailureCode.TransportUnavailable
            assert failure.detail == (
                "no common transport works: policy require:memory, here: memory; offered by rank 0: tcp"
            )
        assert rx.load().free == 64


def test_pain_21_where_rdma_is_absent_each_policy_says_or_shows_what_carries_the_data() -> None:
    rdma = {"transport_options": {"mooncake": {"protocol": "rdma"}}}
    with pytest.raises(TransportUnavailable, match="mooncake"):
        endpoint("require:mooncake", **rdma).start()
    with pytest.raises(TransportUnavailable, match="mooncake"):
        endpoint("mooncake", **rdma).start()
    with pair("prefer:mooncake,tcp", **rdma) as (tx, rx):
        assert list(tx.driver.transports) == ["tcp"]
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(make_data(100))
        assert receiver.wait(SOON_S) is S
        assert {part.transport for part in receiver.parts} == {"tcp"}


def test_pain_20_rooms_share_the_one_registration_of_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is registered for a room, so the first to end cannot take the memory from its siblings."""
    registered: list[int] = []
    register = MemoryTransport.register

    def counted(self: MemoryTransport, region: Region) -> bytes:
        registered.append(region.number)
        return register(self, region)

    monkeypatch.setattr(MemoryTransport, "register", counted)
    faults = Faults()
    with pair(faults=faults) as (tx, rx):
        once = list(registered)
        assert sorted(once) == sorted(2 * list(range(len(FIELDS))))
        faults.hold(3)
        rooms = [open_pair(tx, rx, room) for room in range(4)]
        for room, (sender, _) in enumerate(rooms):
            sender.send(make_data(64, seed=room))
        for room in range(3):
            assert same(rooms[room][1].result(SOON_S), make_data(64, seed=room))
            rooms[room][0].clear()
            rooms[room][1].clear()
        faults.release()
        assert same(rooms[3][1].result(SOON_S), make_data(64, seed=3))
        assert registered == once


@pytest.mark.both
def test_pain_17_ranks_of_one_endpoint_that_never_fit_together_are_refused_at_once() -> None:
    """Each would fit alone; together they would wait for each other's blocks until the deadline."""
    with pair(rx={"pool": pool(7)}) as (tx, rx):
        _, first = open_pair(tx, rx, 1, ranks=2)
        second = rx.receiver(1, peer=tx.address, tokens=64, rank=1, ranks=2)
        failure = failed(second)
        assert failure.code is FailureCode.RequestTooLarge
        assert "8 blocks wanted but the pool has 7" in failure.detail
        second.clear()
        third = rx.receiver(1, peer=tx.address, tokens=48, rank=1, ranks=2)
        until(lambda: first.poll() is third.poll() is W)


def test_a_room_may_have_a_policy_of_its_own() -> None:
    with pair("prefer:memory,tcp") as (tx, rx):
        for room, policy, used in [(1, None, "memory"), (2, "tcp", "tcp"), (3, "prefer:tcp,memory", "tcp")]:
            sender = tx.sender(room, transports=policy)
            receiver = rx.receiver(room, peer=tx.address, tokens=64)
            sender.send(make_data(100))
            assert receiver.wait(SOON_S) is S
            assert [part.transport for part in receiver.parts] == [used, used]
        with pytest.raises(PolicyError):
            tx.sender(4, transports="fastest:tcp")
        assert failed_by_policy(tx, rx).code is FailureCode.TransportUnavailable


def failed_by_policy(tx: Endpoint, rx: Endpoint) -> Any:
    sender = tx.sender(4, transports="shm")
    rx.receiver(4, peer=tx.address)
    return failed(sender)


def test_pain_21_falls_back_to_the_next_transport_before_the_room_opens() -> None:
    faults = Faults()
    faults.refuse_links("cable unplugged")
    with pair("prefer:memory,tcp", faults=faults) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        data = make_data(100)
        sender.send(data)
        assert same(receiver.result(SOON_S), data)
        assert {part.transport for part in receiver.parts} == {"tcp"}


def test_a_failed_part_goes_again_over_the_next_transport() -> None:
    faults = Faults()
    faults.fail(1, "cable unplugged", after_nbytes=100)
    with pair("prefer:memory,tcp", faults=faults) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        data = make_data(200)
        sender.send(data)
        assert same(receiver.result(SOON_S), data)
        assert [part.transport for part in receiver.parts][:2] == ["memory", "tcp"]
        assert sender.wait(SOON_S) is S


def test_without_another_transport_a_failed_part_fails_the_room() -> None:
    faults = Faults()
    faults.fail(0, "cable unplugged")
    with pair(faults=faults) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(make_data(200))
        for handle in (sender, receiver):
            failure = failed(handle)
            assert failure.code is FailureCode.TransportFailed
            assert failure.rank == 0
            assert failure.retryable
            assert failure.detail == "memory to rank 0: cable unplugged"
        transfer(tx, rx, 2)


def test_a_link_that_breaks_fails_what_is_on_it_and_comes_again() -> None:
    faults = Faults()
    faults.hold()
    with pair(faults=faults) as (tx, rx):
        rooms = [open_pair(tx, rx, room) for room in range(3)]
        for sender, _ in rooms:
            sender.send(make_data(10))
        until(lambda: faults.submitted == 3)
        faults.break_links("cable cut")
        faults.release()
        for handles in rooms:
            for handle in handles:
                assert "cable cut" in failed(handle).detail
        transfer(tx, rx, 9)


# Layouts


@pytest.mark.parametrize(
    ("fields", "difference"),
    [
        ([Field("embeddings", "float16", (8,)), *FIELDS[1:]], "embeddings: bfloat16[8] here, float16[8] on the peer"),
        (FIELDS[:2], "aux: only on this side (int64[4] per room)"),
        ([*FIELDS, Field("mrope", "int32", (3,))], "mrope: only on the peer (int32[3])"),
        ([FIELDS[1], FIELDS[0], FIELDS[2]], "embeddings: the fields come in another order on the peer"),
    ],
)
def test_pain_27_layouts_that_differ_fail_the_room_and_name_the_field(fields: list[Field], difference: str) -> None:
    other = BlockPool(Layout(BLOCK_TOKENS, fields), 4)
    with pair(tx={"pool": other, "deadlines": deadlines(peer_lost_s=0.5)}) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        for handle in (sender, receiver):
            failure = failed(handle)
            assert failure.code is FailureCode.LayoutMismatch
            assert difference in failure.detail
            assert not failure.retryable
        until(lambda: rx.load().free == 64)
        until(lambda: not tx.driver.core.connections and not rx.driver.core.connections)


# Ranks


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("required", [4, None])
@pytest.mark.parametrize("endpoints", [1, 2, 4])
def test_ranks_on_one_or_several_endpoints(transport: str, required: int | None, endpoints: int) -> None:
    data = make_data(150)
    with ExitStack() as stack:
        tx = stack.enter_context(endpoint(transport))
        receiving = [stack.enter_context(endpoint(transport)) for _ in range(endpoints)]
        sender = tx.sender(1, required_ranks=required)
        sender.send(data)
        receivers = [
            receiving[rank % endpoints].receiver(1, peer=tx.address, tokens=64 - 16 * rank, rank=rank, ranks=4)
            for rank in range(4)
        ]
        for receiver in receivers:
            assert same(receiver.result(SOON_S), data)
        assert sender.wait(SOON_S) is S
        for receiver in receivers:  # a part has the same range on every rank, so the smallest grant decides
            assert [(part.offset, part.tokens) for part in receiver.parts] == [
                (part.offset, part.tokens) for part in sender.parts
            ]
        assert sender.parts[0].tokens == BLOCK_TOKENS
        assert sender.bytes_done == 4 * (150 * TOKEN_NBYTES + ROOM_NBYTES)


def test_a_dummy_rank_holds_nothing_and_hears_everything() -> None:
    data = make_data(100)
    with pair() as (tx, rx):
        sender = tx.sender(1)
        receiver = rx.receiver(1, peer=tx.address, tokens=64, rank=0, ranks=2)
        sender.send(data)
        until(lambda: any(s.slots for s in list(tx.driver.core.sessions.values())))  # type: ignore[attr-defined]
        assert sender.poll() is KVPoll.Bootstrapping, "it counts"
        dummy = rx.receiver(1, peer=tx.address, rank=1, ranks=2, dummy=True)
        assert same(receiver.result(SOON_S), data)
        assert dummy.result(SOON_S) == {}
        assert dummy.history == receiver.history
        assert sender.wait(SOON_S) is S
        assert dummy.wait_quiescent(SOON_S)


@pytest.mark.both
def test_dummies_alone_have_nothing_to_receive() -> None:
    with pair() as (tx, rx):
        sender = tx.sender(1)
        dummies = [rx.receiver(1, peer=tx.address, rank=rank, ranks=2, dummy=True) for rank in range(2)]
        for handle in (sender, *dummies):
            assert "every rank is a dummy" in failed(handle).detail


@pytest.mark.both
def test_a_rank_of_another_room_size_is_turned_away_and_the_right_ones_may_come() -> None:
    with pair() as (tx, rx):
        sender = tx.sender(1, required_ranks=1)
        stray = rx.receiver(1, peer=tx.address, rank=2, ranks=3)
        failure = failed(stray)
        assert failure.code is FailureCode.ProtocolError
        assert failure.detail == "rank 2 of 3 where 1 ranks are required"
        assert tx.dump()[0]["waits_for"].endswith(f"turned away: {failure.detail}")
        receiver = rx.receiver(1, peer=tx.address, tokens=64)
        sender.send(make_data(40))
        assert receiver.wait(SOON_S) is S


def test_a_rank_that_comes_twice_takes_the_place_of_the_first_until_the_room_opens() -> None:
    with pair() as (tx, rx), endpoint() as other:
        sender = tx.sender(1)
        first = rx.receiver(1, peer=tx.address, tokens=64, rank=0, ranks=2)
        until(lambda: any(s.slots for s in list(tx.driver.core.sessions.values())))  # type: ignore[attr-defined]
        second = other.receiver(1, peer=tx.address, tokens=64, rank=0, ranks=2)
        assert "another life of rank 0" in failed(first).detail
        assert first.wait_quiescent(SOON_S)
        last = rx.receiver(1, peer=tx.address, tokens=64, rank=1, ranks=2)
        sender.send(make_data(100))
        for receiver in (second, last):
            assert same(receiver.result(SOON_S), make_data(100))


@pytest.mark.both
def test_a_rank_that_comes_twice_to_an_open_room_does_it_no_harm() -> None:
    """It may be for the room's next life, so it is neither refused nor let in; its own deadline ends it."""
    with pair() as (tx, rx), endpoint(deadlines=deadlines(bootstrap_s=0.3)) as other:
        sender, receiver = open_pair(tx, rx, 1)
        until(lambda: receiver.poll() is W)
        stray = other.receiver(1, peer=tx.address)
        sender.send(make_data(100))
        assert same(receiver.result(SOON_S), make_data(100))
        assert failed(stray).code is FailureCode.DeadlinePassed
        assert sender.wait(SOON_S) is S


@pytest.mark.parametrize("state", ["waiting", "moving", "transferring"])
def test_pain_03_when_one_of_four_ranks_fails_all_fail_and_know_which(state: str) -> None:
    faults = Faults()
    faults.hold(3 if state == "moving" else 7)
    with pair(faults=faults) as (tx, rx):
        sender = tx.sender(1)
        receivers = [rx.receiver(1, peer=tx.address, tokens=64, rank=rank, ranks=4) for rank in range(4)]
        until(lambda: sender.poll() is W)
        if state != "waiting":
            sender.send(make_data(100))
            until(lambda: faults.submitted == (4 if state == "moving" else 8))
        receivers[1].abort("worker 1 is out of memory")
        for handle in (sender, *receivers):
            failure = failed(handle)
            assert (failure.code, failure.rank) == (FailureCode.Aborted, 1)
            assert failure.detail == "worker 1 is out of memory"
            assert handle.wait_quiescent(SOON_S)
        until(lambda: tx.load().free == rx.load().free == 64)


def test_when_the_second_of_four_writes_fails_all_ranks_fail_and_know_which() -> None:
    faults = Faults()
    faults.fail(1, "injected")
    with pair(faults=faults) as (tx, rx):
        sender = tx.sender(1)
        receivers = in_order(tx, rx, 4)
        sender.send(make_data(100))
        for handle in (sender, *receivers):
            failure = failed(handle)
            assert (failure.code, failure.rank) == (FailureCode.TransportFailed, 1)
            assert failure.detail == "memory to rank 1: injected"


def in_order(tx: Endpoint, rx: Endpoint, ranks: int) -> list[Any]:
    """Receivers of room 1, heard of at the sender in the order of their ranks, as their tickets will be."""
    receivers = []
    for rank in range(ranks):
        receivers.append(rx.receiver(1, peer=tx.address, tokens=64, rank=rank, ranks=ranks))
        until(lambda: [len(s.slots) for s in list(tx.driver.core.sessions.values())] == [len(receivers)])  # type: ignore[attr-defined]
    return receivers


def test_pain_25_one_flipped_bit_fails_all_eight_ranks_and_names_the_one() -> None:
    faults = Faults()
    faults.flip(3, at=77)
    with pair(faults=faults) as (tx, rx):
        sender = tx.sender(1)
        receivers = in_order(tx, rx, 8)
        sender.send(make_data(60))
        for handle in (sender, *receivers):
            failure = failed(handle)
            assert (failure.code, failure.rank, failure.retryable) == (FailureCode.ChecksumMismatch, 3, True)
            assert failure.detail == "part 0, tokens 0 to 60: the bytes differ"
            assert str(failure).startswith("ChecksumMismatch on rank 3 in WaitingForInput")
        until(lambda: rx.load().free == 64)
        for handle in (sender, *receivers):
            handle.clear()
        transfer(tx, rx, 1)


@pytest.mark.parametrize("resume", ["drain", "extend", "manual"])
def test_a_flipped_bit_in_any_part_is_found(resume: str) -> None:
    faults = Faults()
    faults.flip(1, at=5)
    settings: dict[str, Any] = {"resume": resume}
    if resume == "manual":
        settings["blocks"] = [0, 1, 2, 3]
    with pair(faults=faults, rx={"pool": adopted(8)[0] if resume == "manual" else pool(8)}) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1, **{"tokens": None if resume == "manual" else 64, **settings})
        sender.send(make_data(100))
        if resume == "manual":
            until(lambda: receiver.gate is Gate.waiting_resume)
            receiver.resume([4, 5, 6, 7])
        assert failed(sender).code is failed(receiver).code is FailureCode.ChecksumMismatch
        assert "part 1, tokens 64 to 100" in failed(sender).detail
        assert receiver.history[-2] is T


@pytest.mark.parametrize(("checksum", "state"), [("auto", KVPoll.Failed), (True, KVPoll.Failed), (False, S)])
def test_checksums_may_be_switched_off(checksum: bool | str, state: KVPoll) -> None:
    faults = Faults()
    faults.flip(0)
    with pair(faults=faults, checksum=checksum) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(make_data(10))
        assert (sender.wait(SOON_S), receiver.wait(SOON_S)) == (state, state)


# Deadlines: every wait has an end, a reason, and a peer that is told


@pytest.mark.both
def test_a_room_no_receiver_comes_to() -> None:
    with endpoint(deadlines=deadlines(bootstrap_s=0.1)) as tx:
        sender = tx.sender(1, required_ranks=2)
        sender.send(make_data(10))
        failure = failed(sender)
        assert failure.code is FailureCode.DeadlinePassed
        assert failure.detail == "waiting_ranks for 0.1 s: ranks not here: [0, 1]; without a usable grant: []"
        assert failure.retryable
        assert sender.wait_quiescent(SOON_S)


@pytest.mark.parametrize("peer", ["no endpoint", "no room"])
def test_a_room_the_sender_never_opens(peer: str) -> None:
    with pair(deadlines=deadlines(bootstrap_s=0.2)) as (tx, rx):
        address = "tcp://127.0.0.1:9" if peer == "no endpoint" else str(tx.address)
        receiver = rx.receiver(1, peer=address)
        failure = failed(receiver)
        assert failure.code is FailureCode.DeadlinePassed
        assert "the sender has not opened the room: is it open at that address, are all ranks here?" in failure.detail
        assert failure.rank == 0
        assert receiver.wait_quiescent(SOON_S)
        assert rx.load().free == 64


@pytest.mark.both
def test_a_rank_that_never_comes() -> None:
    with pair(tx={"deadlines": deadlines(bootstrap_s=0.2)}) as (tx, rx):
        sender = tx.sender(1)
        receiver = rx.receiver(1, peer=tx.address, rank=1, ranks=3)
        assert "ranks not here: [0, 2]" in failed(sender).detail
        assert failed(receiver) == failed(sender)


@pytest.mark.both
def test_data_that_never_comes() -> None:
    """A host that gives no sign of life, that is; one that does may take its time, up to `room_timeout_s`."""
    quick = deadlines(input_s=0.2, host_alive_s=0.1)
    with pair(tx={"deadlines": quick}) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        assert failed(receiver).code is FailureCode.DeadlinePassed
        assert failed(receiver).detail == "queued for 0.2 s: the host has 0 tokens ready of None"
        assert failed(sender) == failed(receiver)


@pytest.mark.both
def test_pain_09_a_host_that_lives_may_take_its_time_but_not_for_ever() -> None:
    with pair(deadlines=deadlines(input_s=0.4, room_timeout_s=1.0)) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        until(lambda: sender.poll().is_terminal and receiver.poll().is_terminal)
        for handle in (sender, receiver):
            assert failed(handle).code is FailureCode.DeadlinePassed
            assert failed(handle).detail == "the room outlived 1 s"


def test_a_resume_that_never_comes() -> None:
    with pair(rx={"pool": adopted(4)[0], "deadlines": deadlines(resume_s=0.2)}) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1, tokens=None, resume="manual", blocks=[0])
        sender.send(make_data(20))
        failure = failed(sender)
        assert failure.code is FailureCode.DeadlinePassed
        assert failure.detail == "waiting_resume for 0.2 s: resume() was not called for part 1"
        assert failed(receiver) == failure
        assert receiver.history == (KVPoll.Bootstrapping, W, T, KVPoll.Failed)
        assert [part.tokens for part in receiver.parts] == [16]


def test_a_resume_that_never_comes_ends_at_the_sender_too() -> None:
    with pair(tx={"deadlines": deadlines(resume_s=0.2)}, rx={"pool": adopted(4)[0]}) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1, tokens=None, resume="manual", blocks=[0])
        sender.send(make_data(20))
        assert failed(sender).detail == "waiting_resume for 0.2 s: no grant for part 1 from ranks [0]"
        assert failed(receiver) == failed(sender)


def test_a_room_whose_opening_was_not_waited_for_is_opened_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpoll_fsm.engine.CALL_S", 0.01)
    with pair(rx={"pool": adopted(4)[0]}) as (tx, rx):
        driver, peer = rx.driver, str(tx.address)
        with driver_stopped(rx), pytest.raises(concurrent.futures.TimeoutError):
            rx.receiver(1, peer=peer, resume="manual", blocks=[0])
        monkeypatch.undo()
        until(lambda: rx.load().free == 4 and not driver.core.sessions)
        assert rx.receiver(1, peer=peer, resume="manual", blocks=[0]).poll() is not KVPoll.Failed


@pytest.mark.parametrize("part", [0, 1])
def test_a_transport_that_hangs_while_both_sides_live(part: int) -> None:
    faults = Faults()
    faults.hold(part)
    with pair(faults=faults, tx={"deadlines": deadlines(stall_s=0.5)}) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1, tokens=16)
        sender.send(make_data(40))
        for handle in (sender, receiver):
            failure = failed(handle)
            assert failure.code is FailureCode.DeadlinePassed
            assert failure.detail == f"moving for 0.5 s: no bytes landed; part {part} to ranks [0]"
            assert failure.state is (W if part == 0 else T)
            assert handle.wait_quiescent(SOON_S)
        until(lambda: tx.load().free == rx.load().free == 64)
        transfer(tx, rx, 2)


def test_a_transport_that_hangs_is_noticed_at_the_receiver_too() -> None:
    faults = Faults()
    faults.hold()
    with pair(faults=faults, deadlines=BRISK, rx={"deadlines": deadlines(stall_s=0.2)}) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(make_data(40))
        assert failed(receiver).detail == "moving for 0.2 s: part 0 makes no progress"
        assert failed(sender) == failed(receiver)
        until(lambda: tx.load().free == rx.load().free == 64)


@pytest.mark.both
def test_blocks_that_never_come_free_at_the_receiver() -> None:
    quick = deadlines(input_s=0.6, withdraw_s=0.05)
    with pair(deadlines=quick, rx={"pool": pool(4)}) as (tx, rx):
        _, first = open_pair(tx, rx, 1)
        until(lambda: first.poll() is W)
        sender, second = open_pair(tx, rx, 2)
        until(lambda: second.gate is Gate.waiting_blocks)
        assert rx.load().queued == 1
        for handle in (second, sender):
            failure = failed(handle)
            assert failure.code is FailureCode.PoolExhausted
            assert failure.detail == "waiting_blocks for 0.6 s: 4 blocks did not come free in this endpoint's pool"
            assert (failure.rank, failure.retryable) == (0, True)
        assert first.poll() is W
        assert rx.load().queued == 0


def test_blocks_that_never_come_free_at_the_sender() -> None:
    faults = Faults()
    faults.hold(0)
    with pair(faults=faults, tx={"pool": pool(4), "deadlines": deadlines(input_s=0.3)}) as (tx, rx):
        first, _ = open_pair(tx, rx, 1)
        first.send(make_data(64))
        until(lambda: faults.submitted)
        second, receiver = open_pair(tx, rx, 2)
        second.send(make_data(64))
        until(lambda: second.gate is Gate.waiting_blocks)
        for handle in (second, receiver):
            failure = failed(handle)
            assert failure.code is FailureCode.PoolExhausted
            assert "no free source blocks in this endpoint" in failure.detail
        assert not first.poll().is_terminal
        faults.release()
        assert first.wait(SOON_S) is S


@pytest.mark.both
def test_who_waits_for_blocks_gets_them_when_they_come_free() -> None:
    with pair(rx={"pool": pool(4)}) as (tx, rx):
        first_sender, first = open_pair(tx, rx, 1)
        until(lambda: first.poll() is W)
        sender, second = open_pair(tx, rx, 2)
        sender.send(make_data(100))
        until(lambda: second.gate is Gate.waiting_blocks)
        first_sender.send(make_data(100))
        assert first.wait(SOON_S) is S
        assert same(second.result(SOON_S), make_data(100))


def test_rooms_that_hold_each_others_blocks_do_not_wait_for_ever() -> None:
    """Two rooms of two ranks; each rank's pool has gone to the other room first. One gives way."""
    with (
        endpoint(deadlines=deadlines(withdraw_s=0.05)) as tx,
        endpoint(pool=pool(4), deadlines=deadlines(withdraw_s=0.05)) as one,
        endpoint(pool=pool(4), deadlines=deadlines(withdraw_s=0.05)) as two,
    ):
        senders = [tx.sender(room) for room in (1, 2)]
        receivers = []
        for rank, room in [(0, 1), (1, 2), (1, 1), (0, 2)]:
            receivers.append((one, two)[rank].receiver(room, peer=tx.address, tokens=64, rank=rank, ranks=2))
            on_driver((one, two)[rank], lambda: None)
        for sender in senders:
            sender.send(make_data(100))
        for receiver in receivers:
            assert same(receiver.result(SOON_S), make_data(100))


# A room's number again


def test_a_number_is_used_again_while_the_old_transfer_is_in_flight() -> None:
    faults = Faults()
    faults.hold(0)
    with pair(faults=faults) as (tx, rx):
        old_sender, old = open_pair(tx, rx, 7)
        old_sender.send(make_data(64, seed=1))
        until(lambda: faults.submitted)
        with driver_stopped(tx):  # nothing of what follows is heard there yet
            old.clear()
            receiver = rx.receiver(7, peer=tx.address, tokens=64)
            old_sender.clear()
            sender = tx.sender(7)
            sender.send(make_data(64, seed=2))
        assert same(receiver.result(SOON_S), make_data(64, seed=2))
        assert failed(old).code is FailureCode.Aborted
        assert failed(old_sender).code is FailureCode.Aborted
        assert sender.wait(SOON_S) is S


def test_pain_01_bytes_that_come_late_land_in_no_other_room() -> None:
    """The write fails, the room ends, its blocks go to the next room, and then the bytes arrive."""
    faults = Faults()
    faults.fail_late(0, "timeout", after_nbytes=64)
    with pair(faults=faults, rx={"pool": pool(4)}) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(make_data(64, seed=1))
        assert failed(receiver).code is FailureCode.TransportFailed
        assert receiver.wait_quiescent(SOON_S), "the fence makes sure, whatever the writer does"
        faults.hold(1)
        next_sender, next_receiver = open_pair(tx, rx, 2)
        next_sender.send(make_data(64, seed=2))
        until(lambda: faults.submitted == 2)
        faults.land(0)
        faults.release(1)
        assert same(next_receiver.result(SOON_S), make_data(64, seed=2))
        assert sender.wait_quiescent(SOON_S)


def test_pain_01_blocks_stay_in_quarantine_until_no_write_can_land() -> None:
    faults, fences = Faults(), Faults()
    faults.hold()
    fences.hold_fences()
    receiving = {"pool": pool(4), "transport_options": {"memory": {"faults": fences}}}
    with pair(faults=faults, rx=receiving) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(make_data(64))
        until(lambda: faults.submitted)
        with driver_stopped(tx):  # the writer's word does not come either
            receiver.abort("enough")
            assert failed(receiver).detail == "enough"
            until(lambda: rx.load().quarantined == 4)
            assert not receiver.wait_quiescent(0.02)
            assert rx.load().quarantined == 4
            assert not rx.is_idle()
            fences.release_fences()
            assert receiver.wait_quiescent(SOON_S)
            assert rx.load().free == 4


# The whole endpoint


def test_load_tells_where_blocks_are() -> None:
    faults = Faults()
    faults.hold()
    with pair(faults=faults, tx={"pool": pool(8)}, rx={"pool": pool(16)}) as (tx, rx):
        assert (rx.load().total, rx.load().free) == (16, 16)
        sender, receiver = open_pair(tx, rx, 1)
        until(lambda: receiver.poll() is W)
        assert (rx.load().free, rx.load().leased) == (12, 4)
        assert tx.load().free == 8
        sender.send(make_data(40))
        until(lambda: faults.submitted)
        assert (tx.load().free, tx.load().leased, tx.load().quarantined, tx.load().queued) == (5, 3, 0, 0)
        faults.release()
        assert receiver.wait(SOON_S) is S
        until(lambda: tx.load().free == 8 and rx.load().free == 16)


def test_pain_26_drain_waits_for_what_is_open_and_takes_nothing_new() -> None:
    faults = Faults()
    faults.hold()
    with pair(faults=faults) as (tx, rx):
        assert tx.is_idle()
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(make_data(100))
        until(lambda: faults.submitted)
        assert not tx.is_idle()
        assert not tx.drain(0.05)
        with pytest.raises(EndpointClosed, match="draining: no new rooms are taken"):
            tx.sender(2)
        with pytest.raises(EndpointClosed, match="draining"):
            tx.receiver(2, peer=rx.address)
        assert not sender.poll().is_terminal, "the deadline ends the wait, not the room"
        threading.Timer(0.05, faults.release).start()
        assert tx.drain(SOON_S)
        assert sender.poll() is S
        assert tx.is_idle()
        assert rx.drain(SOON_S)
        assert receiver.poll() is S


def test_drain_waits_for_cleared_rooms_too() -> None:
    faults, fences = Faults(), Faults()
    faults.hold()
    fences.hold_fences()
    with pair(faults=faults, rx={"transport_options": {"memory": {"faults": fences}}}) as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        sender.send(make_data(10))
        until(lambda: faults.submitted)
        with driver_stopped(tx):
            receiver.clear()
            assert not rx.drain(0.05)
            fences.release_fences()
            assert rx.drain(SOON_S)


def test_an_endpoint_that_was_not_started_says_so() -> None:
    unstarted = endpoint()
    for use in (
        lambda: unstarted.address,
        lambda: unstarted.sender(1),
        lambda: unstarted.receiver(1, peer="tcp://127.0.0.1:9"),
        unstarted.load,
        unstarted.dump,
        unstarted.is_idle,
        lambda: unstarted.drain(0.1),
    ):
        with pytest.raises(EndpointClosed, match="use `with Endpoint"):
            use()
    unstarted.close()


@pytest.mark.both
def test_an_endpoint_is_started_once() -> None:
    with endpoint() as tx:
        with pytest.raises(InvalidInput, match="started before; make a new one"):
            tx.start()
        assert tx.is_idle()


@pytest.mark.both
def test_a_failed_start_may_be_tried_again() -> None:
    with endpoint() as other:
        again = endpoint(listen=str(other.address))
        with pytest.raises(AddressError, match="cannot listen there"):
            again.start()
    with again:
        assert again.is_idle()


def test_advertise_is_what_peers_are_told() -> None:
    with (
        endpoint("tcp", listen="tcp://0.0.0.0:0", advertise="tcp://127.0.0.1:0", insecure=True) as tx,
        endpoint("tcp") as rx,
    ):
        assert tx.address.host == "127.0.0.1"
        assert tx.address.port
        transfer(tx, rx, 1)
    with endpoint(advertise="tcp://localhost:4711") as tx:
        assert str(tx.address) == "tcp://localhost:4711"


@pytest.mark.both
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_pain_22_ipv6(transport: str) -> None:
    with pair(transport, listen="tcp://[::1]:0") as (tx, rx):
        assert str(tx.address).startswith("tcp://[::1]:")
        transfer(tx, rx, 1)


@pytest.mark.both
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_both_ways_at_once_and_to_oneself(transport: str) -> None:
    with pair(transport) as (one, two):
        rooms = [open_pair(*ends, room) for room, ends in enumerate([(one, two), (two, one), (one, one), (two, two)])]
        for room, (sender, _) in enumerate(rooms):
            sender.send(make_data(100, seed=room))
        for room, (_, receiver) in enumerate(rooms):
            assert same(receiver.result(SOON_S), make_data(100, seed=room))


@pytest.mark.both
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_two_hundred_rooms_at_once_through_small_pools(transport: str) -> None:
    with pair(transport, tx={"pool": pool(3)}, rx={"pool": pool(8)}, workers=1) as (tx, rx):
        senders = []
        for room in range(200):
            senders.append(tx.sender(room))
            senders[-1].send(make_data(20 + room % 30, seed=room))
        receivers = [rx.receiver(room, peer=tx.address, tokens=32) for room in reversed(range(200))]
        for room, receiver in zip(reversed(range(200)), receivers, strict=True):
            assert same(receiver.result(SOON_S), make_data(20 + room % 30, seed=room))
        assert {sender.wait(SOON_S) for sender in senders} == {S}
        until(lambda: tx.load().free == 3 and rx.load().free == 8)


@pytest.mark.both
def test_every_room_that_ends_is_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kvpoll_fsm"), pair() as (tx, rx):
        for room in range(4):
            sender = tx.sender(room, tag=f"request-{room}")
            receiver = rx.receiver(room, peer=tx.address, tokens=64, tag="r")
            if room == 0:
                sender.send(make_data(100))
                assert receiver.wait(SOON_S) is S
                assert sender.wait(SOON_S) is S
            elif room == 1:
                until(lambda receiver=receiver: receiver.poll() is W)  # type: ignore[misc]
                sender.abort("why not")
                failed(receiver)
            elif room == 2:
                until(lambda receiver=receiver: receiver.poll() is W)  # type: ignore[misc]
                sender.clear()
                failed(receiver)
            else:
                until(lambda receiver=receiver: receiver.poll() is W)  # type: ignore[misc]
    lines = [record for record in caplog.records if record.getMessage().startswith("room ended ")]
    found = {
        (r.getMessage().split(" side=")[1].split()[0], int(r.getMessage().split(" room=")[1].split()[0])) for r in lines
    }
    assert found == {(side, room) for side in ("sender", "receiver") for room in range(4)}
    assert len(lines) == 8
    first = next(line for line in lines if "side=sender room=0 " in line.getMessage())
    assert "tag=request-0 state=Success parts=2 tokens=100" in first.getMessage()
    assert first.getMessage().endswith("cause=None")
    second = next(line for line in lines if "side=receiver room=1 " in line.getMessage())
    assert "tag=r state=Failed" in second.getMessage()
    assert "cause=Aborted on sender in WaitingForInput (not retryable): why not" in second.getMessage()
    assert second.levelno == logging.WARNING


@pytest.mark.both
def test_a_long_reason_is_cut_not_lost() -> None:
    with pair() as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        until(lambda: receiver.poll() is W)
        sender.abort("x" * 100_000)
        assert failed(receiver).detail == "x" * MAX_DETAIL


# Peers that come and go


@pytest.fixture
def quick() -> Deadlines:
    return deadlines(peer_lost_s=0.8)


@pytest.mark.both
def test_a_restarted_sender_is_a_new_peer(quick: Deadlines) -> None:
    with endpoint(deadlines=quick) as rx:
        with endpoint(deadlines=quick) as tx:
            address = str(tx.address)
            transfer(tx, rx, 1)
            _, receiver = open_pair(tx, rx, 2)
            until(lambda: receiver.poll() is W)
        failure = failed(receiver)
        assert failure.code is FailureCode.Aborted
        assert receiver.wait_quiescent(SOON_S)
        with endpoint(deadlines=quick, listen=address) as tx:
            assert str(tx.address) == address
            transfer(tx, rx, 3)


def test_a_peer_that_is_silent_for_long_is_lost_and_may_come_back(quick: Deadlines) -> None:
    """Its process was stopped, say, and goes on."""
    with pair(tx={"deadlines": quick}, rx={"deadlines": quick}) as (tx, rx):
        transfer(tx, rx, 1)
        sender, receiver = open_pair(tx, rx, 2)
        until(lambda: receiver.poll() is W)
        with driver_stopped(tx):
            failure = failed(receiver)
            assert failure.code is FailureCode.PeerLost
            assert failure.detail == "the peer was not heard for 0.8 s"
        assert failed(sender).code is FailureCode.PeerLost
        receiver.clear()
        sender.clear()
        transfer(tx, rx, 3)


def test_a_receiver_that_is_silent_for_long_is_lost_and_may_come_back(quick: Deadlines) -> None:
    with pair(tx={"deadlines": quick}, rx={"deadlines": quick}) as (tx, rx):
        transfer(tx, rx, 1)
        sender, receiver = open_pair(tx, rx, 2)
        until(lambda: receiver.poll() is W)
        with driver_stopped(rx):
            failure = failed(sender)
            assert (failure.code, failure.rank) == (FailureCode.PeerLost, 0)
        assert failed(receiver).code is FailureCode.PeerLost
        until(lambda: not rx.driver.core.connections, "the sender says that it does not know it any more")
        transfer(tx, rx, 3)


def test_an_idle_connection_is_given_up_and_made_anew() -> None:
    with pair(deadlines=deadlines(linger_s=0.1)) as (tx, rx):
        transfer(tx, rx, 1)
        until(lambda: not tx.driver.core.connections and not rx.driver.core.connections)
        until(lambda: not tx.driver._links._links and not rx.driver._control._dealers)
        until(lambda: not tx.driver._control._routes)
        transfer(tx, rx, 2)


@pytest.mark.both
def test_closing_tells_the_peers_of_live_rooms() -> None:
    for closing in ("sender", "receiver"):
        with pair() as (tx, rx):
            rooms = [open_pair(tx, rx, room) for room in range(3)]
            until(lambda rooms=rooms: all(receiver.poll() is W for _, receiver in rooms))  # type: ignore[misc]
            (tx if closing == "sender" else rx).close()
            for handles in rooms:
                for handle in handles:
                    assert failed(handle).code is FailureCode.Aborted
                    assert failed(handle).detail == "the endpoint was closed"
                    assert handle.wait_quiescent(SOON_S)
            live = rx if closing == "sender" else tx
            assert live.is_idle()


@pytest.fixture
def closed() -> Endpoint:
    with endpoint() as tx:
        pass
    return tx


@pytest.mark.both
def test_after_close_every_use_says_so(closed: Endpoint) -> None:
    closed.close()
    for use in (
        lambda: closed.driver,
        lambda: closed.sender(1),
        lambda: closed.receiver(1, peer="tcp://127.0.0.1:9"),
        closed.load,
        closed.dump,
        closed.is_idle,
        lambda: closed.drain(0.1),
    ):
        with pytest.raises(EndpointClosed, match="the endpoint has ended: closed"):
            use()
    assert closed.address.port, "where it was may still be asked"


@pytest.mark.both
def test_handles_of_a_closed_endpoint_are_failed_and_quiet() -> None:
    with pair() as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        until(lambda: receiver.poll() is W)
        tx.close()
        rx.close()
        for handle in (sender, receiver):
            failure = failed(handle)
            handle.abort("again")
            handle.clear()
            handle.clear()
            assert handle.failure is failure
            assert handle.wait_quiescent(0)
            assert handle.wait(0) is KVPoll.Failed
