"""A receiver rank's side of a room. It judges only its own bytes; PartOutcome alone moves it on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from kvpoll_fsm import inputs, messages
from kvpoll_fsm.commands import CopyOut, HeldPart, Verify
from kvpoll_fsm.deadlines import Deadlines, Gate
from kvpoll_fsm.errors import Failure, FailureCode, InvalidInput
from kvpoll_fsm.events import Bootstrapped, LifecycleEvent, PartDone
from kvpoll_fsm.lifecycle import OPEN, outcome
from kvpoll_fsm.messages import BlockGrant
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.receiver_blocks import MAKING_ROOM, NONE_FENCED, ReceiverBlocks
from kvpoll_fsm.receiver_fences import ReceiverFences
from kvpoll_fsm.receiver_options import ReceiverOptions
from kvpoll_fsm.session import (
    BOOTSTRAPPING,
    CLOSED,
    MOVING,
    QUEUED,
    ROOM_TIMER,
    WAITING_BLOCKS,
    WAITING_OUTCOME,
    WAITING_RANKS,
    WAITING_RESUME,
    PartRecord,
    RoomKey,
    Session,
)

__all__ = ["ReceiverOptions", "ReceiverSession"]

_LANDED = ("landed", "checking", "verifying", "acked", "rejected")


class ReceiverSession(ReceiverFences):
    """One life of a room at one receiver rank.

    `ReceiverBlocks` says how its grants come and go, `ReceiverFences` how writes that may land still are kept out.
    """

    __slots__ = ()

    def __init__(self, room_key: RoomKey, deadlines: Deadlines, options: ReceiverOptions) -> None:
        super().__init__(room_key, deadlines, options)
        self._sender_generation = 0
        self._report: messages.PartReport | None = None
        self._announced = False

    # What the session is asked

    def _present_gate(self) -> Gate:
        """What the room waits for now."""
        if self.state.is_terminal:
            return CLOSED
        if self._phase in MAKING_ROOM:
            return WAITING_BLOCKS
        if self.state is BOOTSTRAPPING:
            return WAITING_RANKS
        if self._phase in _LANDED:
            return WAITING_OUTCOME
        if self._phase == "none" and not self.options.dummy:
            return WAITING_RESUME
        return MOVING if self._sender_gate is MOVING else QUEUED

    @property
    def sender_generation(self) -> int:
        """The sender's life of the room this one is bound to; 0 before Opened."""
        return self._sender_generation

    def binds(self, conn: int, rank: int, generation: int) -> bool:
        """Whether this receiver's life of the room, heard through `conn`, and this one belong together."""
        return (conn, rank, generation) == (self.options.conn, self.room_key.rank, self.room_key.generation)

    def beats(self, conn: int, host_alive: bool, working: bool) -> Iterator[messages.Beat]:
        """What a heartbeat through `conn` says of this room."""
        yield messages.Beat(
            to_sender=True,
            **self._ids(),
            gate=self.told_gate.value,
            bytes_done=self.bytes_done,
            host_alive=host_alive,
            working=working,
        )

    def clone(self) -> ReceiverSession:
        """A copy that shares nothing mutable."""
        copy = ReceiverSession(self.room_key, self.deadlines, self.options)
        self._copy_base(copy)
        copy._sender_generation, copy._report = self._sender_generation, self._report
        copy._announced = self._announced
        return copy

    def key(self) -> tuple[Any, ...]:
        """Canonical plain value of the state."""
        return (*super().key(), self._sender_generation, self._report, self._announced)

    # The host

    def _start(self, event: inputs.Start) -> None:
        self._arm(ROOM_TIMER, self.deadlines.room_timeout_s)
        if self.options.dummy:
            self._send_reserve(None)
        else:
            self._ask(self.options.exact)

    def _send_reserve(self, grant: BlockGrant | None) -> None:
        self._announced = True
        reserve = messages.Reserve(ranks=self.options.ranks, dummy=self.options.dummy, grant=grant, **self._ids())
        self._send(self.options.conn, reserve)

    def _resume_with(self, event: inputs.ResumeWith) -> None:
        if self.gate is Gate.waiting_resume:
            self._ask(event.blocks)

    # What the sender says

    def _opened(self, conn: int, message: messages.Opened) -> None:
        granted = self.options.dummy or self._phase in ("offered", "withdrawing")
        if self.state is not KVPoll.Bootstrapping or not granted or message.required != self.options.ranks:
            here = f"{self.options.ranks} in {self.state}, grant {self._phase}"
            return self._violation(f"Opened for {message.required} ranks, here {here}")
        self._sender_generation = message.sender_generation
        if self._sender_gate is not Gate.moving:  # a beat that came first, because this had to be sent again, holds
            self._sender_gate = Gate.queued
        self._keep_grant()
        if message.total_tokens is not None:
            self.ledger.learn_total(message.total_tokens)
        self._apply(Bootstrapped())

    def _reported(self, conn: int, message: messages.PartReport) -> None:
        self._keep_grant()
        problem = self._learn_and_check(message)
        if problem or self._grant is None:
            return self._violation(f"part {message.part} at {message.offset}+{message.tokens}: {problem}")
        if message.failure is not None:
            return self._send_ack(message.failure)
        self._phase, self._report = "landed", message
        if not self._job:
            self._take_up()

    def _take_up(self) -> None:
        report = self._report
        if report is None:
            raise AssertionError("a part is taken up once it has been reported")
        if self.options.window > 1 and not report.is_last:
            self._ask_second(report.total_tokens - report.offset - report.tokens)
        else:
            self._check()

    def _check(self) -> None:
        """Compare and copy out the part that has landed; if the next one has its grant, copying comes after the ack."""
        report, grant = self._report, self._grant
        if report is None or grant is None:
            raise AssertionError("a part is checked once it has been reported")
        held = HeldPart(self.part, report.offset, report.tokens, grant.blocks)
        self._phase = "checking" if self._second.grant is None else "verifying"
        copied = self._to_copy(held, report.is_last)
        if copied and self._phase == "checking":
            self._job = True
            self._do(CopyOut(copied, report.total_tokens, report.checksum))
        elif report.checksum is not None:
            self._job = True
            self._do(Verify(held, report.checksum))
        else:
            self._ack(None)

    def _to_copy(self, held: HeldPart, is_last: bool) -> tuple[HeldPart, ...]:
        """The parts that are to be copied out now that this one has landed."""
        if self.options.resume == "drain":
            return (held,)
        if self.options.resume == "extend" and is_last:
            return (*self._held, held)
        return ()

    def _learn_and_check(self, message: messages.PartReport) -> str:
        """Note the total; say what is wrong with a report, or nothing. `is_last` is derived here too."""
        grant = self._grant
        if self.state not in OPEN or self._phase != "offered":
            return f"not expected in {self.state}, grant {self._phase}"
        if grant is None or message.part != self.part or message.tokens > grant.tokens:
            return f"part {self.part} was granted {grant.tokens if grant else 0} tokens"
        try:
            self.ledger.learn_total(message.total_tokens)
            is_last = self.ledger.is_last(message.offset, message.tokens)
        except InvalidInput as error:
            return str(error)
        return "" if message.is_last is is_last else f"is_last={message.is_last} contradicts its range"

    def _copied(self, event: inputs.CopiedOut) -> None:
        self._job = False
        if self._phase == "draining":
            self._drained(event)
        elif self.state.is_terminal or self._phase == "checking":
            self._checked(event.failure)
        elif event.failure is not None:
            self._fail(self._cause(*event.failure, self._own_rank))
        else:
            self._copied_behind()

    def _verified(self, event: inputs.Verified) -> None:
        self._job = False
        self._checked(event.failure)

    def _checked(self, failure: tuple[FailureCode, str] | None) -> None:
        if self.state.is_terminal:
            return self._settle()
        self._ack(failure and self._cause(*failure, self._own_rank))

    def _ack(self, failure: Failure | None) -> None:
        copies_now = self._phase == "verifying" and failure is None
        self._phase = "acked" if failure is None else "rejected"
        self._send_ack(failure)
        report, grant = self._report, self._grant
        if copies_now and report is not None and grant is not None:
            self._job = True
            held = HeldPart(self.part, report.offset, report.tokens, grant.blocks)
            self._do(CopyOut((held,), report.total_tokens, None))

    def _send_ack(self, failure: Failure | None) -> None:
        self._send(self.options.conn, messages.PartAck(part=self.part, failure=failure, **self._ids()))

    def _outcome(self, conn: int, message: messages.PartOutcome) -> None:
        if message.failure is not None:
            event = PartDone(is_last=message.is_last, all_ok=False)
            legal = self.state is not KVPoll.Bootstrapping
            return self._peer_failed(message.failure, message.quiescent, event if legal else None)
        if self.state.is_terminal:  # it ended here while the outcome was on its way
            return None
        if self.options.dummy:
            expected = self.state in OPEN
        else:
            expected = self._phase == "acked" and self._report is not None
            expected = expected and message.is_last is self._report_is_last()
        if not expected or message.part != self.part or message.state is not outcome(message.is_last, (True,)):
            return self._violation(f"an outcome of part {message.part} while part {self.part} is {self._phase}")
        self._commit(message.is_last)

    def _report_is_last(self) -> bool:
        return self._report is not None and self._report.is_last

    def _commit(self, is_last: bool) -> None:
        report, grant = self._report, self._grant
        held = HeldPart(self.part, 0, 0, ())
        if report is not None and grant is not None:
            held = HeldPart(self.part, report.offset, report.tokens, grant.blocks)
            self.ledger.commit(report.offset, report.tokens)
        transport = report.transport if report else ""
        record = PartRecord(self.part, held.offset, held.tokens, is_last, transport, held.blocks)
        self.parts = (*self.parts, record)
        self._report, self._grant, self._phase, self._fencing = None, None, "none", NONE_FENCED
        self._apply(PartDone(is_last=is_last, all_ok=True))
        self.part += 1
        if not self.options.dummy:
            self._make_room(held, is_last)

    # The end

    def _tell_failure(self, failure: Failure, event: LifecycleEvent) -> None:
        if not self._announced:  # an abort of a rank the sender never heard of would be taken for an old one's
            self._send_reserve(None)
        self._send(self.options.conn, messages.Abort(failure=failure, quiescent=False, **self._ids()))

    def _peer_failed(self, failure: Failure, quiescent: bool, event: LifecycleEvent | None) -> None:
        """The sender's verdict; its word that nothing is in flight spares us the fence.

        Before Opened it is answered: the sender must know where the reservations of this life end.
        """
        self._fail(failure, event, tell=self.state is KVPoll.Bootstrapping)
        if quiescent:
            self._now_quiescent()

    def _peer_gone(self, event: inputs.PeerGone) -> None:
        code = event.code
        if code is FailureCode.PeerLost and self._phase == "acked" and self._report_is_last():
            code = FailureCode.OutcomeUnknown
        self._fail(self._cause(code, event.detail, self._own_rank))

    def _violation(self, what: str) -> None:
        self._fail(self._cause(FailureCode.ProtocolError, what, self._own_rank))

    def _clear(self, event: inputs.ClearRoom) -> None:
        super()._clear(event)
        self._settle()

    # Time, messages

    def _beat(self, event: inputs.BeatReceived) -> None:
        grew = event.bytes_done > self.bytes_done or event.tries > self._tries
        self._tries = max(self._tries, event.tries)
        self.bytes_done = max(self.bytes_done, event.bytes_done)
        kept = self._kept_waiting(self.gate)
        self._sender_gate, self._sender_alive = event.gate, event.host_alive
        gate = self._present_gate()
        if gate in (Gate.moving, Gate.waiting_outcome):
            renew = grew or event.working
        else:
            renew = kept or self._kept_waiting(gate)
        if renew:
            self._regate(renew=True)

    def _kept_waiting(self, gate: Gate) -> bool:
        if gate is Gate.waiting_ranks:
            return self._sender_alive and self._sender_gate is Gate.waiting_blocks
        return self._sender_alive and gate is Gate.queued

    def awaited(self) -> str:
        """What would open the present gate, for people."""
        blocks = f"{self.options.blocks} blocks did not come free in this endpoint's pool"
        copying = f"part {self.part - 1} is being copied out, its blocks are those for part {self.part}"
        reasons = {
            Gate.waiting_ranks: "the sender has not opened the room: is it open at that address, are all ranks here?",
            Gate.waiting_blocks: copying if self._phase == "copying" else blocks,
            Gate.queued: f"the sender has not sent part {self.part}",
            Gate.moving: f"part {self.part} makes no progress",
            Gate.waiting_outcome: f"part {self.part} is acknowledged, its outcome has not come",
            Gate.waiting_resume: f"resume() was not called for part {self.part}",
            Gate.closed: self._awaited_after_the_end(),
        }
        return reasons[self.gate]

    def _awaited_after_the_end(self) -> str:
        if self._loose:
            return f"the sender's word, or the fence, that nothing lands any more in part {max(self._loose)}"
        if self._job:
            return f"part {self.part} is being copied or checked"
        held = sorted(held.part for held in self._held)
        return f"release() of parts {held}, or clear()" if held else "clear()"

    def _message(self, event: inputs.MessageReceived) -> None:
        message = event.message
        handler = self._message_handlers.get(type(message))
        if handler is None or isinstance(message, messages.Bye) or event.conn != self.options.conn:
            return
        ours = message.receiver_generation == self.room_key.generation
        bound = self._sender_generation in (0, message.sender_generation)
        after_end = isinstance(message, (messages.Quiesced, messages.Abort, messages.PartOutcome))
        if not (ours and bound) or (self.state.is_terminal and not after_end):
            return
        handler(self, event.conn, message)

    def _on_abort(self, conn: int, message: messages.Abort) -> None:
        self._peer_failed(message.failure, message.quiescent, None)

    def _ids(self) -> dict[str, int]:
        return {
            "room": self.room_key.room,
            "rank": self.room_key.rank,
            "sender_generation": self._sender_generation,
            "receiver_generation": self.room_key.generation,
        }

    _handlers: ClassVar = {
        inputs.Start: _start,
        inputs.ResumeWith: _resume_with,
        inputs.ReleasePart: ReceiverBlocks._release_part,
        inputs.RevokeGrant: ReceiverBlocks._revoke,
        inputs.AbortRoom: Session._abort,
        inputs.ClearRoom: _clear,
        inputs.Crashed: Session._crashed,
        inputs.TimerFired: ReceiverFences._timer_fired,
        inputs.MessageReceived: _message,
        inputs.BeatReceived: _beat,
        inputs.PeerGone: _peer_gone,
        inputs.Granted: ReceiverBlocks._granted,
        inputs.GrantQueued: ReceiverBlocks._queued,
        inputs.GrantRefused: ReceiverBlocks._refused,
        inputs.Verified: _verified,
        inputs.CopiedOut: _copied,
        inputs.Fenced: ReceiverFences._fenced,
        inputs.Worked: Session._worked,
    }
    _message_handlers: ClassVar = {
        messages.Opened: _opened,
        messages.PartReport: _reported,
        messages.PartOutcome: _outcome,
        messages.Withdrawn: ReceiverBlocks._withdrawn,
        messages.FencePart: ReceiverFences._fence_part,
        messages.Abort: _on_abort,
        messages.Quiesced: ReceiverFences._quiesced,
    }
