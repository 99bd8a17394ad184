from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast

import pytest

from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.links import Links
from kvpoll_fsm.messages import TransportOffer
from kvpoll_fsm.spi import LinkDown, LinkUp, Transport

OFFER = TransportOffer("fake", b"where", (b"r0", b"r1"))


class FakeLink:
    def __init__(self, number: int) -> None:
        self.number = number
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


class FakeTransport:
    """Makes links and does nothing with them."""

    def __init__(self) -> None:
        self.links: list[FakeLink] = []
        self.asked: list[tuple[bytes, tuple[bytes, ...]]] = []
        self.refusal: Exception | None = None

    def connect(self, descriptor: bytes, regions: Sequence[bytes]) -> FakeLink:
        if self.refusal is not None:
            raise self.refusal
        self.asked.append((descriptor, tuple(regions)))
        self.links.append(FakeLink(len(self.links)))
        return self.links[-1]


class Bench:
    """Links over one fake transport, and the answers they gave."""

    def __init__(self) -> None:
        self.transport = FakeTransport()
        self.links = Links({"fake": cast("Transport", self.transport)})
        self.answers: list[tuple[int, bool, str]] = []
        self._count = itertools.count()

    def reach(self, conn: int = 1, offer: TransportOffer | None = OFFER, name: str = "fake") -> None:
        number = next(self._count)
        self.links.reach(conn, offer, name, lambda ok, why: self.answers.append((number, ok, why)))


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_connects_once_and_answers_everybody(bench: Bench) -> None:
    bench.reach()
    bench.reach()
    assert bench.transport.asked == [(b"where", (b"r0", b"r1"))]
    assert bench.answers == []
    before = bench.links.idle
    bench.links.completed("fake", LinkUp(0))
    assert (before, bench.links.idle) == (False, True)
    assert bench.answers == [(0, True, ""), (1, True, "")]
    bench.reach()
    assert bench.answers[-1] == (2, True, "")
    assert len(bench.transport.links) == 1
    assert bench.links.get(1, "fake") is cast("Any", bench.transport.links[0])


def test_each_connection_has_its_own_link(bench: Bench) -> None:
    bench.reach(conn=1)
    bench.reach(conn=2)
    bench.links.completed("fake", LinkUp(1))
    assert bench.answers == [(1, True, "")]
    assert bench.links.get(1, "fake") is not bench.links.get(2, "fake")


def test_says_why_and_tries_anew_next_time(bench: Bench) -> None:
    bench.reach()
    bench.links.completed("fake", LinkDown(0, "no route"))
    assert bench.links.idle
    assert bench.answers == [(0, False, "no route")]
    assert bench.transport.links[0].closed == 1
    assert bench.links.get(1, "fake") is None
    bench.reach()
    bench.links.completed("fake", LinkUp(1))
    assert bench.answers[-1] == (1, True, "")


def test_a_link_that_went_down_is_made_anew(bench: Bench) -> None:
    bench.reach()
    bench.links.completed("fake", LinkUp(0))
    bench.links.completed("fake", LinkDown(0, "reset"))
    bench.reach()
    assert len(bench.transport.links) == 2
    assert len(bench.answers) == 1


@pytest.mark.parametrize(
    ("offer", "name", "why"), [(None, "fake", "the peer does not offer it"), (OFFER, "other", "it is not in use here")]
)
def test_what_is_not_offered_is_not_reached(bench: Bench, offer: TransportOffer | None, name: str, why: str) -> None:
    bench.reach(offer=offer, name=name)
    assert bench.answers == [(0, False, why)]
    assert bench.transport.links == []


@pytest.mark.parametrize("error", [InvalidInput("cannot be read"), RuntimeError("cannot be read")])
def test_a_descriptor_that_cannot_be_read_is_an_answer(bench: Bench, error: Exception) -> None:
    bench.transport.refusal = error
    bench.reach()
    assert [(ok, "cannot be read" in why) for _, ok, why in bench.answers] == [(False, True)]
    bench.transport.refusal = None
    bench.reach()
    assert len(bench.transport.links) == 1


def test_hanging_up_closes_the_links_and_answers_who_waits(bench: Bench) -> None:
    bench.reach(conn=1)
    bench.reach(conn=2)
    bench.links.hang_up(1)
    assert not bench.links.idle
    assert bench.answers == [(0, False, "the peer is gone")]
    assert [link.closed for link in bench.transport.links] == [1, 0]
    bench.links.hang_up(1)
    bench.links.completed("fake", LinkUp(0))  # too late, and harmless
    assert bench.links.get(1, "fake") is None
    assert bench.links.get(2, "fake") is not None


def test_the_links_of_a_transport_that_was_closed_are_gone(bench: Bench) -> None:
    bench.reach(conn=1)
    bench.reach(conn=2)
    bench.links.completed("fake", LinkUp(1))
    bench.links.lost("other", "given up")
    bench.links.lost("fake", "given up")
    assert bench.answers == [(1, True, ""), (0, False, "given up")]
    assert bench.links.idle
    assert bench.links.get(2, "fake") is None


@pytest.mark.parametrize("ok", [True, False])
def test_an_answer_that_is_not_taken_keeps_no_other(bench: Bench, ok: bool) -> None:
    def refuse(ok: bool, why: str) -> None:
        raise RuntimeError("nobody is here")

    bench.links.reach(1, OFFER, "fake", refuse)
    bench.reach(conn=1)
    bench.links.completed("fake", LinkUp(0) if ok else LinkDown(0, "reset"))
    assert bench.answers == [(0, ok, "" if ok else "reset")]


def test_news_of_links_that_are_not_ours_is_ignored(bench: Bench) -> None:
    bench.links.completed("fake", LinkUp(99))
    bench.links.completed("other", LinkDown(0, "x"))
    assert bench.answers == []


def test_a_link_that_cannot_be_closed_harms_no_other(bench: Bench) -> None:
    bench.reach(conn=1)
    bench.reach(conn=1)

    def explode() -> None:
        raise RuntimeError("native crash")

    bench.transport.links[0].close = explode  # type: ignore[method-assign]
    bench.links.completed("fake", LinkDown(0, "reset"))
    assert bench.answers == [(0, False, "reset"), (1, False, "reset")]
    assert bench.links.get(1, "fake") is None
