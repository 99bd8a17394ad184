"""What must hold in a `World` after every step, and when everything is over."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvpoll_fsm.errors import FailureCode
from kvpoll_fsm.lessor import lease_of
from kvpoll_fsm.lifecycle import TABLE
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.receiver_session import ReceiverSession
from kvpoll_fsm.sender_session import SenderSession
from kvpoll_fsm.session import RoomKey, Session

if TYPE_CHECKING:
    from kvpoll_fsm.testing.hosts import Host
    from kvpoll_fsm.testing.world import World

__all__ = ["check", "check_nothing_left"]

_MOVES = {(source, dest) for (source, _), dest in TABLE.items()}
ROOM_TIMERS = {"gate", "room"}


def check(world: World, host: Host) -> None:
    """Assert what must hold after every step of a host."""
    check_blocks(host)
    check_timers(host)
    for (incarnation, key), session in world.lives.items():
        if incarnation != host.incarnation:
            continue
        check_history(key, session)
        if session.state is KVPoll.Success and (incarnation, key) not in world.proven:
            check_success(world, incarnation, key, session)
            world.proven.add((incarnation, key))


def check_nothing_left(world: World) -> None:
    """Assert that every room is over, cleared and forgotten, and that nothing of it stays anywhere."""
    pending = [*world.network, *world.jobs, *world.late]
    assert not pending, f"pending: {pending[:3]}"
    for host in world.hosts.values():
        core = host.core
        assert not core.sessions, f"{host.name} keeps {list(core.sessions)}"
        assert core.parking.key() == ((), ()), f"{host.name} keeps {core.parking.key()}"
        assert not core.accounts.leases(), f"{host.name} leases {core.accounts.leases()}"
        assert core.load().free == core.load().total
        assert core.load().queued == 0
        assert not host.exposed, f"{host.name} exposes {[host.granted[token] for token in host.exposed]}"
        assert core.unacked == 0
        left = {timer for timer in host.timers if timer[0] is not None}
        assert not left, f"{host.name} has timers {left}"


def check_blocks(host: Host) -> None:
    """Every block is in exactly one place, and only leases of living rooms hold any."""
    load = host.core.load()
    assert load.free + load.leased + load.quarantined == load.total, f"{host.name}: {load}"
    for lease in host.core.accounts.leases():
        key = RoomKey(lease.side, lease.room, lease.rank, lease.generation)
        assert key in host.core.sessions, f"{host.name}: {lease} outlives its room"
    for token in host.exposed:
        key, part, _ = host.granted[token]
        assert host.core.accounts.holds(lease_of(key, part)), f"{host.name}: part {part} of {key} is exposed"


def check_timers(host: Host) -> None:
    """A live room has its gate's timer and its own, a terminal one neither."""
    for key, session in host.core.sessions.items():
        armed = {name for room, name in host.timers if room == key} & ROOM_TIMERS
        wanted = set() if session.state.is_terminal else ROOM_TIMERS
        assert armed == wanted, f"{host.name}: {key} in {session.state} at {session.gate} has timers {armed}"
        assert session.timed is not session.state.is_terminal
    for room, name in host.timers:
        assert room is None or room in host.core.sessions, f"{host.name}: timer {name} outlives {room}"


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


def check_success(world: World, incarnation: bytes, key: RoomKey, session: Session) -> None:
    """A sender's Success rests on every rank, a receiver's on its sender."""
    if isinstance(session, SenderSession):
        for rank, slot in session.slots.items():
            there = (world.peers[incarnation, slot.conn], RoomKey("receiver", key.room, rank, slot.generation))
            check_bytes(world, there, session.ledger.total_tokens or 0)
    elif isinstance(session, ReceiverSession):
        sender = RoomKey("sender", key.room, 0, session.sender_generation)
        bound = world.lives[world.peers[incarnation, session.options.conn], sender]
        assert bound.state is KVPoll.Success, f"{key} has Success, its sender is {bound.state}"
        check_bytes(world, (incarnation, key), session.ledger.total_tokens or 0)


def check_bytes(world: World, life: tuple[bytes, RoomKey], total_tokens: int) -> None:
    """A receiver that acknowledged everything has every byte; a dummy has none, an engine has its own."""
    session = world.lives[life]
    assert isinstance(session, ReceiverSession)
    wanted = {} if session.options.dummy else {token: (life[1].room, token) for token in range(total_tokens)}
    if session.options.resume != "manual":
        assert world.delivered[life] == wanted, f"{life[1]} has wrong bytes"
