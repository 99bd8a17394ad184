"""Which tokens are committed, and the one place `is_last` comes from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.ledger import Ledger, is_last_part, part_tokens


def parts_of(total: int, capacity: int) -> list[tuple[int, bool]]:
    """Length and `is_last` of each part when every grant holds `capacity` tokens and all data is ready."""
    ledger = Ledger()
    ledger.learn_total(total)
    parts = []
    while not ledger.complete:
        remaining = ledger.remaining_tokens
        assert remaining is not None
        tokens = part_tokens(remaining, (capacity, capacity), remaining)
        parts.append((tokens, ledger.commit(ledger.covered_tokens, tokens)))
    return parts


@pytest.mark.parametrize(
    ("total", "parts"),
    [
        (1, [(1, True)]),
        (500, [(500, True)]),
        (1023, [(1023, True)]),
        (1024, [(1024, True)]),
        (1025, [(1024, False), (1, True)]),
        (2000, [(1024, False), (976, True)]),
        (2048, [(1024, False), (1024, True)]),
        (5000, [(1024, False)] * 4 + [(904, True)]),
    ],
)
def test_parts_over_a_buffer_of_1024_tokens(total: int, parts: list[tuple[int, bool]]) -> None:
    assert parts_of(total, 1024) == parts


def compositions(total: int) -> Iterator[list[int]]:
    """Every way to cut `total` tokens into parts."""
    if total == 0:
        yield []
    for first in range(1, total + 1):
        for rest in compositions(total - first):
            yield [first, *rest]


@pytest.mark.parametrize("total", range(1, 11))
def test_pain_15_every_split_ends_with_exactly_one_last_part(total: int) -> None:
    for split in compositions(total):
        ledger = Ledger(0, total)
        flags = [ledger.commit(ledger.covered_tokens, tokens) for tokens in split]
        assert flags == [False] * (len(split) - 1) + [True]
        assert ledger.complete
        assert ledger.remaining_tokens == 0


def test_is_last_part_is_exact() -> None:
    assert is_last_part(1024, 976, 2000)
    assert not is_last_part(1024, 975, 2000)
    assert not is_last_part(1024, 977, 2000)


@pytest.mark.parametrize(
    ("remaining", "capacities", "ready", "tokens"),
    [
        (2000, (1024,), 2000, 1024),
        (2000, (1024, 512), 2000, 512),
        (2000, (1024, 512), 100, 100),
        (976, (1024, 1024), 976, 976),
        (10, (), 8, 8),
        (10, (1024,), 0, 0),
    ],
)
def test_a_part_fits_every_rank(remaining: int, capacities: tuple[int, ...], ready: int, tokens: int) -> None:
    assert part_tokens(remaining, capacities, ready) == tokens


@pytest.mark.parametrize(
    ("offset", "tokens", "problem"),
    [
        (0, 1, "where 4 tokens are covered"),
        (5, 1, "where 4 tokens are covered"),
        (4, 0, "a part of 0 tokens"),
        (4, -1, "a part of -1 tokens"),
        (4, 7, "in a room of 10"),
    ],
)
def test_a_part_out_of_place_changes_nothing(offset: int, tokens: int, problem: str) -> None:
    ledger = Ledger(4, 10)
    for ask in (ledger.is_last, ledger.commit):
        with pytest.raises(InvalidInput, match=problem):
            ask(offset, tokens)
    assert ledger.key() == (4, 10)


def test_no_part_before_the_total_is_known() -> None:
    ledger = Ledger()
    with pytest.raises(InvalidInput, match="not known yet"):
        ledger.commit(0, 1)
    assert ledger.remaining_tokens is None
    assert not ledger.complete


def test_asking_is_not_committing() -> None:
    ledger = Ledger(0, 10)
    assert ledger.is_last(0, 10)
    assert ledger.covered_tokens == 0


@pytest.mark.parametrize("total", [0, -1, 3])
def test_a_total_below_what_is_covered_is_refused(total: int) -> None:
    ledger = Ledger(4)
    with pytest.raises(InvalidInput, match="less than the 4 covered"):
        ledger.learn_total(total)
    assert ledger.total_tokens is None


def test_the_total_may_turn_out_to_be_what_is_covered() -> None:
    ledger = Ledger(4)
    ledger.learn_total(4)
    assert ledger.complete


def test_a_total_may_be_learnt_again_but_not_change() -> None:
    ledger = Ledger()
    ledger.learn_total(10)
    ledger.learn_total(10)
    with pytest.raises(InvalidInput, match="cannot become 11"):
        ledger.learn_total(11)
    assert ledger.total_tokens == 10


def test_clone_and_key_are_independent() -> None:
    ledger = Ledger(0, 10)
    twin, key = ledger.clone(), ledger.key()
    assert twin.key() == key
    twin.commit(0, 5)
    assert ledger.key() == key
    assert twin.key() != key
    ledger.commit(0, 5)
    assert ledger == twin
