"""The writes on their way in a universe: how each may land, fail, hang, or land late."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from kvpoll_fsm import inputs
from kvpoll_fsm.lessor import lease_of
from kvpoll_fsm.testing.props import Ticket
from kvpoll_fsm.testing.universe_base import SENDER, Action, Endpoints

__all__ = ["Writes"]

CHECKSUM = bytes(16)
"""Stands for the right one."""


class Writes(Endpoints):
    """What may happen to tickets."""

    def _ticket_progress(self) -> Iterator[Action]:
        for ticket in self.tickets:
            if ticket.loose:
                yield ("quiesce", ticket)
                continue
            given_up = ticket.cancelled or not self._wanted(ticket)
            if self._lands(ticket) and (given_up or not ticket.hung) and not ticket.target.shut:
                yield ("land", ticket)
            if not self._lands(ticket) or given_up or ticket.target.shut:
                yield ("break", ticket)

    def _ticket_faults(self, ticket: Ticket) -> Iterator[Action]:
        budget = self.budget
        if ticket.loose or ticket.target.shut:
            if ticket.loose and self._lands(ticket):
                yield ("land", ticket)
            return
        if budget.fail:
            yield ("fail", ticket)
        if budget.hang and not ticket.hung:
            yield ("hang", ticket)
        if budget.collateral:
            yield ("collateral", ticket, False)
        if self._lands(ticket):
            if budget.late:
                yield ("late", ticket)
            if budget.collateral and budget.late:
                yield ("collateral", ticket, True)

    def _lands(self, ticket: Ticket) -> bool:
        """The destination's memory is still there, and has not fenced this writer."""
        return any(ticket.token in node.exposed for node in self.nodes.values())

    def _wanted(self, ticket: Ticket) -> bool:
        session = self.nodes[SENDER].core.sessions.get(ticket.key)
        return session is not None and not session.state.is_terminal

    def _spend(self, fault: str) -> None:
        self.budget = replace(self.budget, **{fault: getattr(self.budget, fault) - 1})

    def _land(self, ticket: Ticket) -> None:
        """Its bytes arrive. One that is loose may land again: a writer may repeat itself."""
        _, key, part, blocks = self.leases[ticket.token]
        node = self._touch(next(node.name for node in self.nodes.values() if ticket.token in node.exposed))
        lease = lease_of(key, part)
        if node.core.accounts.blocks_of(lease) != blocks:
            self.violation = f"a write for {lease} landed in blocks {blocks} which it does not hold any more"
        for block, cell in zip(blocks, ticket.bytes or self._read(ticket), strict=False):
            node.memory[block] = cell
        if not ticket.loose:
            checksum = CHECKSUM if self.scene.checksums else None
            self._ended(ticket, inputs.PartWritten(**_written(ticket), ok=True, checksum=checksum))

    def _break(self, ticket: Ticket) -> None:
        """It ends without having landed: it was cancelled, fenced, not even tried, or the destination is gone."""
        shut = bool(ticket.target.shut)
        self._ended(ticket, inputs.PartWritten(**_written(ticket), ok=False, detail="broken", shut=shut))

    def _fail(self, ticket: Ticket) -> None:
        self._spend("fail")
        self._break(ticket)

    def _late(self, ticket: Ticket) -> None:
        """It fails, and its bytes may land later."""
        self._spend("late")
        self._loosen(ticket, collateral=False)

    def _loosen(self, ticket: Ticket, *, collateral: bool) -> None:
        reads = self.scene.reads
        loose = ticket._replace(loose=True, bytes=None if reads else self._read(ticket))
        self._replace(ticket, loose)
        node = self._touch(SENDER)
        how = {**_written(ticket), "quiescent": False, "source_free": not reads, "collateral": collateral}
        node.core.feed(ticket.key, inputs.PartWritten(ok=False, detail="late", **how))
        self._settle(node)

    def _hang(self, ticket: Ticket) -> None:
        self._spend("hang")
        self._replace(ticket, ticket._replace(hung=True))

    def _collateral(self, ticket: Ticket, late: bool) -> None:
        """It fails through no fault of the transport."""
        self._spend("collateral")
        if late:
            self._spend("late")
            return self._loosen(ticket, collateral=True)
        self._ended(ticket, inputs.PartWritten(**_written(ticket), ok=False, detail="killed", collateral=True))

    def _quiesce(self, ticket: Ticket) -> None:
        """A loose ticket can land no more; its writer, if it lives, says so."""
        self._replace(ticket, None)
        node = self._touch(SENDER)
        if node.incarnation == ticket.source:
            command = ticket.command
            node.core.feed(ticket.key, inputs.RankQuiesced(ticket.target.rank, command.part, command.attempt))
            self._settle(node)

    def _ended(self, ticket: Ticket, written: inputs.PartWritten) -> None:
        self._replace(ticket, None)
        node = self._touch(SENDER)
        node.core.feed(ticket.key, written)
        self._settle(node)

    def _replace(self, old: Ticket, new: Ticket | None) -> None:
        kept = tuple(ticket for ticket in self.tickets if ticket is not old)
        self.tickets = kept if new is None else (*kept, new)

    def _read(self, ticket: Ticket) -> tuple[Any, ...]:
        memory = self.nodes[SENDER].memory
        return tuple(memory.get(block) for block in ticket.command.blocks)


def _written(ticket: Ticket) -> dict[str, Any]:
    command, target = ticket.command, ticket.target
    return {
        "rank": target.rank,
        "part": command.part,
        "transport": target.transport,
        "attempt": command.attempt,
    }
