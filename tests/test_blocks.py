"""The accounts of a pool: every block in one place, and who is served first."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from kvpoll_fsm.blocks import BlockAccounts, BlockLoad
from kvpoll_fsm.errors import BlockError, DoubleFree, ForeignBlock, RequestTooLarge
from kvpoll_fsm.spi import LeaseId


def lease(room: int, part: int = 0, rank: int = 0, generation: int = 1) -> LeaseId:
    return LeaseId("receiver", room, rank, generation, part)


@pytest.fixture
def pool() -> BlockAccounts:
    return BlockAccounts(8)


def counts(pool: BlockAccounts) -> tuple[int, int, int, int]:
    load = pool.load()
    assert load.free + load.leased + load.quarantined == load.total == pool.total
    return (load.free, load.leased, load.quarantined, load.queued)


def test_a_fresh_pool_is_free(pool: BlockAccounts) -> None:
    assert pool.load() == BlockLoad(total=8, free=8, leased=0, quarantined=0, queued=0)
    assert pool.leases() == ()
    assert pool.first_waiting is None


@pytest.mark.parametrize("total", range(1, 5))
def test_every_request_against_every_load(total: int) -> None:
    for taken, wanted in itertools.product(range(total + 1), range(1, total + 1)):
        pool = BlockAccounts(total)
        held = pool.take(lease(1), taken) if taken else ()
        assert held is not None
        blocks = pool.take(lease(2), wanted)
        if wanted > total - taken:
            assert blocks is None
            assert counts(pool) == (total - taken, taken, 0, 0)
        else:
            assert blocks is not None
            assert len(set(blocks)) == len(blocks) == wanted
            assert set(blocks) <= set(range(total)) - set(held)


def test_take_quarantine_release(pool: BlockAccounts) -> None:
    blocks = pool.take(lease(1), 3)
    assert counts(pool) == (5, 3, 0, 0)
    assert pool.holds(lease(1))
    pool.quarantine(lease(1))
    assert counts(pool) == (5, 0, 3, 0)
    assert pool.holds(lease(1))
    assert pool.blocks_of(lease(1)) == blocks
    assert pool.leases() == (lease(1),)
    assert pool.release(lease(1)) == blocks
    assert counts(pool) == (8, 0, 0, 0)
    assert not pool.holds(lease(1))
    assert pool.blocks_of(lease(1)) == ()


def test_quarantined_blocks_are_given_to_nobody(pool: BlockAccounts) -> None:
    blocks = pool.take(lease(1), 8)
    assert blocks is not None
    pool.quarantine(lease(1))
    assert pool.take(lease(2), 1) is None
    with pytest.raises(ForeignBlock, match="quarantined"):
        pool.take_exact(lease(2), blocks[:1])
    pool.wait(lease(2), 1)
    assert pool.serve() == []


@pytest.mark.parametrize("count", [-1, 0, 9, 1 << 40])
def test_pain_17_what_can_never_be_had_is_refused_at_once(pool: BlockAccounts, count: int) -> None:
    asks: list[Callable[[], object]] = [
        lambda: pool.take(lease(1), count),
        lambda: pool.wait(lease(1), count),
        lambda: pool.check(count),
    ]
    for ask in asks:
        with pytest.raises(RequestTooLarge) as caught:
            ask()
        assert (caught.value.wanted_blocks, caught.value.pool_blocks) == (count, 8)
    assert pool.serve() == []
    assert counts(pool) == (8, 0, 0, 0)


def test_a_pool_of_the_engine_gives_out_nothing_by_itself() -> None:
    pool = BlockAccounts(8, managed=False)
    for ask in (pool.take, pool.wait):
        with pytest.raises(RequestTooLarge) as caught:
            ask(lease(1), 1)
        assert caught.value.pool_blocks == 0
    assert pool.take_exact(lease(1), [3, 1]) == (3, 1)
    assert counts(pool) == (6, 2, 0, 0)


# ----------------------------------------------------------------------------------------- exact blocks


def test_exact_blocks_in_the_order_named(pool: BlockAccounts) -> None:
    assert pool.take_exact(lease(1), iter([7, 0, 3])) == (7, 0, 3)
    assert pool.blocks_of(lease(1)) == (7, 0, 3)
    rest = pool.take(lease(2), 5)
    assert rest is not None
    assert set(rest) == {1, 2, 4, 5, 6}


@pytest.mark.parametrize(
    ("blocks", "named", "problem"),
    [
        ([], (), "at least one"),
        ([8], (8,), "0 to 7"),
        ([-1], (-1,), "0 to 7"),
        ([0, 99], (0, 99), "0 to 7"),
        ([3, 3], (3, 3), "twice"),
        ([2, 0, 1], (0, 1), "held by a room"),
    ],
)
def test_blocks_that_cannot_be_had(
    pool: BlockAccounts, blocks: list[int], named: tuple[int, ...], problem: str
) -> None:
    pool.take_exact(lease(1), [0, 1])
    before = pool.key()
    with pytest.raises(ForeignBlock, match=problem) as caught:
        pool.take_exact(lease(2), blocks)
    assert caught.value.blocks == named
    assert pool.key() == before


# ------------------------------------------------------------------------------------------ against rules


@pytest.mark.parametrize("action", ["release", "quarantine", "relabel"])
@pytest.mark.parametrize("history", ["never given", "released", "only waiting"])
def test_ending_a_lease_that_holds_nothing_is_a_double_free(pool: BlockAccounts, action: str, history: str) -> None:
    if history == "released":
        pool.take(lease(1), 2)
        pool.release(lease(1))
    elif history == "only waiting":
        pool.take(lease(9), 8)
        pool.wait(lease(1), 1)
    before = pool.key()
    extra = (lease(1, part=1), 1) if action == "relabel" else ()
    with pytest.raises(DoubleFree) as caught:
        getattr(pool, action)(lease(1), *extra)
    assert caught.value.lease == lease(1)
    assert pool.key() == before


@pytest.mark.parametrize("action", ["quarantine", "relabel"])
def test_quarantine_ends_only_by_release(pool: BlockAccounts, action: str) -> None:
    pool.take(lease(1), 2)
    pool.quarantine(lease(1))
    before = pool.key()
    extra = (lease(1, part=1), 1) if action == "relabel" else ()
    with pytest.raises(DoubleFree):
        getattr(pool, action)(lease(1), *extra)
    assert pool.key() == before


@pytest.mark.parametrize("quarantined", [False, True])
@pytest.mark.parametrize("action", ["take", "take_exact", "wait", "relabel"])
def test_a_lease_is_given_once(pool: BlockAccounts, action: str, quarantined: bool) -> None:
    """Giving it again would lose its first blocks: they would be in no place at all."""
    pool.take(lease(1), 2)
    if quarantined:
        pool.quarantine(lease(1))
    pool.take(lease(5), 1)
    before = pool.key()
    asks: dict[str, Callable[[], object]] = {
        "take": lambda: pool.take(lease(1), 1),
        "take_exact": lambda: pool.take_exact(lease(1), [7]),
        "wait": lambda: pool.wait(lease(1), 1),
        "relabel": lambda: pool.relabel(lease(5), lease(1), 1),
    }
    with pytest.raises(BlockError, match="already"):
        asks[action]()
    assert pool.key() == before


# -------------------------------------------------------------------------------------------- relabelling


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_relabel_keeps_the_first_blocks_and_frees_the_rest(pool: BlockAccounts, count: int) -> None:
    pool.take_exact(lease(1), [6, 1, 4])
    kept = pool.relabel(lease(1), lease(1, part=1), count)
    assert kept == (6, 1, 4)[:count]
    assert not pool.holds(lease(1))
    assert pool.blocks_of(lease(1, part=1)) == kept
    assert counts(pool) == (8 - len(kept), len(kept), 0, 0)


def test_relabel_to_itself_shrinks(pool: BlockAccounts) -> None:
    pool.take_exact(lease(1), [6, 1, 4])
    assert pool.relabel(lease(1), lease(1), 1) == (6,)
    assert counts(pool) == (7, 1, 0, 0)


# ---------------------------------------------------------------------------------------------- the queue


@pytest.mark.parametrize("order", list(itertools.permutations([(1, 0), (1, 1), (2, 0), (3, 0)])))
def test_served_in_room_and_rank_order_however_they_came(
    pool: BlockAccounts, order: tuple[tuple[int, int], ...]
) -> None:
    pool.take(lease(0), 8)
    for room, rank in order:
        pool.wait(lease(room, rank=rank), 2)
    assert counts(pool) == (0, 8, 0, 4)
    assert pool.first_waiting == lease(1, rank=0)
    pool.release(lease(0))
    served = pool.serve()
    assert [(given.room, given.rank) for given, _ in served] == sorted(order)
    assert sorted(itertools.chain.from_iterable(blocks for _, blocks in served)) == list(range(8))


def test_a_small_request_does_not_overtake_a_large_one_of_an_earlier_room(pool: BlockAccounts) -> None:
    pool.take(lease(0), 6)
    pool.wait(lease(1), 3)
    pool.wait(lease(2), 1)
    assert pool.serve() == []
    assert pool.take(lease(3), 1) is None, "room 1 waits"
    assert pool.take(lease(0, part=1), 1) is not None, "room 0 is before room 1"
    pool.release(lease(0))
    assert [given for given, _ in pool.serve()] == [lease(1), lease(2)]


def test_waiting_again_replaces_the_request(pool: BlockAccounts) -> None:
    pool.take(lease(0), 8)
    pool.wait(lease(1), 5)
    pool.wait(lease(1), 2)
    assert counts(pool)[3] == 1
    pool.release(lease(0))
    ((given, blocks),) = pool.serve()
    assert (given, len(blocks)) == (lease(1), 2)


@pytest.mark.parametrize("action", ["take", "take_exact", "relabel"])
def test_who_got_blocks_waits_no_more(pool: BlockAccounts, action: str) -> None:
    pool.take(lease(0), 8)
    pool.wait(lease(1), 1)
    if action == "relabel":
        pool.relabel(lease(0), lease(1), 2)
    else:
        pool.release(lease(0))
        getattr(pool, action)(lease(1), 1 if action == "take" else [4])
    assert pool.holds(lease(1))
    assert pool.first_waiting is None
    assert pool.serve() == []


def test_forget_drops_exactly_that_request(pool: BlockAccounts) -> None:
    pool.take(lease(0), 8)
    same_turn = [lease(1), lease(1, part=1), lease(1, generation=2)]
    for waiting in [lease(2), *same_turn]:
        pool.wait(waiting, 1)
    pool.forget(lease(7))
    pool.forget(same_turn[1])
    pool.release(lease(0))
    assert [given for given, _ in pool.serve()] == [same_turn[0], same_turn[2], lease(2)]


# -------------------------------------------------------------------------------------- clone() and key()


def busy() -> BlockAccounts:
    pool = BlockAccounts(8)
    pool.take(lease(1), 3)
    pool.take(lease(2), 2)
    pool.quarantine(lease(2))
    pool.wait(lease(3), 5)
    return pool


@pytest.mark.parametrize("managed", [False, True])
def test_a_clone_has_the_same_total_and_kind(managed: bool) -> None:
    twin = BlockAccounts(8, managed).clone()
    assert (twin.total, twin.managed, twin.load().free) == (8, managed, 8)


def test_clone_and_key_are_independent() -> None:
    pool = busy()
    twin, key = pool.clone(), pool.key()
    assert twin.key() == key
    assert hash(key) == hash(busy().key())
    twin.release(lease(1))
    twin.release(lease(2))
    twin.serve()
    assert pool.key() == key != twin.key()
    pool.forget(lease(3))
    assert twin.blocks_of(lease(3))


def test_key_does_not_depend_on_the_order_leases_came_in() -> None:
    first, second = BlockAccounts(2), BlockAccounts(2)
    first.take_exact(lease(1), [0])
    first.take_exact(lease(2), [1])
    second.take_exact(lease(2), [1])
    second.take_exact(lease(1), [0])
    assert first.key() == second.key()
