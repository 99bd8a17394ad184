"""A receiver keeps out what may land still, on one transport while the room lives."""

from __future__ import annotations

from typing import Any

import pytest

from kvpoll_fsm import inputs
from kvpoll_fsm.commands import Command, Fence, Release
from kvpoll_fsm.messages import FencePart, PartFenced, Quiesced, Withdrawn
from kvpoll_fsm.poll import KVPoll
from tests.test_receiver_session import Rx, armed, kinds, sent


def moving() -> Rx:
    """Part 0 of 20 tokens is on its way."""
    rx = Rx()
    rx.feed(inputs.Granted(0, (4, 2), 8, (("a", b"1"), ("b", b"2"))))
    return rx.opened(20)


def ask(rx: Rx, transport: str = "a", attempt: int = 0, part: int = 0) -> list[Command]:
    return rx.say(FencePart, part=part, transport=transport, attempt=attempt)


def test_one_transport_is_fenced_and_the_room_goes_on() -> None:
    rx = moving()
    assert ask(rx) == [Fence(0, force=True, transport="a")]
    told = rx.feed(inputs.Fenced(0, "a", b"3"))
    fenced = sent(told, PartFenced)
    assert (fenced.part, fenced.transport, fenced.attempt, fenced.token) == (0, "a", 0, b"3")
    assert kinds(told) == ["PartFenced"]
    assert rx.session._grant.tokens_by_transport == (("a", b"3"), ("b", b"2"))  # type: ignore[union-attr]
    rx.part_done()
    assert rx.session.state is KVPoll.Transferring


def test_two_transports_are_fenced_each_for_itself() -> None:
    rx = moving()
    ask(rx, "a", 0)
    assert ask(rx, "b", 1) == [Fence(0, force=True, transport="b")]
    assert sent(rx.feed(inputs.Fenced(0, "b", b"4")), PartFenced).attempt == 1
    assert sent(rx.feed(inputs.Fenced(0, "a", b"3")), PartFenced).attempt == 0
    assert rx.feed(inputs.Fenced(0, "a", b"3")) == []


def test_a_transport_that_was_given_up_is_answered_for_without_a_token() -> None:
    rx = moving()
    ask(rx)
    assert sent(rx.feed(inputs.Fenced(0, "a")), PartFenced).token is None
    assert rx.session._grant.transports == ("b",)  # type: ignore[union-attr]


def test_a_fence_that_is_asked_for_answers_a_withdraw() -> None:
    rx = moving()
    assert kinds(rx.feed(inputs.RevokeGrant())) == []  # the sender has all it waits for
    rx.session._phase = "withdrawing"
    assert ask(rx) == [Fence(0, force=True, transport="a")]
    assert rx.session._phase == "offered"


def test_what_was_asked_of_a_grant_says_nothing_of_the_one_in_its_place() -> None:
    """A sender by the rules would not give back what it writes to."""
    rx = Rx()
    rx.feed(inputs.Granted(0, (4, 2), 8, (("a", b"1"),)))
    rx.feed(inputs.RevokeGrant())
    ask(rx)
    rx.session._phase = "withdrawing"
    rx.say(Withdrawn, part=0, ok=True)
    rx.feed(inputs.Granted(0, (6, 3), 8, (("a", b"2"),)))
    assert rx.feed(inputs.Fenced(0, "a", b"3")) == []
    assert rx.session._grant.tokens_by_transport == (("a", b"2"),)  # type: ignore[union-attr]


@pytest.mark.parametrize("part", [1, 7])
def test_what_is_asked_of_another_part_is_not_done(part: int) -> None:
    assert ask(moving(), part=part) == []


def test_nothing_is_fenced_alone_once_the_part_has_landed_or_the_room_is_over() -> None:
    rx = moving()
    rx.report(20)
    assert ask(rx) == []
    ended = moving()
    ended.feed(inputs.AbortRoom("enough"))
    assert ask(ended) == []


def test_an_answer_for_a_part_that_is_over_is_not_passed_on() -> None:
    rx = moving()
    ask(rx)
    rx.part_done()
    assert rx.feed(inputs.Fenced(0, "a")) == []


@pytest.mark.parametrize("first", ["one", "all"])
def test_after_the_end_the_fence_of_one_is_told_and_that_of_all_ends_the_quarantine(first: str) -> None:
    rx = moving()
    ask(rx)
    ended = rx.feed(inputs.AbortRoom("enough"))
    assert [c for c in ended if isinstance(c, Fence)] == [Fence(0, force=False)]
    assert "quarantine" in armed(ended)
    steps: dict[str, Any] = {"one": inputs.Fenced(0, "a"), "all": inputs.Fenced(0)}
    order = ("one", "all") if first == "one" else ("all", "one")
    said = [rx.feed(steps[step]) for step in order]
    if first == "one":
        assert sent(said[0], PartFenced).token is None
    assert sent(said[order.index("all")], Quiesced)
    assert Release(0) in said[order.index("all")]
    assert rx.session.quiescent
