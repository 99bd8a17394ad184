"""Transport policies: how they are read, and what they allow."""

from __future__ import annotations

import itertools

import pytest

from kvpoll_fsm.errors import PolicyError
from kvpoll_fsm.selection import Policy

NAMES = ("mooncake", "shm", "tcp")


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("tcp", Policy("require", ("tcp",))),
        ("require:tcp", Policy("require", ("tcp",))),
        ("prefer:tcp", Policy("prefer", ("tcp",))),
        ("prefer:mooncake,tcp", Policy("prefer", ("mooncake", "tcp"))),
        (" prefer : shm , tcp ", Policy("prefer", ("shm", "tcp"))),
        ("my_own-transport2", Policy("require", ("my_own-transport2",))),
    ],
)
def test_read(text: str, policy: Policy) -> None:
    assert Policy.parse(text) == policy
    assert Policy.parse(policy) is policy
    assert Policy.parse(str(policy)) == policy


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "names no transport"),
        ("require:", "names no transport"),
        ("prefer:", "names no transport"),
        ("prefer:tcp,", "names no transport"),
        ("prefer:,tcp", "names no transport"),
        ("-", "names no transport"),
        ("tcp:1", "unknown mode 'tcp'"),
        ("Prefer:tcp", "unknown mode 'Prefer'"),
        (":tcp", "unknown mode ''"),
        ("prefer:tcp:shm", "odd characters"),
        ("prefer:tcp shm", "odd characters"),
        ("tcp,shm", "exactly one"),
        ("require:tcp,shm", "exactly one"),
        ("prefer:tcp,shm,tcp", "twice"),
        (None, "not a string"),
        (["tcp"], "not a string"),
    ],
)
def test_refused_with_the_cause(text: str, problem: str) -> None:
    with pytest.raises(PolicyError, match=problem) as caught:
        Policy.parse(text)
    assert "prefer:shm,tcp" in str(caught.value), "the error shows how to write one"


def subsets() -> list[tuple[str, ...]]:
    return [names for size in range(4) for names in itertools.combinations(NAMES, size)]


@pytest.mark.parametrize("named", [order for names in subsets() for order in itertools.permutations(names)])
def test_only_what_is_named_and_common_in_the_order_named(named: tuple[str, ...]) -> None:
    policy = Policy("prefer", named)
    for ours, theirs in itertools.product(subsets(), repeat=2):
        allowed = policy.candidates(ours, theirs)
        assert set(allowed) == set(named) & set(ours) & set(theirs)
        assert list(allowed) == sorted(allowed, key=named.index)


def test_pain_21_a_required_transport_has_no_substitute() -> None:
    assert Policy.parse("require:mooncake").candidates(["mooncake", "tcp"], ["tcp"]) == ()


def test_those_before_the_first_candidate_are_accounted_for() -> None:
    policy = Policy.parse("prefer:shm,mooncake,tcp,memory")
    assert policy.missing(["shm", "tcp", "memory"], ["mooncake", "tcp"]) == (
        "shm: the receiver does not have it",
        "mooncake: the sender does not have it",
    )
    assert policy.missing(["shm"], ["shm"]) == ()
