"""The receiver ranks of a sender's room: how they come, what they grant, and what they take back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from msgspec import Struct

from kvpoll_fsm import inputs, messages
from kvpoll_fsm.commands import Preflight
from kvpoll_fsm.deadlines import Deadlines
from kvpoll_fsm.errors import Failure, FailureCode
from kvpoll_fsm.events import Bootstrapped, Resumed
from kvpoll_fsm.ledger import Ledger
from kvpoll_fsm.messages import BlockGrant
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.rank_slot import RankSlot
from kvpoll_fsm.selection import Policy
from kvpoll_fsm.session import RoomKey, Session

__all__ = ["SenderOptions", "SenderRanks"]


class SenderOptions(Struct, frozen=True):
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


_NO_SLOTS: Mapping[int, RankSlot] = MappingProxyType({})


class SenderRanks(Session):
    """What `SenderSession` knows of its receivers.

    Attributes:
        options: What it was opened with.
        required: How many ranks there must be, once that is known.
        slots: The receiver ranks that have reserved.
        ledger: Tokens committed on every rank.
        ready_tokens: How far the host has data.
        part: Number of the part that is next or under way.
        tries: How often an attempt at a part was given up, or begun again.
    """

    __slots__ = (
        "_blocks",
        "_phase",
        "_tokens",
        "_turned_away",
        "ledger",
        "options",
        "part",
        "ready_tokens",
        "required",
        "slots",
        "staged",
        "tries",
    )

    def __init__(self, room_key: RoomKey, deadlines: Deadlines, options: SenderOptions) -> None:
        super().__init__(room_key, deadlines)
        self.options = options
        self.required = options.required_ranks
        self.slots: Mapping[int, RankSlot] = _NO_SLOTS
        self.ledger = Ledger()
        self.ready_tokens = 0
        self.staged = False
        self.part = self.tries = 0
        self._tokens = 0
        self._phase = "idle"
        self._turned_away = ""
        self._blocks: tuple[int, ...] = ()

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
                    tries=self.tries,
                )

    def admits(self, conn: int, reserve: messages.Reserve) -> bool:
        """Whether a reservation is for this life of the room, and not for a later one."""
        if self.state.is_terminal or reserve.sender_generation not in (0, self.room_key.generation):
            return False
        bound = self.binds(conn, reserve.rank, reserve.receiver_generation)
        return bound or self.state is KVPoll.Bootstrapping

    def _ids(self, rank: int) -> dict[str, int]:
        """The fields that address one rank's life of this room."""
        return {
            "room": self.room_key.room,
            "rank": rank,
            "sender_generation": self.room_key.generation,
            "receiver_generation": self.slots[rank].generation,
        }

    def _try_part(self) -> None:
        """Start the next part if grants and data are there."""
        raise NotImplementedError

    def _reissue(self, rank: int, slot: RankSlot) -> None:
        """The same range and part number again; nothing of the attempt before can land any more."""
        raise NotImplementedError

    def _report(
        self, rank: int, slot: RankSlot, transport: str, checksum: bytes | None, failure: Failure | None
    ) -> None:
        """The last write to a rank has ended, or no transport is left: ask for its verdict, or why that is."""
        raise NotImplementedError

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
            self.slots = {**self.slots, message.rank: slot}
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
        ahead = self._takes_second(slot, message.grant)
        expected = self._phase == "idle" and self.state is KVPoll.Transferring and slot.grant is None
        if not (ahead or expected) or slot.dummy or message.sent_tokens != self.ledger.covered_tokens:
            said = f"Resume at {message.sent_tokens} tokens for part {message.grant.part}"
            return self._violation(message.rank, f"{said} while part {self.part} is at {self.ledger.covered_tokens}")
        if ahead:
            slot.second = message.grant
            return
        self._take_grant(message.rank, slot, message.grant)
        self._try_resume()

    def _takes_second(self, slot: RankSlot, grant: BlockGrant) -> bool:
        """Whether a rank that has been told of the present part may grant the next one already."""
        told = self._phase == "moving" and slot.reported and slot.second is None
        remaining = (self.ledger.remaining_tokens or 0) - self._tokens
        return told and grant.part == self.part + 1 and remaining > 0

    def _take_grant(self, rank: int, slot: RankSlot, grant: BlockGrant) -> None:
        if grant.part != self.part or slot.dummy or slot.grant is not None:
            return self._violation(rank, f"a grant for part {grant.part} while part {self.part} is next")
        slot.grant, slot.waits_for_blocks = grant, False
        policy, ours, theirs = self.options.policy, self.options.transports, grant.transports
        offered = policy.candidates(ours, theirs)
        if slot.reachable and not slot.stale and slot.transports[0] in offered:
            slot.transports = tuple(name for name in slot.transports if name in offered)
            return
        slot.choose(offered, policy.missing(ours, theirs))
        self._preflight(rank, slot, f"offered by rank {rank}: {', '.join(theirs)}")

    def _preflight(self, rank: int, slot: RankSlot, why_none: str) -> None:
        slot.reaching = slot.resort()
        if slot.reaching:
            self._do(Preflight(rank, slot.conn, slot.transports[0], slot.insist))
            return
        ours = f"policy {self.options.policy}, here: {', '.join(self.options.transports)}"
        detail = f"no common transport works: {ours}; {why_none}"
        self._fail(self._cause(FailureCode.TransportUnavailable, detail, rank))

    def _preflighted(self, event: inputs.Preflighted) -> None:
        slot = self.slots.get(event.rank)
        current = slot is not None and slot.conn == event.conn and slot.transports[:1] == (event.transport,)
        if slot is None or not current or self.state.is_terminal or slot.reachable:
            return
        slot.reaching = False
        if not event.ok:
            detail = f"{event.transport} to rank {event.rank}: {event.detail}"
            (slot.put_off if event.shut else slot.drop)(event.transport, detail)
            if slot.resort() or self._phase != "moving":
                return self._preflight(event.rank, slot, detail)
            failure = self._cause(FailureCode.TransportFailed, "; ".join(slot.passed_over), event.rank)
            return self._report(event.rank, slot, event.transport, None, failure)
        slot.reachable = True
        if self._phase == "moving" and not (slot.in_flight or slot.reported):
            self._reissue(event.rank, slot)
        self._try_bootstrap()
        self._try_resume()

    def _reconsider(self, event: inputs.Reconsider) -> None:
        for slot in self.slots.values():
            if slot.conn == event.conn and len(self.options.policy.names) > 1:
                slot.stale = True

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
        elif slot.second is not None and slot.second.part == message.part:  # its turn cannot come before our answer
            slot.second, ok = None, True
        self._send(conn, messages.Withdrawn(part=message.part, ok=ok, **self._ids(message.rank)))

    def _committed_to_part(self) -> bool:
        """All ranks have granted and know it, so the part will start; no grant can be taken back."""
        return self.state is not KVPoll.Bootstrapping and self._all_granted()

    def _ranks_without_blocks(self) -> bool:
        return any(slot.waits_for_blocks and slot.grant is None for slot in self.slots.values())

    def _vacate(self, rank: int, slot: RankSlot) -> None:
        """A rank that was contested gave up: the other, which was told to try again, may have its place."""
        self._send(slot.conn, messages.Quiesced(**self._ids(rank)))
        self._forget(rank)

    def _forget(self, rank: int) -> None:
        self.slots = {other: slot for other, slot in self.slots.items() if other != rank}

    def _violation(self, rank: int, what: str) -> None:
        self._fail(self._cause(FailureCode.ProtocolError, what, rank))
