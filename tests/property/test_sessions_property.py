"""Sessions in a world where anything happens in any order: what must hold always, and that everything ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from kvpoll_fsm.commands import StartPart
from kvpoll_fsm.errors import DuplicateRoom
from kvpoll_fsm.inputs import AbortRoom
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.session import RoomKey, Session
from kvpoll_fsm.testing.invariants import check_nothing_left
from kvpoll_fsm.testing.world import SENDER, World
from tests.worlds import Transfer, end, rest

# Without faults: every split


@st.composite
def transfers(draw: st.DrawFn) -> tuple[Transfer, list[int]]:
    """A transfer that is not open yet, and how much of its data is ready at each step."""
    tokens, ranks = draw(st.integers(1, 60)), draw(st.integers(1, 3))
    world = World(checksums=draw(st.booleans()))
    world.add_host(SENDER, draw(st.integers(1, 6)), draw(st.integers(1, 9)))
    blocks = draw(st.integers(1, 5))
    for rank in range(ranks):
        world.add_host(f"r{rank}", blocks + draw(st.integers(0, 9)), draw(st.integers(1, 9)))
    dummies = draw(st.sets(st.integers(0, ranks - 1), max_size=ranks - 1)) if ranks > 1 else set()
    steps = sorted({*draw(st.lists(st.integers(0, tokens), max_size=4)), tokens})
    resume = draw(st.sampled_from(["drain", "extend"]))
    most = 2 if resume == "drain" else 1
    windows = tuple(draw(st.lists(st.integers(1, most), min_size=ranks, max_size=ranks)))
    return Transfer(world, tokens, ranks, resume, tuple(sorted(dummies)), blocks, windows), steps


def expected_parts(one: Transfer, steps: list[int]) -> list[int]:
    """Lengths of the parts when each step of the source is moved before the next comes."""
    hosts = one.world.hosts
    granted = [one.blocks * hosts[f"r{r}"].block_tokens for r in range(one.ranks) if r not in one.dummies]
    capacity = min(*granted, hosts[SENDER].block_tokens * hosts[SENDER].core.options.blocks)
    parts: list[int] = []
    for ready in steps:
        while sum(parts) < ready:
            parts.append(min(capacity, ready - sum(parts)))
    return parts


@settings(max_examples=300)
@given(transfers(), st.booleans())
def test_every_split_arrives_in_the_expected_parts(made: tuple[Transfer, list[int]], sender_first: bool) -> None:
    one, steps = made
    one.open(sender_first=sender_first, supply=False)
    assert one.sender is not None
    for ready in steps:
        one.world.supply(one.sender, one.tokens, ready)
        one.world.run()
    one.assert_success()
    assert [part.tokens for part in one.tx.parts] == expected_parts(one, steps)
    assert [part.is_last for part in one.tx.parts] == [False] * (len(one.tx.parts) - 1) + [True]
    end(one.world, one)


# With every fault


@dataclass
class Room:
    """What the hosts want of one room, and the lives of it they have open."""

    number: int
    tokens: int
    blocks: int
    resume: str
    dummies: frozenset[int]
    window: int = 1
    open: dict[str, RoomKey] = field(default_factory=dict)


numbers = st.integers(0, 30)
MAKING_ROOM = [("drain", 1), ("drain", 2), ("extend", 1)]


class Sessions(RuleBasedStateMachine):
    """A sender, receivers, rooms, and every fault. Numbers choose among what is possible at that moment."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.ranks = 1
        self.rooms: list[Room] = []

    def begin(self, world: World, pools: list[tuple[int, int]], rooms: list[Room], ahead: int) -> None:
        """Start everybody, the receivers in the opposite order of rooms, and let some steps go well."""
        self.ranks, self.world, self.rooms = len(pools) - 1, world, rooms
        for name, (blocks, block_tokens) in zip([SENDER, *self.names], pools, strict=True):
            self.world.add_host(name, blocks, block_tokens)
        for room in self.rooms:
            self._open(room, SENDER)
        for room in reversed(self.rooms):
            for name in self.names:
                self._open(room, name)
        self._supply_all()
        self._run(ahead)

    @property
    def names(self) -> list[str]:
        return [f"r{rank}" for rank in range(self.ranks)]

    # Hosts

    @rule(at=numbers, who=numbers)
    def open_again(self, at: int, who: int) -> None:
        """A second opening is refused, one after clear() is not."""
        room, name = _pick(self.rooms, at), _pick([SENDER, *self.names], who)
        if name not in room.open:
            self._open(room, name)
            return
        try:
            self._open(room, name)
        except DuplicateRoom:
            return
        raise AssertionError("opened twice")

    @rule(at=numbers, ready=st.integers(0, 14))
    def supply(self, at: int, ready: int) -> None:
        room = _pick(self.rooms, at)
        if SENDER in room.open:
            self.world.supply(room.open[SENDER], room.tokens, min(ready, room.tokens))

    @rule(at=numbers, who=numbers)
    def abort(self, at: int, who: int) -> None:
        room, name = _pick(self.rooms, at), _pick([SENDER, *self.names], who)
        if name in room.open:
            self.world.feed(name, room.open[name], AbortRoom("given up"))

    @rule(at=numbers, who=numbers)
    def clear(self, at: int, who: int) -> None:
        room, name = _pick(self.rooms, at), _pick([SENDER, *self.names], who)
        if name in room.open:
            self.world.clear(name, room.open.pop(name))

    @rule(who=numbers)
    def restart(self, who: int) -> None:
        name = _pick([SENDER, *self.names], who)
        old = self.world.hosts[name].core.options
        self.world.add_host(name, old.blocks, old.layout.block_tokens)
        for room in self.rooms:
            room.open.pop(name, None)

    # Network

    @precondition(lambda self: self.world.network)
    @rule(at=numbers, what=st.sampled_from(["deliver", "deliver", "lose", "repeat"]))
    def packet(self, at: int, what: str) -> None:
        self.world.deliver(at % len(self.world.network), keep=what == "repeat", lose=what == "lose")

    @rule(steps=st.integers(1, 30))
    def run_ahead(self, steps: int) -> None:
        self._run(steps)

    # Work

    @precondition(lambda self: self.world.jobs)
    @rule(at=numbers, how=st.sampled_from(["well", "well", "badly", "late", "collateral", "late, collateral"]))
    def job(self, at: int, how: str) -> None:
        at %= len(self.world.jobs)
        writes = isinstance(self.world.jobs[at].command, StartPart)
        self.world.perform(at, ok=how == "well", loose=writes and "late" in how, collateral="collateral" in how)

    @precondition(lambda self: self.world.late)
    @rule(at=numbers, over=st.booleans())
    def late_write(self, at: int, over: bool) -> None:
        at %= len(self.world.late)
        self.world.land(at)
        if over:
            self.world.quiesce(at)

    # Time

    @rule(who=numbers, heartbeat=st.booleans(), host_alive=st.booleans())
    def tick(self, who: int, heartbeat: bool, host_alive: bool) -> None:
        self.world.tick(_pick([SENDER, *self.names], who), heartbeat=heartbeat, host_alive=host_alive)

    @rule(at=numbers, host_alive=st.booleans())
    def timer(self, at: int, host_alive: bool) -> None:
        timers = [(host.name, *timer) for host in self.world.hosts.values() for timer in host.timers]
        if timers:
            self.world.fire(*_pick(timers, at), host_alive=host_alive)

    @rule(steps=st.integers(0, 10))
    def withdraw(self, steps: int) -> None:
        """Everybody says where it stands, then the pools ask for unused grants."""
        for name in self.world.hosts:
            self.world.tick(name, heartbeat=True)
        self._run(steps)
        self._withdraw()

    # The end

    def teardown(self) -> None:
        if not self.rooms:
            return
        note(f"before healing: {self.world.gates()}")
        complete = all(self._is_complete(room) for room in self.rooms)
        self._supply_all()
        self._heal()
        note(f"healed: {self.world.gates()}")
        for room in self.rooms if complete else ():
            self._assert_no_deadline_needed(room)
        for host in self.world.hosts.values():
            for key, session in list(host.core.sessions.items()):
                if not session.state.is_terminal:
                    self.world.fire(host.name, key, "gate")
                if not session.state.is_terminal:  # the other side waits for blocks, and its host lives
                    assert session._kept_waiting(session.gate)
                    self.world.fire(host.name, key, "room")
                assert session.state.is_terminal
        self._finish()
        self._again()

    def _lives(self, room: Room) -> list[Session]:
        return [self.world.session(name, key) for name, key in room.open.items()]

    def _is_complete(self, room: Room) -> bool:
        """Every side is open, and none has ended."""
        return len(room.open) == 1 + self.ranks and not any(life.state.is_terminal for life in self._lives(room))

    def _assert_no_deadline_needed(self, room: Room) -> None:
        """Some side may be left alone by one that was lost; but none waits where all are there, or after Opened."""
        live = [life.state for life in self._lives(room) if not life.state.is_terminal]
        assert len(live) < 1 + self.ranks, self.world.gates()
        assert set(live) <= {KVPoll.Bootstrapping}, self.world.gates()

    def _finish(self) -> None:
        """Everything is cleared and quarantines end: nothing is left."""
        for room in self.rooms:
            for name, key in room.open.items():
                self.world.clear(name, key)
            room.open.clear()
        for _ in range(7):  # so that those who restarted are missed, and their reservations go
            self._tick()
        for host in self.world.hosts.values():
            for key, timer in list(host.timers):
                if timer == "quarantine":
                    self.world.fire(host.name, key, timer)
        rest(self.world)
        check_nothing_left(self.world)

    def _again(self) -> None:
        """After all that, the same rooms work."""
        for room in self.rooms:
            for name in (SENDER, *self.names):
                self._open(room, name)
        self._supply_all()
        self._heal()
        states = {self.world.session(name, key).state for room in self.rooms for name, key in room.open.items()}
        assert states == {KVPoll.Success}, self.world.gates()

    def _open(self, room: Room, name: str) -> None:
        if name == SENDER:
            room.open[name] = self.world.open_sender(room.number, self.ranks)
            return
        rank = int(name[1:])
        blocks = 0 if rank in room.dummies else room.blocks
        window = room.window if rank == 0 else 1
        shape = (room.number, rank, self.ranks, blocks, room.resume)
        room.open[name] = self.world.open_receiver(name, *shape, window=window)

    def _supply_all(self) -> None:
        for room in self.rooms:
            if SENDER in room.open:
                self.world.supply(room.open[SENDER], room.tokens)

    def _run(self, steps: int) -> None:
        for _ in range(steps):
            if self.world.network:
                self.world.deliver()
            elif self.world.jobs:
                self.world.perform()

    def _heal(self) -> None:
        """No more faults, and every tick of time short of a deadline, until all is over."""
        for _ in range(12):
            self._tick()
            if self._over():
                return

    def _tick(self) -> None:
        self.world.run()
        while self.world.late:
            self.world.quiesce()
        for name in self.world.hosts:
            self.world.tick(name)
            self.world.tick(name, heartbeat=True)
        self.world.run()
        self._withdraw()
        self.world.run()

    def _over(self) -> bool:
        """Nothing is on its way, nothing unacknowledged, no room live or waiting for quiescence."""
        cores = [host.core for host in self.world.hosts.values()]
        lives = [life for core in cores for life in core.sessions.values()]
        pending = self.world.network or self.world.jobs or self.world.late or any(core.unacked for core in cores)
        return not pending and all(life.quiescent for life in lives)

    def _withdraw(self) -> None:
        for host in self.world.hosts.values():
            if (None, "withdraw") in host.timers:
                self.world.fire(host.name, None, "withdraw")


def _pick(choices: list[Any], at: int) -> Any:
    return choices[at % len(choices)]


class RoomyMachine(Sessions):
    """Up to three ranks, up to two rooms, pools of all sizes."""

    @initialize(
        pools=st.lists(st.tuples(st.integers(2, 5), st.integers(1, 4)), min_size=2, max_size=4),
        rooms=st.lists(
            st.tuples(st.integers(1, 14), st.integers(1, 2), st.sampled_from(MAKING_ROOM), st.booleans()),
            min_size=1,
            max_size=2,
        ),
        checksums=st.booleans(),
        ahead=st.integers(0, 60),
    )
    def roomy(
        self,
        pools: list[tuple[int, int]],
        rooms: list[tuple[int, int, tuple[str, int], bool]],
        checksums: bool,
        ahead: int,
    ) -> None:
        last = len(pools) - 2
        dummies = [frozenset({last} if dummy and last else ()) for *_, dummy in rooms]
        made = [
            Room(n, tokens, blocks, resume, dummies[n - 1], window)
            for n, (tokens, blocks, (resume, window), _) in enumerate(rooms, 1)
        ]
        self.begin(World(checksums=checksums), pools, made, ahead)


class CrowdedMachine(Sessions):
    """Two rooms that each want all the blocks of each of two pools, some a part at a time, and two transports."""

    @initialize(resume=st.lists(st.sampled_from(MAKING_ROOM), min_size=2, max_size=2), ahead=st.integers(0, 40))
    def crowded(self, resume: list[tuple[str, int]], ahead: int) -> None:
        rooms = [Room(n, 5, 2 // window, how, frozenset(), window) for n, (how, window) in enumerate(resume, 1)]
        self.begin(World(transports=("a", "b")), [(2, 1)] * 3, rooms, ahead)
        self.world.network.reverse()


SHRINKING_S = 400
"""A failure is shrunk for up to five minutes; without one a test takes seconds."""


def run_machine(machine: Callable[[], RuleBasedStateMachine]) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=250, stateful_step_count=40))


@pytest.mark.timeout(SHRINKING_S)
def test_rooms_with_every_fault() -> None:
    run_machine(RoomyMachine)


@pytest.mark.timeout(SHRINKING_S)
def test_crowded_rooms_with_every_fault() -> None:
    run_machine(CrowdedMachine)
