"""What follows when a part does not get through to a rank: which transport is next, and when it may begin.

Nothing is written again before what was written before can land no more, and its source is not read any more. Either
the transport says so (PartWritten, RankQuiesced), or the receiver, which is asked to fence that part on that transport
(FencePart, PartFenced). Every attempt at a part has the same number, range and blocks.
"""

from __future__ import annotations

from kvpoll_fsm import inputs, messages
from kvpoll_fsm.commands import CancelWrites, StartPart, Target
from kvpoll_fsm.errors import FailureCode
from kvpoll_fsm.rank_slot import RankSlot
from kvpoll_fsm.sender_ranks import SenderRanks

__all__ = ["MAX_COLLATERALS", "SenderAttempts"]

MAX_COLLATERALS = 3
"""How often a part is written to a rank again by a transport that was not to blame for the failure."""


class SenderAttempts(SenderRanks):
    """The attempts of a `SenderSession` to write its part."""

    __slots__ = ()

    def _settle(self) -> None:
        """After the end: tell each rank when nothing is in flight to it, free the source when nothing reads it."""
        raise NotImplementedError

    def _issue(self, targets: tuple[Target, ...], attempt: int) -> None:
        offset = self.ledger.covered_tokens
        self._do(StartPart(self.part, offset, self._tokens, self._blocks, targets, attempt))

    def _target(self, rank: int, slot: RankSlot) -> Target:
        if slot.grant is None:
            raise AssertionError("a part starts only with every rank's grant")
        return Target(rank, slot.conn, slot.transports[0], slot.grant, slot.insist)

    def _reissue(self, rank: int, slot: RankSlot) -> None:
        """The same range and part number again; nothing of the attempt before can land any more."""
        slot.begin_again()
        self._issue((self._target(rank, slot),), slot.attempt)
        self._keep_waiting()

    def _keep_waiting(self) -> None:
        """The part is not at a standstill: something else is tried. Both sides' clocks begin anew."""
        self.tries += 1
        self.news = True
        self._regate(renew=True)

    def _is_of_attempt(self, slot: RankSlot, event: inputs.PartWritten | inputs.RankQuiesced) -> bool:
        return (event.part, event.attempt) == (self.part, slot.attempt)

    def _written(self, event: inputs.PartWritten) -> None:
        slot = self.slots.get(event.rank)
        if slot is None or not slot.writing or not self._is_of_attempt(slot, event):
            return
        slot.writing, slot.reading = False, not (event.ok or event.source_free)
        slot.landing = not (event.ok or event.quiescent or slot.closed)
        if self.state.is_terminal:
            self._settle()
        elif event.ok:
            self._report(event.rank, slot, event.transport, event.checksum, None)
        else:
            self._attempt_failed(event, slot)

    def _attempt_failed(self, event: inputs.PartWritten, slot: RankSlot) -> None:
        slot.reachable = slot.probing = False
        why = f"{event.transport} to rank {event.rank}: {event.detail}"
        if event.ours:  # the bytes themselves are not there: another transport would carry whatever lies in the blocks
            slot.abandon(why)
        elif event.shut:
            slot.put_off(event.transport, why)
        elif event.collateral and slot.collaterals < MAX_COLLATERALS:
            slot.collaterals += 1
        else:
            slot.drop(event.transport, why)
        if slot.landing and slot.resort():
            slot.fencing = event.transport
            ask = messages.FencePart(
                part=self.part, transport=event.transport, attempt=slot.attempt, **self._ids(event.rank)
            )
            self._send(slot.conn, ask)
        self._try_again(event.rank, slot, event.transport)

    def _try_again(self, rank: int, slot: RankSlot, failed: str) -> None:
        """Go on with the best transport that is left, as soon as nothing of the attempt before is under way."""
        if not slot.resort():
            failure = self._cause(FailureCode.TransportFailed, "; ".join(slot.passed_over), rank)
            return self._report(rank, slot, failed, None, failure)
        renewing = slot.fencing == slot.transports[0]  # its token dies by the fence: the new one is on its way
        if slot.landing or slot.reading or renewing:
            return
        slot.fencing = ""
        self._preflight(rank, slot, f"{failed} failed")

    def _patience_s(self) -> float | None:
        """The least that an attempt has which another transport can take the place of."""
        slots = [slot for slot in self.slots.values() if slot.may_fall_back]
        if not slots:
            return None
        return self.deadlines.patience_s(probing=any(slot.probing for slot in slots))

    def _hurry(self) -> bool:
        """The gate's time is over. Give up those attempts that another transport can take the place of, if any."""
        seconds = self._patience_s()
        if seconds is None:
            return False
        slots = [(rank, slot) for rank, slot in self.slots.items() if slot.may_fall_back]
        for rank, slot in slots:
            if slot.reaching:
                name = slot.transports[0]
                slot.drop(name, f"{name} to rank {rank}: its port was not reached for {seconds:g} s")
                self._preflight(rank, slot, "")
            elif self.deadlines.patience_s(probing=slot.probing) <= seconds:
                slot.hurried = True
                self._do(CancelWrites(rank, self.part, slot.attempt, f"no bytes landed for {seconds:g} s"))
        self._keep_waiting()
        return True

    def _probing(self, event: inputs.Probing) -> None:
        slot = self.slots.get(event.rank)
        if slot is not None and slot.writing and (event.part, event.attempt) == (self.part, slot.attempt):
            slot.probing = True

    def _rank_quiesced(self, event: inputs.RankQuiesced) -> None:
        slot = self.slots.get(event.rank)
        if slot is None or not (slot.landing or slot.reading) or not self._is_of_attempt(slot, event):
            return
        slot.landing = slot.reading = False
        if self.state.is_terminal:
            self._settle()
        elif not slot.reported:
            self._try_again(event.rank, slot, "the transport before it")

    def _part_fenced(self, conn: int, message: messages.PartFenced) -> None:
        """The rank has seen to it that the attempt cannot land; an answer to any other one is out of date."""
        slot = self.slots[message.rank]
        asked = (self.part, slot.attempt, slot.fencing)
        if not slot.fencing or (message.part, message.attempt, message.transport) != asked:
            return
        slot.fencing, slot.landing = "", False
        if self.state.is_terminal:
            return self._settle()
        if slot.grant is not None:
            slot.grant = slot.grant.with_token(message.transport, message.token)
        if message.token is None and message.transport in slot.transports:
            slot.drop(message.transport, f"{message.transport} to rank {message.rank}: the receiver has given it up")
        self._try_again(message.rank, slot, message.transport)
