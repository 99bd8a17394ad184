"""The sender's side of a room. It decides the outcome of every part, once, for all ranks.

Where the rule for `is_last` acts: `SenderSession._decide`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from kvpoll_fsm import inputs, messages
from kvpoll_fsm.commands import CancelPart, Grant, Preflight, Release, StartPart, Target
from kvpoll_fsm.deadlines import Deadlines, Gate
from kvpoll_fsm.errors import Failure, FailureCode
from kvpoll_fsm.events import Bootstrapped, LifecycleEvent, PartDone, Resumed
from kvpoll_fsm.ledger import Ledger, is_last_part, part_tokens
from kvpoll_fsm.messages import BlockGrant
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.rank_slot import RankSlot
from kvpoll_fsm.selection import Policy
from kvpoll_fsm.session import GATE_TIMER, ROOM_TIMER, PartRecord, RoomKey, Session

__all__ = ["RankSlot", "SenderOptions", "SenderSession"]


@dataclass(frozen=True, slots=True)
class SenderOptions:
    """What a sender's room is opened with.

    Attributes:
        required_ranks: Receiver ranks there must be, or None to take it from their messages.
        policy: Which transports may carry the room.
        transports: Those this endpoint has.
        block_tokens: Tokens per source block.
        max_part_tokens: Most tokens of a staged part (what the source pool holds), 0 for no limit.
    """

    required_ranks: int | None
    policy: Policy
    transports: tuple[str, ...]
    block_tokens: int
    max_part_tokens: int = 0


class SenderSession(Session):
    """One life of a room at its sender.

    Attributes:
        options: What it was opened with.
        slots: The receiver ranks that have reserved.
        ledger: Tokens committed on every rank.
        ready_tokens: How far the host has data.
    """

    def __init__(self, room_key: RoomKey, deadlines: Deadlines, options: SenderOptions) -> None:
        super().__init__(room_key, deadlines)
        self.options = options
        self.required = options.required_ranks
        self.slots: dict[int, RankSlot] = {}
        self.ledger = Ledger()
        self.ready_tokens = 0
        self.staged = False
        self.part = 0
        self._tokens = 0
        self._phase = "idle"
        self._turned_away = ""
        self._blocks: tuple[int, ...] = ()

    # What the session is asked

    @property
    def gate(self) -> Gate:
        """What the room waits for."""
        if self.state.is_terminal:
            return Gate.closed
        if self.state is KVPoll.Bootstrapping:
            return Gate.waiting_ranks
        if self._phase == "leasing":
            return Gate.waiting_blocks
        if self._phase == "moving":
            unreported = any(not (s.reported or s.dummy) for s in self.slots.values())
            return Gate.moving if unreported else Gate.waiting_outcome
        return Gate.queued if self._all_granted() else Gate.waiting_resume

    @property
    def told_gate(self) -> Gate:
        """The gate heartbeats speak of: a sender whose receivers wait for blocks waits for blocks."""
        if self.gate in (Gate.waiting_ranks, Gate.waiting_resume) and self._ranks_without_blocks():
            return Gate.waiting_blocks
        return self.gate

    @property
    def quiescent(self) -> bool:
        """Terminal, and no write of this room can land or read its source any more."""
        busy = any(slot.in_flight or slot.reading for slot in self.slots.values())
        return self.state.is_terminal and not busy and not self._blocks

    @property
    def was_opened(self) -> bool:
        """All ranks were there once, and were told Opened."""
        return KVPoll.WaitingForInput in self.history

    def binds(self, conn: int, rank: int, generation: int) -> bool:
        """Whether this receiver's life of the room is the one bound here."""
        slot = self.slots.get(rank)
        return slot is not None and (slot.conn, slot.generation) == (conn, generation)

    def beats(self, conn: int, host_alive: bool, working: bool) -> Iterator[messages.Beat]:
        """What a heartbeat through `conn` says of this room, to each rank there."""
        gate = self.told_gate.value
        for rank, slot in self.slots.items():
            if slot.conn == conn:
                yield messages.Beat(
                    to_sender=False,
                    **self._ids(rank),
                    gate=gate,
                    bytes_done=self.bytes_done,
                    host_alive=host_alive,
                    working=working,
                )

    def admits(self, conn: int, reserve: messages.Reserve) -> bool:
        """Whether a reservation is for this life of the room, and not for a later one."""
        if self.state.is_terminal or reserve.sender_generation not in (0, self.room_key.generation):
            return False
        bound = self.binds(conn, reserve.rank, reserve.receiver_generation)
        return bound or self.state is KVPoll.Bootstrapping

    def clone(self) -> SenderSession:
        """A copy that shares nothing mutable."""
        copy = SenderSession(self.room_key, self.deadlines, self.options)
        self._copy_base(copy)
        copy.required, copy.ready_tokens, copy.staged = self.required, self.ready_tokens, self.staged
        copy._turned_away = self._turned_away
        copy.slots = {rank: replace(slot) for rank, slot in self.slots.items()}
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

    # Receivers come

    def _reserve(self, conn: int, message: messages.Reserve) -> None:
        problem = self._problem_of(conn, message)
        bound = self.binds(conn, message.rank, message.receiver_generation)
        if problem and bound:
            return self._violation(message.rank, problem)
        if problem:
            return self._turn_away(conn, message, problem)
        if not bound:
            contested = self._replaced(message.rank, conn)
            slot = RankSlot(conn, message.receiver_generation, message.dummy, contested=contested)
            self.slots[message.rank] = slot
        if message.grant is not None:
            self._take_grant(message.rank, self.slots[message.rank], message.grant)
        self._try_bootstrap()

    def _problem_of(self, conn: int, message: messages.Reserve) -> str:
        """What is wrong with a reservation, or nothing. The first one may tell how many ranks there are."""
        if self.required is None and message.rank < message.ranks:
            self.required = message.ranks
        required = self.required or message.ranks
        if message.ranks != required or message.rank >= required:
            return f"rank {message.rank} of {message.ranks} where {required} ranks are required"
        bound = self.binds(conn, message.rank, message.receiver_generation)
        if bound and (self.state is not KVPoll.Bootstrapping or message.dummy is not self.slots[message.rank].dummy):
            return f"rank {message.rank} reserved again in {self.state}"
        return ""

    def _turn_away(self, conn: int, message: messages.Reserve, problem: str) -> None:
        """Tell a receiver that has no place in the room; it may be a stale one, so those that have wait on."""
        self._turned_away = f"; turned away: {problem}"
        ids = {"room": message.room, "rank": message.rank, "sender_generation": self.room_key.generation}
        failure = self._cause(FailureCode.ProtocolError, problem, message.rank)
        generation = message.receiver_generation
        self._send(conn, messages.Abort(failure=failure, quiescent=True, receiver_generation=generation, **ids))

    def _replaced(self, rank: int, conn: int) -> bool:
        """Tell the life of a rank that another one takes the place of; nothing was sent to it yet.

        Returns:
            Whether the two are on different endpoints, so that nobody can say which of them is the later.
        """
        before = self.slots.get(rank)
        if before is None:
            return False
        detail = f"another life of rank {rank} reserved the room after this one"
        failure = self._cause(FailureCode.Displaced, detail, rank)
        self._send(before.conn, messages.Abort(failure=failure, quiescent=True, **self._ids(rank)))
        return before.contested or before.conn != conn

    def _resume(self, conn: int, message: messages.Resume) -> None:
        slot = self.slots[message.rank]
        expected = self._phase == "idle" and self.state is KVPoll.Transferring and slot.grant is None
        if not expected or slot.dummy or message.sent_tokens != self.ledger.covered_tokens:
            said = f"Resume at {message.sent_tokens} tokens for part {message.grant.part}"
            return self._violation(message.rank, f"{said} while part {self.part} is at {self.ledger.covered_tokens}")
        self._take_grant(message.rank, slot, message.grant)
        self._try_resume()

    def _take_grant(self, rank: int, slot: RankSlot, grant: BlockGrant) -> None:
        if grant.part != self.part or slot.dummy or slot.grant is not None:
            return self._violation(rank, f"a grant for part {grant.part} while part {self.part} is next")
        slot.grant, slot.waits_for_blocks = grant, False
        offered = self.options.policy.candidates(self.options.transports, grant.transports)
        if slot.reachable and slot.transports[0] in offered:
            slot.transports = tuple(name for name in slot.transports if name in offered)
            return
        slot.transports, slot.reachable = offered, False
        slot.passed_over = self.options.policy.missing(self.options.transports, grant.transports)
        self._preflight(rank, slot, f"offered by rank {rank}: {', '.join(grant.transports)}")

    def _preflight(self, rank: int, slot: RankSlot, why_none: str) -> None:
        if slot.transports:
            self._do(Preflight(rank, slot.conn, slot.transports[0]))
            return
        ours = f"policy {self.options.policy}, here: {', '.join(self.options.transports)}"
        detail = f"no common transport works: {ours}; {why_none}"
        self._fail(self._cause(FailureCode.TransportUnavailable, detail, rank))

    def _preflighted(self, event: inputs.Preflighted) -> None:
        slot = self.slots.get(event.rank)
        current = slot is not None and slot.conn == event.conn and slot.transports[:1] == (event.transport,)
        if slot is None or not current or self.state.is_terminal or slot.reachable:
            return
        if not event.ok:
            detail = f"{event.transport} to rank {event.rank}: {event.detail}"
            slot.transports, slot.passed_over = slot.transports[1:], (*slot.passed_over, detail)
            if slot.transports or self._phase != "moving":
                return self._preflight(event.rank, slot, detail)
            failure = self._cause(FailureCode.TransportFailed, "; ".join(slot.passed_over), event.rank)
            return self._report(event.rank, slot, event.transport, None, failure)
        slot.reachable = True
        if self._phase == "moving" and not (slot.in_flight or slot.reported):
            self._reissue(event.rank, slot)
        self._try_bootstrap()
        self._try_resume()

    def _try_bootstrap(self) -> None:
        if self.state is not KVPoll.Bootstrapping or self.required != len(self.slots) or not self._all_granted():
            return
        if all(slot.dummy for slot in self.slots.values()):
            return self._violation(0, "every rank is a dummy: there is nobody to send to")
        self._apply(Bootstrapped())
        total, required = self.ledger.total_tokens, len(self.slots)
        for rank, slot in self.slots.items():
            self._send(slot.conn, messages.Opened(required=required, total_tokens=total, **self._ids(rank)))
        self._try_part()

    def _try_resume(self) -> None:
        if self.state is KVPoll.Transferring and self._phase == "idle" and self._all_granted():
            self._apply(Resumed())
            self._try_part()

    def _all_granted(self) -> bool:
        return all(slot.dummy or (slot.grant and slot.reachable) for slot in self.slots.values())

    def _withdraw(self, conn: int, message: messages.Withdraw) -> None:
        slot = self.slots[message.rank]
        unused = self._phase == "idle" and slot.grant is not None and slot.grant.part == message.part
        ok = unused and not self._committed_to_part()
        if ok:
            slot.grant = None
        self._send(conn, messages.Withdrawn(part=message.part, ok=ok, **self._ids(message.rank)))

    def _committed_to_part(self) -> bool:
        """All ranks have granted and know it, so the part will start; no grant can be taken back."""
        return self.state is not KVPoll.Bootstrapping and self._all_granted()

    # A part

    def _try_part(self) -> None:
        """Start the next part if grants and data are there."""
        remaining = self.ledger.remaining_tokens
        idle = self._phase == "idle" and self.state in (KVPoll.WaitingForInput, KVPoll.Transferring)
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
            slot.writing, slot.attempt = True, 0
        self._issue(tuple(self._target(rank, slot) for rank, slot in live.items()), attempt=0)

    def _issue(self, targets: tuple[Target, ...], attempt: int) -> None:
        offset = self.ledger.covered_tokens
        self._do(StartPart(self.part, offset, self._tokens, self._blocks, targets, attempt))

    def _target(self, rank: int, slot: RankSlot) -> Target:
        if slot.grant is None:
            raise AssertionError("a part starts only with every rank's grant")
        return Target(rank, slot.conn, slot.transports[0], slot.grant)

    def _reissue(self, rank: int, slot: RankSlot) -> None:
        """The same range and part number again, on the next transport; the first writer is quiescent."""
        slot.writing, slot.attempt = True, slot.attempt + 1
        self._issue((self._target(rank, slot),), slot.attempt)

    def _progress(self, event: inputs.Progress) -> None:
        if event.bytes_done > self.bytes_done:
            self.bytes_done = event.bytes_done
            if self.gate is Gate.moving:
                self._regate(renew=True)

    def _written(self, event: inputs.PartWritten) -> None:
        slot = self.slots.get(event.rank)
        if slot is None or not slot.writing or (event.part, event.attempt) != (self.part, slot.attempt):
            return
        slot.writing, slot.reading = False, not (event.ok or event.source_free)
        slot.landing = not (event.ok or event.quiescent or slot.closed)
        if self.state.is_terminal:
            return self._settle()
        if event.ok:
            return self._report(event.rank, slot, event.transport, event.checksum, None)
        slot.transports, slot.reachable = slot.transports[1:], False
        detail = f"{event.transport} to rank {event.rank}: {event.detail}"
        slot.passed_over = (*slot.passed_over, detail)
        if not slot.transports:
            failure = self._cause(FailureCode.TransportFailed, "; ".join(slot.passed_over), event.rank)
            return self._report(event.rank, slot, event.transport, event.checksum, failure)
        if not (slot.landing or slot.reading):
            self._preflight(event.rank, slot, detail)

    def _rank_quiesced(self, event: inputs.RankQuiesced) -> None:
        slot = self.slots.get(event.rank)
        if slot is None or not (slot.landing or slot.reading):
            return
        slot.landing = slot.reading = False
        if self.state.is_terminal:
            self._settle()
        elif not (slot.reachable or slot.reported):
            self._preflight(event.rank, slot, "the transport before it failed")

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
        self.parts.append(PartRecord(self.part, offset, tokens, is_last, transport, blocks, passed_over))
        self._apply(PartDone(is_last=is_last, all_ok=True))
        self._tell_outcome(is_last, None)
        for slot in self.slots.values():
            slot.grant, slot.poll, slot.reported = None, None, False
        self._release_source()
        self.part += 1
        self._phase = "idle"

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

    def _vacate(self, rank: int, slot: RankSlot) -> None:
        """A rank that was contested gave up: the other, which was told to try again, may have its place."""
        self._send(slot.conn, messages.Quiesced(**self._ids(rank)))
        del self.slots[rank]

    def _peer_gone(self, event: inputs.PeerGone) -> None:
        lost = [rank for rank, slot in self.slots.items() if slot.conn == event.conn]
        if self.state is KVPoll.Bootstrapping:
            for rank in lost:
                del self.slots[rank]
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

    def _violation(self, rank: int, what: str) -> None:
        self._fail(self._cause(FailureCode.ProtocolError, what, rank))

    # Time, messages

    def _beat(self, event: inputs.BeatReceived) -> None:
        slot = self.slots.get(event.rank)
        if slot is None:
            return
        if event.working:
            self._worked(inputs.Worked())
        slot.waits_for_blocks = event.gate is Gate.waiting_blocks and event.host_alive
        if slot.waits_for_blocks and self.gate in (Gate.waiting_ranks, Gate.waiting_resume):
            self._regate(renew=True)

    def _gate_expired(self, event: inputs.TimerFired) -> None:
        if self.gate is Gate.queued and event.host_alive:
            self._arm(GATE_TIMER, self.deadlines.input_s)
        else:
            super()._gate_expired(event)

    def _ranks_without_blocks(self) -> bool:
        return any(slot.waits_for_blocks and slot.grant is None for slot in self.slots.values())

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
        over = self.state.is_terminal and not isinstance(message, messages.Quiesced)
        if over or not (bound or isinstance(message, messages.Reserve)):
            return
        handler(self, event.conn, message)

    def _ids(self, rank: int) -> dict[str, int]:
        """The fields that address one rank's life of this room."""
        return {
            "room": self.room_key.room,
            "rank": rank,
            "sender_generation": self.room_key.generation,
            "receiver_generation": self.slots[rank].generation,
        }

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
        inputs.Preflighted: _preflighted,
        inputs.Granted: _granted,
        inputs.GrantRefused: _refused,
        inputs.Progress: _progress,
        inputs.PartWritten: _written,
        inputs.RankQuiesced: _rank_quiesced,
        inputs.Worked: Session._worked,
    }
    _message_handlers: ClassVar = {
        messages.Reserve: _reserve,
        messages.Resume: _resume,
        messages.Withdraw: _withdraw,
        messages.PartAck: _ack,
        messages.Abort: _aborted,
        messages.Quiesced: _fenced_there,
    }
