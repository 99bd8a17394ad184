"""What must hold in a `World` after every step, and when everything is over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kvpoll_fsm.commands import HeldPart
from kvpoll_fsm.errors import FailureCode
from kvpoll_fsm.lessor import lease_of
from kvpoll_fsm.lifecycle import TABLE
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.receiver_session import ReceiverSession
from kvpoll_fsm.sender_session import SenderSession
from kvpoll_fsm.session import GATE_TIMER, ROOM_TIMER, PartRecord, RoomKey, Session
from kvpoll_fsm.testing.hosts import Cell

if TYPE_CHECKING:
    from kvpoll_fsm.testing.hosts import Host
    from kvpoll_fsm.testing.world import World

__all__ = ["check", "check_host_empty", "check_nothing_left", "sent"]

_MOVES = {(source, dest) for (source, _), dest in TABLE.items()}
ROOM_TIMERS = (GATE_TIMER, ROOM_TIMER)


def check(world: World, host: Host, changed: Iterable[RoomKey] | None = None) -> None:
    """Assert what must hold after every step of a host.

    Args:
        world: Where it is.
        host: The host that took the step.
        changed: Its rooms that may have changed; all of them if not given.
    """
    check_blocks(host)
    if changed is None:
        changed = [key for incarnation, key in world.lives if incarnation == host.incarnation]
    for key in changed:
        check_timers(host, key)
        session = world.lives.get((host.incarnation, key))
        if session is not None:
            check_history(key, session)
            check_room(world, host, key, session)


def check_room(world: World, host: Host, key: RoomKey, session: Session) -> None:
    """Assert that a room's bytes are right, and its Success, once."""
    if isinstance(session, ReceiverSession):
        check_held(world, host, key, session)
    if session.state is KVPoll.Success and (host.incarnation, key) not in world.proven:
        check_success(world, host.incarnation, key, session)
        world.proven.add((host.incarnation, key))


def check_nothing_left(world: World) -> None:
    """Assert that every room is over, cleared and forgotten, and that nothing of it stays anywhere."""
    pending = [*world.network, *world.jobs, *world.late]
    assert not pending, f"pending: {pending[:3]}"
    for host in world.hosts.values():
        check_host_empty(host)


def check_host_empty(host: Host) -> None:
    """Assert that nothing is left of any room at one host."""
    core = host.core
    assert not core.sessions, f"{host.name} keeps {list(core.sessions)}"
    assert core.parking.key() == ((), ()), f"{host.name} keeps {core.parking.key()}"
    assert not core.accounts.leases(), f"{host.name} leases {core.accounts.leases()}"
    assert core.load().free == core.load().total
    assert core.load().queued == 0
    assert not host.exposed, f"{host.name} exposes {[host.granted[token] for token in host.exposed]}"
    assert core.unacked == 0, f"{host.name} waits for {core.unacked} acknowledgements"
    left = {timer for timer in host.timers if timer[0] is not None}
    assert not left, f"{host.name} has timers {left}"


def check_blocks(host: Host) -> None:
    """Every block is in exactly one place, only living rooms hold any, and those that drain no more than they may."""
    load = host.core.load()
    assert load.free + load.leased + load.quarantined == load.total, f"{host.name}: {load}"
    lots: Counter[RoomKey] = Counter()
    for lease in host.core.accounts.leases():
        key = RoomKey(lease.side, lease.room, lease.rank, lease.generation)
        assert key in host.core.sessions, f"{host.name}: {lease} outlives its room"
        lots[key] += 1
    for key, held in lots.items():
        session = host.core.sessions[key]
        if isinstance(session, ReceiverSession) and session.options.resume == "drain":
            assert held <= session.options.window, f"{host.name}: {key} holds blocks for {held} parts"
    for token in host.exposed:
        key, part, _ = host.granted[token]
        assert host.core.accounts.holds(lease_of(key, part)), f"{host.name}: part {part} of {key} is exposed"


def check_timers(host: Host, key: RoomKey) -> None:
    """A live room has its gate's timer and its own, a terminal one neither, one that is forgotten none."""
    session = host.core.sessions.get(key)
    armed = [name for name in ROOM_TIMERS if (key, name) in host.timers]
    if session is None:
        assert not armed, f"{host.name}: timers {armed} outlive {key}"
        assert (key, "quarantine") not in host.timers, f"{host.name}: the quarantine of {key} outlives it"
        return
    wanted = [] if session.state.is_terminal else [*ROOM_TIMERS]
    assert armed == wanted, f"{host.name}: {key} in {session.state} at {session.gate} has timers {armed}"
    assert session.timed is not session.state.is_terminal


def check_history(key: RoomKey, session: Session) -> None:
    """Every move has a row; the last state is the present one; only a failure has a cause."""
    assert session.history[0] is KVPoll.Bootstrapping
    assert session.history[-1] is session.state
    for move in zip(session.history, session.history[1:], strict=False):
        assert move in _MOVES, f"{key} moved from {move[0]} to {move[1]}"
    failed = session.state is KVPoll.Failed
    assert failed is (session.failure is not None)
    bug = session.failure is not None and session.failure.code is FailureCode.InternalError
    assert not bug, f"{key}: {session.failure}"


def check_held(world: World, host: Host, key: RoomKey, session: ReceiverSession) -> None:
    """What a receiver has committed and holds in its blocks stays as the sender sent it."""
    for held in session.held_parts:
        assert host.read(held) == sent(world, host, key, held), (
            f"{host.name}: {key} holds wrong bytes in part {held.part}"
        )


def sent(world: World, host: Host, key: RoomKey, held: HeldPart) -> list[Cell]:
    """What the sender of a receiver's room sends as this part."""
    session = world.lives[host.incarnation, key]
    assert isinstance(session, ReceiverSession)
    origin, generation = world.peers[host.incarnation, session.options.conn], session.sender_generation
    tokens = range(held.offset, held.offset + held.tokens)
    return [Cell(origin, key.room, generation, held.part, token) for token in tokens]


def check_success(world: World, incarnation: bytes, key: RoomKey, session: Session) -> None:
    """A sender's Success rests on every rank, a receiver's on its sender."""
    if isinstance(session, SenderSession):
        for rank, slot in session.slots.items():
            there = (world.peers[incarnation, slot.conn], RoomKey("receiver", key.room, rank, slot.generation))
            check_bytes(world, there, (incarnation, key), session.parts)
    elif isinstance(session, ReceiverSession):
        sender = RoomKey("sender", key.room, 0, session.sender_generation)
        peer = world.peers[incarnation, session.options.conn]
        bound = world.lives[peer, sender]
        assert bound.state is KVPoll.Success, f"{key} has Success, its sender is {bound.state}"
        check_bytes(world, (incarnation, key), (peer, sender), bound.parts)


def check_bytes(
    world: World, life: tuple[bytes, RoomKey], sender: tuple[bytes, RoomKey], parts: Sequence[PartRecord]
) -> None:
    """A receiver that acknowledged everything has every byte; a dummy has none, an engine has its own."""
    session = world.lives[life]
    assert isinstance(session, ReceiverSession)
    origin, key = sender
    ranges = [] if session.options.dummy else [(part.part, part.offset, part.offset + part.tokens) for part in parts]
    wanted = {
        token: Cell(origin, key.room, key.generation, part, token)
        for part, first, end in ranges
        for token in range(first, end)
    }
    if session.options.resume != "manual":
        assert world.delivered[life] == wanted, f"{life[1]} has wrong bytes"
