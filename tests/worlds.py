"""What the tests of sessions and core share: transfers in a `World`, run to some point, and their end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvpoll_fsm.errors import Failure
from kvpoll_fsm.inputs import AbortRoom
from kvpoll_fsm.messages import Frame, Message
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.receiver_session import ReceiverSession
from kvpoll_fsm.sender_session import SenderSession
from kvpoll_fsm.session import RoomKey
from kvpoll_fsm.testing.invariants import check_nothing_left
from kvpoll_fsm.testing.world import SENDER, World

ROOM = 7
BLOCK = 128
BLOCKS = 8
CAPACITY = BLOCK * BLOCKS
"""Tokens of the default grant: 1,024."""


@dataclass
class Transfer:
    """One room in a world: the sender's side, and a receiver rank on each of the hosts r0, r1, ..."""

    world: World
    tokens: int
    ranks: int = 1
    resume: str = "drain"
    dummies: tuple[int, ...] = ()
    blocks: int = BLOCKS
    windows: tuple[int, ...] = ()
    room: int = ROOM
    required: int | None = None
    sender: RoomKey | None = None
    receivers: dict[int, RoomKey] = field(default_factory=dict)

    def open_sender(self, *, supply: bool = True) -> None:
        self.sender = self.world.open_sender(self.room, self.required)
        if supply:
            self.world.supply(self.sender, self.tokens)

    def open_receiver(self, rank: int = 0) -> None:
        blocks = 0 if rank in self.dummies else self.blocks
        window = self.windows[rank] if rank < len(self.windows) else 1
        shape = (self.room, rank, self.ranks, blocks, self.resume)
        self.receivers[rank] = self.world.open_receiver(f"r{rank}", *shape, window=window)

    def open_receivers(self) -> None:
        for rank in range(self.ranks):
            self.open_receiver(rank)

    def open(self, *, sender_first: bool = True, supply: bool = True) -> Transfer:
        if sender_first:
            self.open_sender(supply=supply)
            self.open_receivers()
        else:
            self.open_receivers()
            self.world.run()
            self.open_sender(supply=supply)
        return self

    @property
    def tx(self) -> SenderSession:
        assert self.sender is not None
        session = self.world.session(SENDER, self.sender)
        assert isinstance(session, SenderSession)
        return session

    def rx(self, rank: int = 0) -> ReceiverSession:
        session = self.world.session(f"r{rank}", self.receivers[rank])
        assert isinstance(session, ReceiverSession)
        return session

    @property
    def sides(self) -> dict[str, tuple[str, RoomKey]]:
        """Host and key of each side, by name: "sender", "r0", ..."""
        sides = {} if self.sender is None else {SENDER: (SENDER, self.sender)}
        return sides | {f"r{rank}": (f"r{rank}", key) for rank, key in self.receivers.items()}

    def side(self, name: str) -> SenderSession | ReceiverSession:
        return self.tx if name == SENDER else self.rx(int(name[1:]))

    def states(self) -> list[KVPoll]:
        """Of the sender, then of each rank."""
        sender = [] if self.sender is None else [self.tx.state]
        return sender + [self.rx(rank).state for rank in self.receivers]

    def failures(self) -> list[Failure | None]:
        sender = [] if self.sender is None else [self.tx.failure]
        return sender + [self.rx(rank).failure for rank in self.receivers]

    def abort(self, name: str, detail: str = "given up") -> None:
        host, key = self.sides[name]
        self.world.feed(host, key, AbortRoom(detail))

    def fire(self, name: str, timer: str = "gate", *, host_alive: bool = False) -> None:
        host, key = self.sides[name]
        self.world.fire(host, key, timer, host_alive=host_alive)

    def clear(self) -> None:
        for host, key in self.sides.values():
            if host in self.world.hosts:
                self.world.clear(host, key)

    def assert_success(self) -> None:
        assert set(self.states()) == {KVPoll.Success}, self.world.gates()
        for rank in range(self.ranks):
            wanted = [] if rank in self.dummies else [(self.room, token) for token in range(self.tokens)]
            if self.resume != "manual":
                assert self.world.received(f"r{rank}", self.receivers[rank]) == wanted

    def assert_failed(self, code: str, text: str = "", rank: int | None = ...) -> None:  # type: ignore[assignment]
        """Every side ended Failed for the same first cause."""
        assert set(self.states()) == {KVPoll.Failed}, self.world.gates()
        for failure in self.failures():
            assert failure is not None
            assert failure.code.value == code, self.world.gates()
            assert text in failure.detail
            assert rank is ... or failure.rank == rank


def world(
    ranks: int = 1, *, blocks: int = BLOCKS, block_tokens: int = BLOCK, rx_block_tokens: int = 0, **more: Any
) -> World:
    """A sender and one host for each rank."""
    made = World(**more)
    made.add_host(SENDER, blocks, block_tokens)
    for rank in range(ranks):
        made.add_host(f"r{rank}", blocks, rx_block_tokens or block_tokens)
    return made


def transfer(tokens: int, ranks: int = 1, **more: Any) -> Transfer:
    """A transfer in a world of its own, with nothing open yet."""
    of_world = ("block_tokens", "rx_block_tokens", "deadlines", "checksums", "transports")
    made = world(ranks, **{name: more.pop(name) for name in of_world if name in more})
    return Transfer(made, tokens, ranks, **more)


def end(world: World, *transfers: Transfer) -> None:
    """Clear every room, let the world come to rest, and find nothing left of them."""
    for one in transfers:
        one.clear()
    rest(world)
    check_nothing_left(world)


def rest(world: World) -> None:
    """Let everything pending happen, late writes and resends too."""
    for _ in range(50):
        world.run()
        while world.late:
            world.quiesce()
        if not any(host.core.unacked for host in world.hosts.values()) and not (world.network or world.jobs):
            return
        for name in list(world.hosts):
            world.tick(name)
            world.tick(name, heartbeat=True)  # finds connections that only one end has forgotten
    raise AssertionError(f"not at rest: {world.gates()}")


def step(world: World) -> bool:
    """One thing that is pending happens, in order; False if nothing was."""
    if world.network:
        world.deliver()
    elif world.jobs:
        world.perform()
    else:
        owing = [host for host in world.hosts.values() if host.core.owes_ack]
        for host in owing:
            world.tick(host.name)
        return bool(owing)
    return True


def run_until(world: World, condition: Callable[[], bool]) -> None:
    """Take steps until `condition` holds."""
    while not condition():
        assert step(world), f"came to rest: {world.gates()}"


def messages_of(world: World, kind: type[Message]) -> list[Message]:
    """Messages of a kind that are on their way."""
    frames = [delivery.packet for delivery in world.network if isinstance(delivery.packet, Frame)]
    return [message for frame in frames for message in frame.messages if isinstance(message, kind)]


def beat(world: World, times: int = 1) -> None:
    """Heartbeats of every endpoint, and what comes of them."""
    for _ in range(times):
        for name in list(world.hosts):
            world.tick(name, heartbeat=True)
        world.run()


def say(world: World, name: str, *said: Message, conn: int = 1) -> None:
    """Endpoint `name` says something through a connection, whatever its sessions think, and it arrives."""
    host = world.hosts[name]
    channel = host.core.connections[conn].channel
    for message in said:
        channel.push(message)
    for frame in channel.flush():
        delivery = world.delivery(host, conn, frame)
        assert delivery is not None
        world.network.append(delivery)
    world.run()


def withdraw(one: World) -> None:
    """The pools in which a room waits ask later rooms for unused grants."""
    for name, host in one.hosts.items():
        if (None, "withdraw") in host.timers:
            one.fire(name, None, "withdraw")
