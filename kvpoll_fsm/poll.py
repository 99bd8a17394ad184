"""The five states of a transfer, with the numbers that engines already reduce over."""

from __future__ import annotations

import enum

__all__ = ["KVPoll"]


class KVPoll(enum.IntEnum):
    """Where one transfer stands.

    The numbers are those engines put into their own all-reduce, so they never change. Inside this
    library states are never compared as numbers: order between them comes from the rows in
    `kvpoll_fsm.lifecycle` alone.
    """

    Failed = 0
    Bootstrapping = 1
    WaitingForInput = 2
    Transferring = 3
    Success = 4

    is_terminal: bool
    """True for Success and Failed, which nothing leaves."""

    def __str__(self) -> str:
        return self.name

    def __format__(self, spec: str) -> str:
        return format(self.name, spec)


for _state in KVPoll:  # asked so often that a property would show in what a room costs
    _state.is_terminal = _state in (KVPoll.Success, KVPoll.Failed)
