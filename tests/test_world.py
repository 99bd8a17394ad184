"""Whole transfers through production cores in a `World`, without faults and with lost or repeated packets."""

from __future__ import annotations

import pytest

from kvpoll_fsm.commands import CopyOut, Fence, StartPart
from kvpoll_fsm.errors import FailureCode
from kvpoll_fsm.inputs import ReleasePart, ResumeWith
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.session import RoomKey
from kvpoll_fsm.testing.invariants import check, check_nothing_left
from kvpoll_fsm.testing.world import SENDER, World
from tests.worlds import BLOCK, BLOCKS, CAPACITY, Transfer, end, rest, run_until, step, transfer

SIZES = {1: 1, 127: 1, 128: 1, 500: 1, 1023: 1, 1024: 1, 1025: 2, 2000: 2, 2048: 2, 5000: 5}
"""Parts over a grant of 1,024 tokens, by tokens of the room."""
STATES = {
    1: (KVPoll.Bootstrapping, KVPoll.WaitingForInput, KVPoll.Success),
    2: (KVPoll.Bootstrapping, KVPoll.WaitingForInput, KVPoll.Transferring, KVPoll.Success),
}


def assert_parts(one: Transfer, parts: int) -> None:
    """Both sides saw these parts, in order, only the last of them `is_last`; history has no repetition."""
    seen = [one.tx, *(one.rx(rank) for rank in range(one.ranks) if rank not in one.dummies)]
    for session in seen:
        assert [part.part for part in session.parts] == list(range(parts))
        assert [part.is_last for part in session.parts] == [False] * (parts - 1) + [True]
        assert [part.offset for part in session.parts] == [n * CAPACITY for n in range(parts)]
        assert sum(part.tokens for part in session.parts) == one.tokens
        assert session.history == STATES[min(parts, 2)]


# Without faults


@pytest.mark.parametrize("sender_first", [True, False])
@pytest.mark.parametrize("resume", ["drain", "extend"])
@pytest.mark.parametrize(("tokens", "parts"), SIZES.items())
def test_every_size(tokens: int, parts: int, resume: str, sender_first: bool) -> None:
    one = transfer(tokens, resume=resume).open(sender_first=sender_first)
    one.world.run()
    one.assert_success()
    assert_parts(one, parts)
    end(one.world, one)


@pytest.mark.parametrize("required", [None, "given"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("tokens", [500, 2000])
def test_every_number_of_ranks(tokens: int, ranks: int, required: str | None) -> None:
    one = transfer(tokens, ranks, required=ranks if required else None).open()
    one.world.run()
    one.assert_success()
    assert one.tx.required == ranks
    assert_parts(one, SIZES[tokens])
    end(one.world, one)


@pytest.mark.parametrize("dummy", range(4))
@pytest.mark.parametrize("tokens", [500, 2000])
def test_pain_16_one_dummy_among_four_that_come_one_after_another(tokens: int, dummy: int) -> None:
    one = transfer(tokens, 4, dummies=(dummy,), required=4)
    one.open_sender()
    for rank in (2, 0, 3, 1):
        assert one.tx.state is KVPoll.Bootstrapping
        one.open_receiver(rank)
        one.world.run()
    one.assert_success()
    assert_parts(one, SIZES[tokens])
    assert [part.is_last for part in one.rx(dummy).parts] == [False] * (SIZES[tokens] - 1) + [True]
    end(one.world, one)


def test_pain_16_the_barrier_of_a_resume_waits_for_the_last_rank() -> None:
    one = transfer(2000, 4, dummies=(1,)).open()
    world = one.world
    run_until(world, lambda: one.tx.state is KVPoll.Transferring)
    held_back = []
    while True:  # everything but what rank 3 says
        held_back += [packet for packet in world.network if packet.source == "r3"]
        world.network = [packet for packet in world.network if packet.source != "r3"]
        if not step(world):
            break
    assert one.tx.history[-1] is KVPoll.Transferring
    assert str(one.tx.gate) == "waiting_resume"
    assert one.tx.part == 1
    world.network += held_back
    rest(world)
    one.assert_success()
    end(world, one)


@pytest.mark.parametrize(("ours", "theirs"), [(64, 128), (128, 64), (128, 16), (1, 7), (7, 3), (100, 128)])
@pytest.mark.parametrize("resume", ["drain", "extend"])
def test_different_block_sizes(ours: int, theirs: int, resume: str) -> None:
    one = transfer(700, block_tokens=ours, rx_block_tokens=theirs, resume=resume, blocks=3).open()
    one.world.run()
    one.assert_success()
    capacity = min(3 * theirs, BLOCKS * ours)
    assert [part.tokens for part in one.tx.parts[:-1]] == [capacity] * (len(one.tx.parts) - 1)
    assert len(one.tx.parts) == -(-700 // capacity)
    end(one.world, one)


def test_ranks_of_different_capacity_move_the_same_ranges() -> None:
    world = World()
    world.add_host(SENDER, 8, 128)
    for rank, (blocks, block_tokens) in enumerate([(8, 128), (2, 100), (5, 64)]):
        world.add_host(f"r{rank}", blocks, block_tokens)
    sender = world.open_sender(3)
    world.supply(sender, 1000)
    keys = [world.open_receiver(f"r{rank}", 3, rank, 3, blocks=blocks) for rank, blocks in enumerate([8, 2, 5])]
    world.run()
    ranges = [[(part.offset, part.tokens) for part in world.session(f"r{r}", key).parts] for r, key in enumerate(keys)]
    assert ranges == [[(at, 200) for at in range(0, 1000, 200)]] * 3
    world.clear(SENDER, sender)
    for rank, key in enumerate(keys):
        assert world.received(f"r{rank}", key) == [(3, token) for token in range(1000)]
        world.clear(f"r{rank}", key)
    rest(world)
    check_nothing_left(world)


@pytest.mark.parametrize("staged", [True, False])
def test_the_source_grows_in_steps(staged: bool) -> None:
    """Chunked prefill: parts end where the data ends, and `is_last` comes from the total alone."""
    one = transfer(2000, ranks=2).open(supply=False)
    world, steps = one.world, [0, 100, 1024, 1900, 2000]
    for ready in steps:
        assert one.sender is not None
        world.supply(one.sender, 2000, ready, staged=staged)
        world.run()
        assert one.tx.ledger.covered_tokens == ready
    one.assert_success()
    assert [part.tokens for part in one.tx.parts] == [100, 924, 876, 100]
    assert [part.is_last for part in one.tx.parts] == [False, False, False, True]
    end(world, one)


def test_data_supplied_in_the_middle_of_a_part_goes_into_the_next() -> None:
    one = transfer(2000).open(supply=False)
    assert one.sender is not None
    one.world.supply(one.sender, 2000, 300)
    run_until(one.world, lambda: any(isinstance(job.command, StartPart) for job in one.world.jobs))
    one.world.supply(one.sender, 2000)
    one.world.run()
    assert [part.tokens for part in one.tx.parts] == [300, 1024, 676]
    one.assert_success()


def test_extend_takes_fresh_blocks_as_long_as_there_are_some_then_drains() -> None:
    world = World()
    world.add_host(SENDER, 8, 128)
    world.add_host("r0", 5, 128)
    one = Transfer(world, 1200, blocks=2, resume="extend").open()
    world.run()
    one.assert_success()
    first, second, third, *_ = one.rx().parts
    assert set(first.blocks).isdisjoint(second.blocks)
    assert set(third.blocks) <= set(range(5))
    assert len(one.rx().parts) == 5
    end(world, one)


def test_pain_17_extend_without_any_free_block_drains_instead_of_holding_and_waiting() -> None:
    one = transfer(3000, blocks=BLOCKS, resume="extend").open()
    copies: list[tuple[int, ...]] = []
    while step(one.world):
        copies += [tuple(h.part for h in j.command.parts) for j in one.world.jobs if isinstance(j.command, CopyOut)]
    one.assert_success()
    assert list(dict.fromkeys(copies)) == [(0,), (1,), (2,)]
    end(one.world, one)


def test_two_rooms_that_extend_in_one_pool_do_not_block_each_other() -> None:
    world = World()
    world.add_host(SENDER, 8, 128)
    world.add_host("r0", 8, 128)
    rooms = [Transfer(world, 3000, blocks=4, resume="extend", room=room).open() for room in (2, 1)]
    world.run()
    while world.hosts["r0"].timers.get((None, "withdraw")) and world.hosts["r0"].core.load().queued:
        for name in world.hosts:
            world.tick(name, heartbeat=True)
        world.fire("r0", None, "withdraw")
        world.run()
    for one in rooms:
        one.assert_success()
    end(world, *rooms)


def test_manual_the_engine_grants_reads_and_releases_its_own_blocks() -> None:
    world = World()
    world.add_host(SENDER, 8, 128)
    host = world.add_host("r0", 6, 128, managed=False)
    sender = world.open_sender(9)
    world.supply(sender, 600)
    key = world.open_receiver("r0", 9, exact=(5, 0), resume="manual")
    session = world.session("r0", key)
    world.run()
    assert session.state is KVPoll.Transferring
    assert str(session.gate) == "waiting_resume"
    world.feed("r0", key, ResumeWith((3, 1)))
    world.run()
    world.feed("r0", key, ReleasePart(0))
    world.feed("r0", key, ReleasePart(0))  # once more changes nothing
    world.feed("r0", key, ResumeWith((0,)))
    world.run()
    assert session.state is KVPoll.Success
    assert [(part.blocks, part.tokens) for part in session.parts] == [((5, 0), 256), ((3, 1), 256), ((0,), 88)]
    lies = [host.memory[slot] for part in session.parts[1:] for slot in host.slots(part.blocks, part.tokens)]
    assert [(cell.room, cell.token) for cell in lies] == [(9, token) for token in range(256, 600)]
    assert world.hosts["r0"].core.load().leased == 3
    world.clear("r0", key)
    world.clear(SENDER, sender)
    rest(world)
    check_nothing_left(world)


def test_many_rooms_at_once_through_small_pools() -> None:
    world = World()
    world.add_host(SENDER, 4, 16)
    for rank in range(2):
        world.add_host(f"r{rank}", 6, 16)
    rooms = [
        Transfer(world, 100 + room, 2, blocks=1 + room % 3, room=room, resume=("drain", "extend")[room % 2])
        for room in range(12)
    ]
    for at, one in enumerate(rooms):
        one.open(sender_first=at % 2 == 0)
    world.run()
    for _ in range(100):
        for name in world.hosts:
            world.tick(name, heartbeat=True)
            if (None, "withdraw") in world.hosts[name].timers:
                world.fire(name, None, "withdraw")
        world.run()
        if all(state.is_terminal for one in rooms for state in one.states()):
            break
    for one in rooms:
        one.assert_success()
    end(world, *rooms)


def test_the_same_number_again_after_clear() -> None:
    one = transfer(500)
    for _ in range(3):
        one.open()
        one.world.run()
        one.assert_success()
        end(one.world, one)


# Lost and repeated packets


class Counting(World):
    """Numbers packets as they are delivered, and loses or repeats one of them."""

    def __init__(self, fault: str, victim: int) -> None:
        super().__init__(checksums=True)
        self.fault = fault
        self.victim = victim
        self.seen = 0

    def deliver(self, at: int = 0, *, keep: bool = False, lose: bool = False) -> None:
        number, self.seen = self.seen, self.seen + 1
        hit = number == self.victim
        super().deliver(at, keep=hit and self.fault == "repeat", lose=hit and self.fault == "lose")


def run_2000(fault: str, victim: int, ranks: int) -> Transfer:
    world = Counting(fault, victim)
    world.add_host(SENDER, BLOCKS, BLOCK)
    for rank in range(ranks):
        world.add_host(f"r{rank}", BLOCKS, BLOCK)
    one = Transfer(world, 2000, ranks).open()
    for _ in range(20):
        world.run()
        if all(state.is_terminal for state in one.states()):
            break
        for name in world.hosts:
            world.tick(name)
    return one


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("fault", ["lose", "repeat"])
def test_pain_07_each_packet_lost_or_repeated_in_turn(fault: str, ranks: int) -> None:
    clean = run_2000(fault, -1, ranks)
    assert isinstance(clean.world, Counting)
    for victim in range(clean.world.seen):
        one = run_2000(fault, victim, ranks)
        assert isinstance(one.world, Counting)
        assert one.world.seen > victim
        one.assert_success()
        assert_parts(one, 2)
        end(one.world, one)


def test_every_packet_twice() -> None:
    one = transfer(2000, 2).open()
    world = one.world
    while world.network or world.jobs:
        if world.network:
            world.deliver(keep=True)
            world.deliver()
        else:
            world.perform()
    one.assert_success()
    end(world, one)


def test_every_packet_in_reverse_order() -> None:
    one = transfer(2000, 2).open()
    world = one.world
    for _ in range(200):
        while world.network or world.jobs:
            if world.network:
                world.deliver(len(world.network) - 1)
            else:
                world.perform(len(world.jobs) - 1)
        if all(state.is_terminal for state in one.states()):
            break
        for name in world.hosts:
            world.tick(name)
    one.assert_success()
    end(world, one)


# The world itself notices what must not happen


def writing(**more: object) -> Transfer:
    """A transfer whose first write is about to be performed."""
    one = transfer(500, **more).open()
    run_until(one.world, lambda: any(isinstance(job.command, StartPart) for job in one.world.jobs))
    return one


def test_the_world_notices_a_write_into_blocks_that_were_given_away() -> None:
    one = writing()
    host = one.world.hosts["r0"]
    for lease in host.core.accounts.leases():
        host.core.accounts.release(lease)
    with pytest.raises(AssertionError, match="is written, but"):
        one.world.perform()


def test_the_world_notices_a_source_that_was_given_away() -> None:
    one = writing()
    accounts = one.world.hosts[SENDER].core.accounts
    for lease in accounts.leases():
        accounts.release(lease)
    with pytest.raises(AssertionError, match="is read, but"):
        one.world.perform()


def test_the_world_notices_wrong_bytes() -> None:
    one = writing()
    host = one.world.hosts[SENDER]
    host.memory = dict.fromkeys(host.memory, "wrong")
    with pytest.raises(AssertionError, match="wrong bytes"):
        one.world.run()


def test_the_world_notices_a_committed_part_that_changes() -> None:
    one = transfer(2000, resume="extend", blocks=4)
    one.open()
    run_until(one.world, lambda: bool(one.rx().held_parts))
    host = one.world.hosts["r0"]
    check(one.world, host)
    block = one.rx().held_parts[0].blocks[0]
    host.memory[block, 1] = host.memory[block, 0]
    with pytest.raises(AssertionError, match="holds wrong bytes in part"):
        check(one.world, host)


def test_the_world_notices_a_missing_timer() -> None:
    one = writing()
    assert one.sender is not None
    del one.world.hosts[SENDER].timers[one.sender, "gate"]
    with pytest.raises(AssertionError, match="has timers"):
        check(one.world, one.world.hosts[SENDER])


def test_a_late_write_lands_until_it_is_fenced() -> None:
    one = writing()
    one.world.perform(ok=False, loose=True)
    one.world.land()
    host = one.world.hosts["r0"]
    assert ("late", 0) in host.memory.values()
    host.memory.clear()
    run_until(one.world, lambda: any(isinstance(job.command, Fence) for job in one.world.jobs))
    one.world.land()
    assert ("late", 0) in host.memory.values()
    host.memory.clear()
    at = next(n for n, job in enumerate(one.world.jobs) if isinstance(job.command, Fence))
    one.world.perform(at)
    one.world.land()
    assert not host.memory
    one.assert_failed(FailureCode.TransportFailed)
    end(one.world, one)


def test_a_wrong_checksum_fails_the_room() -> None:
    for resume in ("drain", "extend"):
        one = writing(checksums=True, resume=resume)
        host = one.world.hosts[SENDER]
        host.memory = dict.fromkeys(host.memory, "wrong")
        one.world.run()
        one.assert_failed(FailureCode.ChecksumMismatch, rank=0)
        end(one.world, one)


def test_gates_say_where_rooms_stand() -> None:
    one = writing()
    while one.world.network:
        one.world.deliver()
    assert one.world.gates() == ["sender:sender/7/0 WaitingForInput moving", "r0:receiver/7/0 WaitingForInput queued"]
    one.abort(SENDER, "enough")
    assert one.world.gates()[0].endswith("Failed closed Aborted on sender in WaitingForInput (not retryable): enough")


def test_a_host_that_is_gone_takes_its_work_with_it() -> None:
    one = writing()
    one.world.drop_host(SENDER)
    assert not one.world.jobs
    assert [late.job.key for late in one.world.late] == [RoomKey("sender", 7, 0, 1)]
    one.world.drop_host(SENDER)  # once more changes nothing
