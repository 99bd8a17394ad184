"""Every target on the inputs that are kept, on changed ones, and on any bytes. `make fuzz` goes on where this ends."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.choices import Choices
from tests.fuzz.targets import CORPUS, TARGETS, Target

EXAMPLES = dict.fromkeys(TARGETS, 60) | {"core": 40, "trace_files": 30, "key_files": 30, "key_name": 30}
"""Fewer for those that take milliseconds each."""


@pytest.fixture(params=list(TARGETS))
def target(request: pytest.FixtureRequest) -> Target:
    return TARGETS[request.param]


def test_every_target_has_inputs_that_are_kept() -> None:
    assert {folder.name for folder in CORPUS.iterdir()} == set(TARGETS)
    for target in TARGETS.values():
        assert 2 <= len(target.corpus()) <= 60, target.name


def test_kept_inputs(target: Target) -> None:
    for path in target.corpus():
        target.run(path.read_bytes())


def test_any_bytes(target: Target) -> None:
    @settings(max_examples=EXAMPLES[target.name])
    @given(st.binary(max_size=min(target.most_nbytes, 400)))
    def run(data: bytes) -> None:
        target.run(data)

    run()


def changed(target: Target) -> st.SearchStrategy[bytes]:
    """A kept input with some things changed, by its structure where it has one."""
    kept = st.sampled_from([path.read_bytes() for path in target.corpus()])

    def change(pair: tuple[bytes, list[bytes]]) -> bytes:
        data, decisions = pair
        for each in decisions:
            data = target.changed(data, Choices(each))
        return data

    return st.tuples(kept, st.lists(st.binary(min_size=8, max_size=24), min_size=1, max_size=3)).map(change)


def test_changed_inputs(target: Target) -> None:
    @settings(max_examples=EXAMPLES[target.name])
    @given(changed(target))
    def run(data: bytes) -> None:
        target.run(data)

    run()


@given(st.binary(max_size=40), st.lists(st.integers(1, 1 << 40), max_size=6))
def test_choices_stay_within_their_bounds(data: bytes, bounds: list[int]) -> None:
    choices: Any = Choices(data)
    for bound in bounds:
        assert 0 <= choices.below(bound) < bound
    choices.rest()
    assert not choices
    assert [choices.below(9), choices.flag(), choices.pick("abc"), choices.text(3)] == [0, False, "a", ""]
