"""The endpoint core where blocks are short: rooms that wait, withdraw, drain, give up."""

from __future__ import annotations

import random

import pytest

from kvpoll_fsm.deadlines import Gate
from kvpoll_fsm.errors import FailureCode, KVPoll
from kvpoll_fsm.messages import Opened, Withdraw, Withdrawn
from kvpoll_fsm.testing.world import SENDER, World
from tests.worlds import BLOCK, Transfer, beat, end, messages_of, rest, run_until, step, withdraw, world

B, W, T, S, F = KVPoll.Bootstrapping, KVPoll.WaitingForInput, KVPoll.Transferring, KVPoll.Success, KVPoll.Failed


# Pools that are short


def test_a_room_waits_for_blocks_and_gets_them() -> None:
    one = world()
    first, second = Transfer(one, 2000, room=1), Transfer(one, 2000, room=2)
    first.open()
    second.open()
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
    first.open(supply=False)
    second.open()
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
    for each, rank in ((second, 0), (first, 1), (first, 0), (second, 1)):
        each.open_receiver(rank)
    return first, second


@pytest.mark.parametrize("resume", ["drain", "extend"])
def test_pain_17_pools_given_to_each_others_room_are_withdrawn(resume: str) -> None:
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
    first.open()
    second.open()
    one.run()
    withdraw(one)
    assert (None, "withdraw") not in one.hosts["r0"].timers
    end(one, first, second)


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
