"""Every gate a room can wait at, and how long.

A room that is not terminal always waits at exactly one gate. `GATES` gives each (state, gate) pair its
clock; a pair that is missing fails at import, so no room can wait without an end.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields

from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.poll import KVPoll

__all__ = ["GATES", "Clock", "Deadlines", "Gate"]


class Gate(str, enum.Enum):
    """What a live room waits for."""

    waiting_ranks = "waiting_ranks"
    """The other side: reservations of all required ranks, or the sender's Opened."""
    waiting_blocks = "waiting_blocks"
    """Free blocks of this side's own pool."""
    queued = "queued"
    """The sender's host to have the next tokens ready."""
    moving = "moving"
    """Bytes of a part to land."""
    waiting_outcome = "waiting_outcome"
    """Acknowledgements (sender), or the outcome (receiver), of a part that has landed."""
    waiting_resume = "waiting_resume"
    """Blocks for the next part."""
    closed = "closed"
    """The room is terminal and waits for nothing."""

    def __str__(self) -> str:
        return self.value


class Clock(str, enum.Enum):
    """Which of the settings in `Deadlines` times a gate."""

    bootstrap = "bootstrap_s"
    input = "input_s"
    stall = "stall_s"
    resume = "resume_s"


_B, _W, _T = KVPoll.Bootstrapping, KVPoll.WaitingForInput, KVPoll.Transferring

GATES: dict[tuple[KVPoll, Gate], Clock] = {
    (_B, Gate.waiting_ranks): Clock.bootstrap,
    (_B, Gate.waiting_blocks): Clock.input,
    (_W, Gate.queued): Clock.input,
    (_W, Gate.waiting_blocks): Clock.input,
    (_W, Gate.moving): Clock.stall,
    (_W, Gate.waiting_outcome): Clock.stall,
    (_T, Gate.queued): Clock.input,
    (_T, Gate.waiting_blocks): Clock.input,
    (_T, Gate.moving): Clock.stall,
    (_T, Gate.waiting_outcome): Clock.stall,
    (_T, Gate.waiting_resume): Clock.resume,
}

GATES_OF: dict[KVPoll, tuple[Gate, ...]] = {
    _B: (Gate.waiting_ranks, Gate.waiting_blocks),
    _W: (Gate.queued, Gate.waiting_blocks, Gate.moving, Gate.waiting_outcome),
    _T: (Gate.queued, Gate.waiting_blocks, Gate.moving, Gate.waiting_outcome, Gate.waiting_resume),
}
"""The gates that exist in each live state."""

_SETTINGS = {pair: clock.value for pair, clock in GATES.items()}

_missing = {(s, g) for s, gates in GATES_OF.items() for g in gates} ^ GATES.keys()
if _missing or GATES_OF.keys() != {s for s in KVPoll if not s.is_terminal}:
    raise AssertionError(f"a live (state, gate) has no clock, or a clock no gate: {sorted(map(str, _missing))}")


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long rooms may wait, in seconds.

    Attributes:
        bootstrap_s: For the other side to show up and grant blocks.
        input_s: For the host to have data, renewed by a "queued, alive" heartbeat; for blocks of one's own pool.
        stall_s: For a part to make progress; renewed only by growth of the bytes that landed,
            while its staging, checking or copying goes on at either end, and when it is begun again.
        resume_s: For the next grant after a part that was not the last.
        room_timeout_s: Caps the life of a room whatever renews the others.
        heartbeat_s: How often a peer is told that we live and where its rooms stand.
        peer_lost_s: Silence after which a peer counts as gone.
        host_alive_s: A host that has not called the endpoint for this long gives no sign of life.
        withdraw_s: How long a grant no room has used stays, while an earlier room waits for blocks.
        quarantine_max_s: How long blocks wait for the writer's word before the receiver fences by force.
        linger_s: How long a connection without rooms is kept.
        fallback_s: How long an attempt at a part may make no progress while another transport is left; at most half
            of `stall_s` counts.
        probe_s: The same for the attempt that is to show whether a transport works again.
        breaker_s: How long a transport to a peer is not tried after it failed. Doubles each time that it still fails.
        breaker_max_s: The longest such time.
    """

    bootstrap_s: float = 30.0
    input_s: float = 300.0
    stall_s: float = 10.0
    resume_s: float = 30.0
    room_timeout_s: float = 1800.0
    heartbeat_s: float = 1.0
    peer_lost_s: float = 5.0
    host_alive_s: float = 30.0
    withdraw_s: float = 0.5
    quarantine_max_s: float = 60.0
    linger_s: float = 30.0
    fallback_s: float = 4.0
    probe_s: float = 1.0
    breaker_s: float = 1.0
    breaker_max_s: float = 60.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
                raise InvalidInput(f"{field.name}={value!r}: give a number of seconds above 0")
        if self.peer_lost_s <= self.heartbeat_s:
            raise InvalidInput(
                f"peer_lost_s={self.peer_lost_s:g} must exceed heartbeat_s={self.heartbeat_s:g}, "
                "or every idle peer counts as lost"
            )

    def of(self, state: KVPoll, gate: Gate) -> float:
        """Seconds a room in `state` may wait at `gate`.

        Raises:
            KeyError: The state has no such gate.
        """
        seconds: float = getattr(self, _SETTINGS[state, gate])
        return seconds

    def patience_s(self, *, probing: bool) -> float:
        """Seconds without progress after which an attempt is given up for another transport's sake."""
        fallback_s = min(self.fallback_s, self.stall_s / 2)
        return min(self.probe_s, fallback_s) if probing else fallback_s
