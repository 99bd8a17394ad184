"""A receiver rank's side of a room. It judges only its own bytes; PartOutcome alone moves it on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from kvpoll_fsm import inputs, messages
from kvpoll_fsm.commands import CopyOut, Fence, Grant, HeldPart, Regrant, Release, Verify
from kvpoll_fsm.deadlines import Deadlines, Gate
from kvpoll_fsm.errors import Failure, FailureCode, InvalidInput
from kvpoll_fsm.events import Bootstrapped, LifecycleEvent, PartDone, Resumed
from kvpoll_fsm.ledger import Ledger
from kvpoll_fsm.lifecycle import outcome
from kvpoll_fsm.messages import BlockGrant
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.session import ROOM_TIMER, PartRecord, RoomKey, Session

__all__ = ["ReceiverOptions", "ReceiverSession"]

QUARANTINE_TIMER = "quarantine"
_ASKED = ("asked", "queued")
_MAKING_ROOM = (*_ASKED, "draining")
_GATES_BEFORE_A_PART = (Gate.waiting_ranks, Gate.waiting_resume, Gate.waiting_blocks)
"""Where the sender stands while some rank has not granted yet."""


@dataclass(frozen=True, slots=True)
class ReceiverOptions:
    """What a receiver's room is opened with.

    Attributes:
        conn: The connection to the sender's endpoint.
        ranks: How many receiver ranks the room has.
        blocks: Blocks of one grant; 0 for a dummy rank, which holds no data.
        block_tokens: Tokens per block.
        resume: "drain", "extend" or "manual".
        exact: The engine's own blocks for part 0, or () to let the pool choose.
    """

    conn: int
    ranks: int
    blocks: int
    block_tokens: int
    resume: str
    exact: tuple[int, ...] = ()

    @property
    def dummy(self) -> bool:
        """The rank counts, grants nothing, acks by definition and gets every outcome."""
        return self.blocks == 0


class ReceiverSession(Session):
    """One life of a room at one receiver rank.

    The grant for the current part goes through these phases:
    none -> asked -> (queued ->) offered -> checking -> acked -> none, offered -> withdrawing -> asked, and
    checking -> rejected, which only a failure follows.

    Attributes:
        options: What it was opened with.
        ledger: Tokens committed, as the sender's outcomes told.
        part: Number of the part that is next or under way.
    """

    def __init__(self, room_key: RoomKey, deadlines: Deadlines, options: ReceiverOptions) -> None:
        super().__init__(room_key, deadlines)
        self.options = options
        self.ledger = Ledger()
        self.part = 0
        self._sender_generation = 0
        self._phase = "none"
        self._grant: BlockGrant | None = None
        self._report: messages.PartReport | None = None
        self._sender_gate = Gate.waiting_ranks
        self._held: dict[int, HeldPart] = {}
        self._loose: set[int] = set()
        self._job = False
        self._exact = False
        self._announced = False

    # What the session is asked

    @property
    def gate(self) -> Gate:
        """What the room waits for."""
        if self.state.is_terminal:
            return Gate.closed
        if self._phase in _MAKING_ROOM:
            return Gate.waiting_blocks
        if self.state is KVPoll.Bootstrapping:
            return Gate.waiting_ranks
        if self._phase in ("checking", "acked", "rejected"):
            return Gate.waiting_outcome
        if self._phase == "none" and not self.options.dummy:
            return Gate.waiting_resume
        return Gate.moving if self._sender_gate is Gate.moving else Gate.queued

    @property
    def sender_generation(self) -> int:
        """The sender's life of the room this one is bound to; 0 before Opened."""
        return self._sender_generation

    @property
    def quiescent(self) -> bool:
        """Terminal, and no write of this room can land in blocks it was granted."""
        return self.state.is_terminal and not self._job and not self._loose and self._grant is None

    @property
    def finished(self) -> bool:
        """Terminal, quiescent, no blocks held, and the host has no more use for it."""
        return super().finished and not self._held

    @property
    def held_parts(self) -> tuple[HeldPart, ...]:
        """Committed parts whose blocks this room still holds (`extend`, `manual`)."""
        return tuple(self._held.values())

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
        copy.ledger, copy.part = self.ledger.clone(), self.part
        copy._sender_generation, copy._phase = self._sender_generation, self._phase
        copy._grant, copy._report, copy._sender_gate = self._grant, self._report, self._sender_gate
        copy._held, copy._loose, copy._job = dict(self._held), set(self._loose), self._job
        copy._exact, copy._announced = self._exact, self._announced
        return copy

    def key(self) -> tuple[Any, ...]:
        """Canonical plain value of the state."""
        own = (self.ledger.key(), self.part, self._sender_generation, self._phase, self._grant, self._report)
        held = tuple(self._held.values())
        flags = (self._job, self._exact, self._announced)
        return (*super().key(), *own, self._sender_gate, held, frozenset(self._loose), flags)

    # The host and its pool

    def _start(self, event: inputs.Start) -> None:
        self._arm(ROOM_TIMER, self.deadlines.room_timeout_s)
        if self.options.dummy:
            self._send_reserve(None)
        else:
            self._ask(self.options.exact)

    def _ask(self, exact: tuple[int, ...] = (), *, or_refuse: bool = False) -> None:
        self._phase, self._exact = "asked", bool(exact)
        self._do(Grant(self.part, len(exact) or self.options.blocks, exact, or_refuse))

    def _give_up_asking(self) -> None:
        """No grant is wanted any more; one that is on its way has lost its lease and will be ignored."""
        self._phase = "none"
        self._do(Release(self.part))

    def _queued(self, event: inputs.GrantQueued) -> None:
        if self._phase == "asked":
            self._phase = "queued"
            if self.state is KVPoll.Bootstrapping:
                self._send_reserve(None)

    def _granted(self, event: inputs.Granted) -> None:
        if self._phase not in _ASKED or event.part != self.part:
            return
        grant = BlockGrant(event.part, event.tokens, event.blocks, event.tokens_by_transport)
        self._phase, self._grant, self._sender_gate = "offered", grant, Gate.waiting_ranks
        if self.state is KVPoll.Bootstrapping:
            return self._send_reserve(grant)
        sent = self.ledger.covered_tokens
        self._send(self.options.conn, messages.Resume(sent_tokens=sent, grant=grant, **self._ids()))
        self._apply(Resumed())

    def _send_reserve(self, grant: BlockGrant | None) -> None:
        self._announced = True
        reserve = messages.Reserve(ranks=self.options.ranks, dummy=self.options.dummy, grant=grant, **self._ids())
        self._send(self.options.conn, reserve)

    def _refused(self, event: inputs.GrantRefused) -> None:
        if self._phase not in _ASKED or event.part != self.part:
            return
        self._give_up_asking()  # blocks that could not be exposed are leased already
        if event.failure is None and self._drains_instead():
            return self._drain_held()
        self._fail(event.failure or self._cause(FailureCode.PoolExhausted, "no blocks", self._own_rank))

    def _drains_instead(self) -> bool:
        """Whether blocks are held that must not be held while waiting for more."""
        return self.options.resume == "extend" and bool(self._held)

    def _resume_with(self, event: inputs.ResumeWith) -> None:
        if self.gate is Gate.waiting_resume:
            self._ask(event.blocks)

    def _release_part(self, event: inputs.ReleasePart) -> None:
        if self._held.pop(event.part, None) is not None:
            self._do(Release(event.part))

    def _revoke(self, event: inputs.RevokeGrant) -> None:
        """Ask for an unused grant back, unless it is in use for all we know, or the engine chose the blocks."""
        unused = self.state is KVPoll.Bootstrapping or self._sender_gate in _GATES_BEFORE_A_PART
        if self._phase == "offered" and unused and not (self._exact or self.state.is_terminal):
            self._phase = "withdrawing"
            self._send(self.options.conn, messages.Withdraw(part=self.part, **self._ids()))

    def _withdrawn(self, conn: int, message: messages.Withdrawn) -> None:
        if self._phase != "withdrawing" or message.part != self.part:
            return
        self._phase = "offered"
        if message.ok:
            self._grant = None
            self._do(Release(self.part))
            self._ask(or_refuse=self._drains_instead())

    def _keep_grant(self) -> None:
        """The sender uses the grant that was asked back: that answers the Withdraw."""
        if self._phase == "withdrawing":
            self._phase = "offered"

    # What the sender says

    def _opened(self, conn: int, message: messages.Opened) -> None:
        granted = self.options.dummy or self._phase in ("offered", "withdrawing")
        if self.state is not KVPoll.Bootstrapping or not granted or message.required != self.options.ranks:
            here = f"{self.options.ranks} in {self.state}, grant {self._phase}"
            return self._violation(f"Opened for {message.required} ranks, here {here}")
        self._sender_generation = message.sender_generation
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
        self._phase, self._report = "checking", message
        held = HeldPart(self.part, message.offset, message.tokens, self._grant.blocks)
        copied = self._to_copy(held, message.is_last)
        if copied:
            self._job = True
            self._do(CopyOut(copied, message.total_tokens, message.checksum))
        elif message.checksum is not None:
            self._job = True
            self._do(Verify(held, message.checksum))
        else:
            self._ack(None)

    def _to_copy(self, held: HeldPart, is_last: bool) -> tuple[HeldPart, ...]:
        """The parts that are copied out before this one is acknowledged."""
        if self.options.resume == "drain":
            return (held,)
        if self.options.resume == "extend" and is_last:
            return (*self._held.values(), held)
        return ()

    def _learn_and_check(self, message: messages.PartReport) -> str:
        """Note the total; say what is wrong with a report, or nothing. `is_last` is derived here too."""
        grant = self._grant
        if self.state not in (KVPoll.WaitingForInput, KVPoll.Transferring) or self._phase != "offered":
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
            return self._drained(event)
        self._checked(event.failure)

    def _verified(self, event: inputs.Verified) -> None:
        self._job = False
        self._checked(event.failure)

    def _checked(self, failure: tuple[FailureCode, str] | None) -> None:
        if self.state.is_terminal:
            return self._settle()
        self._ack(failure and self._cause(*failure, self._own_rank))

    def _ack(self, failure: Failure | None) -> None:
        self._phase = "acked" if failure is None else "rejected"
        self._send_ack(failure)

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
            expected = self.state in (KVPoll.WaitingForInput, KVPoll.Transferring)
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
        self.parts.append(PartRecord(self.part, held.offset, held.tokens, is_last, transport, held.blocks))
        self._report, self._grant, self._phase = None, None, "none"
        self._apply(PartDone(is_last=is_last, all_ok=True))
        self.part += 1
        if not self.options.dummy:
            self._make_room(held, is_last)

    # Making room for the next part

    def _make_room(self, held: HeldPart, is_last: bool) -> None:
        if self.options.resume != "drain":
            self._held[held.part] = held
        if is_last and self.options.resume == "drain":
            self._do(Release(held.part))
        elif is_last and self.options.resume == "extend":
            self._release_held()
        elif not is_last and self.options.resume == "drain":
            self._phase = "asked"
            self._do(Regrant(held.part, self.part, self._wanted(len(held.blocks))))
        elif not is_last and self.options.resume == "extend":
            self._ask(or_refuse=self._drains_instead())

    def _wanted(self, granted: int) -> int:
        """Blocks the rest of the room needs, at most those granted so far."""
        remaining = self.ledger.remaining_tokens or 0
        return min(granted, -(-remaining // self.options.block_tokens))

    def _drain_held(self) -> None:
        """`extend` found no free blocks: copy out what is held and use those blocks again."""
        self._phase, self._job = "draining", True
        self._do(CopyOut(tuple(self._held.values()), self.ledger.total_tokens or 0, None))

    def _drained(self, event: inputs.CopiedOut) -> None:
        self._phase = "none"
        if self.state.is_terminal:
            return self._settle()
        if event.failure is not None:
            self._fail(self._cause(*event.failure, self._own_rank))
            return
        self._release_held()
        self._ask()

    def _release_held(self) -> None:
        for part in list(self._held):
            del self._held[part]
            self._do(Release(part))

    # The end

    def _tell_failure(self, failure: Failure, event: LifecycleEvent) -> None:
        if not self._announced:  # an abort of a rank the sender never heard of would be taken for an old one's
            self._send_reserve(None)
        self._send(self.options.conn, messages.Abort(failure=failure, quiescent=False, **self._ids()))

    def _on_failed(self) -> None:
        if self._phase in _ASKED:
            self._give_up_asking()
        if self._phase in ("offered", "withdrawing"):
            self._loose.add(self.part)
            self._do(Fence(self.part, force=False))
            self._arm(QUARANTINE_TIMER, self.deadlines.quarantine_max_s)
        self._settle()

    def _settle(self) -> None:
        """After the end: free the blocks nothing writes to or reads from any more."""
        if self._job:
            return
        if self._grant is not None and self.part not in self._loose:
            self._grant = None
            self._do(Release(self.part))
        if self.options.resume != "manual" or self._cleared:
            self._release_held()

    def _now_quiescent(self) -> None:
        """Every write of this room has ended: by the sender's word, or by the fence."""
        self._loose.clear()
        self._disarm(QUARANTINE_TIMER)
        self._settle()

    def _fenced(self, event: inputs.Fenced) -> None:
        if event.part in self._loose:
            self._send(self.options.conn, messages.Quiesced(**self._ids()))
            self._now_quiescent()

    def _quiesced(self, conn: int, message: messages.Quiesced) -> None:
        if self.state.is_terminal:
            self._now_quiescent()

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

    def _timer_fired(self, event: inputs.TimerFired) -> None:
        if event.name == QUARANTINE_TIMER and self._armed.get(event.name) == event.epoch:
            del self._armed[event.name]
            for part in sorted(self._loose):
                self._do(Fence(part, force=True))
            return
        super()._timer_fired(event)

    def _beat(self, event: inputs.BeatReceived) -> None:
        grew = event.bytes_done > self.bytes_done
        self.bytes_done = max(self.bytes_done, event.bytes_done)
        self._sender_gate = event.gate
        if self.gate in (Gate.moving, Gate.waiting_outcome):
            renew = grew or event.working
        elif self.gate is Gate.waiting_ranks:
            renew = event.gate is Gate.waiting_blocks and event.host_alive
        else:
            renew = self.gate is Gate.queued and event.host_alive
        if renew:
            self._regate(renew=True)

    def awaited(self) -> str:
        """What would open the present gate, for people."""
        reasons = {
            Gate.waiting_ranks: "the sender has not opened the room; is it open there, are all ranks here?",
            Gate.waiting_blocks: f"{self.options.blocks} blocks did not come free in this endpoint's pool",
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
        held = sorted(self._held)
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
        """The fields that address this life of the room."""
        return {
            "room": self.room_key.room,
            "rank": self.room_key.rank,
            "sender_generation": self._sender_generation,
            "receiver_generation": self.room_key.generation,
        }

    _handlers: ClassVar = {
        inputs.Start: _start,
        inputs.ResumeWith: _resume_with,
        inputs.ReleasePart: _release_part,
        inputs.RevokeGrant: _revoke,
        inputs.AbortRoom: Session._abort,
        inputs.ClearRoom: _clear,
        inputs.Crashed: Session._crashed,
        inputs.TimerFired: _timer_fired,
        inputs.MessageReceived: _message,
        inputs.BeatReceived: _beat,
        inputs.PeerGone: _peer_gone,
        inputs.Granted: _granted,
        inputs.GrantQueued: _queued,
        inputs.GrantRefused: _refused,
        inputs.Verified: _verified,
        inputs.CopiedOut: _copied,
        inputs.Fenced: _fenced,
        inputs.Worked: Session._worked,
    }
    _message_handlers: ClassVar = {
        messages.Opened: _opened,
        messages.PartReport: _reported,
        messages.PartOutcome: _outcome,
        messages.Withdrawn: _withdrawn,
        messages.Abort: _on_abort,
        messages.Quiesced: _quiesced,
    }
