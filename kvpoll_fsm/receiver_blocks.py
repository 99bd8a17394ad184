"""The blocks a receiver's room holds: which for which part, how it makes room for the next, how they are given back.

A room holds one lot of blocks at a time, or with `window=2` up to two. The second is asked for when a part that is
not the last has landed, is taken only if it is free, and is granted to the next part at once. Then the sender need not
wait until the part that has landed was copied out.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from msgspec import Struct

from kvpoll_fsm import inputs, messages
from kvpoll_fsm.commands import CopyOut, Grant, HeldPart, Regrant, Release
from kvpoll_fsm.deadlines import Deadlines, Gate
from kvpoll_fsm.errors import FailureCode
from kvpoll_fsm.events import Resumed
from kvpoll_fsm.ledger import Ledger
from kvpoll_fsm.messages import BlockGrant
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.receiver_options import ReceiverOptions
from kvpoll_fsm.session import RoomKey, Session

__all__ = ["ReceiverBlocks", "SecondGrant"]

ASKED = ("asked", "queued")
MAKING_ROOM = (*ASKED, "draining", "copying")
_GATES_BEFORE_A_PART = (Gate.waiting_ranks, Gate.waiting_resume, Gate.waiting_blocks)
"""Where the sender stands while some rank has not granted yet."""


class SecondGrant(Struct, frozen=True):
    """The grant for the next part while the present one is not over.

    Attributes:
        phase: "none", "asked", "offered" or "withdrawing".
        grant: Its blocks, once they are leased.
    """

    phase: str = "none"
    grant: BlockGrant | None = None


NO_SECOND = SecondGrant()
NONE_LOOSE: frozenset[int] = frozenset()
NONE_FENCED: Mapping[str, int] = MappingProxyType({})


class ReceiverBlocks(Session):
    """What `ReceiverSession` knows of its blocks.

    The grant for the current part goes through these phases:
    none -> asked -> (queued ->) offered -> checking -> acked -> none, offered -> withdrawing -> asked, and
    checking -> rejected, which only a failure follows. With a window of 2: offered -> landed -> checking, or
    landed -> verifying -> acked where the next part has its grant already; acked -> copying where that was taken back.

    Attributes:
        options: What it was opened with.
        ledger: Tokens committed, as the sender's outcomes told.
        part: Number of the part that is next or under way.
    """

    __slots__ = (
        "_announced",
        "_behind",
        "_exact",
        "_fencing",
        "_grant",
        "_held",
        "_job",
        "_loose",
        "_phase",
        "_report",
        "_second",
        "_sender_alive",
        "_sender_gate",
        "_sender_generation",
        "_tries",
        "ledger",
        "options",
        "part",
    )

    def __init__(self, room_key: RoomKey, deadlines: Deadlines, options: ReceiverOptions) -> None:
        super().__init__(room_key, deadlines)
        self.options = options
        self.ledger = Ledger()
        self.part = 0
        self._phase = "none"
        self._grant: BlockGrant | None = None
        self._second = NO_SECOND
        self._behind: HeldPart | None = None
        self._held: tuple[HeldPart, ...] = ()
        self._loose: frozenset[int] = NONE_LOOSE
        self._fencing: Mapping[str, int] = NONE_FENCED
        self._sender_gate, self._sender_alive = Gate.waiting_ranks, False
        self._job = False
        self._exact = False
        self._tries = 0

    def _nothing_lands(self) -> bool:
        """Whether a room that is terminal is quiescent, too: no write can land in blocks it was granted."""
        if self._job or self._loose:
            return False
        return self._grant is None and self._second.grant is None and self._behind is None

    @property
    def finished(self) -> bool:
        """Terminal, quiescent, no blocks held, and the host has no more use for it."""
        return self._cleared and self.quiescent and not self._held

    @property
    def held_parts(self) -> tuple[HeldPart, ...]:
        """Committed parts that lie in this room's blocks (`extend`, `manual`, one that is still being copied out)."""
        behind = () if self._behind is None else (self._behind,)
        return (*self._held, *behind)

    def _copy_base(self, copy: Any) -> None:
        super()._copy_base(copy)
        copy.ledger, copy.part, copy._phase = self.ledger.clone(), self.part, self._phase
        copy._grant, copy._second, copy._behind = self._grant, self._second, self._behind
        copy._held, copy._loose, copy._sender_gate = self._held, self._loose, self._sender_gate
        copy._job, copy._exact, copy._sender_alive = self._job, self._exact, self._sender_alive
        copy._fencing, copy._tries = self._fencing, self._tries

    def key(self) -> tuple[Any, ...]:
        """Canonical plain value of the state."""
        own = (self.ledger.key(), self.part, self._phase, self._grant, self._second, self._behind)
        held = (self._held, self._loose, frozenset(self._fencing.items()))
        return (*super().key(), *own, *held, self._sender_gate, self._sender_alive, self._job, self._exact)

    def _ids(self) -> dict[str, int]:
        """The fields that address this life of the room."""
        raise NotImplementedError

    def _send_reserve(self, grant: BlockGrant | None) -> None:
        """Tell the sender that this rank is here."""
        raise NotImplementedError

    def _check(self) -> None:
        """Look at the part that has landed; whether the next one has its grant is settled."""
        raise NotImplementedError

    def _take_up(self) -> None:
        """A part has landed, and no worker is busy with another of this room."""
        raise NotImplementedError

    def _settle(self) -> None:
        """After the end: free the blocks nothing writes to or reads from any more."""
        raise NotImplementedError

    # Grants

    def _ask(self, exact: tuple[int, ...] = (), *, or_refuse: bool = False) -> None:
        self._phase, self._exact = "asked", bool(exact)
        self._do(Grant(self.part, len(exact) or self.options.blocks, exact, or_refuse))

    def _ask_second(self, remaining_tokens: int) -> None:
        """Blocks for the next part, if there are any free at this moment; a room never waits for them."""
        self._second = SecondGrant("asked")
        self._do(Grant(self.part + 1, self._wanted(self.options.blocks, remaining_tokens), or_refuse=True))

    def _give_up_asking(self) -> None:
        """No grant is wanted any more; one that is on its way has lost its lease and will be ignored."""
        self._phase = "none"
        self._do(Release(self.part))

    def _give_up_second(self) -> None:
        self._second = NO_SECOND
        self._do(Release(self.part + 1))

    def _asks_second(self, part: int) -> bool:
        """Whether an answer of the pool is about the second grant."""
        return self._second.phase == "asked" and part == self.part + 1

    def _queued(self, event: inputs.GrantQueued) -> None:
        if self._phase == "asked":
            self._phase = "queued"
            if self.state is KVPoll.Bootstrapping:
                self._send_reserve(None)

    def _granted(self, event: inputs.Granted) -> None:
        grant = BlockGrant(event.part, event.tokens, event.blocks, event.tokens_by_transport)
        if self._asks_second(event.part):
            self._second = SecondGrant("offered", grant)
            self._send_resume(grant)
            return self._check()
        if self._phase not in ASKED or event.part != self.part:
            return
        self._offer(grant)
        if self.state is KVPoll.Bootstrapping:
            return self._send_reserve(grant)
        self._send_resume(grant)
        self._apply(Resumed())

    def _offer(self, grant: BlockGrant | None, phase: str = "offered") -> None:
        """The sender has, or gets, this grant for the current part."""
        self._phase, self._grant, self._sender_gate = phase, grant, Gate.waiting_ranks

    def _send_resume(self, grant: BlockGrant) -> None:
        sent = self.ledger.covered_tokens
        self._send(self.options.conn, messages.Resume(sent_tokens=sent, grant=grant, **self._ids()))

    def _refused(self, event: inputs.GrantRefused) -> None:
        if self._asks_second(event.part):
            return self._second_refused(event)
        if self._phase not in ASKED or event.part != self.part:
            return
        self._give_up_asking()  # blocks that could not be exposed are leased already
        if event.failure is None and self._drains_instead():
            return self._drain_held()
        self._fail(event.failure or self._cause(FailureCode.PoolExhausted, "no blocks", self._own_rank))

    def _second_refused(self, event: inputs.GrantRefused) -> None:
        self._give_up_second()
        if event.failure is not None:
            return self._fail(event.failure)
        self._check()

    def _drains_instead(self) -> bool:
        """Whether blocks are held that must not be held while waiting for more."""
        return self.options.resume == "extend" and bool(self._held)

    def _release_part(self, event: inputs.ReleasePart) -> None:
        kept = tuple([held for held in self._held if held.part != event.part])
        if len(kept) < len(self._held):
            self._held = kept
            self._do(Release(event.part))

    # Withdrawing them

    def _revoke(self, event: inputs.RevokeGrant) -> None:
        """Ask for an unused grant back, unless it is in use for all we know, or the engine chose the blocks."""
        unused = self.state is KVPoll.Bootstrapping or self._sender_gate in _GATES_BEFORE_A_PART
        if self.state.is_terminal:
            return
        if self._second.phase == "offered":
            self._second = SecondGrant("withdrawing", self._second.grant)
            self._send_withdraw(self.part + 1)
        elif self._phase == "offered" and unused and not self._exact:
            self._phase = "withdrawing"
            self._send_withdraw(self.part)

    def _send_withdraw(self, part: int) -> None:
        self._send(self.options.conn, messages.Withdraw(part=part, **self._ids()))

    def _withdrawn(self, conn: int, message: messages.Withdrawn) -> None:
        if self._second.phase == "withdrawing" and message.part == self.part + 1:
            return self._second_withdrawn(message.ok)
        if self._phase != "withdrawing" or message.part != self.part:
            return
        self._phase = "offered"
        if not message.ok:
            self._sender_gate = Gate.queued  # the part will come: no use in asking again
            return
        self._grant, self._fencing = None, NONE_FENCED
        self._do(Release(self.part))
        self._ask(or_refuse=self._drains_instead())

    def _second_withdrawn(self, ok: bool) -> None:
        """Without it this room goes on as one with a single grant."""
        if ok:
            self._give_up_second()
        else:
            self._second = SecondGrant("offered", self._second.grant)

    def _keep_grant(self) -> None:
        """The sender uses the grant that was asked back: that answers the Withdraw."""
        if self._phase == "withdrawing":
            self._phase = "offered"

    # Making room for the next part

    def _make_room(self, held: HeldPart, is_last: bool) -> None:
        if self.options.resume != "drain":
            self._held = (*self._held, held)
        if is_last and self.options.resume == "drain":
            self._do(Release(held.part))
        elif is_last and self.options.resume == "extend":
            self._release_held()
        elif not is_last and self.options.resume == "drain":
            self._drain(held)
        elif not is_last and self.options.resume == "extend":
            self._ask(or_refuse=self._drains_instead())

    def _drain(self, held: HeldPart) -> None:
        """The part was copied out, or is (then `_copied_behind` goes on); the next may have its grant already."""
        second, self._second = self._second, NO_SECOND
        if self._job:
            self._behind = held
        if second.grant is not None:
            self._offer(second.grant, second.phase)
            self._apply(Resumed())
            if not self._job:
                self._do(Release(held.part))
        elif self._job:
            self._phase = "copying"
        else:
            self._grant_again(held)

    def _copied_behind(self) -> None:
        """A part that had been acknowledged before has been copied out."""
        behind, self._behind = self._behind, None
        if behind is None:  # its outcome has not come; that looks after the blocks
            return
        if self._phase == "copying":
            return self._grant_again(behind)
        self._do(Release(behind.part))
        if self._phase == "landed":
            self._take_up()

    def _grant_again(self, held: HeldPart) -> None:
        """The blocks of a part become those of the next."""
        self._phase = "asked"
        self._do(Regrant(held.part, self.part, self._wanted(len(held.blocks), self.ledger.remaining_tokens or 0)))

    def _wanted(self, most: int, remaining_tokens: int) -> int:
        """Blocks that so many tokens need, at most as many as one grant has."""
        return min(most, -(-remaining_tokens // self.options.block_tokens))

    def _drain_held(self) -> None:
        """`extend` found no free blocks: copy out what is held and use those blocks again."""
        self._phase, self._job = "draining", True
        self._do(CopyOut(self._held, self.ledger.total_tokens or 0, None))

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
        released, self._held = self._held, ()
        for held in released:
            self._do(Release(held.part))
