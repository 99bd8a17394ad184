"""One state out of the states of many ranks.

Any failure wins, Success needs all, otherwise the least advanced rank decides. That equals the MIN that
engines compute over their numbers, without comparing a number: the order is `ADVANCEMENT`.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvpoll_fsm.poll import KVPoll

__all__ = ["ADVANCEMENT", "reduce_ranks"]

ADVANCEMENT: tuple[KVPoll, ...] = (
    KVPoll.Failed,
    KVPoll.Bootstrapping,
    KVPoll.WaitingForInput,
    KVPoll.Transferring,
    KVPoll.Success,
)
"""The first of these that any rank is in is the state of all."""


def reduce_ranks(polls: Iterable[KVPoll]) -> KVPoll:
    """Reduce the states of all ranks to one; the order they come in does not matter.

    A dummy rank (one that holds no data) is in the state its outcomes put it in, like any other.

    Args:
        polls: The state of each rank. Plain numbers will do, as they come out of an engine's all-reduce.

    Raises:
        ValueError: There are no ranks, or a number is no state.
    """
    seen = {KVPoll(poll) for poll in polls}
    if not seen:
        raise ValueError("reduce_ranks() needs the state of at least one rank")
    return next(state for state in ADVANCEMENT if state in seen)
