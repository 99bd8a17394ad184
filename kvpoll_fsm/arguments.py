"""Checks of what hosts pass to an endpoint and its handles."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, SupportsIndex

from kvpoll_fsm.address import Address
from kvpoll_fsm.arena import BlockPool
from kvpoll_fsm.errors import ForeignBlock, InvalidInput, RequestTooLarge
from kvpoll_fsm.messages import MAX_BLOCKS_PER_GRANT, MAX_ROOM

__all__ = ["grant_size", "peer_address", "plain_block_ids", "plain_integer"]


def peer_address(given: str | Address) -> Address:
    """Where a peer can be reached.

    Raises:
        AddressError: It cannot be read, or nobody could reach it.
    """
    return _read(given) if isinstance(given, str) else Address.parse(given).require_reachable()


@lru_cache(maxsize=64)
def _read(text: str) -> Address:
    """Few peers are named, each for many rooms."""
    return Address.parse(text).require_reachable()


def plain_block_ids(pool: BlockPool, given: Iterable[SupportsIndex], at_least: int = 0) -> tuple[int, ...]:
    """Block ids as integers of Python's own; engines keep them in arrays.

    Raises:
        ForeignBlock: Too few, one twice, or what is no id of this pool.
    """
    wanted = f"block ids of this pool are 0 to {pool.blocks - 1}, and at least one is needed"
    try:
        ids = tuple(map(operator.index, given))
    except TypeError:
        raise ForeignBlock((), f"given {given!r}; {wanted}") from None
    if len(ids) < at_least or any(not 0 <= block < pool.blocks for block in ids):
        raise ForeignBlock(ids, wanted)
    if len(set(ids)) != len(ids):
        raise ForeignBlock(ids, "an id is named twice")
    return ids


def plain_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """A number as an integer of Python's own; numpy's could not be sent.

    Raises:
        InvalidInput: No integer, or one outside `low` to `high`; names the argument.
    """
    try:
        number = low - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = low - 1
    if number < low or (high is not None and number > high):
        wanted = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise InvalidInput(f"{name}={value!r}: give an integer {wanted}")
    return number


def grant_size(
    pool: BlockPool,
    tokens: int | None,
    resume: str,
    blocks: Iterable[SupportsIndex] | None,
    dummy: bool,
    window: int,
) -> tuple[tuple[int, ...], int]:
    """The blocks the engine chose, and how many blocks one grant has (0 for a dummy rank).

    All but `pool` is what `Endpoint.receiver` was given.

    Raises:
        InvalidInput: Something cannot work, or does not go together.
        RequestTooLarge: More than the pool holds.
        ForeignBlock: Blocks that the pool does not have.
    """
    if resume not in ("drain", "extend", "manual"):
        raise InvalidInput(f"resume={resume!r}: choose 'drain', 'extend' or 'manual'")
    if dummy:
        return (), 0
    if (blocks is not None) is not (resume == "manual") or (blocks is not None) is pool.managed:
        raise InvalidInput("blocks=[...], resume='manual' and a BlockPool.adopt() belong together")
    if blocks is not None:
        chosen = plain_block_ids(pool, blocks, at_least=1)
        return chosen, len(chosen)
    most = min(pool.blocks // window, MAX_BLOCKS_PER_GRANT)
    if tokens is None:
        count = max(1, min(8, most))
    else:
        count = pool.layout.blocks_for(plain_integer("tokens", tokens, 1, MAX_ROOM))
    if count > most:
        raise RequestTooLarge(count * window, min(pool.blocks, MAX_BLOCKS_PER_GRANT * window))
    return (), count
