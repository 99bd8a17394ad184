"""What both sides of a room share: the lifecycle, the first failure, gates and their timers.

Sessions are sans-I/O. `feed(input)` returns the commands to carry out; there is no thread, socket, clock or
randomness in here, and every state is a plain value that `clone()` copies and `key()` names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from msgspec import Struct

from kvpoll_fsm.commands import CancelTimer, Command, Send, SetTimer
from kvpoll_fsm.deadlines import Deadlines, Gate
from kvpoll_fsm.errors import Failure, FailureCode
from kvpoll_fsm.events import Aborted, DeadlinePassed, LifecycleEvent, PeerLost, ProtocolError
from kvpoll_fsm.inputs import AbortRoom, ClearRoom, Crashed, Input, TimerFired, Worked
from kvpoll_fsm.lifecycle import Lifecycle
from kvpoll_fsm.messages import Beat, Message
from kvpoll_fsm.poll import KVPoll

__all__ = ["PartRecord", "RoomKey", "Session"]

GATE_TIMER = "gate"
ROOM_TIMER = "room"

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


class RoomKey(Struct, frozen=True, cache_hash=True):
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


class Session:
    """Base of `SenderSession` and `ReceiverSession`.

    Attributes:
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
        "_armed",
        "_cleared",
        "_epoch",
        "_gate_mark",
        "_lifecycle",
        "_out",
        "_told",
        "bytes_done",
        "conns",
        "deadlines",
        "failure",
        "history",
        "news",
        "parts",
        "room_key",
    )

    _handlers: ClassVar[dict[type, Callable[[Any, Any], None]]] = {}
    _message_handlers: ClassVar[dict[type, Callable[[Any, int, Any], None]]] = {}

    def __init__(self, room_key: RoomKey, deadlines: Deadlines) -> None:
        self.room_key = room_key
        self.deadlines = deadlines
        self.failure: Failure | None = None
        self.history: tuple[KVPoll, ...] = (KVPoll.Bootstrapping,)
        self.parts: tuple[PartRecord, ...] = ()
        self.bytes_done = 0
        self.conns: tuple[int, ...] = ()
        self.news = False
        self._told: Gate | None = None
        self._lifecycle = Lifecycle()
        self._cleared = False
        self._epoch = 0
        self._armed: dict[str, int] = {}
        self._gate_mark: tuple[Any, ...] = ()
        self._out: list[Command] = []

    @property
    def state(self) -> KVPoll:
        """Where the room stands on this side."""
        return self._lifecycle.state

    @property
    def late_events(self) -> int:
        """Lifecycle events that came after the end and changed nothing."""
        return self._lifecycle.late_events

    @property
    def gate(self) -> Gate:
        """What the room waits for."""
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
        return GATE_TIMER in self._armed and ROOM_TIMER in self._armed

    @property
    def quiescent(self) -> bool:
        """Terminal, and no write of this room can land or read its source any more."""
        raise NotImplementedError

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
        out, self._out = self._out, []
        return out

    def feed_safely(self, event: Input) -> list[Command]:
        """As `feed`; an exception fails this room and nothing else."""
        try:
            return self.feed(event)
        except Exception as error:  # any bug in a session must stay in its room
            if isinstance(event, Crashed):
                raise
            return self.feed(Crashed(f"{type(error).__name__} at {type(event).__name__}: {error}"))

    def key(self) -> tuple[Any, ...]:
        """Canonical plain value of the state; equal keys behave alike."""
        return (
            self.room_key,
            self._lifecycle.key(),
            self.failure and self.failure.code,
            self._cleared,
            self.bytes_done,
            frozenset(self._armed),
        )

    def _copy_base(self, copy: Session) -> None:
        copy.failure = self.failure
        copy.history, copy.parts = self.history, self.parts
        copy.bytes_done = self.bytes_done
        copy._lifecycle = self._lifecycle.clone()
        copy._cleared = self._cleared
        copy._epoch = self._epoch
        copy._armed = dict(self._armed)
        copy._gate_mark = self._gate_mark
        copy.conns, copy.news, copy._told = self.conns, self.news, self._told

    def _do(self, command: Command) -> None:
        self._out.append(command)

    def _send(self, conn: int, message: Message) -> None:
        self._out.append(Send(conn, message))

    def _apply(self, event: LifecycleEvent) -> None:
        before = self.state
        if self._lifecycle.apply(event) is not before:
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
        self._epoch += 1
        self._armed[name] = self._epoch
        self._do(SetTimer(name, after_s, self._epoch))

    def _disarm(self, name: str) -> None:
        if self._armed.pop(name, None) is not None:
            self._do(CancelTimer(name))

    def _regate(self, *, renew: bool = False) -> None:
        """Keep the gate's timer: a new gate starts its clock, a terminal state stops all."""
        gate = self.gate
        if gate is Gate.closed:
            self._disarm(GATE_TIMER)
            self._disarm(ROOM_TIMER)
            return
        patience_s = self._patience_s() if gate is Gate.moving else None
        mark = (self.state, gate, len(self.parts), patience_s)
        if renew or mark != self._gate_mark:
            self._gate_mark = mark
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
        if self._armed.get(event.name) != event.epoch:
            return
        del self._armed[event.name]
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
