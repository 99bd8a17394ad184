from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import pytest

from kvpoll_fsm.arena import BlockPool
from kvpoll_fsm.commands import CopyOut, Expose, Fence, HeldPart, Verify
from kvpoll_fsm.errors import FailureCode, InvalidInput
from kvpoll_fsm.incoming import Incoming
from kvpoll_fsm.inputs import CopiedOut, Fenced, Granted, GrantRefused, Input, Verified
from kvpoll_fsm.layout import Field, Layout
from kvpoll_fsm.session import RoomKey
from kvpoll_fsm.spi import Capabilities, FenceKind, LeaseId, Range, Transport
from kvpoll_fsm.staging import Destination, Source, checksum, new_arrays, stage

LAYOUT = Layout(4, [Field("ids", "int32"), Field("aux", "int64", (2,), per_room=True)])
KEY = RoomKey("receiver", 1, 2, 3)


class FakeTransport:
    """Notes what it is asked."""

    def __init__(self, name: str, fence: FenceKind = FenceKind.token) -> None:
        self.name = name
        self.capabilities = Capabilities(fence=fence)
        self.granted: list[tuple[LeaseId, tuple[Range, ...]]] = []
        self.revoked: list[bytes] = []
        self.fenced: list[bytes] = []
        self.refusal: Exception | None = None
        self._fences = itertools.count(10)

    def grant(self, lease: LeaseId, ranges: Sequence[Range]) -> bytes:
        if self.refusal is not None:
            raise self.refusal
        self.granted.append((lease, tuple(ranges)))
        return f"{self.name}{len(self.granted)}".encode()

    def revoke(self, token: bytes) -> None:
        self.revoked.append(token)

    def fence(self, token: bytes) -> int:
        self.fenced.append(token)
        return next(self._fences)


def _numpy(layout: Layout, total_tokens: int) -> Destination:
    return new_arrays(layout, total_tokens, "numpy")


class Bench:
    def __init__(self, *transports: FakeTransport) -> None:
        self.pool = BlockPool(LAYOUT, 6)
        self.transports = transports
        self.fed: list[tuple[RoomKey, Input]] = []
        by_name = {each.name: cast("Transport", each) for each in transports}
        self.given_up: list[str] = []
        self.closes = True
        self.incoming = Incoming(
            self.pool, by_name, self._submit, lambda key, event: self.fed.append((key, event)), self._give_up, _numpy
        )

    def _submit(self, key: RoomKey, work: Callable[[], object], then: Callable[[object], None], nbytes: int) -> None:
        try:
            result = work()
        except Exception as error:
            result = error
        then(result)

    def _give_up(self, name: str, error: Exception) -> None:
        self.given_up.append(name)
        if self.closes:
            self.incoming.lost(name)

    def expose(self, part: int = 0, blocks: tuple[int, ...] = (4, 1)) -> None:
        self.incoming.expose(KEY, Expose(part, blocks))

    @property
    def last(self) -> Any:
        key, event = self.fed[-1]
        assert key == KEY
        return event


@pytest.fixture
def bench() -> Bench:
    return Bench(FakeTransport("a"), FakeTransport("b"))


def landed(pool: BlockPool, held: HeldPart) -> tuple[bytes, dict[str, Any]]:
    """Put a part where a sender would; returns its checksum and the room's data."""
    data = {"ids": np.arange(held.offset + held.tokens, dtype=np.int32), "aux": np.array([7, 8], np.int64)}
    first = held.part == 0
    stage(pool, held.blocks, Source.of(LAYOUT, data), held.offset, held.tokens, first)
    return checksum(pool, held.blocks, held.tokens, first), data


def test_exposes_exactly_the_blocks_on_every_transport(bench: Bench) -> None:
    bench.expose()
    lease = LeaseId("receiver", 1, 2, 3, 0)
    ranges = (Range(0, 64, 16), Range(0, 16, 16), Range(1, 64, 16))  # the per-room value: first block only
    assert [each.granted for each in bench.transports] == [[(lease, ranges)], [(lease, ranges)]]
    assert bench.last == Granted(0, (4, 1), 8, (("a", b"a1"), ("b", b"b1")))


def test_later_parts_carry_no_per_room_value(bench: Bench) -> None:
    bench.expose(part=1)
    assert bench.transports[0].granted[0][1] == (Range(0, 64, 16), Range(0, 16, 16))


@pytest.mark.parametrize("error", [InvalidInput("no such region"), RuntimeError("native crash")])
def test_a_grant_that_fails_is_refused_and_leaves_no_token(bench: Bench, error: Exception) -> None:
    for transport in bench.transports:
        transport.refusal = error
    bench.expose()
    assert isinstance(bench.last, GrantRefused)
    assert bench.last.failure is not None
    assert bench.last.failure.code is FailureCode.InternalError
    assert str(error) in bench.last.failure.detail
    assert bench.last.failure.rank == 2
    assert bench.incoming._exposed == {}


def test_a_transport_that_grants_nothing_is_left_out_of_the_grant(bench: Bench) -> None:
    bench.transports[0].refusal = RuntimeError("native crash")
    bench.expose()
    assert bench.last == Granted(0, (4, 1), 8, (("b", b"b1"),))
    bench.incoming.fence(KEY, Fence(0, force=True))
    assert [each.fenced for each in bench.transports] == [[], [b"b1"]]


def test_the_end_of_a_lease_is_the_end_of_its_tokens(bench: Bench) -> None:
    bench.expose(part=0)
    bench.expose(part=1)
    bench.incoming.release(KEY, 0)
    bench.incoming.release(KEY, 0)
    assert [each.revoked for each in bench.transports] == [[b"a1"], [b"b1"]]
    bench.incoming.release(KEY, 1)
    assert bench.incoming._exposed == {}


def explode(token: bytes) -> int:
    raise RuntimeError("native crash")


def test_a_token_that_cannot_be_revoked_is_not_left_to_a_transport_that_works(bench: Bench) -> None:
    bench.expose()
    bench.transports[0].revoke = explode  # type: ignore[assignment, method-assign]
    bench.incoming.release(KEY, 0)
    assert bench.transports[1].revoked == [b"b1"]
    assert bench.given_up == ["a"]
    assert bench.incoming._exposed == {}


def test_fenced_once_every_transport_is(bench: Bench) -> None:
    bench.expose()
    bench.incoming.fence(KEY, Fence(0, force=False))
    assert [each.fenced for each in bench.transports] == [[b"a1"], [b"b1"]]
    bench.incoming.fenced("a", 10)
    bench.incoming.fenced("a", 10)
    bench.incoming.fenced("b", 11)
    assert not isinstance(bench.last, Fenced)
    assert not bench.incoming.idle
    bench.incoming.fenced("b", 10)
    assert bench.last == Fenced(0)
    assert bench.incoming.idle


def test_a_fence_that_would_hurt_others_only_by_force() -> None:
    bench = Bench(FakeTransport("a"), FakeTransport("b", FenceKind.process))
    bench.expose()
    bench.incoming.fence(KEY, Fence(0, force=False))
    assert [each.revoked for each in bench.transports] == [[b"a1"], [b"b1"]]
    assert [each.fenced for each in bench.transports] == [[], []]
    bench.incoming.fence(KEY, Fence(0, force=True))
    assert [each.fenced for each in bench.transports] == [[b"a1"], [b"b1"]]


def test_a_fence_that_is_asked_twice_is_answered_once(bench: Bench) -> None:
    bench.expose()
    bench.incoming.fence(KEY, Fence(0, force=False))
    bench.incoming.fenced("a", 10)
    bench.incoming.fence(KEY, Fence(0, force=True))
    bench.incoming.fenced("b", 10)  # of the first; the second is what counts
    assert not isinstance(bench.last, Fenced)
    bench.incoming.fenced("a", 11)
    bench.incoming.fenced("b", 11)
    assert [event for _, event in bench.fed if isinstance(event, Fenced)] == [Fenced(0)]
    assert bench.incoming.idle


@pytest.mark.parametrize("broken", ["ab", "a", "b"])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_transport_that_cannot_fence_is_closed_which_fences(bench: Bench, broken: str, earlier: bool) -> None:
    bench.expose()
    if earlier:  # and what it was to fence before has ended too
        bench.incoming.fence(KEY, Fence(0, force=False))
    for each in bench.transports:
        if each.name in broken:
            each.fence = explode  # type: ignore[method-assign]
    bench.incoming.fence(KEY, Fence(0, force=True))
    assert bench.given_up == list(broken)
    for each in bench.transports:
        if each.name not in broken:
            assert not isinstance(bench.last, Fenced)
            bench.incoming.fenced(each.name, 10 + earlier)
    assert [event for _, event in bench.fed if isinstance(event, Fenced)] == [Fenced(0)]
    assert bench.incoming.idle


def test_what_cannot_even_be_closed_is_not_called_fenced(bench: Bench) -> None:
    bench.expose()
    bench.closes = False
    bench.transports[0].fence = bench.transports[1].fence = explode  # type: ignore[method-assign]
    bench.incoming.fence(KEY, Fence(0, force=True))
    assert not any(isinstance(event, Fenced) for _, event in bench.fed)


def test_closing_a_transport_ends_the_fences_it_was_asked_for(bench: Bench) -> None:
    bench.expose(part=0)
    bench.expose(part=1)
    bench.incoming.fence(KEY, Fence(0, force=False))
    bench.incoming.lost("a")
    assert not isinstance(bench.last, Fenced)
    bench.incoming.fenced("b", 10)
    assert bench.last == Fenced(0)
    bench.incoming.fence(KEY, Fence(1, force=False))
    assert bench.transports[0].fenced == [b"a1"]  # it has no token any more
    bench.incoming.fenced("b", 11)
    assert bench.last == Fenced(1)


def test_one_transport_is_fenced_alone_and_gets_a_new_token(bench: Bench) -> None:
    bench.expose()
    bench.incoming.fence(KEY, Fence(0, force=True, transport="a"))
    assert [each.fenced for each in bench.transports] == [[b"a1"], []]
    assert not isinstance(bench.last, Fenced)
    bench.incoming.fenced("a", 10)
    assert bench.last == Fenced(0, "a", b"a2")
    assert bench.transports[0].granted[0] == bench.transports[0].granted[1]
    bench.incoming.release(KEY, 0)
    assert [each.revoked for each in bench.transports] == [[b"a2"], [b"b1"]]


def test_a_transport_that_is_not_there_any_more_is_fenced(bench: Bench) -> None:
    bench.expose()
    bench.incoming.lost("a")
    bench.incoming.fence(KEY, Fence(0, force=True, transport="a"))
    assert bench.last == Fenced(0, "a")
    bench.incoming.fence(KEY, Fence(1, force=True, transport="b"))
    assert bench.last == Fenced(1, "b")
    assert bench.transports[1].fenced == []


def test_a_transport_that_grants_no_second_time_is_done_without(bench: Bench) -> None:
    bench.expose()
    bench.incoming.fence(KEY, Fence(0, force=True, transport="a"))
    bench.transports[0].refusal = RuntimeError("native crash")
    bench.incoming.fenced("a", 10)
    assert bench.last == Fenced(0, "a")
    bench.incoming.fence(KEY, Fence(0, force=False))
    assert [each.fenced for each in bench.transports] == [[b"a1"], [b"b1"]]


def test_a_fence_alone_that_raises_is_a_close(bench: Bench) -> None:
    bench.expose()
    bench.transports[0].fence = explode  # type: ignore[method-assign]
    bench.incoming.fence(KEY, Fence(0, force=True, transport="a"))
    assert bench.given_up == ["a"]
    assert bench.last == Fenced(0, "a")


def test_the_end_of_a_room_waits_for_the_fence_that_is_under_way(bench: Bench) -> None:
    bench.expose()
    bench.incoming.fence(KEY, Fence(0, force=True, transport="a"))
    bench.incoming.fence(KEY, Fence(0, force=False))
    assert [each.fenced for each in bench.transports] == [[b"a1"], [b"b1"]]
    bench.incoming.fenced("b", 10)
    assert not isinstance(bench.last, Fenced)
    bench.incoming.fenced("a", 10)
    assert [event for _, event in bench.fed if isinstance(event, Fenced)] == [Fenced(0)]
    assert len(bench.transports[0].granted) == 1  # nobody is to write there any more


def test_a_costly_fence_alone_ends_without_a_token_if_the_room_did() -> None:
    bench = Bench(FakeTransport("a", FenceKind.process), FakeTransport("b"))
    bench.expose()
    bench.incoming.fence(KEY, Fence(0, force=True, transport="a"))
    bench.incoming.fence(KEY, Fence(0, force=False))
    assert bench.transports[0].fenced == [b"a1"]
    bench.incoming.fenced("a", 10)
    assert bench.last == Fenced(0, "a")
    assert len(bench.transports[0].granted) == 1


def test_a_fence_of_blocks_that_were_given_back_renews_no_token_of_others(bench: Bench) -> None:
    """A peer that has a part fenced and then gives its grant back: the token it was given next must not outlive it."""
    bench.expose()
    bench.incoming.fence(KEY, Fence(0, force=True, transport="a"))
    bench.incoming.release(KEY, 0)
    bench.expose(blocks=(2, 3))
    bench.incoming.fenced("a", 10)
    assert [len(each.granted) for each in bench.transports] == [2, 2]
    assert isinstance(bench.last, Granted)
    bench.incoming.release(KEY, 0)
    assert bench.transports[0].revoked == [b"a1", b"a2"]
    assert bench.incoming.idle


def test_what_was_not_exposed_is_fenced(bench: Bench) -> None:
    bench.incoming.fence(KEY, Fence(3, force=False))
    assert bench.last == Fenced(3)


def test_verifies_where_it_lies(bench: Bench) -> None:
    held = HeldPart(0, 0, 7, (5, 2))
    right, _ = landed(bench.pool, held)
    bench.incoming.verify(KEY, Verify(held, right))
    assert bench.last == Verified(0, None)
    bench.pool.view("ids")[2][1] ^= 1
    bench.incoming.verify(KEY, Verify(held, right))
    assert bench.last.failure == (FailureCode.ChecksumMismatch, "part 0, tokens 0 to 7: the bytes differ")


def test_copies_out_part_by_part_and_gives_the_arrays_once(bench: Bench) -> None:
    first, second = HeldPart(0, 0, 8, (5, 2)), HeldPart(1, 8, 3, (2, 0))
    for held in (first, second):
        right, data = landed(bench.pool, held)
        bench.incoming.copy_out(KEY, CopyOut((held,), 11, right))
        assert bench.last == CopiedOut(held.part, None)
    arrays = bench.incoming.take_result(KEY)
    assert arrays is not None
    assert (arrays["ids"] == data["ids"]).all()
    assert (arrays["aux"] == data["aux"]).all()
    assert bench.incoming.take_result(KEY) is None
    assert bench.incoming._destinations == {}


def test_what_does_not_agree_is_not_copied(bench: Bench) -> None:
    held = HeldPart(0, 0, 8, (5, 2))
    landed(bench.pool, held)
    bench.incoming.copy_out(KEY, CopyOut((held,), 8, bytes(16)))
    assert bench.last.failure[0] is FailureCode.ChecksumMismatch
    assert bench.incoming.take_result(KEY) is None


@pytest.mark.parametrize("error", [RuntimeError("no worker"), SystemExit()])
def test_work_that_no_worker_takes_is_answered(bench: Bench, error: BaseException) -> None:
    """As is what a worker that is shot leaves behind."""

    def submit(key: RoomKey, work: Callable[[], object], then: Callable[[object], None], nbytes: int) -> None:
        if isinstance(error, SystemExit):
            return then(error)
        raise error

    bench.incoming._submit = submit
    held = HeldPart(0, 0, 8, (5, 2))
    bench.incoming.verify(KEY, Verify(held, bytes(16)))
    assert isinstance(bench.last, Verified)
    bench.incoming.copy_out(KEY, CopyOut((held,), 8, None))
    assert isinstance(bench.last, CopiedOut)
    for _, event in bench.fed:
        assert isinstance(event, (Verified, CopiedOut))
        assert event.failure is not None
        assert event.failure[0] is FailureCode.InternalError
    assert len(bench.fed) == 2


def test_a_total_beyond_all_memory_is_a_failure_of_the_room(bench: Bench) -> None:
    held = HeldPart(0, 0, 8, (5, 2))
    landed(bench.pool, held)
    bench.incoming.copy_out(KEY, CopyOut((held,), 1 << 62, None))
    assert bench.last.failure[0] is FailureCode.RequestTooLarge
    assert "memory" in bench.last.failure[1]


def test_an_exception_on_the_worker_is_a_failure_of_the_room(bench: Bench) -> None:
    bench.pool.close()
    bench.incoming.verify(KEY, Verify(HeldPart(0, 0, 4, (0,)), bytes(16)))
    assert bench.last.failure is not None
    assert "pool has been closed" in bench.last.failure[1]


def test_forget_lets_go_of_the_arrays(bench: Bench) -> None:
    held = HeldPart(0, 0, 8, (5, 2))
    landed(bench.pool, held)
    bench.incoming.copy_out(KEY, CopyOut((held,), 8, None))
    bench.incoming.forget(KEY)
    assert bench.incoming._destinations == {}
