"""The hosts of a simulation: they open rooms, supply data, call resume(), give up, and clear what is over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from kvpoll_fsm import inputs
from kvpoll_fsm.deadlines import Gate
from kvpoll_fsm.errors import DuplicateRoom, Failure, FailureCode, RequestTooLarge
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.receiver_session import ReceiverSession
from kvpoll_fsm.sender_session import SenderSession
from kvpoll_fsm.session import RoomKey, Session
from kvpoll_fsm.testing.hosts import Host
from kvpoll_fsm.testing.sim_clock import ANSWER, CHECK
from kvpoll_fsm.testing.sim_plan import Abort, Clear, Open, Rank
from kvpoll_fsm.testing.sim_world import TimedWorld

__all__ = ["Rooms"]

RETRY_S = 1.0
"""How often an engine without free blocks looks again."""
QUIET_WITHIN_S = 400.0
"""How long after the end of a room a write of it may be in flight: quarantine, stuck and late writes, a pause."""
TOLD_WITHIN_S = 6.0
"""How long after the end of one side the other has ended, if nothing is wrong; shorter than any deadline."""
SLACK_S = 1.0


_BUGS = {
    FailureCode.ChecksumMismatch,
    FailureCode.InternalError,
    FailureCode.LayoutMismatch,
    FailureCode.RequestTooLarge,
    FailureCode.UnsupportedVersion,
}
"""Nothing a plan does may end a room so."""
_MIXED_UP = ("ranks are required", "another life of rank", "reserved again", "every rank is a dummy")
"""What may be called a breach of the protocol: hosts that use one number for two rooms at once."""


@dataclass
class _Life:
    """One life of a room, as the host that opened it sees it.

    Attributes:
        state: As last seen.
        blocks: Those an engine has given to the room, by part.
        asked: The part for which resume() is under way.
        released: The parts an engine is done with, or will be in a moment.
    """

    host: Host
    key: RoomKey
    session: Session
    plan: Open
    opened_s: float
    rank: Rank | None = None
    state: KVPoll = KVPoll.Bootstrapping
    blocks: dict[int, tuple[int, ...]] = field(default_factory=dict)
    asked: int = 0
    released: set[int] = field(default_factory=set)


class Rooms:
    """Carries out the rooms of a plan.

    Attributes:
        outcomes: Lives of rooms that ended, by state.
        codes: Failures, by code.
        refused: Openings that were refused because the number was in use.
    """

    def __init__(self, world: TimedWorld) -> None:
        self.world = world
        self.outcomes: Counter[str] = Counter()
        self.codes: Counter[str] = Counter()
        self.refused = 0
        self._lives: dict[tuple[bytes, RoomKey], _Life] = {}
        self._free: dict[bytes, list[int]] = {}
        world.watch = self._look

    # What the plan asks

    def open(self, plan: Open) -> None:
        """Both sides open, each in its time."""
        clock = self.world.clock
        clock.after(plan.after_s, ANSWER, lambda: self._on(plan.sender, lambda host: self._open_sender(host, plan)))
        for number, rank in enumerate(plan.ranks):
            clock.after(rank.after_s, ANSWER, partial(self._receiver_comes, plan, number))

    def abort(self, event: Abort) -> None:
        """A host gives up its rooms of that number."""
        for life in self._open_here(event.host, event.room):
            self._feed(life, inputs.AbortRoom("given up"))

    def clear(self, event: Clear) -> None:
        """A host drops its rooms of that number."""
        for life in self._open_here(event.host, event.room):
            self._clear(life)

    def live_before(self, moment_s: float) -> list[str]:
        """The rooms that were opened before some moment and have not ended, and where they stand."""
        return [
            f"{life.host.name}: {life.key} in {life.session.state} at {life.session.gate}"
            for life in self._lives.values()
            if life.opened_s < moment_s and not life.session.state.is_terminal and self._runs(life)
        ]

    # Opening

    def _on(self, name: str, action: Callable[[Host], None]) -> None:
        def act() -> None:
            host = self.world.hosts.get(name)
            if host is not None:
                action(host)

        self.world.when_running(name, ANSWER, act)

    def _refused(self, plan: Open) -> None:
        assert not plan.must_succeed, f"after the last fault room {plan.room} cannot be opened"
        self.refused += 1

    def _open_sender(self, host: Host, plan: Open) -> None:
        ranks = len(plan.ranks) if plan.told else None
        try:
            key = self.world.open_sender(plan.room, ranks, name=host.name)
        except DuplicateRoom:
            return self._refused(plan)
        life = self._opened(host, key, plan)
        for after_s, ready in plan.supply:
            supplied = inputs.Supplied(plan.tokens, ready, plan.staged)
            self._later(after_s, life, partial(self._feed, life, supplied))

    def _receiver_comes(self, plan: Open, number: int) -> None:
        self._on(plan.ranks[number].host, lambda host: self._open_receiver(host, plan, number))

    def _open_receiver(self, host: Host, plan: Open, number: int) -> None:
        rank = plan.ranks[number]
        exact = self._take(host, rank.blocks) if rank.resume == "manual" and rank.blocks else ()
        if exact is None:
            return self.world.clock.after(RETRY_S, ANSWER, lambda: self._receiver_comes(plan, number))
        ranks = len(plan.ranks)
        try:
            shape = (ranks, rank.blocks, rank.resume, exact)
            key = self.world.open_receiver(host.name, plan.room, number, *shape, window=rank.window, peer=plan.sender)
        except (DuplicateRoom, RequestTooLarge):  # the latter where two rooms of one number meet
            self._give_back(host, exact)
            return self._refused(plan)
        life = self._opened(host, key, plan, rank)
        life.blocks[0] = exact

    def _opened(self, host: Host, key: RoomKey, plan: Open, rank: Rank | None = None) -> _Life:
        world = self.world
        session = world.lives[host.incarnation, key]
        life = self._lives[host.incarnation, key] = _Life(host, key, session, plan, world.clock.now, rank)
        world.clock.log(f"{host.name}: opens {key}")
        world.after(world.deadlines.room_timeout_s + SLACK_S, host, CHECK, lambda: self._must_be_over(life))
        self._look(host, key)
        return life

    # Living

    def _look(self, host: Host, key: RoomKey) -> None:
        """A room may have changed."""
        life = self._lives.get((host.incarnation, key))
        if life is None:
            return
        state = life.session.state
        if state is not life.state:
            life.state = state
            self.world.clock.log(f"{host.name}: room {key.room} {key.side} {key.rank} is in {state}")
            if state.is_terminal:
                self._ended(life)
        if key not in host.core.sessions:
            self._over(life)
        elif life.rank is not None and life.rank.resume == "manual" and life.rank.blocks:
            self._serve(life, life.rank)

    def _ended(self, life: _Life) -> None:
        failure = life.session.failure
        self.outcomes[life.state.name] += 1
        if failure is not None:
            self.codes[failure.code.value] += 1
            self.world.clock.log(f"{life.host.name}: {failure}")
            assert not life.plan.must_succeed, f"after the last fault {life.key} failed: {failure}"
            assert not _is_a_bug(failure), f"{life.key}: {failure}"
        self._later(life.plan.clear_s, life, lambda: self._clear(life))
        self.world.after(QUIET_WITHIN_S, life.host, CHECK, lambda: self._must_be_quiet(life))
        self.world.after(TOLD_WITHIN_S, life.host, CHECK, lambda: self._must_be_told(life))

    def _over(self, life: _Life) -> None:
        del self._lives[life.host.incarnation, life.key]
        for part in list(life.blocks):
            self._give_back(life.host, life.blocks.pop(part))

    def _must_be_over(self, life: _Life) -> None:
        state, gate = life.session.state, life.session.gate
        assert state.is_terminal, f"{life.host.name}: {life.key} has outlived room_timeout_s in {state} at {gate}"

    def _must_be_quiet(self, life: _Life) -> None:
        assert life.session.quiescent, (
            f"{life.host.name}: {life.key} is not quiescent {QUIET_WITHIN_S:g} s after its end"
        )

    def _must_be_told(self, life: _Life) -> None:
        """Where nothing was wrong, the end of one side is the end of the other, and no deadline is waited for."""
        world = self.world
        hasty = world.deadlines.stall_s < TOLD_WITHIN_S
        if hasty or not world.weather.clear_for(TOLD_WITHIN_S, world.clock.now):
            return
        for conn, key in _others(life.session):
            peer = world.peers.get((life.host.incarnation, conn))
            other, host = world.lives.get((peer or b"", key)), world.host_of(peer)
            met = conn in life.host.core.connections and host is not None
            told = not met or other is None or other.state.is_terminal
            assert told, f"{life.key} ended {TOLD_WITHIN_S:g} s ago, {key} has not heard of it"

    # An engine that names blocks

    def _serve(self, life: _Life, rank: Rank) -> None:
        session = life.session
        for record in session.parts:
            if record.part not in life.released:
                life.released.add(record.part)
                self._later(rank.think_s, life, partial(self._release, life, record.part))
        part = len(session.parts)
        if session.gate is Gate.waiting_resume and life.asked < part:
            life.asked = part
            self._later(rank.think_s, life, lambda: self._resume(life, rank, part))

    def _release(self, life: _Life, part: int) -> None:
        self._feed(life, inputs.ReleasePart(part))
        if not life.session.state.is_terminal:
            self._give_back(life.host, life.blocks.pop(part, ()))

    def _resume(self, life: _Life, rank: Rank, part: int) -> None:
        if life.session.gate is not Gate.waiting_resume:
            return
        blocks = self._take(life.host, rank.blocks)
        if blocks is None:
            return self._later(RETRY_S, life, lambda: self._resume(life, rank, part))
        life.blocks[part] = blocks
        self._feed(life, inputs.ResumeWith(blocks))

    def _take(self, host: Host, count: int) -> tuple[int, ...] | None:
        free = self._blocks_of(host)
        if len(free) < count:
            return None
        taken = tuple(free[-count:])
        del free[-count:]
        return taken

    def _give_back(self, host: Host, blocks: tuple[int, ...]) -> None:
        self._blocks_of(host).extend(blocks)

    def _blocks_of(self, host: Host) -> list[int]:
        return self._free.setdefault(host.incarnation, list(range(host.core.options.blocks)))

    # Inside

    def _runs(self, life: _Life) -> bool:
        return self.world.hosts.get(life.host.name) is life.host

    def _later(self, seconds: float, life: _Life, action: Callable[[], None]) -> None:
        """Act on a room in a while, if it is still there by then."""

        def act() -> None:
            if (life.host.incarnation, life.key) in self._lives:
                action()

        self.world.after(seconds, life.host, ANSWER, act)

    def _open_here(self, name: str, room: int) -> list[_Life]:
        lives = list(self._lives.values())
        return [life for life in lives if (life.host.name, life.key.room) == (name, room) and self._runs(life)]

    def _feed(self, life: _Life, event: inputs.Input) -> None:
        self.world.clock.log(f"{life.host.name}: {type(event).__name__} for {life.key}")
        self.world.feed(life.host.name, life.key, event)

    def _clear(self, life: _Life) -> None:
        if life.host.core.is_open(life.key):
            self.world.clock.log(f"{life.host.name}: clears {life.key}")
            self.world.clear(life.host.name, life.key)


def _others(session: Session) -> list[tuple[int, RoomKey]]:
    """The lives of the room that one is bound to: through which connection, and which."""
    room = session.room_key.room
    if isinstance(session, SenderSession):
        slots = session.slots.items()
        return [(slot.conn, RoomKey("receiver", room, rank, slot.generation)) for rank, slot in slots]
    if isinstance(session, ReceiverSession) and session.sender_generation:
        return [(session.options.conn, RoomKey("sender", room, 0, session.sender_generation))]
    return []


def _is_a_bug(failure: Failure) -> bool:
    """Whether no fault explains a failure: our own endpoints do not break the protocol."""
    mixed_up = any(text in failure.detail for text in _MIXED_UP)
    return failure.code in _BUGS or (failure.code is FailureCode.ProtocolError and not mixed_up)
