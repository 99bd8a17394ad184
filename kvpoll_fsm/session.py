"""What both sides of a room share: the lifecycle, the first failure, gates and their timers.

Sessions are sans-I/O. `feed(input)` returns the commands to carry out; there is no thread, socket, clock or
randomness in here, and every state is a plain value that `clone()` copies and `key()` names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from msgspec import Struct, structs

from kvpoll_fsm.commands import CancelTimer, Command, Send, SetTimer
from kvpoll_fsm.deadlines import Deadlines, Gate
from kvpoll_fsm.errors import Failure, FailureCode
from kvpoll_fsm.events import Aborted, DeadlinePassed, LifecycleEvent, PeerLost, ProtocolError
from kvpoll_fsm.inputs import AbortRoom, ClearRoom, Crashed, Input, TimerFired, Worked
from kvpoll_fsm.lifecycle import after
from kvpoll_fsm.messages import Beat, Message
from kvpoll_fsm.poll import KVPoll

__all__ = ["PartRecord", "RoomKey", "Session"]

GATE_TIMER = "gate"
ROOM_TIMER = "room"
QUARANTINE_TIMER = "quarantine"

# Asked for at every input; before Python 3.12 it costs as much as a call to reach a member through its enumeration.
BOOTSTRAPPING = KVPoll.Bootstrapping
CLOSED, MOVING, QUEUED = Gate.closed, Gate.moving, Gate.queued
WAITING_RANKS, WAITING_RESUME = Gate.waiting_ranks, Gate.waiting_resume
WAITING_BLOCKS, WAITING_OUTCOME = Gate.waiting_blocks, Gate.waiting_outcome

_AT_FIRST = (BOOTSTRAPPING,)

_LIFECYCLE_EVENT: dict[FailureCode, LifecycleEvent] = {
    FailureCode.PeerLost: PeerLost(),
    FailureCode.OutcomeUnknown: PeerLost(),
    FailureCode.DeadlinePassed: DeadlinePassed(),
    FailureCode.PoolExhausted: DeadlinePassed(),
    FailureCode.ProtocolError: ProtocolError(),
    FailureCode.InternalError: ProtocolError(),
    FailureCode.LayoutMismatch: ProtocolError(),
    FailureCode.UnsupportedVersion: ProtocolError(),
}
"""The event a failure is to the machine; every other code is Aborted."""


class RoomKey(Struct, frozen=True, cache_hash=True, gc=False):
    """One life of a room on one side of one endpoint.

    Attributes:
        side: "sender" or "receiver".
        rank: The receiver's rank; 0 for a sender.
        generation: Counts up with every opening on this endpoint's incarnation.
    """

    side: str
    room: int
    rank: int
    generation: int


@dataclass(frozen=True, slots=True)
class PartRecord:
    """A part that has an outcome, for people and for `receiver.part`.

    `passed_over` says, at the sender, why transports that its policy likes better did not carry the part.
    """

    part: int
    offset: int
    tokens: int
    is_last: bool
    transport: str
    blocks: tuple[int, ...] = ()
    passed_over: str = field(default="", compare=False, repr=False)


class Clocks(Struct, gc=False):
    """The timers of one room: the epoch of each while it is set, else 0.

    Attributes:
        epoch: The last that was given to any of them.
        turn: How many states and parts the room had seen when the gate's was set.
        patience_s: Set if that was not the gate's whole time.
    """

    gate: int = 0
    room: int = 0
    quarantine: int = 0
    epoch: int = 0
    turn: int = 0
    patience_s: float | None = None

    def rings(self, name: str, epoch: int) -> bool:
        """Take the timer as fired; returns whether it was set, and not set again since."""
        rang = 0 < epoch == getattr(self, name, 0)
        if rang:
            setattr(self, name, 0)
        return rang

    @property
    def running(self) -> frozenset[str]:
        """Those that are set."""
        return frozenset(name for name in (GATE_TIMER, ROOM_TIMER, QUARANTINE_TIMER) if getattr(self, name))


class Session:
    """Base of `SenderSession` and `ReceiverSession`.

    `feed` alone changes anything but `conns` and `news`.

    Attributes:
        state: Where the room stands on this side.
        gate: What the room waits for, as of the end of the last `feed`.
        quiescent: Terminal, and no write of this room can land or read its source any more; as of then, too.
        late_events: Lifecycle events that came after the end and changed nothing.
        room_key: Which life of which room this is.
        deadlines: How long each gate may stay shut.
        failure: The first cause of the room's end, if it ended Failed.
        history: The states gone through, the present one last.
        parts: The parts that have an outcome.
        bytes_done: Bytes of the room that have landed, over all ranks, as far as this side knows.
        conns: The connections whose peers take part; kept by whoever hosts the session.
        news: Heartbeats have something to say that they have not said yet; unset by whoever says it.
    """

    __slots__ = (
        "_cleared",
        "_clocks",
        "_out",
        "_told",
        "bytes_done",
        "conns",
        "deadlines",
        "failure",
        "gate",
        "history",
        "late_events",
        "news",
        "parts",
        "quiescent",
        "room_key",
        "state",
    )

    _handlers: ClassVar[dict[type, Callable[[Any, Any], None]]] = {}
    _message_handlers: ClassVar[dict[type, Callable[[Any, int, Any], None]]] = {}

    def __init__(self, room_key: RoomKey, deadlines: Deadlines) -> None:
        self.room_key = room_key
        self.deadlines = deadlines
        self.state = BOOTSTRAPPING
        self.gate = WAITING_RANKS
        self.quiescent = False
        self.late_events = 0
        self.failure: Failure | None = None
        self.history: tuple[KVPoll, ...] = _AT_FIRST
        self.parts: tuple[PartRecord, ...] = ()
        self.bytes_done = 0
        self.conns: tuple[int, ...] = ()
        self.news = False
        self._told: Gate | None = None
        self._cleared = False
        self._clocks = Clocks()
        self._out: list[Command] | None = None

    def _present_gate(self) -> Gate:
        """What the room waits for now."""
        raise NotImplementedError

    def _nothing_lands(self) -> bool:
        """Whether a room that is terminal is quiescent, too."""
        raise NotImplementedError

    @property
    def told_gate(self) -> Gate:
        """The gate heartbeats speak of."""
        return self._told_gate(self.gate)

    def _told_gate(self, gate: Gate) -> Gate:
        """What heartbeats say of a room at this gate."""
        return gate

    def binds(self, conn: int, rank: int, generation: int) -> bool:
        """Whether this receiver's life of the room, heard through `conn`, and this one belong together."""
        raise NotImplementedError

    def beats(self, conn: int, host_alive: bool, working: bool) -> Iterator[Beat]:
        """What a heartbeat through `conn` says of this room."""
        raise NotImplementedError

    def clone(self) -> Session:
        """A copy that shares nothing mutable."""
        raise NotImplementedError

    @property
    def timed(self) -> bool:
        """A deadline runs for the present gate, and one for the whole room."""
        return bool(self._clocks.gate and self._clocks.room)

    @property
    def finished(self) -> bool:
        """Terminal, quiescent, and the host has no more use for it: nothing will happen here again."""
        return self._cleared and self.quiescent

    def feed(self, event: Input) -> list[Command]:
        """Take one input and return what is to be done, in order.

        Inputs that concern what is over are ignored. What a peer must not do fails the room with
        ProtocolError; nothing is raised for it.
        """
        handler = self._handlers.get(type(event))
        if handler is not None:
            handler(self, event)  # what it asked for before it raised is returned by the next feed()
        self._regate()
        out, self._out = self._out, None
        return out or []

    def crash(self, event: Input, error: Exception) -> list[Command]:
        """What is to be done after `feed` raised this: it fails this room, unless that is what it failed to do."""
        if isinstance(event, Crashed):
            raise error
        return self.feed(Crashed(f"{type(error).__name__} at {type(event).__name__}: {error}"))

    def key(self) -> tuple[Any, ...]:
        """Canonical plain value of the state; equal keys behave alike."""
        return (
            self.room_key,
            int(self.state),
            self.failure and self.failure.code,
            self._cleared,
            self.bytes_done,
            self._clocks.running,
        )

    def _copy_base(self, copy: Session) -> None:
        copy.state, copy.gate, copy.quiescent = self.state, self.gate, self.quiescent
        copy.failure, copy.late_events = self.failure, self.late_events
        copy.history, copy.parts = self.history, self.parts
        copy.bytes_done = self.bytes_done
        copy._cleared = self._cleared
        copy._clocks = structs.replace(self._clocks)
        copy.conns, copy.news, copy._told = self.conns, self.news, self._told

    def _do(self, command: Command) -> None:
        if self._out is None:
            self._out = []
        self._out.append(command)

    def _send(self, conn: int, message: Message) -> None:
        self._do(Send(conn, message))

    def _apply(self, event: LifecycleEvent) -> None:
        before = self.state
        self.state = after(before, event)
        self.late_events += before.is_terminal
        if self.state is not before:
            self.history = (*self.history, self.state)

    def _fail(self, failure: Failure, event: LifecycleEvent | None = None, *, tell: bool = True) -> None:
        """End the room as Failed, unless it has ended, and tell the other side once (`tell`)."""
        event = event or _LIFECYCLE_EVENT.get(failure.code, Aborted())
        if self.state.is_terminal:
            self._apply(event)
            return
        self.failure = failure
        self._apply(event)
        if tell:
            self._tell_failure(failure, event)
        self._on_failed()

    def _tell_failure(self, failure: Failure, event: LifecycleEvent) -> None:
        """Send word of the room's end to the other side."""
        raise NotImplementedError

    def _on_failed(self) -> None:
        """Stop what is under way and give back what can be given back."""
        raise NotImplementedError

    def _cause(self, code: FailureCode, detail: str, rank: int | None = None) -> Failure:
        """A failure that arose here, in the present state."""
        return Failure.of(code, detail, state=self.state, rank=rank)

    def _arm(self, name: str, after_s: float) -> None:
        clocks = self._clocks
        clocks.epoch += 1
        setattr(clocks, name, clocks.epoch)
        self._do(SetTimer(name, after_s, clocks.epoch))

    def _disarm(self, name: str) -> None:
        if getattr(self._clocks, name):
            setattr(self._clocks, name, 0)
            self._do(CancelTimer(name))

    def _regate(self, *, renew: bool = False) -> None:
        """Keep the gate, and its timer: a new gate starts its clock, a terminal state stops all."""
        before, gate = self.gate, self._present_gate()
        self.gate = gate
        clocks = self._clocks
        if gate is CLOSED:
            self.quiescent = self._nothing_lands()
            if gate is not before:
                self._disarm(GATE_TIMER)
                self._disarm(ROOM_TIMER)
            return
        patience_s = self._patience_s() if gate is MOVING else None
        turn = len(self.history) + len(self.parts)
        if renew or gate is not before or turn != clocks.turn or patience_s != clocks.patience_s:
            clocks.turn, clocks.patience_s = turn, patience_s
            self._arm(GATE_TIMER, self.deadlines.of(self.state, gate) if patience_s is None else patience_s)
        told = self._told_gate(gate)
        if told is not self._told:
            self._told, self.news = told, True

    def _patience_s(self) -> float | None:
        """How long bytes of a part may stay away before something is done about it, where all is not lost then."""
        return None

    def _worked(self, event: Worked) -> None:
        """A part is staged, checked or copied, or waits for its turn behind others: that is no standstill."""
        if self.gate in (Gate.moving, Gate.waiting_outcome):
            self._regate(renew=True)

    def _timer_fired(self, event: TimerFired) -> None:
        if not self._clocks.rings(event.name, event.epoch):
            return
        if event.name == ROOM_TIMER:
            limit = self.deadlines.room_timeout_s
            self._fail(self._cause(FailureCode.DeadlinePassed, f"the room outlived {limit:g} s", self._own_rank))
        elif event.name == GATE_TIMER:
            self._gate_expired(event)

    def _gate_expired(self, event: TimerFired) -> None:
        gate = self.gate
        if gate is Gate.closed:
            return
        if self._kept_waiting(gate):
            return self._arm(GATE_TIMER, self.deadlines.of(self.state, gate))
        seconds = self.deadlines.of(self.state, gate)
        code = FailureCode.PoolExhausted if gate is Gate.waiting_blocks else FailureCode.DeadlinePassed
        self._fail(self._cause(code, f"{gate} for {seconds:g} s: {self.awaited()}", self._own_rank))

    def _kept_waiting(self, gate: Gate) -> bool:
        """What the other side said last keeps this gate's clock from ending, as long as it says nothing else."""
        return False

    @property
    def _own_rank(self) -> int | None:
        return None if self.room_key.side == "sender" else self.room_key.rank

    def awaited(self) -> str:
        """What would open the present gate, for people."""
        raise NotImplementedError

    def _abort(self, event: AbortRoom) -> None:
        self._fail(self._cause(event.code, event.detail, self._own_rank))

    def _crashed(self, event: Crashed) -> None:
        self._fail(self._cause(FailureCode.InternalError, event.detail, self._own_rank))

    def _clear(self, event: ClearRoom) -> None:
        if not self.state.is_terminal:
            self._abort(AbortRoom("the handle was cleared while the room was live"))
        self._cleared = True
