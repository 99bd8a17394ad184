"""The sender's side of a room. It decides the outcome of every part, once, for all ranks.

Where the rule for `is_last` acts: `SenderSession._decide`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from msgspec import structs

from kvpoll_fsm import inputs, messages
from kvpoll_fsm.commands import CancelPart, Grant, Release
from kvpoll_fsm.deadlines import Gate
from kvpoll_fsm.errors import Failure, FailureCode
from kvpoll_fsm.events import LifecycleEvent, PartDone
from kvpoll_fsm.ledger import is_last_part, part_tokens
from kvpoll_fsm.lifecycle import OPEN
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.rank_slot import RankSlot
from kvpoll_fsm.sender_attempts import SenderAttempts
from kvpoll_fsm.sender_ranks import SenderOptions, SenderRanks
from kvpoll_fsm.session import (
    BOOTSTRAPPING,
    CLOSED,
    GATE_TIMER,
    MOVING,
    QUEUED,
    ROOM_TIMER,
    WAITING_BLOCKS,
    WAITING_OUTCOME,
    WAITING_RANKS,
    WAITING_RESUME,
    PartRecord,
    Session,
)

__all__ = ["RankSlot", "SenderOptions", "SenderSession"]

_GATES_OF_RANKS = (Gate.waiting_ranks, Gate.waiting_resume)
"""Where the room waits for what its receivers do."""


class SenderSession(SenderAttempts):
    """One life of a room at its sender.

    `SenderRanks` says how its receivers come and grant, `SenderAttempts` what follows on a write that failed.
    """

    __slots__ = ()

    # What the session is asked

    def _present_gate(self) -> Gate:
        """What the room waits for now."""
        if self.state.is_terminal:
            return CLOSED
        if self.state is BOOTSTRAPPING:
            return WAITING_RANKS
        if self._phase == "leasing":
            return WAITING_BLOCKS
        if self._phase == "moving":
            unreported = any(not (slot.reported or slot.dummy) for slot in self.slots.values())
            return MOVING if unreported else WAITING_OUTCOME
        return QUEUED if self._all_granted() else WAITING_RESUME

    def _told_gate(self, gate: Gate) -> Gate:
        """What heartbeats say: a sender whose receivers wait for blocks waits for blocks."""
        return Gate.waiting_blocks if gate in _GATES_OF_RANKS and self._ranks_without_blocks() else gate

    def _nothing_lands(self) -> bool:
        """Whether a room that is terminal is quiescent, too."""
        return not (self._blocks or any(slot.in_flight or slot.reading for slot in self.slots.values()))

    def clone(self) -> SenderSession:
        """A copy that shares nothing mutable."""
        copy = SenderSession(self.room_key, self.deadlines, self.options)
        self._copy_base(copy)
        copy.required, copy.ready_tokens, copy.staged = self.required, self.ready_tokens, self.staged
        copy._turned_away, copy.tries = self._turned_away, self.tries
        copy.slots = {rank: structs.replace(slot) for rank, slot in self.slots.items()}
        copy.ledger = self.ledger.clone()
        copy.part, copy._tokens, copy._phase, copy._blocks = self.part, self._tokens, self._phase, self._blocks
        return copy

    def key(self) -> tuple[Any, ...]:
        """Canonical plain value of the state."""
        slots = tuple((rank, slot.key()) for rank, slot in sorted(self.slots.items()))
        own = (self.required, self.ledger.key(), self.ready_tokens, self.staged, self.part)
        return (*super().key(), *own, self._tokens, self._phase, self._blocks, slots)

    # The host

    def _start(self, event: inputs.Start) -> None:
        self._arm(ROOM_TIMER, self.deadlines.room_timeout_s)

    def _supplied(self, event: inputs.Supplied) -> None:
        if self.state.is_terminal:
            return
        self.ledger.learn_total(event.total_tokens)
        self.ready_tokens = max(self.ready_tokens, event.ready_tokens)
        self.staged = event.staged
        self._try_part()

    # A part

    def _try_part(self) -> None:
        """Start the next part if grants and data are there."""
        remaining = self.ledger.remaining_tokens
        idle = self._phase == "idle" and self.state in OPEN
        if not idle or not remaining or not self._all_granted():
            return
        capacities = tuple(slot.grant.tokens for slot in self.slots.values() if slot.grant)
        if self.staged and self.options.max_part_tokens:
            capacities += (self.options.max_part_tokens,)
        self._tokens = part_tokens(remaining, capacities, self.ready_tokens - self.ledger.covered_tokens)
        if self._tokens < 1:
            return
        if self.staged:
            self._phase = "leasing"
            self._do(Grant(self.part, -(-self._tokens // self.options.block_tokens)))
        else:
            self._start_part(())

    def _granted(self, event: inputs.Granted) -> None:
        if self._phase != "leasing" or event.part != self.part:
            return
        self._start_part(event.blocks)

    def _refused(self, event: inputs.GrantRefused) -> None:
        if self._phase == "leasing":
            detail = "the source pool cannot hold the part"
            self._fail(event.failure or self._cause(FailureCode.PoolExhausted, detail))

    def _start_part(self, blocks: tuple[int, ...]) -> None:
        self._phase, self._blocks = "moving", blocks
        live = {rank: slot for rank, slot in self.slots.items() if not slot.dummy}
        for slot in live.values():
            slot.begin()
        self._issue(tuple(self._target(rank, slot) for rank, slot in live.items()), attempt=0)

    def _progress(self, event: inputs.Progress) -> None:
        if event.bytes_done > self.bytes_done:
            self.bytes_done, self.news = event.bytes_done, True
            if self.gate is Gate.moving:
                self._regate(renew=True)

    def _report(
        self, rank: int, slot: RankSlot, transport: str, checksum: bytes | None, failure: Failure | None
    ) -> None:
        """The last write to a rank has ended, or no transport is left: ask for its verdict, or why that is."""
        slot.reported = True
        total = self.ledger.total_tokens or 0
        offset = self.ledger.covered_tokens
        report = messages.PartReport(
            part=self.part,
            offset=offset,
            tokens=self._tokens,
            total_tokens=total,
            is_last=is_last_part(offset, self._tokens, total),
            transport=transport,
            checksum=checksum,
            failure=failure,
            **self._ids(rank),
        )
        self._send(slot.conn, report)

    def _ack(self, conn: int, message: messages.PartAck) -> None:
        slot = self.slots[message.rank]
        if self._phase != "moving" or not slot.reported or message.part != self.part or slot.poll is not None:
            return self._violation(message.rank, f"an ack of part {message.part} that was not asked for")
        if message.failure is None and not slot.transports:
            return self._violation(message.rank, f"an ack of part {self.part}, whose writes were reported as failed")
        slot.poll = message.failure is None
        if message.failure is not None:
            return self._part_failed(replace(message.failure, rank=message.rank))
        polls = [slot.poll for slot in self.slots.values() if not slot.dummy]
        if all(poll is not None for poll in polls):
            self._decide()

    def _decide(self) -> None:
        """Every rank has the part: apply the outcome rule, once, and tell all."""
        offset, tokens, blocks = self.ledger.covered_tokens, self._tokens, self._blocks
        is_last = self.ledger.commit(offset, tokens)
        used = [slot for slot in self.slots.values() if not slot.dummy]
        transport = ",".join(dict.fromkeys(slot.transports[0] for slot in used))
        passed_over = "; ".join(dict.fromkeys(why for slot in used for why in slot.passed_over))
        record = PartRecord(self.part, offset, tokens, is_last, transport, blocks, passed_over)
        self.parts = (*self.parts, record)
        self._apply(PartDone(is_last=is_last, all_ok=True))
        self._tell_outcome(is_last, None)
        for slot in self.slots.values():
            slot.grant, slot.poll, slot.reported = None, None, False
        self._release_source()
        self.part += 1
        self._phase = "idle"
        self._take_second_grants()

    def _take_second_grants(self) -> None:
        """The next part begins at once if every rank had granted it while this one was under way."""
        for rank, slot in self.slots.items():
            grant, slot.second = slot.second, None
            if grant is not None and not self.state.is_terminal:
                self._take_grant(rank, slot, grant)
        self._try_resume()

    def _part_failed(self, failure: Failure) -> None:
        """Some rank does not have the part: the same rule, decided at once."""
        total, offset = self.ledger.total_tokens or 0, self.ledger.covered_tokens
        self._fail(failure, PartDone(is_last=is_last_part(offset, self._tokens, total), all_ok=False))

    def _tell_outcome(self, is_last: bool, failure: Failure | None) -> None:
        for rank, slot in self.slots.items():
            slot.told = self.state.is_terminal and not slot.in_flight
            told = messages.PartOutcome(
                part=self.part,
                is_last=is_last,
                state=self.state,
                failure=failure,
                quiescent=not slot.in_flight,
                **self._ids(rank),
            )
            self._send(slot.conn, told)

    # The end

    def _tell_failure(self, failure: Failure, event: LifecycleEvent) -> None:
        if isinstance(event, PartDone):
            self._tell_outcome(event.is_last, failure)
        else:
            self._tell_abort(failure)

    def _on_failed(self) -> None:
        if any(slot.writing for slot in self.slots.values()):
            self._do(CancelPart(self.part))
        if self._phase == "leasing":
            self._phase = "idle"
            self._do(Release(self.part))
        self._settle()

    def _tell_abort(self, failure: Failure) -> None:
        for rank, slot in self.slots.items():
            if slot.gave_up:
                continue
            slot.told = not slot.in_flight
            abort = messages.Abort(failure=failure, quiescent=slot.told, **self._ids(rank))
            self._send(slot.conn, abort)

    def _settle(self) -> None:
        """After the end: tell each rank when nothing is in flight to it, free the source when nothing reads it."""
        for rank, slot in self.slots.items():
            if not slot.told and not slot.in_flight:
                slot.told = True
                self._send(slot.conn, messages.Quiesced(**self._ids(rank)))
        if not any(slot.writing or slot.reading for slot in self.slots.values()):
            self._release_source()

    def _release_source(self) -> None:
        if self._blocks:
            self._blocks = ()
            self._do(Release(self.part))

    def _aborted(self, conn: int, message: messages.Abort) -> None:
        slot = self.slots[message.rank]
        if slot.contested and self.state is KVPoll.Bootstrapping:
            return self._vacate(message.rank, slot)
        slot.gave_up = True
        self._fail(replace(message.failure, rank=message.rank))

    def _peer_gone(self, event: inputs.PeerGone) -> None:
        lost = [rank for rank, slot in self.slots.items() if slot.conn == event.conn]
        if self.state is KVPoll.Bootstrapping:
            for rank in lost:
                self._forget(rank)
            return
        for rank in lost:
            self.slots[rank].close()
        if lost:
            self._fail(self._cause(event.code, event.detail, lost[0]))
            self._settle()

    def _fenced_there(self, conn: int, message: messages.Quiesced) -> None:
        """A rank that ended the room has made sure that nothing lands in it any more."""
        slot = self.slots[message.rank]
        if self.state.is_terminal and slot.in_flight:
            slot.close()
            self._settle()

    # Time, messages

    def _beat(self, event: inputs.BeatReceived) -> None:
        slot = self.slots.get(event.rank)
        if slot is None:
            return
        if event.working:
            self._worked(inputs.Worked())
        waited, slot.waits_for_blocks = slot.waits_for_blocks, event.gate is Gate.waiting_blocks and event.host_alive
        if (waited or slot.waits_for_blocks) and self.gate in _GATES_OF_RANKS:
            self._regate(renew=True)

    def _kept_waiting(self, gate: Gate) -> bool:
        return gate in _GATES_OF_RANKS and any(slot.waits_for_blocks for slot in self.slots.values())

    def _gate_expired(self, event: inputs.TimerFired) -> None:
        if self.gate is Gate.queued and event.host_alive:
            self._arm(GATE_TIMER, self.deadlines.input_s)
        elif self.gate is not Gate.moving or not self._hurry():
            super()._gate_expired(event)

    def awaited(self) -> str:
        """What would open the present gate, for people."""
        missing = [r for r in range(self.required or 0) if r not in self.slots]
        late = [r for r, s in self.slots.items() if not s.dummy and not (s.grant and s.reachable)]
        unacked = [r for r, s in self.slots.items() if not s.dummy and not s.poll]
        ranks = f"ranks not here: {missing or 'unknown'}; without a usable grant: {late}"
        reasons = {
            Gate.waiting_ranks: ranks + self._turned_away,
            Gate.waiting_blocks: "no free source blocks in this endpoint's pool",
            Gate.queued: f"the host has {self.ready_tokens} tokens ready of {self.ledger.total_tokens}",
            Gate.moving: f"no bytes landed; part {self.part} to ranks {unacked}",
            Gate.waiting_outcome: f"no answer for part {self.part} from ranks {unacked}",
            Gate.waiting_resume: f"no grant for part {self.part} from ranks {late}",
            Gate.closed: self._awaited_after_the_end(),
        }
        return reasons[self.gate]

    def _awaited_after_the_end(self) -> str:
        busy = [rank for rank, slot in self.slots.items() if slot.in_flight or slot.reading]
        return f"writes to ranks {busy} have not ended" if busy else "clear()"

    def _message(self, event: inputs.MessageReceived) -> None:
        message = event.message
        handler = self._message_handlers.get(type(message))
        if handler is None or isinstance(message, messages.Bye):
            return
        bound = self.binds(event.conn, message.rank, message.receiver_generation)
        over = self.state.is_terminal and not isinstance(message, (messages.Quiesced, messages.PartFenced))
        if over or not (bound or isinstance(message, messages.Reserve)):
            return
        handler(self, event.conn, message)

    _handlers: ClassVar = {
        inputs.Start: _start,
        inputs.Supplied: _supplied,
        inputs.AbortRoom: Session._abort,
        inputs.ClearRoom: Session._clear,
        inputs.Crashed: Session._crashed,
        inputs.TimerFired: Session._timer_fired,
        inputs.MessageReceived: _message,
        inputs.BeatReceived: _beat,
        inputs.PeerGone: _peer_gone,
        inputs.Preflighted: SenderRanks._preflighted,
        inputs.Reconsider: SenderRanks._reconsider,
        inputs.Probing: SenderAttempts._probing,
        inputs.Granted: _granted,
        inputs.GrantRefused: _refused,
        inputs.Progress: _progress,
        inputs.PartWritten: SenderAttempts._written,
        inputs.RankQuiesced: SenderAttempts._rank_quiesced,
        inputs.Worked: Session._worked,
    }
    _message_handlers: ClassVar = {
        messages.Reserve: SenderRanks._reserve,
        messages.Resume: SenderRanks._resume,
        messages.Withdraw: SenderRanks._withdraw,
        messages.PartAck: _ack,
        messages.PartFenced: SenderAttempts._part_fenced,
        messages.Abort: _aborted,
        messages.Quiesced: _fenced_there,
    }
