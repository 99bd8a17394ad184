"""One fault at every step of a small transfer: aborts, deadlines, clears, restarts, dead hosts, failed work.

A run is repeated once for each of its steps, with the fault there. The world checks its invariants all the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from kvpoll_fsm.commands import Fence, StartPart
from kvpoll_fsm.deadlines import Gate
from kvpoll_fsm.errors import FailureCode
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.testing.world import SENDER, World
from tests.worlds import Transfer, end, rest, step, transfer

BLOCK, TOKENS = 4, 22
"""Blocks of 4 tokens, grants of 2 blocks: parts of 8, 8 and 6 tokens."""


def small(ranks: int, resume: str = "drain", *, sender_first: bool = True, **more: object) -> Transfer:
    one = transfer(TOKENS, ranks, block_tokens=BLOCK, blocks=2, resume=resume, **more)
    return one.open(sender_first=sender_first)


def every_step(make: Callable[[], Transfer]) -> Iterator[Transfer]:
    """The transfer after 0, 1, 2, ... steps, each time made anew."""
    at = 0
    while True:
        one = make()
        if sum(step(one.world) for _ in range(at)) < at:
            return
        yield one
        at += 1


def cases(*resumes: str) -> pytest.MarkDecorator:
    sides = [(1, SENDER), (1, "r0"), (2, SENDER), (2, "r0"), (2, "r1")]
    return pytest.mark.parametrize(("ranks", "side", "resume"), [(*side, how) for side in sides for how in resumes])


def generation(world: World) -> None:
    """What is on its way now arrives."""
    for _ in range(len(world.network)):
        world.deliver()


def restart(world: World, name: str) -> None:
    old = world.hosts[name].core.options
    world.add_host(name, old.blocks, old.layout.block_tokens)


def beats(world: World, ticks: int = 8) -> None:
    """Heartbeats everywhere, and what comes of them."""
    for _ in range(ticks):
        for name in list(world.hosts):
            world.tick(name, heartbeat=True)
            world.tick(name)
        world.run()


def fenced(world: World) -> None:
    """Time passes until every quarantine has ended by force."""
    rest(world)
    for host in list(world.hosts.values()):
        for key, timer in list(host.timers):
            if timer == "quarantine":
                world.fire(host.name, key, timer)
    rest(world)


def works_again(one: Transfer) -> None:
    """The same room, opened again everywhere, succeeds and leaves nothing."""
    again = Transfer(one.world, TOKENS, one.ranks, one.resume, blocks=2)
    again.open()
    rest(one.world)
    again.assert_success()
    end(one.world, again)


# The hosts


@cases("drain", "extend")
def test_pain_02_abort_at_every_step(ranks: int, side: str, resume: str) -> None:
    for one in every_step(lambda: small(ranks, resume)):
        before = one.states()
        one.abort(side, "enough of it")
        if one.side(side).state is KVPoll.Success:
            continue
        knows_all = all(rank in one.tx.slots for rank in range(ranks))
        for _ in range(2 if knows_all else 4):
            generation(one.world)
        if knows_all or side != SENDER:  # a receiver the sender never heard of is parked for the next opening
            assert one.tx.state.is_terminal, one.world.gates()
            told = [one.rx(rank) for rank in one.receivers if rank in one.tx.slots]
            assert all(session.state.is_terminal for session in told), one.world.gates()
        for was, failure in zip(before, one.failures(), strict=True):
            if failure is not None and not was.is_terminal:
                assert (failure.code, failure.detail) == (FailureCode.Aborted, "enough of it")
                assert failure.rank == (None if side == SENDER else int(side[1:]))
        one.clear()
        fenced(one.world)
        end(one.world)
        works_again(one)


@cases("drain")
def test_clear_at_every_step(ranks: int, side: str, resume: str) -> None:
    for one in every_step(lambda: small(ranks, resume)):
        host, key = one.sides[side]
        one.world.clear(host, key)
        fenced(one.world)
        one.clear()
        end(one.world)
        works_again(one)


@cases("drain", "extend")
def test_pain_08_the_deadline_of_the_gate_at_every_step(ranks: int, side: str, resume: str) -> None:
    gates = set()
    for one in every_step(lambda: small(ranks, resume)):
        session = one.side(side)
        if session.state.is_terminal:
            continue
        gate = session.gate
        gates.add((session.state, gate))
        one.fire(side)
        assert session.failure is not None
        expected = FailureCode.PoolExhausted if gate is Gate.waiting_blocks else FailureCode.DeadlinePassed
        assert session.failure.code is expected
        assert session.failure.detail.startswith(f"{gate} for ")
        assert session.failure.retryable
        one.clear()
        fenced(one.world)
        end(one.world)
    assert len(gates) >= 4, gates


@cases("drain")
def test_the_deadline_of_the_room_at_every_step(ranks: int, side: str, resume: str) -> None:
    for one in every_step(lambda: small(ranks, resume)):
        if not one.side(side).state.is_terminal:
            one.fire(side, "room", host_alive=True)
            failure = one.side(side).failure
            assert failure is not None
            assert (failure.code, failure.detail) == (FailureCode.DeadlinePassed, "the room outlived 1800 s")
        one.clear()
        fenced(one.world)
        end(one.world)


# The machines


@cases("drain", "extend")
def test_a_restart_at_every_step(ranks: int, side: str, resume: str) -> None:
    """The old room fails for everybody it concerned, and the next room of that number works."""
    for one in every_step(lambda: small(ranks, resume)):
        lives = {name: one.side(name) for name in one.sides if name != side}
        before = {name: life.state for name, life in lives.items()}
        met = {name: knows(one.world, name) for name in lives}
        restart(one.world, side)
        beats(one.world)
        for name, life in lives.items():
            if before[name].is_terminal:
                assert life.state is before[name]
            elif met[name] if side == SENDER else before[SENDER] is not KVPoll.Bootstrapping:
                assert life.state.is_terminal  # the last word may have been on its way
                allowed = (FailureCode.PeerLost, FailureCode.OutcomeUnknown)
                assert life.failure is None or life.failure.code in allowed
        one.clear()
        fenced(one.world)
        beats(one.world)
        one.world.late.clear()
        end(one.world)
        works_again(one)


def knows(world: World, name: str) -> bool:
    """Whether a host has heard of any peer."""
    return any(connection.peer is not None for connection in world.hosts[name].core.connections.values())


@cases("drain", "extend")
def test_a_host_is_gone_at_every_step(ranks: int, side: str, resume: str) -> None:
    codes = set()
    for one in every_step(lambda: small(ranks, resume)):
        lives = {name: one.side(name) for name in one.sides}
        before = one.side(side).state
        one.world.drop_host(side)
        beats(one.world)
        while one.world.late:  # what it was writing lands before anybody could know better
            one.world.land()
            one.world.quiesce()
        survivors = [life for name, life in lives.items() if name != side]
        codes |= {life.failure.code for life in survivors if life.failure is not None}
        for life in survivors:
            assert life.state.is_terminal or KVPoll.Bootstrapping in (before, life.state), one.world.gates()
        one.clear()
        fenced(one.world)
        assert all(not host.core.sessions for host in one.world.hosts.values())
        assert all(not host.core.accounts.leases() for host in one.world.hosts.values())
    assert codes == {FailureCode.PeerLost} | ({FailureCode.OutcomeUnknown} if side == SENDER else set())


def test_the_sender_is_gone_after_the_last_ack() -> None:
    """Success there, but nobody here can know: OutcomeUnknown, which may be tried again."""
    one = small(1)
    while one.tx.state is not KVPoll.Success:
        step(one.world)
    one.world.network.clear()
    one.world.drop_host(SENDER)
    beats(one.world)
    failure = one.rx().failure
    assert failure is not None
    assert (failure.code, failure.retryable) == (FailureCode.OutcomeUnknown, True)
    assert one.rx().history[-1] is KVPoll.Failed


# Work that fails


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("resume", ["drain", "extend"])
@pytest.mark.parametrize("loose", [False, True])
def test_each_job_fails_in_turn(ranks: int, resume: str, loose: bool) -> None:
    victim = 0
    while True:
        one = small(ranks, resume, checksums=True)
        done = _run_but(one.world, victim, loose)
        if not done:
            break
        victim += 1
        assert set(one.states()) == {KVPoll.Failed}, one.world.gates()
        assert len({failure and failure.detail for failure in one.failures()}) == 1
        while one.world.late:
            one.world.land()
            assert any(host.core.load().quarantined or host.fenced for host in one.world.hosts.values())
            one.world.quiesce()
        one.clear()
        fenced(one.world)
        end(one.world)
        works_again(one)
    assert victim >= 6 * ranks


def _run_but(world: World, victim: int, loose: bool) -> bool:
    """Run, job number `victim` failing; False if there was no such job."""
    performed = 0
    while world.network or world.jobs:
        if world.network:
            world.deliver()
            continue
        hit, writes = performed == victim, isinstance(world.jobs[0].command, StartPart)
        performed += not isinstance(world.jobs[0].command, Fence)
        world.perform(ok=not hit, loose=hit and loose and writes)
    rest_of_acks(world)
    return performed > victim


def rest_of_acks(world: World) -> None:
    for name in world.hosts:
        world.tick(name)
    while world.network:
        world.deliver()


def test_the_third_of_four_ranks_finds_wrong_bytes() -> None:
    one = small(4, checksums=True)
    while not any(job.host == "r2" for job in one.world.jobs):
        step(one.world)
    at = next(n for n, job in enumerate(one.world.jobs) if job.host == "r2")
    one.world.perform(at, ok=False)
    one.world.run()
    one.assert_failed("ChecksumMismatch", "the bytes differ", rank=2)
    end(one.world, one)


def test_a_failed_write_is_tried_again_on_the_next_transport() -> None:
    one = small(2, transports=("fast", "slow"))
    failed = 0
    while True:
        writes = [n for n, job in enumerate(one.world.jobs) if isinstance(job.command, StartPart)]
        broken = [
            n for n in writes if one.world.jobs[n].target.transport == "fast" and one.world.jobs[n].host == SENDER
        ]
        broken = [n for n in broken if one.world.jobs[n].target.rank == 1]
        if broken:
            one.world.perform(broken[0], ok=False)
            failed += 1
        elif not step(one.world):
            break
    assert failed == 1  # rank 1 stays with what works
    one.assert_success()
    assert {part.transport for part in one.tx.parts} == {"fast,slow"}
    assert {part.transport for part in one.rx(1).parts} == {"slow"}
    end(one.world, one)


def test_the_second_transport_waits_until_the_first_can_land_no_more() -> None:
    one = small(1, transports=("fast", "slow"))
    while not any(isinstance(job.command, StartPart) for job in one.world.jobs):
        step(one.world)
    one.world.perform(ok=False, loose=True)
    one.world.run()
    assert one.tx.gate is Gate.moving
    one.world.land()  # into the blocks of its own part, which nobody has written again yet
    assert not [job for job in one.world.jobs if isinstance(job.command, StartPart)]
    one.world.quiesce()
    one.world.run()
    one.assert_success()
    end(one.world, one)


def test_no_transport_is_left() -> None:
    one = small(1, transports=("fast", "slow"))
    while one.world.network or one.world.jobs:
        if one.world.network:
            one.world.deliver()
        else:
            one.world.perform(ok=not isinstance(one.world.jobs[0].command, StartPart))
    one.assert_failed("TransportFailed", "slow to rank 0: the write failed")
    end(one.world, one)


def test_no_transport_is_reachable() -> None:
    one = small(2, transports=("fast", "slow"))
    while one.world.network or one.world.jobs:
        if one.world.network:
            one.world.deliver()
        else:
            one.world.perform(ok=False)
    one.assert_failed("TransportUnavailable", "no common transport works")
    end(one.world, one)


def test_a_fence_that_costs_others_waits_for_the_writer_then_is_forced() -> None:
    one = small(1)
    while not any(isinstance(job.command, StartPart) for job in one.world.jobs):
        step(one.world)
    one.world.perform(ok=False, loose=True)
    while one.world.network:
        one.world.deliver()
    host = one.world.hosts["r0"]
    assert isinstance(one.world.jobs[0].command, Fence)
    one.world.perform(ok=False)
    assert host.core.load().quarantined == 2
    one.clear()
    rest_of_acks(one.world)
    one.world.land()
    assert host.core.load().quarantined == 2
    one.fire("r0", "quarantine")
    assert one.world.jobs[-1].command == Fence(0, force=True)
    one.world.run()
    assert host.core.load().free == 8
    one.world.land()  # nothing happens
    one.world.quiesce()
    end(one.world)
