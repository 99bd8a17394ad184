from __future__ import annotations

import logging
from typing import Any, cast

import pytest

from kvpoll_fsm.arena import BlockPool
from kvpoll_fsm.carriers import Carriers, Loaded
from kvpoll_fsm.control import Control
from kvpoll_fsm.errors import TransportUnavailable
from kvpoll_fsm.layout import Field, Layout
from kvpoll_fsm.spi import Completion, Fenced, LinkUp, Region, Transport

POOL = BlockPool(Layout(4, [Field("ids", "int32"), Field("aux", "int64", (2,), per_room=True)]), 2)


class FakeTransport:
    """Says what it was told to say."""

    def __init__(self, name: str, fd: int | None = None) -> None:
        self.name = name
        self.fd = fd
        self.said: list[Completion] = []
        self.registered: list[int] = []
        self.closed = 0
        self.problems: dict[str, Exception] = {}

    def _maybe_raise(self, what: str) -> None:
        if what in self.problems:
            raise self.problems[what]

    def start(self) -> None:
        self._maybe_raise("start")

    def register(self, region: Region) -> bytes:
        self.registered.append(region.number)
        return b"%d" % region.number

    def descriptor(self) -> bytes:
        return self.name.encode()

    def fileno(self) -> int | None:
        return self.fd

    def completions(self) -> list[Completion]:
        self._maybe_raise("completions")
        said, self.said = self.said, []
        return said

    def close(self) -> None:
        self.closed += 1
        self._maybe_raise("close")


class FakeControl:
    def __init__(self) -> None:
        self.watched: set[int] = set()

    def watch(self, fd: int) -> None:
        self.watched.add(fd)

    def unwatch(self, fd: int) -> None:
        self.watched.remove(fd)


class Bench:
    def __init__(self, *transports: FakeTransport) -> None:
        self.control = FakeControl()
        self.lost: list[tuple[str, str, int]] = []
        self.transports = {each.name: each for each in transports}
        loaded = Loaded(cast("dict[str, Transport]", self.transports))
        self.carriers = Carriers(loaded, cast("Control", self.control))

    def start(self) -> Any:
        offers = self.carriers.start(POOL, tuple(self.transports))
        self.carriers.watch(lambda name, why: self.lost.append((name, why, self.transports[name].closed)))
        return offers


@pytest.fixture
def bench() -> Bench:
    return Bench(FakeTransport("a", fd=7), FakeTransport("b"))


def test_starts_registers_and_watches(bench: Bench) -> None:
    offers = bench.start()
    assert [(o.name, o.descriptor, o.regions) for o in offers] == [
        ("a", b"a", (b"0", b"1")),
        ("b", b"b", (b"0", b"1")),
    ]
    assert bench.control.watched == {7}
    assert bench.carriers.blind


def test_those_that_cannot_start_are_left_out(bench: Bench) -> None:
    bench.transports["b"].problems["start"] = TransportUnavailable("b", "not here")
    assert [offer.name for offer in bench.start()] == ["a"]
    assert bench.transports["b"].closed == 1
    assert not bench.carriers.blind


def test_none_can_start(bench: Bench) -> None:
    for each in bench.transports.values():
        each.problems["start"] = TransportUnavailable(each.name, "not here")
    with pytest.raises(TransportUnavailable, match="'a': not here"):
        bench.start()


def test_news_with_the_name_of_who_brings_it(bench: Bench) -> None:
    bench.start()
    bench.transports["a"].said = [Fenced(1), LinkUp(2)]
    bench.transports["b"].said = [LinkUp(2)]
    assert list(bench.carriers.news()) == [("a", Fenced(1)), ("a", LinkUp(2)), ("b", LinkUp(2))]
    assert list(bench.carriers.news()) == []


def test_one_whose_file_has_nothing_to_read_is_asked_only_with_all_others(bench: Bench) -> None:
    bench.start()
    for each in bench.transports.values():
        each.said = [LinkUp(2)]
    assert list(bench.carriers.news(set())) == [("b", LinkUp(2))], "it has no file to show that it has news"
    assert list(bench.carriers.news({7})) == [("a", LinkUp(2))]
    bench.transports["a"].said = [LinkUp(3)]
    assert list(bench.carriers.news()) == [("a", LinkUp(3))]


def test_one_that_breaks_is_closed_first_and_then_told(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.start()
    bench.transports["a"].problems["completions"] = MemoryError("native heap")
    bench.transports["b"].said = [LinkUp(2)]
    assert list(bench.carriers.news()) == [("b", LinkUp(2))]
    why = "given up after MemoryError: native heap"
    assert bench.lost == [("a", why, 1)]
    assert (list(bench.carriers.live), bench.control.watched, bench.carriers.fatal) == (["b"], set(), None)
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [(logging.ERROR, f"transport a: {why}")]
    bench.carriers.give_up("a", RuntimeError("again"))
    assert len(bench.lost) == 1


def test_without_any_left_there_is_no_use_in_going_on(bench: Bench) -> None:
    bench.start()
    for name in "ab":
        bench.carriers.give_up(name, RuntimeError("native crash"))
    assert [name for name, _, _ in bench.lost] == ["a", "b"]
    assert str(bench.carriers.fatal) == ("transport 'b': given up after RuntimeError: native crash; no other is left")


def test_one_that_cannot_be_closed_may_write_still_so_nothing_of_it_has_ended(bench: Bench) -> None:
    bench.start()
    bench.transports["a"].problems["close"] = OSError("stuck")
    bench.carriers.give_up("a", RuntimeError("native crash"))
    assert bench.lost == []
    assert str(bench.carriers.fatal) == (
        "transport 'a': given up after RuntimeError: native crash; nor can it be closed: OSError('stuck')"
    )


def test_close_closes_all(bench: Bench) -> None:
    bench.start()
    bench.transports["a"].problems["close"] = OSError("stuck")
    bench.carriers.close()
    assert [each.closed for each in bench.transports.values()] == [1, 1]
    assert bench.carriers.unsafe
