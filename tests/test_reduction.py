"""Many ranks, one state: any failure wins, Success needs all, otherwise the least advanced."""

from __future__ import annotations

import itertools

import pytest

from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.reduction import ADVANCEMENT, reduce_ranks


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equals_min_over_the_engines_numbers_in_every_order(ranks: int) -> None:
    for polls in itertools.product(KVPoll, repeat=ranks):
        assert reduce_ranks(polls) is KVPoll(min(int(poll) for poll in polls))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_pain_06_order_of_ranks_does_not_matter(ranks: int) -> None:
    for polls in itertools.combinations_with_replacement(KVPoll, ranks):
        assert len({reduce_ranks(order) for order in itertools.permutations(polls)}) == 1


@pytest.mark.parametrize("polls", list(itertools.product(KVPoll, repeat=3)))
def test_the_rule_in_words(polls: tuple[KVPoll, ...]) -> None:
    reduced = reduce_ranks(polls)
    assert (reduced is KVPoll.Failed) == (KVPoll.Failed in polls)
    assert (reduced is KVPoll.Success) == all(poll is KVPoll.Success for poll in polls)
    assert reduced in polls


def test_takes_any_iterable_and_plain_numbers() -> None:
    assert reduce_ranks(iter([KVPoll.Success, KVPoll.Transferring])) is KVPoll.Transferring
    assert reduce_ranks([4, 3, 4]) is KVPoll.Transferring  # type: ignore[list-item]


def test_no_ranks_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one rank"):
        reduce_ranks([])


@pytest.mark.parametrize("polls", [[7], [4, 7], [7, 0], [-1, 4], [None, 4]])
def test_what_is_no_state_is_an_error_and_never_ignored(polls: list[int]) -> None:
    with pytest.raises(ValueError, match="KVPoll"):
        reduce_ranks(polls)  # type: ignore[arg-type]


def test_every_state_has_one_place_in_the_order() -> None:
    assert len(ADVANCEMENT) == len(KVPoll)
    assert set(ADVANCEMENT) == set(KVPoll)
