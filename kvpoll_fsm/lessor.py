"""Gives an endpoint's blocks to its rooms, and asks for unused ones back while an earlier room waits."""

from __future__ import annotations

from typing import Any

from kvpoll_fsm import inputs
from kvpoll_fsm.blocks import BlockAccounts
from kvpoll_fsm.commands import Expose, Grant, Regrant, Release, SetTimer
from kvpoll_fsm.effects import Outbox
from kvpoll_fsm.errors import Failure, FailureCode, KvpollError, RequestTooLarge
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.session import RoomKey
from kvpoll_fsm.spi import LeaseId

__all__ = ["WITHDRAW_TIMER", "Lessor", "lease_of"]

WITHDRAW_TIMER = "withdraw"
MAX_BACKOFF = 32
"""Grants are asked back after `withdraw_s`, then twice that, and so on up to this many times it."""


def lease_of(key: RoomKey, part: int) -> LeaseId:
    """The lease of one part of one life of a room."""
    return LeaseId(key.side, key.room, key.rank, key.generation, part)


class Lessor:
    """Carries out the commands that concern blocks.

    Attributes:
        accounts: Who holds which block.
    """

    __slots__ = ("_armed", "_block_tokens", "_epoch", "_out", "_waits", "_withdraw_s", "accounts")

    def __init__(self, accounts: BlockAccounts, block_tokens: int, withdraw_s: float, out: Outbox) -> None:
        self.accounts = accounts
        self._block_tokens = block_tokens
        self._withdraw_s = withdraw_s
        self._out = out
        self._epoch = 0
        self._armed = False
        self._waits = 1

    def holds(self, key: RoomKey, part: int) -> bool:
        """Whether the part holds blocks."""
        return self.accounts.holds(lease_of(key, part))

    def take_exact(self, key: RoomKey, blocks: tuple[int, ...]) -> None:
        """Lease the blocks that the engine named for part 0.

        Raises:
            ForeignBlock: They are not free.
        """
        self.accounts.take_exact(lease_of(key, 0), blocks)

    def grant(self, key: RoomKey, state: KVPoll, command: Grant) -> None:
        """Lease blocks now, or queue, or refuse; the answer is fed to the room."""
        lease = lease_of(key, command.part)
        try:
            blocks: tuple[int, ...] | None = self.accounts.blocks_of(lease)
            if not blocks and command.exact:
                blocks = self.accounts.take_exact(lease, command.exact)
            elif not blocks:
                blocks = self.accounts.take(lease, command.blocks)
        except KvpollError as error:
            code = FailureCode.RequestTooLarge if isinstance(error, RequestTooLarge) else FailureCode.ProtocolError
            self._out.feed(key, inputs.GrantRefused(command.part, Failure.of(code, str(error), state=state)))
            return
        if blocks is not None:
            self._leased(key, command.part, blocks)
        elif command.or_refuse:
            self._out.feed(key, inputs.GrantRefused(command.part))
        else:
            self.accounts.wait(lease, command.blocks)
            self._out.feed(key, inputs.GrantQueued(command.part))
            self._arm()

    def regrant(self, key: RoomKey, command: Regrant) -> None:
        """Turn the lease of one part into that of the next."""
        old, new = lease_of(key, command.old_part), lease_of(key, command.part)
        blocks = self.accounts.relabel(old, new, command.blocks)
        self._out.do(key, Release(command.old_part))
        self._leased(key, command.part, blocks)
        self._serve()

    def release(self, key: RoomKey, command: Release) -> None:
        """End a lease, or the wait for one; those who wait are served."""
        lease = lease_of(key, command.part)
        if self.accounts.holds(lease):
            self.accounts.release(lease)
            self._out.do(key, command)
        else:
            self.accounts.forget(lease)
        self._serve()

    def quarantine(self, key: RoomKey, part: int) -> None:
        """The transfer has ended, but writes may land still."""
        self.accounts.quarantine(lease_of(key, part))

    def timer_fired(self, epoch: int) -> None:
        """An earlier room has waited: ask later rooms for grants they have not used."""
        if not self._armed or epoch != self._epoch:
            return
        self._armed = False
        first = self.accounts.first_waiting
        if first is None:
            return
        for lease in self.accounts.leases():
            if (lease.room, lease.rank) > (first.room, first.rank):
                self._out.feed(_key_of(lease), inputs.RevokeGrant())
        self._waits = min(self._waits * 2, MAX_BACKOFF)
        self._arm()

    def clone(self, out: Outbox) -> Lessor:
        """A copy that shares nothing mutable and speaks through `out`."""
        copy = Lessor(self.accounts.clone(), self._block_tokens, self._withdraw_s, out)
        copy._epoch, copy._armed, copy._waits = self._epoch, self._armed, self._waits
        return copy

    def key(self) -> tuple[Any, ...]:
        """Canonical plain value of the state, the length of the wait apart."""
        return (self.accounts.key(), self._armed)

    def _leased(self, key: RoomKey, part: int, blocks: tuple[int, ...]) -> None:
        if key.side == "receiver":
            self._out.do(key, Expose(part, blocks))
        else:
            self._out.feed(key, inputs.Granted(part, blocks, len(blocks) * self._block_tokens))

    def _serve(self) -> None:
        for lease, blocks in self.accounts.serve():
            self._waits = 1
            self._leased(_key_of(lease), lease.part, blocks)

    def _arm(self) -> None:
        """Set the timer, unless it runs: rooms that keep coming must not put it off."""
        if not self._armed:
            self._armed = True
            self._epoch += 1
            self._out.timer(None, SetTimer(WITHDRAW_TIMER, self._withdraw_s * self._waits, self._epoch))


def _key_of(lease: LeaseId) -> RoomKey:
    return RoomKey(lease.side, lease.room, lease.rank, lease.generation)
