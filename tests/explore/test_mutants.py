"""The explorer can fail: twenty-two bugs of this field, put into the production code one at a time, are all found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from kvpoll_fsm import inputs, messages
from kvpoll_fsm.breaker import Breakers
from kvpoll_fsm.channel import Channel
from kvpoll_fsm.commands import Release
from kvpoll_fsm.core import EndpointCore
from kvpoll_fsm.deadlines import Gate
from kvpoll_fsm.ledger import Ledger
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.receiver_blocks import ReceiverBlocks
from kvpoll_fsm.receiver_fences import ReceiverFences
from kvpoll_fsm.receiver_session import ReceiverSession
from kvpoll_fsm.rooms import Rooms
from kvpoll_fsm.sender_session import SenderSession
from kvpoll_fsm.session import RoomKey, Session
from kvpoll_fsm.testing.counterexample import Counterexample
from kvpoll_fsm.testing.explore import NO_END, explore
from kvpoll_fsm.testing.scene import Budget, Scene

Patch = pytest.MonkeyPatch
pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Mutant:
    """A bug, the scene that shows it, and a word of the law it breaks."""

    name: str
    infect: Callable[[Patch], None]
    scene: Scene
    law: str


def on_message(patch: Patch, session: type[Session], kind: type, handler: Callable[..., None]) -> None:
    patch.setitem(session._message_handlers, kind, handler)


def late_success_wins(patch: Patch) -> None:
    right = ReceiverSession._message_handlers[messages.PartOutcome]

    def outcome(self: ReceiverSession, conn: int, message: messages.PartOutcome) -> None:
        if self.state is KVPoll.Failed and message.state is KVPoll.Success:
            self.state = KVPoll.Success
            self.history = (*self.history, KVPoll.Success)
        else:
            right(self, conn, message)

    on_message(patch, ReceiverSession, messages.PartOutcome, outcome)


def is_last_ignored(patch: Patch) -> None:
    right = Ledger.commit
    patch.setattr(Ledger, "commit", lambda self, offset, tokens: right(self, offset, tokens) or True)


def failure_told_to_first_rank_only(patch: Patch) -> None:
    right = SenderSession._tell_abort

    def tell(self: SenderSession, failure: Any) -> None:
        others = {rank: slot for rank, slot in self.slots.items() if rank != min(self.slots)}
        for slot in others.values():
            slot.told = True
        self.slots = {rank: slot for rank, slot in self.slots.items() if rank not in others}
        right(self, failure)
        self.slots = {**self.slots, **others}

    patch.setattr(SenderSession, "_tell_abort", tell)


def receiver_succeeds_on_its_own_coverage(patch: Patch) -> None:
    right = ReceiverSession._ack

    def ack(self: ReceiverSession, failure: Any) -> None:
        right(self, failure)
        if failure is None and self._report_is_last():
            self._commit(True)

    patch.setattr(ReceiverSession, "_ack", ack)


def freed_at_the_end(self: ReceiverSession) -> None:
    if self._phase in ("offered", "withdrawing"):
        self._grant = None
        self._do(Release(self.part))


def blocks_freed_at_abort(patch: Patch) -> None:
    patch.setattr(ReceiverSession, "_on_failed", freed_at_the_end)


def released_on_the_peers_death(patch: Patch) -> None:
    right_failed = ReceiverSession._on_failed
    right_gone = ReceiverSession._handlers[inputs.PeerGone]

    def gone(self: ReceiverSession, event: inputs.PeerGone) -> None:
        patch.setattr(ReceiverSession, "_on_failed", freed_at_the_end)
        right_gone(self, event)
        patch.setattr(ReceiverSession, "_on_failed", right_failed)

    patch.setitem(ReceiverSession._handlers, inputs.PeerGone, gone)


def next_transport_too_early(patch: Patch) -> None:
    right = SenderSession._handlers[inputs.PartWritten]

    def written(self: SenderSession, event: inputs.PartWritten) -> None:
        quiet = inputs.PartWritten(
            event.rank, event.part, event.transport, event.ok, detail=event.detail, attempt=event.attempt
        )
        right(self, quiet)

    patch.setitem(SenderSession._handlers, inputs.PartWritten, written)


def resume_resets_the_state(patch: Patch) -> None:
    right = SenderSession._try_resume

    def resume(self: SenderSession) -> None:
        if self.state is KVPoll.Transferring and self._phase == "idle" and self._all_granted():
            self.state = KVPoll.WaitingForInput
            self.history = (*self.history, KVPoll.WaitingForInput)
            self._try_part()
        else:
            right(self)

    patch.setattr(SenderSession, "_try_resume", resume)


def dropped_messages_stay_lost(patch: Patch) -> None:
    patch.setattr(Channel, "resend", lambda self: [])


def generation_ignored(patch: Patch) -> None:
    right = Rooms.find

    def find(self: Rooms, connection: Any, message: Any) -> Any:
        side, rank = ("receiver", message.rank) if connection.outgoing else ("sender", 0)
        found = [key for key in self.sessions if self.is_open(key)]
        same = [key for key in found if (key.side, key.room, key.rank) == (side, message.room, rank)]
        return same[-1] if same else right(self, connection, message)

    def receives(self: ReceiverSession, event: inputs.MessageReceived) -> None:
        handler = self._message_handlers.get(type(event.message))
        if handler is not None and not self.state.is_terminal:
            handler(self, event.conn, event.message)

    patch.setattr(Rooms, "find", find)
    patch.setitem(ReceiverSession._handlers, inputs.MessageReceived, receives)


def no_stall_deadline_before_the_first_part(patch: Patch) -> None:
    right = Session._regate

    def regate(self: Session, *, renew: bool = False) -> None:
        gate = self._present_gate()
        if self.state is KVPoll.WaitingForInput and gate is Gate.moving:
            self.gate = gate
            self._disarm("gate")
        else:
            right(self, renew=renew)

    patch.setattr(Session, "_regate", regate)


def grants_cannot_be_revoked(patch: Patch) -> None:
    patch.setitem(ReceiverSession._handlers, inputs.RevokeGrant, lambda self, event: None)


def clear_kills_the_resend(patch: Patch) -> None:
    right = EndpointCore.clear

    def clear(self: EndpointCore, key: Any) -> None:
        right(self, key)
        self.flush()
        for connection in self.connections.values():
            connection.channel.acked += len(connection.channel.unacked)
            connection.channel.unacked.clear()

    patch.setattr(EndpointCore, "clear", clear)


def second_grant_freed_at_abort(patch: Patch) -> None:
    right = ReceiverFences._on_failed

    def failed(self: ReceiverFences) -> None:
        if self._second.grant is not None:
            self._give_up_second()
        right(self)

    patch.setattr(ReceiverFences, "_on_failed", failed)


def blocks_freed_while_they_are_copied(patch: Patch) -> None:
    right = ReceiverBlocks._drain

    def drain(self: ReceiverBlocks, held: Any) -> None:
        copying, self._job = self._job, False
        right(self, held)
        self._job = copying

    patch.setattr(ReceiverBlocks, "_drain", drain)


def a_third_grant(patch: Patch) -> None:
    right = ReceiverSession._message_handlers[messages.PartReport]

    def reported(self: ReceiverSession, conn: int, message: messages.PartReport) -> None:
        right(self, conn, message)
        if self._phase == "landed" and self._job:
            self._take_up()

    on_message(patch, ReceiverSession, messages.PartReport, reported)


def any_part_fenced_believed(patch: Patch) -> None:
    """The answer for one attempt is taken for that for another, which went through another transport."""
    right = SenderSession._message_handlers[messages.PartFenced]

    def fenced(self: SenderSession, conn: int, message: messages.PartFenced) -> None:
        slot = self.slots[message.rank]
        transport = slot.fencing or message.transport
        right(self, conn, msgspec.structs.replace(message, transport=transport, attempt=slot.attempt))

    on_message(patch, SenderSession, messages.PartFenced, fenced)


def fenced_before_the_fence_holds(patch: Patch) -> None:
    right = ReceiverSession._message_handlers[messages.FencePart]

    def fence(self: ReceiverSession, conn: int, message: messages.FencePart) -> None:
        right(self, conn, message)
        if self._fencing:
            self._fenced_alone(inputs.Fenced(message.part, message.transport, b"early"))

    on_message(patch, ReceiverSession, messages.FencePart, fence)


def quiescence_of_any_attempt_believed(patch: Patch) -> None:
    right = SenderSession._handlers[inputs.RankQuiesced]

    def quiesced(self: SenderSession, event: inputs.RankQuiesced) -> None:
        slot = self.slots.get(event.rank)
        right(self, inputs.RankQuiesced(event.rank, event.part, slot.attempt if slot else 0))

    patch.setitem(SenderSession._handlers, inputs.RankQuiesced, quiesced)


def breaker_stays_open(patch: Patch) -> None:
    patch.setattr(Breakers, "timer", lambda self, name, epoch: None)


def half_open_for_all(patch: Patch) -> None:
    patch.setattr(Breakers, "_admitted", lambda self, key, command, target: target)


def port_for_all(patch: Patch) -> None:
    right = Breakers._preflight

    def preflight(self: Breakers, key: RoomKey, command: Any) -> None:
        right(self, key, command)
        for breaker in self._by_place.values():
            breaker.caller = None

    patch.setattr(Breakers, "_preflight", preflight)


CROSSED = Scene("each pool given to the other room", ranks=2, rooms=(1, 2), source_pool=2, ordered=True)

MUTANTS = (
    Mutant("late Success wins", late_success_wins, Scene("m", faults=Budget(deadline=1)), "moved from Failed"),
    Mutant("is_last ignored", is_last_ignored, Scene("m", parts=2), "Success, but rank 0 holds"),
    Mutant(
        "failure told to the first rank only",
        failure_told_to_first_rank_only,
        Scene("m", ranks=2, faults=Budget(abort=1), opened=True),
        "could have said so",
    ),
    Mutant(
        "receiver succeeds on its own coverage",
        receiver_succeeds_on_its_own_coverage,
        Scene("m", ranks=1),
        "its sender is live",
    ),
    Mutant("blocks freed at abort", blocks_freed_at_abort, Scene("m", faults=Budget(abort=1)), "does not hold"),
    Mutant(
        "released on the peer's death without a fence",
        released_on_the_peers_death,
        Scene("m", faults=Budget(crash=1)),
        "does not hold",
    ),
    Mutant(
        "next transport before the first is quiescent",
        next_transport_too_early,
        Scene("m", parts=2, transports=("a", "b"), faults=Budget(late=1)),
        "are both on their way to rank 0",
    ),
    Mutant("resume resets the state", resume_resets_the_state, Scene("m", parts=2), "moved from Transferring"),
    Mutant("ack dropped", dropped_messages_stay_lost, Scene("m", faults=Budget(lose=1)), NO_END),
    Mutant("generation ignored", generation_ignored, Scene("m", faults=Budget(reopen=1)), "could have said so"),
    Mutant(
        "no stall deadline in WaitingForInput",
        no_stall_deadline_before_the_first_part,
        Scene("m"),
        "without a deadline",
    ),
    Mutant("revocable grants removed", grants_cannot_be_revoked, CROSSED, "waits for a deadline"),
    Mutant(
        "clear() kills the resend",
        clear_kills_the_resend,
        Scene("m", faults=Budget(reopen=1, lose=1)),
        "could have said so",
    ),
    Mutant(
        "a second grant freed at abort",
        second_grant_freed_at_abort,
        Scene("m", parts=3, pool=2, windows=(2,), faults=Budget(abort=1)),
        "does not hold any more",
    ),
    Mutant(
        "blocks freed while they are copied out",
        blocks_freed_while_they_are_copied,
        Scene("m", rooms=(1, 2), parts=2, pool=2, source_pool=2, windows=(2,), ordered=True),
        "Success, but rank 0 holds",
    ),
    Mutant(
        "a third grant while one part is copied",
        a_third_grant,
        Scene("m", parts=3, pool=3, windows=(2,)),
        "its window is 2",
    ),
    Mutant(
        "PartFenced of another attempt and transport believed",
        any_part_fenced_believed,
        Scene("m", transports=("a", "b", "c"), reads=False, faults=Budget(late=2)),
        "are both on their way to rank 0",
    ),
    Mutant(
        "fenced before the fence holds",
        fenced_before_the_fence_holds,
        Scene("m", transports=("a", "b"), reads=False, faults=Budget(late=1)),
        "are both on their way to rank 0",
    ),
    Mutant(
        "quiescence of any attempt believed",
        quiescence_of_any_attempt_believed,
        Scene("m", transports=("a", "b", "c"), reads=False, faults=Budget(late=2)),
        "are both on their way to rank 0",
    ),
    Mutant(
        "breaker never half-opens",
        breaker_stays_open,
        Scene("m", transports=("a", "b"), faults=Budget(fail=1)),
        "is open for ever",
    ),
    Mutant(
        "half-open for every room's port",
        port_for_all,
        Scene("m", rooms=(1, 2), transports=("a", "b"), faults=Budget(port=1), ordered=True),
        "reaches for the port of a",
    ),
    Mutant(
        "half-open for everybody",
        half_open_for_all,
        Scene("m", rooms=(1, 2), pool=2, source_pool=2, transports=("a", "b"), faults=Budget(fail=1), ordered=True),
        "whose breaker is not closed",
    ),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_is_found(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.infect(monkeypatch)
    report = explore(mutant.scene, limit=150_000)
    assert report.findings, f"{mutant.name}: not found in {report.states} states"
    finding = report.findings[0]
    assert mutant.law in finding.law
    assert len(finding.text) < 25, "\n".join(finding.text)
    assert Counterexample.of(mutant.scene, finding).replay()[0] == finding.law


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_without_the_mutant_the_scene_holds(mutant: Mutant) -> None:
    report = explore(mutant.scene, limit=1_000)
    assert not report.findings, "\n".join(report.findings[0].text)
