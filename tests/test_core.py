"""The endpoint core: rooms that meet, wait, are parked, withdrawn, refused; peers that come and go."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from kvpoll_fsm import messages
from kvpoll_fsm.channel import Channel
from kvpoll_fsm.commands import Expose, Grant, StartPart
from kvpoll_fsm.core import CoreOptions, Do, EndpointCore, Hangup, Transmit
from kvpoll_fsm.deadlines import Gate
from kvpoll_fsm.errors import DuplicateRoom, Failure, FailureCode, ForeignBlock, KVPoll, RequestTooLarge
from kvpoll_fsm.inputs import AbortRoom, Crashed, GrantRefused, PartWritten, RevokeGrant
from kvpoll_fsm.layout import Field, Layout
from kvpoll_fsm.messages import Abort, Beat, Bye, Frame, Opened, Quiesced, Reserve, Withdraw, Withdrawn
from kvpoll_fsm.peers import Peers
from kvpoll_fsm.receiver_session import ReceiverOptions
from kvpoll_fsm.selection import Policy
from kvpoll_fsm.sender_session import SenderOptions, SenderSession
from kvpoll_fsm.session import RoomKey
from kvpoll_fsm.testing.hosts import Host
from kvpoll_fsm.testing.invariants import check_nothing_left
from kvpoll_fsm.testing.world import SENDER, World
from tests.worlds import BLOCK, Transfer, end, messages_of, rest, run_until, step, transfer, world

B, W, T, S, F = (
    KVPoll.Bootstrapping,
    KVPoll.WaitingForInput,
    KVPoll.Transferring,
    KVPoll.Success,
    KVPoll.Failed,
)


def beat(world: World, times: int = 1) -> None:
    """Heartbeats of every endpoint, and what comes of them."""
    for _ in range(times):
        for name in list(world.hosts):
            world.tick(name, heartbeat=True)
        world.run()


def say(world: World, name: str, *said: messages.Message, conn: int = 1) -> None:
    """Endpoint `name` says something through a connection, whatever its sessions think, and it arrives."""
    host = world.hosts[name]
    for message in said:
        host.core.connections[conn].channel.push(message)
    world.network += [
        delivery
        for frame in host.core.connections[conn].channel.flush()
        for delivery in [world.delivery(host, conn, frame)]
    ]
    world.run()


# Openings


def test_a_room_that_is_open_is_not_opened_twice() -> None:
    one = transfer(2000).open()
    run_until(one.world, lambda: one.tx.state is T)
    with pytest.raises(DuplicateRoom, match="sender of room 7, rank 0 is open already"):
        one.world.open_sender(7)
    with pytest.raises(DuplicateRoom, match="receiver of room 7, rank 0"):
        one.world.open_receiver("r0", 7)
    one.world.run()
    one.assert_success()
    with pytest.raises(DuplicateRoom):  # a room that ended is open until it is cleared
        one.world.open_sender(7)
    end(one.world, one)


def test_what_never_fits_is_refused_at_once() -> None:
    one = world()
    with pytest.raises(RequestTooLarge, match="9 blocks wanted but the pool has 8"):
        one.open_receiver("r0", 7, blocks=9)
    one.run()
    assert one.hosts["r0"].core.load().queued == 0
    ok = Transfer(one, 100).open()
    one.run()
    ok.assert_success()
    end(one, ok)


@pytest.mark.parametrize("exact", [(8,), (1, 1), (-1,)])
def test_blocks_that_are_not_there_are_refused(exact: tuple[int, ...]) -> None:
    one = world()
    with pytest.raises(ForeignBlock):
        one.open_receiver("r0", 7, exact=exact)
    assert one.hosts["r0"].core.load().free == 8
    assert not one.hosts["r0"].core.sessions


def test_blocks_in_use_are_refused() -> None:
    one = transfer(100, blocks=2).open()
    busy = one.rx()
    held = one.world.hosts["r0"].core.accounts.blocks_of(next(iter(one.world.hosts["r0"].core.accounts.leases())))
    with pytest.raises(ForeignBlock, match="held by a room"):
        one.world.open_receiver("r0", 8, exact=held[:1])
    assert busy.state is B
    one.world.run()
    end(one.world, one)


def test_a_cleared_room_is_open_for_the_next_life_at_once() -> None:
    one = transfer(2000).open()
    run_until(one.world, lambda: one.tx.state is T)
    core = one.world.hosts[SENDER].core
    assert one.sender is not None
    assert core.is_open(one.sender)
    one.world.clear(SENDER, one.sender)
    assert not core.is_open(one.sender)
    old = one.tx
    again = one.world.open_sender(7)
    assert (old.room_key.generation, again.generation) == (1, 2)
    one.sender = again
    one.clear()
    rest(one.world)
    check_nothing_left(one.world)


# Parked reservations


def test_a_receiver_that_comes_first_waits_for_the_sender() -> None:
    one = transfer(500)
    one.open_receiver()
    one.world.run()
    core = one.world.hosts[SENDER].core
    assert len(core.parking) == 1
    one.open_sender()
    assert len(core.parking) == 0
    one.world.run()
    one.assert_success()
    end(one.world, one)


@pytest.mark.parametrize("ended", [S, F])
def test_a_newer_reservation_waits_until_the_old_life_is_cleared(ended: KVPoll) -> None:
    one = transfer(500).open()
    if ended is F:
        run_until(one.world, lambda: one.tx.state is W)
        one.abort("r0")
    one.world.run()
    assert one.tx.state is ended
    one.world.clear("r0", one.receivers[0])
    one.open_receiver()
    one.world.run()
    assert len(one.world.hosts[SENDER].core.parking) == 1
    assert one.tx.state is ended
    assert one.rx().state is B
    assert one.sender is not None
    one.world.clear(SENDER, one.sender)
    one.open_sender()
    one.world.run()
    one.assert_success()
    end(one.world, one)


@pytest.mark.parametrize("how", ["abort", "clear", "gone", "restart"])
def test_a_parked_reservation_goes_with_its_receiver(how: str) -> None:
    one = transfer(500, 2)
    one.open_receivers()
    one.world.run()
    parking = one.world.hosts[SENDER].core.parking
    assert len(parking) == 2
    if how == "abort":
        one.abort("r0")
    elif how == "clear":
        one.world.clear("r0", one.receivers[0])
    elif how == "gone":
        one.world.drop_host("r0")
        beat(one.world, 7)
    else:
        one.world.add_host("r0", 8, BLOCK)
        beat(one.world, 7)
    one.world.run()
    assert len(parking) == 1
    one.abort("r1")
    one.world.run()
    assert len(parking) == 0
    assert parking.key() == ((), ())


@pytest.mark.parametrize("opened", [False, True])
def test_the_later_of_two_receivers_takes_the_place_and_the_other_is_told(opened: bool) -> None:
    """Whether the room is open, waiting for another rank, or the first reservation is parked."""
    one = transfer(500, 2)
    if opened:
        one.open_sender()
    loser = one.world.session("r0", one.world.open_receiver("r0", 7, 0, 2, blocks=2))
    one.world.run()
    one.world.add_host("r2", 8, BLOCK)
    one.receivers[0] = one.world.open_receiver("r2", 7, 0, 2, blocks=2)
    one.world.run()
    assert loser.failure is not None
    assert loser.failure.code is FailureCode.ProtocolError
    assert "another life of rank 0" in loser.failure.detail
    if not opened:
        one.open_sender()
    one.open_receiver(1)
    one.world.run()
    assert one.tx.state is S
    assert one.world.session("r2", one.receivers[0]).state is S


def test_a_reservation_made_before_the_end_was_heard_is_void() -> None:
    """Its blocks go back when the end is heard: the next life of the room must not write to them."""
    one = world()
    other, late = Transfer(one, 500, room=1), Transfer(one, 500, room=2)
    other.open(supply=False)
    one.run()
    late.open()
    one.run()
    assert late.rx().gate is Gate.waiting_blocks  # reserved without blocks, and bound by the sender
    late.abort(SENDER)
    told, one.network = one.network, []
    other.abort("r0")
    one.run()  # the other room ends, late gets its blocks and reserves with them
    assert late.rx().gate is Gate.waiting_ranks
    assert late.sender is not None
    one.clear(SENDER, late.sender)
    again = one.open_sender(2)
    assert not one.session(SENDER, again).slots  # type: ignore[attr-defined]
    one.network += told
    rest(one)
    assert late.rx().state is F
    late.receivers.clear()
    late.sender = again
    one.clear("r0", RoomKey("receiver", 2, 0, 2))
    late.open_receiver()
    one.supply(again, 500)
    rest(one)
    late.assert_success()
    end(one, other, late)


def test_a_rank_of_another_room_size_is_told_why_it_is_refused() -> None:
    """It has no place in the room and would hear nothing of its end until its own deadline."""
    one = transfer(500, 2, required=1).open()
    one.world.run()
    assert one.tx.failure is not None
    assert one.tx.failure.code is FailureCode.ProtocolError
    told = one.rx(0).failure
    assert told is not None
    assert told.code is FailureCode.ProtocolError
    assert "rank 0 of 2 where 1 ranks are required" in told.detail
    one.abort("r1")
    end(one.world, one)


def test_no_more_rooms_are_parked_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpoll_fsm.parking.MAX_PARKED", 3)
    one = world(blocks=8)
    keys = [one.open_receiver("r0", room, blocks=1) for room in range(5)]
    one.run()
    parking = one.hosts[SENDER].core.parking
    assert len(parking) == 3
    for key in keys:
        one.clear("r0", key)
    rest(one)
    check_nothing_left(one)


def test_orphans_leave_nothing() -> None:
    """Receivers whose sender never opens: each gives up, and nobody keeps anything of it."""
    one = world(blocks=4)
    for room in range(100):
        key = one.open_receiver("r0", room, blocks=1)
        one.run()
        one.fire("r0", key, "gate")
        one.clear("r0", key)
        one.run()
    check_nothing_left(one)
    assert one.hosts["r0"].core.ignored + one.hosts[SENDER].core.ignored > 0


# Old packets, old lives


def test_old_packets_never_change_a_new_life() -> None:
    """Everything ever said in the first life is said again at every step of the second."""
    one = transfer(20, block_tokens=4, blocks=2).open()
    world, said = one.world, []
    while step(world):
        said += [packet for packet in world.network if packet not in said]
    one.assert_success()
    one.clear()
    world.run()
    again = Transfer(world, 15, blocks=2).open()
    assert len(said) > 12
    while True:
        fresh, before = list(world.network), (again.tx.key(), again.rx().key())
        world.network[:] = said
        while world.network:
            world.deliver()
        assert (again.tx.key(), again.rx().key()) == before
        world.network[:] = fresh
        if set(again.states()) == {S}:
            break
        step(world)
    again.assert_success()
    end(world, again)


def test_a_sender_that_was_cleared_while_it_writes_does_not_say_that_nothing_lands() -> None:
    """The receiver gives up before it heard Opened, so its Abort cannot name the life that writes to it."""
    one = transfer(500).open()
    world = one.world
    run_until(world, lambda: any(isinstance(job.command, StartPart) for job in world.jobs))
    assert one.rx().state is B  # Opened is on its way
    assert one.sender is not None
    world.clear(SENDER, one.sender)
    to_rx, world.network = world.network, []
    one.abort("r0")
    while world.network and world.network[0].dest == SENDER:
        world.deliver()
    assert not messages_of(world, Quiesced)
    world.network[:0] = to_rx
    while world.network:
        world.deliver()
    world.jobs = [job for job in world.jobs if job.host == SENDER]  # the fence takes its time
    assert world.hosts["r0"].core.load().quarantined == 8
    world.perform()  # lands in quarantined blocks, and nobody else has them
    rest(world)
    one.clear()
    rest(world)
    check_nothing_left(world)


def test_words_of_a_room_that_is_not_here_are_counted_and_answered() -> None:
    one = transfer(500).open()
    one.world.run()
    ids = {"room": 99, "rank": 0, "sender_generation": 0, "receiver_generation": 5}
    failure = Failure.of(FailureCode.Aborted, "no", state=B, rank=0)
    core, peer = one.world.hosts[SENDER].core, one.world.hosts["r0"].core
    before = core.ignored, peer.ignored
    say(one.world, "r0", Abort(failure=failure, **ids))
    say(one.world, "r0", Withdraw(part=0, **ids))
    say(one.world, "r0", messages.PartAck(part=0, **ids))
    assert core.ignored == before[0] + 3
    assert peer.ignored == before[1] + 2  # Quiesced and Withdrawn, for a room that is not there either
    end(one.world, one)


def test_nobody_reserves_at_the_end_that_said_hello() -> None:
    one = transfer(500).open()
    one.world.run()
    core = one.world.hosts["r0"].core
    say(one.world, SENDER, Reserve(room=3, rank=0, ranks=1, receiver_generation=1))
    assert core.ignored == 1
    assert len(core.parking) == 0
    end(one.world, one)


def test_beats_of_another_life_are_not_heard() -> None:
    one = transfer(500, 2).open()
    run_until(one.world, lambda: one.tx.state is W)
    slot = one.tx.slots[0]
    generations = {"sender_generation": 1, "receiver_generation": slot.generation + 5}
    told = Beat(to_sender=True, room=7, rank=0, **generations, gate="waiting_blocks", bytes_done=0, host_alive=True)
    connection = one.world.hosts["r0"].core.connections[1]
    packet = connection.channel.heartbeat((told, told))
    one.world.hosts[SENDER].core.frame(packet)
    assert not slot.waits_for_blocks
    unknown = messages.Beat(True, 7, 0, 1, slot.generation, "no such gate", 0, True)
    one.world.hosts[SENDER].core.frame(connection.channel.heartbeat((unknown,)))
    one.world.run()
    one.assert_success()


# Pools that are short


def test_a_room_waits_for_blocks_and_gets_them() -> None:
    one = world()
    first, second = Transfer(one, 2000, room=1), Transfer(one, 2000, room=2)
    first.open(), second.open()
    run_until(one, lambda: first.tx.state is T)
    assert second.rx().gate is Gate.waiting_blocks
    assert second.rx().told_gate is Gate.waiting_blocks
    beat(one)
    assert second.tx.told_gate is Gate.waiting_blocks or second.tx.state is S
    one.run()
    first.assert_success()
    second.assert_success()
    end(one, first, second)


def test_a_room_that_waits_for_blocks_too_long_ends_as_pool_exhausted_and_the_others_go_on() -> None:
    one = world()
    first, second = Transfer(one, 500, room=1), Transfer(one, 500, room=2)
    first.open(supply=False), second.open()
    one.run()
    second.fire("r0")
    one.run()
    second.assert_failed("PoolExhausted", "8 blocks did not come free", rank=0)
    assert one.hosts["r0"].core.load().queued == 0
    assert first.sender is not None
    one.supply(first.sender, 500)
    one.run()
    first.assert_success()
    end(one, first, second)


def test_a_sender_without_free_source_blocks_waits_too() -> None:
    one = World()
    one.add_host(SENDER, 4, BLOCK)
    one.add_host("r0", 8, BLOCK)
    rooms = [Transfer(one, 500, blocks=4, room=room).open() for room in (1, 2)]
    run_until(one, lambda: rooms[1].tx.gate is Gate.waiting_blocks)
    rooms[1].fire(SENDER)
    rooms[1].assert_failed  # noqa: B018
    assert rooms[1].tx.failure is not None
    assert rooms[1].tx.failure.code is FailureCode.PoolExhausted
    one.run()
    rooms[0].assert_success()
    rooms[1].assert_failed("PoolExhausted", "no free source blocks", rank=None)
    end(one, *rooms)


def crossed(one: World, resume: str = "drain", tokens: int = 2000) -> tuple[Transfer, Transfer]:
    """Two rooms, two ranks; rank 0's pool goes to the second room first, rank 1's to the first."""
    first, second = (Transfer(one, tokens, 2, room=room, resume=resume) for room in (1, 2))
    for each in (first, second):
        each.open_sender()
    second.open_receiver(0), first.open_receiver(1)
    first.open_receiver(0), second.open_receiver(1)
    return first, second


def withdraw(one: World) -> None:
    for name, host in one.hosts.items():
        if (None, "withdraw") in host.timers:
            one.fire(name, None, "withdraw")


@pytest.mark.parametrize("resume", ["drain", "extend"])
def test_pools_given_to_each_others_room_are_withdrawn(resume: str) -> None:
    one = world(2)
    first, second = crossed(one, resume)
    one.run()
    assert set(first.states() + second.states()) == {B}
    for _ in range(20):
        withdraw(one)
        one.run()
        beat(one)
    first.assert_success()
    second.assert_success()
    end(one, first, second)


@pytest.mark.parametrize("seed", range(60))
def test_withdraw_may_cross_with_anything(seed: int) -> None:
    """Packets and jobs in any order that channels mend, withdraw timers and beats at any time."""
    one, chance = world(2, block_tokens=4), random.Random(seed)
    first, second = crossed(one, chance.choice(["drain", "extend"]), tokens=60)
    for _ in range(3000):
        if all(state.is_terminal for each in (first, second) for state in each.states()):
            break
        anything(one, chance)
    first.assert_success()
    second.assert_success()
    end(one, first, second)


def anything(one: World, chance: random.Random) -> None:
    """One step of any kind, but nobody is silent for long."""
    roll = chance.random()
    if roll < 0.1:
        withdraw(one)
    elif roll < 0.2:
        one.tick(chance.choice(list(one.hosts)), heartbeat=True)
    elif roll < 0.25 or not (one.network or one.jobs):
        for name in one.hosts:
            one.tick(name)
    elif one.network and (roll < 0.7 or not one.jobs):
        one.deliver(chance.randrange(len(one.network)))
    else:
        one.perform(chance.randrange(len(one.jobs)))
    for host in one.hosts.values():
        for connection in host.core.connections.values():
            connection.silent_ticks = 0


def test_a_grant_is_withdrawn_from_a_room_nobody_has_opened() -> None:
    """Its reservation is parked at the sender, which must answer all the same."""
    one = world()
    late, early = Transfer(one, 500, room=9), Transfer(one, 500, room=3)
    late.open_receiver()
    one.run()
    early.open()
    one.run()
    assert early.rx().gate is Gate.waiting_blocks
    withdraw(one)
    one.run()
    early.assert_success()
    assert late.rx().gate is Gate.waiting_ranks  # it has blocks again, now that the others are done
    late.open_sender()
    one.run()
    late.assert_success()
    end(one, early, late)


def test_a_withdrawn_grant_of_a_part_that_extends_is_not_waited_for_while_blocks_are_held() -> None:
    """Room 1 needs the whole pool, room 2 holds part 0 and has lent part 1: it copies out and gives all."""
    one = world(2)
    big, small = Transfer(one, 500, room=1), Transfer(one, 2000, 2, room=2, blocks=4, resume="extend")
    small.open()
    run_until(one, lambda: small.rx(0).state is T)
    held = [packet for packet in one.network if packet.source == "r1"]
    one.network = [packet for packet in one.network if packet.source != "r1"]
    big.open()
    while step(one):
        held += [packet for packet in one.network if packet.source == "r1"]
        one.network = [packet for packet in one.network if packet.source != "r1"]
    one.tick(SENDER, heartbeat=True)
    one.deliver()
    assert small.rx(0).held_parts
    assert small.tx.gate is Gate.waiting_resume
    withdraw(one)
    one.run()
    big.assert_success()
    one.network += held
    rest(one)
    small.assert_success()
    end(one, big, small)


def test_rooms_that_keep_coming_do_not_put_off_the_withdrawal() -> None:
    one = world()
    first = Transfer(one, 500, room=9)
    first.open_receiver()
    one.run()
    epochs = set()
    for room in range(5):
        one.open_receiver("r0", room, blocks=8)
        epochs.add(one.hosts["r0"].timers[None, "withdraw"])
    assert len(epochs) == 1


def test_a_grant_that_the_engine_chose_is_not_asked_back() -> None:
    one = world()
    late, early = Transfer(one, 500, room=9), Transfer(one, 500, room=3)
    late.receivers[0] = one.open_receiver("r0", 9, exact=(0, 1, 2))
    one.run()
    early.open()
    one.run()
    withdraw(one)
    assert not one.network
    late.abort("r0")
    one.run()
    early.assert_success()
    late.clear()
    end(one, early)


def test_a_stale_withdraw_timer_does_nothing() -> None:
    one = world()
    Transfer(one, 500, room=9).open_receiver()
    Transfer(one, 500, room=3).open_receiver()
    one.run()
    core = one.hosts["r0"].core
    core.timer(None, "withdraw", 99, host_alive=True)
    core.timer(None, "unknown", 1, host_alive=True)
    assert core.drain() == []


def test_the_withdraw_timer_rests_when_nobody_waits() -> None:
    one = world()
    first, second = Transfer(one, 500, room=1), Transfer(one, 500, room=2)
    first.open(), second.open()
    one.run()
    withdraw(one)
    assert (None, "withdraw") not in one.hosts["r0"].timers
    end(one, first, second)


# Blocks and work that go wrong


def test_blocks_that_cannot_be_exposed_go_back() -> None:
    one = world()
    core = one.hosts["r0"].core
    conn = core.connect(SENDER)
    key = core.open_receiver(5, 0, ReceiverOptions(conn, 1, 2, BLOCK, "drain"))
    assert [effect.command for effect in core.drain() if isinstance(effect, Do)][-1:] or True
    assert core.load().leased == 2
    failure = Failure.of(FailureCode.InternalError, "grant: no", state=B, rank=0)
    core.feed(key, GrantRefused(0, failure))
    assert core.sessions[key].failure is failure
    assert core.load().free == 8


def test_a_crash_while_blocks_are_exposed_gives_them_back_and_the_grant_comes_to_nothing() -> None:
    one = world()
    core = one.hosts["r0"].core
    conn = core.connect(SENDER)
    key = core.open_receiver(5, 0, ReceiverOptions(conn, 1, 2, BLOCK, "drain"))
    exposes = [e.command for e in core.drain() if isinstance(e, Do) and isinstance(e.command, Expose)]
    core.feed(key, Crashed("RuntimeError: no"))
    assert core.sessions[key].failure is not None
    assert core.sessions[key].failure.code is FailureCode.InternalError
    assert core.load().free == 8
    before = core.key()
    core.feed(key, messages_granted(exposes[0]))
    assert core.key() == before
    core.clear(key)
    assert not core.sessions


def messages_granted(expose: Expose) -> Any:
    from kvpoll_fsm.inputs import Granted

    return Granted(expose.part, expose.blocks, len(expose.blocks) * BLOCK, (("memory", b"token"),))


def test_a_bug_in_a_session_stays_in_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    one = world()
    bad, good = Transfer(one, 2000, room=1, blocks=4), Transfer(one, 2000, room=2, blocks=4)
    bad.open(), good.open()
    run_until(one, lambda: bad.tx.state is W)

    def poisoned(self: SenderSession, event: PartWritten) -> None:
        if self.room_key.room == 1:
            raise RuntimeError("bug")
        original(self, event)

    original = SenderSession._handlers[PartWritten]
    monkeypatch.setitem(SenderSession._handlers, PartWritten, poisoned)
    monkeypatch.setattr("kvpoll_fsm.testing.invariants.check_history", lambda key, session: None)
    one.run()
    bad.assert_failed("InternalError", "RuntimeError at PartWritten: bug")
    good.assert_success()


def test_what_a_session_asked_for_before_it_raised_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    one = world()
    monkeypatch.setattr("kvpoll_fsm.testing.invariants.check_history", lambda key, session: None)
    waiting = Transfer(one, 100, room=1)
    waiting.open_receiver()
    session = waiting.rx()

    def poisoned(self: Any, event: RevokeGrant) -> None:
        self._do(Grant(5, 1))
        raise RuntimeError("bug")

    monkeypatch.setitem(type(session)._handlers, RevokeGrant, poisoned)
    commands = None
    with pytest.raises(RuntimeError):
        session.feed(RevokeGrant())
    commands = session.feed(Crashed("bug"))
    assert commands[0] == Grant(5, 1)
    assert session.state is F


def test_a_crash_inside_a_crash_is_nobodys_room(monkeypatch: pytest.MonkeyPatch) -> None:
    one = transfer(100).open()

    def poisoned(self: Any, event: Any) -> None:
        raise RuntimeError("bug")

    monkeypatch.setitem(SenderSession._handlers, Crashed, poisoned)
    assert one.sender is not None
    with pytest.raises(RuntimeError):
        one.world.hosts[SENDER].core.feed(one.sender, Crashed("x"))


def test_a_grant_of_more_tokens_than_its_blocks_hold_is_a_protocol_error() -> None:
    one = transfer(500, 2, block_tokens=16, blocks=2).open(supply=False)
    victim = Transfer(one.world, 100, room=8, blocks=2).open()
    world = one.world
    run_until(world, lambda: any(isinstance(m, Reserve) and m.rank == 1 for m in messages_of(world, Reserve)))
    for at, delivery in enumerate(world.network):
        packet = delivery.packet
        if isinstance(packet, Frame) and delivery.source == "r1":
            lies = tuple(lie(message) for message in packet.messages)
            forged = Frame(packet.source, packet.target, packet.outgoing, packet.first_seq, packet.ack, lies)
            world.network[at] = type(delivery)(delivery.source, delivery.dest, delivery.origin, forged)
    world.run()
    assert one.tx.failure is not None
    assert one.tx.failure.code is FailureCode.ProtocolError
    assert one.tx.failure.detail == "a grant of 1000 tokens in 2 blocks of 16 for part 0"
    victim.assert_success()
    one.clear(), rest(world)
    end(world, victim)


def ids_of(one: Transfer) -> dict[str, int]:
    slot = one.tx.slots[0]
    generation = {"sender_generation": one.tx.room_key.generation, "receiver_generation": slot.generation}
    return {"room": one.room, "rank": 0} | generation


FORGED: dict[str, tuple[str, Any]] = {
    "an ack of another part": ("r0", lambda ids: messages.PartAck(part=9, **ids)),
    "an ack nobody asked for": ("r0", lambda ids: messages.PartAck(part=1, **ids)),
    "a resume at another token": ("r0", lambda ids: messages.Resume(sent_tokens=3, grant=FORGED_GRANT, **ids)),
    "opened again": (SENDER, lambda ids: Opened(required=2, **ids)),
    "opened for other ranks": (SENDER, lambda ids: Opened(required=1, **ids)),
    "a part at another token": (SENDER, lambda ids: forged_report(offset=3, **ids)),
    "a part of another number": (SENDER, lambda ids: forged_report(part=7, **ids)),
    "a last part that is not": (SENDER, lambda ids: forged_report(is_last=True, **ids)),
    "another total": (SENDER, lambda ids: forged_report(total_tokens=60, **ids)),
    "an outcome of nothing": (SENDER, lambda ids: messages.PartOutcome(part=1, is_last=False, state=T, **ids)),
}
FORGED_GRANT = messages.BlockGrant(1, 8, (0, 1), (("memory", b"t"),))


def forged_report(**fields: Any) -> messages.PartReport:
    right = {"part": 1, "offset": 8, "tokens": 8, "total_tokens": 20, "is_last": False, "transport": "memory"}
    return messages.PartReport(**(right | fields))


@pytest.mark.parametrize("what", FORGED)
def test_what_a_peer_must_not_say_ends_that_room_and_no_other(what: str) -> None:
    name, make = FORGED[what]
    one = transfer(20, 2, block_tokens=4, blocks=2).open()
    world = one.world
    other = Transfer(world, 20, 2, room=8, blocks=2).open()
    run_until(world, lambda: one.tx.state is T)
    say(world, name, make(ids_of(one)))
    rest(world)
    rank = 0
    one.assert_failed("ProtocolError", rank=rank)
    other.assert_success()
    end(world, one, other)


def lie(message: Any) -> Any:
    grant = getattr(message, "grant", None)
    if grant is None:
        return message
    more = messages.BlockGrant(grant.part, 1000, grant.blocks, grant.tokens_by_transport)
    ids = {name: getattr(message, name) for name in ("room", "rank", "sender_generation", "receiver_generation")}
    return Reserve(**ids, ranks=message.ranks, dummy=message.dummy, grant=more)


# Peers


def test_one_connection_to_each_address() -> None:
    one = world()
    core = one.hosts["r0"].core
    assert core.connect("a") == core.connect("a") != core.connect("b")


def test_hello_is_repeated_until_somebody_answers() -> None:
    one = World()
    one.add_host("r0", 8, BLOCK)
    key = one.open_receiver("r0", 7)
    for _ in range(3):
        one.tick("r0")
    assert [type(delivery.packet) for delivery in one.network] == [messages.Hello] * 4
    beats = 10
    for _ in range(beats):  # nobody is missed who was never there: the room's own deadline ends it
        one.tick("r0", heartbeat=True)
    assert one.session("r0", key).state is B
    one.add_host(SENDER, 8, BLOCK)
    one.run()
    assert len(one.hosts[SENDER].core.connections) == 1
    assert len(one.hosts[SENDER].core.parking) == 1


def test_layouts_that_differ_end_both_sides_with_the_difference() -> None:
    one = transfer(500)
    other = CoreOptions(b"other" + bytes(11), Layout(BLOCK, [Field("x", "int32"), Field("y", "int8")]), (), 8)
    one.world.hosts["r0"] = Host("r0", EndpointCore(other))
    one.open()
    one.world.run()
    one.assert_failed("LayoutMismatch", "x: ")
    assert one.tx.failure is not None
    assert "y: " in one.tx.failure.detail
    assert not one.tx.failure.retryable


def test_a_peer_that_is_silent_is_lost_and_one_that_beats_is_not() -> None:
    one = transfer(500).open(supply=False)
    one.world.run()
    for _ in range(20):
        beat(one.world)
    assert one.states() == [W, W]
    for _ in range(5):
        one.world.tick("r0", heartbeat=True)
        one.world.network.clear()
    assert one.rx().state is W
    one.world.tick("r0", heartbeat=True)
    failure = one.rx().failure
    assert failure is not None
    assert (failure.code, failure.detail) == (FailureCode.PeerLost, "the peer was not heard for 5 s")


def test_an_idle_connection_says_bye_and_comes_back_when_needed() -> None:
    one = transfer(500).open()
    one.world.run()
    end(one.world, one)
    for _ in range(40):
        beat(one.world)
    assert not one.world.hosts["r0"].core.connections
    assert not one.world.hosts[SENDER].core.connections
    again = Transfer(one.world, 500).open()
    one.world.run()
    again.assert_success()
    end(one.world, again)


@pytest.mark.parametrize("lost", ["bye", "silence"])
def test_a_connection_that_only_one_end_has_forgotten(lost: str) -> None:
    """The receiver comes back before the sender has missed it: its words must not be taken for old ones."""
    one = transfer(500).open()
    one.world.run()
    old = Transfer(one.world, 500, room=8)
    old.open(supply=False) if lost == "silence" else None
    one.world.run()
    end_of_first = one.clear()
    assert end_of_first is None
    one.world.run()
    core = one.world.hosts["r0"].core
    for _ in range(40 if lost == "bye" else 6):
        one.world.tick("r0", heartbeat=True)
        one.world.network.clear()
    assert not core.connections
    assert len(one.world.hosts[SENDER].core.connections) == 1
    again = Transfer(one.world, 500).open()
    rest(one.world)
    again.assert_success()
    beat(one.world, 7)
    assert len(one.world.hosts[SENDER].core.connections) == 1
    if lost == "silence":
        assert old.tx.failure is not None
        assert old.tx.failure.code is FailureCode.PeerLost
        old.clear()
    end(one.world, again)


def test_frames_of_a_connection_that_has_ended_go_nowhere() -> None:
    one = transfer(500).open(supply=False)
    one.world.run()
    one.world.hosts["r0"].core.end(1, "gone")
    one.world.settle(one.world.hosts["r0"])
    last_words, one.world.network = one.world.network, []
    one.world.run()
    before = one.rx().key()
    one.world.tick(SENDER, heartbeat=True)
    assert one.world.network
    one.world.run()
    assert one.rx().key() == before
    one.world.network = last_words
    one.world.run()
    one.assert_failed("PeerLost", "gone")  # the last words of the connection told the sender


def test_bye_ends_the_rooms_of_that_peer() -> None:
    one = transfer(500).open(supply=False)
    one.world.run()
    one.world.hosts[SENDER].core.say_bye()
    one.world.settle(one.world.hosts[SENDER])
    one.world.run()
    failure = one.rx().failure
    assert failure is not None
    assert (failure.code, failure.detail) == (FailureCode.PeerLost, "the peer said bye")


def test_who_ends_a_connection_says_so_in_case_it_is_heard() -> None:
    """A peer taken for lost learns at once what became of its rooms, and that it must come anew."""
    one = transfer(500).open(supply=False)
    one.world.run()
    for _ in range(6):
        one.world.tick(SENDER, heartbeat=True)
    assert one.tx.state is F
    one.world.run()
    one.assert_failed("PeerLost", "the peer was not heard for 5 s", rank=0)
    assert not one.world.hosts["r0"].core.connections
    end(one.world, one)


def test_nothing_after_a_bye_is_heard() -> None:
    """A connection that ended in the middle of a frame takes the rest of it along."""
    one = transfer(500)
    one.open_receiver()
    one.world.run()
    core = one.world.hosts[SENDER].core
    reserve = Reserve(room=50, rank=0, ranks=1, receiver_generation=9)
    withdraw_it = Withdraw(room=51, rank=0, part=0, receiver_generation=9)
    say(one.world, "r0", Bye(), reserve, withdraw_it)
    assert not core.connections
    assert len(core.parking) == 0
    assert not core.owes_ack


def test_frames_from_nowhere() -> None:
    core = world().hosts["r0"].core
    stray = Frame(bytes(16), core.options.incarnation, outgoing=True)
    assert core.frame(stray) is None
    core.stranger(99, messages.Stranger(bytes(16), bytes(16)))
    core.welcome(99, messages.Welcome(incarnation=bytes(16), min_version=1, max_version=1, answers=bytes(16)))
    core.end(99, "never there")
    assert core.drain() == []


def test_a_welcome_for_somebody_else_is_not_ours() -> None:
    one = world()
    core = one.hosts["r0"].core
    conn = core.connect("there")
    hello = next(effect.packet for effect in core.drain() if isinstance(effect, Transmit))
    assert isinstance(hello, messages.Hello)
    fields = {"min_version": 1, "max_version": 1, "fields": hello.fields}
    core.welcome(conn, messages.Welcome(incarnation=b"p" * 16, answers=bytes(16), **fields))
    assert core.connections[conn].peer is None
    core.welcome(conn, messages.Welcome(incarnation=b"p" * 16, answers=hello.incarnation, **fields))
    assert core.connections[conn].peer == b"p" * 16
    core.welcome(conn, messages.Welcome(incarnation=b"q" * 16, answers=hello.incarnation, **fields))
    assert conn not in core.connections
    assert Hangup(conn) in core.drain()


def overflowing(monkeypatch: pytest.MonkeyPatch, limit: int) -> World:
    def small(self: Channel, source: bytes, target: bytes | None, outgoing: bool, limit: int = limit) -> None:
        original(self, source, target, outgoing, limit)

    original = Channel.__init__
    monkeypatch.setattr(Channel, "__init__", small)
    return world()


def test_a_peer_that_takes_nothing_overflows_and_its_rooms_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    one = overflowing(monkeypatch, 6)
    keys = [one.open_receiver("r0", room, blocks=1) for room in range(6)]
    assert {one.session("r0", key).state for key in keys} == {B}
    last = one.open_receiver("r0", 99, blocks=1)
    assert last in one.hosts["r0"].core.sessions
    for key in (*keys, last):
        failure = one.session("r0", key).failure
        assert failure is not None
        assert failure.code is FailureCode.PeerLost
        assert "6 messages are waiting" in failure.detail
        one.clear("r0", key)
    rest(one)
    check_nothing_left(one)


def test_a_bye_that_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    one = overflowing(monkeypatch, 1)
    key = one.open_receiver("r0", 1, blocks=1)
    host = one.hosts["r0"]
    host.core.say_bye()
    assert not host.core.connections
    assert host.core.sessions[key].state is F


def test_heartbeats_of_many_rooms_are_cut_into_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpoll_fsm.peers.MAX_BEATS_PER_FRAME", 3)
    one = world()
    for room in range(8):
        one.open_receiver("r0", room, blocks=1)
    one.run()
    one.tick("r0", heartbeat=True)
    frames = [d.packet for d in one.network if isinstance(d.packet, Frame) and d.packet.beats]
    assert [len(frame.beats) for frame in frames] == [3, 3, 2]
    beats = list(itertools.chain.from_iterable(frame.beats for frame in frames))
    assert {(beat.to_sender, beat.gate, beat.host_alive) for beat in beats} == {(True, "waiting_ranks", True)}


def test_a_heartbeat_that_ends_one_connection_goes_on_with_the_others() -> None:
    """One host, two senders it waits for; both are silent."""
    one = world()
    core = one.hosts["r0"].core
    for address in ("a", "b"):
        conn = core.connect(address)
        core.connections[conn].channel.target = address.encode() * 16
    for _ in range(7):
        core.heartbeat_tick(host_alive=True)
    assert not core.connections


def test_two_endpoints_that_send_to_each_other() -> None:
    """Each has a connection of its own to the other."""
    a, b = (EndpointCore(CoreOptions(name * 16, Layout(4, [Field("x", "int8")]), (), 4)) for name in (b"a", b"b"))
    cores = {"a": a, "b": b}
    for core, peer in ((a, "b"), (b, "a")):
        conn = core.connect(peer)
        core.open_receiver(1, 0, ReceiverOptions(conn, 1, 0, 4, "drain"))
        core.open_sender(1, SenderOptions(1, Policy.parse("memory"), ("memory",), 4))
    for _ in range(5):
        for name, core in cores.items():
            other = cores["b" if name == "a" else "a"]
            core.flush(ack_now=True)
            for effect in core.drain():
                packet = effect.packet if isinstance(effect, Transmit) else None
                if isinstance(packet, messages.Hello):
                    other.hello(packet)
                elif isinstance(packet, messages.Welcome):
                    other.welcome(1, packet)
                elif isinstance(packet, Frame):
                    assert other.frame(packet) is not None
    for core in cores.values():
        assert len(core.connections) == 2
        states = {key.side: session.failure and session.failure.detail for key, session in core.sessions.items()}
        assert states["sender"] == "every rank is a dummy: there is nobody to send to"
        assert states["receiver"] == states["sender"]


# Copies


class Twins(EndpointCore):
    """Does everything twice: on itself, and on a copy made just before; compares what comes of it."""

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        return value if name not in ACTS or object.__getattribute__(self, "busy") else self.both(name)

    busy = False

    def both(self, name: str) -> Any:
        def act(*args: Any, **kwargs: Any) -> Any:
            self.busy = True
            copy, idle = EndpointCore.clone(self), EndpointCore.clone(self)
            before = self.key()
            assert idle.key() == copy.key() == before
            assert hash(before) == hash(copy.key())
            result = getattr(self, name)(*args, **kwargs)
            assert getattr(copy, name)(*args, **kwargs) == result
            assert copy.key() == self.key()
            assert list(copy._out.effects) == list(self._out.effects)
            assert idle.key() == before
            self.busy = False
            return result

        return act


ACTS = {
    "open_sender",
    "open_receiver",
    "feed",
    "clear",
    "drain",
    "connect",
    "hello",
    "welcome",
    "frame",
    "stranger",
    "end",
    "say_bye",
    "timer",
    "heartbeat_tick",
    "resend_tick",
    "flush",
}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("resume", ["drain", "extend"])
def test_a_copy_fed_the_same_does_the_same_and_shares_nothing(seed: int, resume: str) -> None:
    one, chance = World(checksums=True), random.Random(seed)
    for name in (SENDER, "r0", "r1"):
        host = one.add_host(name, 3, 4)
        host.core = Twins(host.core.options)
    rooms = [Transfer(one, 22, 2, room=room, blocks=2, resume=resume).open() for room in (2, 1)]
    for _ in range(150):
        roll = chance.random()
        if one.network and roll < 0.5:
            one.deliver(chance.randrange(len(one.network)), keep=roll < 0.05, lose=roll > 0.45)
        elif one.jobs and roll < 0.9:
            one.perform(chance.randrange(len(one.jobs)), ok=roll < 0.88)
        elif roll < 0.97:
            one.tick(chance.choice(list(one.hosts)), heartbeat=roll < 0.93)
        else:
            withdraw(one)
    rooms[0].abort("r0")
    rooms[1].fire(SENDER) if not rooms[1].tx.state.is_terminal else None
    for each in rooms:
        each.clear()
    rest(one)
    one.hosts[SENDER].core.say_bye()


def test_keys_tell_states_apart() -> None:
    one = transfer(2000, 2).open()
    seen = {}
    for at in itertools.count():
        key = tuple(host.core.key() for host in one.world.hosts.values())
        assert hash(key) == hash(key)
        seen[key] = at
        if not step(one.world):
            break
    assert len(seen) > 30


# Sending it all through the public surface


def test_the_counters_of_a_core() -> None:
    one = transfer(500).open()
    core = one.world.hosts["r0"].core
    assert core.unacked == 0  # the peer is not known yet
    while not core.connections[1].peer:
        one.world.deliver()
    assert core.unacked == 1
    one.world.run()
    assert (core.unacked, core.owes_ack) == (0, False)
    assert core.load().total == 8


def test_peers_forget_what_is_not_there() -> None:
    one = world()
    peers = one.hosts["r0"].core._peers
    assert isinstance(peers, Peers)
    peers.push(42, Bye())
    assert peers.owes_ack is False


def test_an_abort_of_a_key_that_is_gone_is_ignored() -> None:
    one = transfer(500).open()
    one.world.run()
    end(one.world, one)
    assert one.sender is not None
    one.world.feed(SENDER, one.sender, AbortRoom("late"))
    one.world.clear(SENDER, one.sender)
    check_nothing_left(one.world)


def test_opened_and_withdrawn_cross() -> None:
    """The sender uses the grant while the receiver asks it back: it is used."""
    one = world()
    late, early = Transfer(one, 500, room=9), Transfer(one, 500, room=3)
    late.open()
    run_until(one, lambda: bool(messages_of(one, Opened)))
    early.open_receiver()
    withdraw(one)
    assert messages_of(one, Withdraw)
    run_until(one, lambda: bool(messages_of(one, Withdrawn)))
    assert [message.ok for message in messages_of(one, Withdrawn)] == [False]
    early.open_sender()
    one.run()
    late.assert_success()
    early.assert_success()
    end(one, late, early)
