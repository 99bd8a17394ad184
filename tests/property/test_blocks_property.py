"""Whatever is asked of the accounts: every block in exactly one place, waiters served in room order."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvpoll_fsm.blocks import BlockAccounts
from kvpoll_fsm.errors import BlockError, DoubleFree, ForeignBlock, RequestTooLarge
from kvpoll_fsm.spi import LeaseId

TOTAL = 6

LEASES = [LeaseId("receiver", room, rank, 1, part) for room, rank, part in [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 0, 1)]]
leases = st.sampled_from(LEASES)  # few, so that they meet
sizes = st.integers(1, 3) | st.integers(-1, TOTAL + 1)


def turn(lease: LeaseId) -> tuple[int, int]:
    return (lease.room, lease.rank)


class Accounts(RuleBasedStateMachine):
    """Compared with a model that stores, for each block, the one place it is in."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockAccounts(TOTAL)
        self.places: dict[int, tuple[LeaseId, str] | None] = dict.fromkeys(range(TOTAL))
        self.waiting: dict[LeaseId, int] = {}

    @initialize(managed=st.sampled_from([True, True, True, False]))
    def build(self, managed: bool) -> None:
        self.pool = BlockAccounts(TOTAL, managed)

    def _held(self, lease: LeaseId, *kinds: str) -> set[int]:
        pairs = [(lease, kind) for kind in kinds or ("leased", "quarantined")]
        return {block for block, place in self.places.items() if place in pairs}

    def _free(self) -> set[int]:
        return {block for block, place in self.places.items() if place is None}

    def _given(self, lease: LeaseId, blocks: tuple[int, ...]) -> None:
        assert len(set(blocks)) == len(blocks) > 0
        assert set(blocks) <= self._free(), "given although somebody has it"
        assert not self._held(lease)
        for block in blocks:
            self.places[block] = (lease, "leased")
        self.waiting.pop(lease, None)

    def _refused_for_size(self, lease: LeaseId, count: int, error: BlockError) -> None:
        """Either reason to refuse a request, and nothing else."""
        if self._held(lease):
            assert type(error) is BlockError
        else:
            assert type(error) is RequestTooLarge
            assert not 0 < count <= TOTAL or not self.pool.managed

    @rule(lease=leases, count=sizes)
    def take(self, lease: LeaseId, count: int) -> None:
        try:
            blocks = self.pool.take(lease, count)
        except BlockError as error:
            return self._refused_for_size(lease, count, error)
        first = min(map(turn, self.waiting), default=turn(lease))
        if first < turn(lease) or count > len(self._free()):
            assert blocks is None
        else:
            assert blocks is not None
            assert len(blocks) == count
            self._given(lease, blocks)

    @rule(lease=leases, count=sizes)
    def wait(self, lease: LeaseId, count: int) -> None:
        try:
            self.pool.wait(lease, count)
        except BlockError as error:
            return self._refused_for_size(lease, count, error)
        self.waiting[lease] = count

    @rule(lease=leases, blocks=st.lists(st.integers(-1, TOTAL), max_size=3))
    def take_exact(self, lease: LeaseId, blocks: list[int]) -> None:
        possible = bool(blocks) and len(set(blocks)) == len(blocks) and set(blocks) <= self._free()
        try:
            taken = self.pool.take_exact(lease, blocks)
        except ForeignBlock:
            assert not possible
        except BlockError:
            assert self._held(lease)
        else:
            assert possible
            assert taken == tuple(blocks)
            self._given(lease, taken)

    @rule(lease=leases)
    def forget(self, lease: LeaseId) -> None:
        self.pool.forget(lease)
        self.waiting.pop(lease, None)

    @rule()
    def serve(self) -> None:
        served = self.pool.serve()
        turns = [turn(lease) for lease, _ in served]
        assert turns == sorted(turns)
        for lease, blocks in served:
            assert turn(lease) == min(map(turn, self.waiting)), "somebody earlier waits"
            assert len(blocks) == self.waiting[lease]
            self._given(lease, blocks)
        first = self.pool.first_waiting
        assert first is None or self.waiting[first] > len(self._free()), "stopped although there are blocks"

    @rule(data=st.data(), new=leases, count=st.integers(1, TOTAL))
    def relabel(self, data: st.DataObject, new: LeaseId, count: int) -> None:
        old = data.draw(st.sampled_from([*self.pool.leases(), *LEASES]), "old")
        before = self.pool.blocks_of(old)
        held = self._held(old, "leased")
        try:
            kept = self.pool.relabel(old, new, count)
        except DoubleFree:
            assert not held
        except BlockError:
            assert new != old
            assert self._held(new)
        else:
            assert held == set(before)
            assert kept == before[:count]
            self.places.update(dict.fromkeys(before))
            self._given(new, kept)

    @rule(lease=leases)
    def quarantine(self, lease: LeaseId) -> None:
        held = self._held(lease, "leased")
        try:
            self.pool.quarantine(lease)
        except DoubleFree:
            assert not held
        else:
            assert held
            self.places.update(dict.fromkeys(held, (lease, "quarantined")))

    @rule(lease=leases)
    def release(self, lease: LeaseId) -> None:
        held = self._held(lease)
        try:
            blocks = self.pool.release(lease)
        except DoubleFree:
            assert not held
        else:
            assert set(blocks) == held
            self.places.update(dict.fromkeys(held))

    @rule()
    def go_on_with_a_clone(self) -> None:
        original = self.pool
        self.pool = original.clone()
        assert self.pool.key() == original.key()
        for lease in original.leases():
            original.release(lease)
        original.take_exact(LeaseId("sender", 0, 0, 9, 9), range(TOTAL))

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        load = self.pool.load()
        assert load.free + load.leased + load.quarantined == load.total == TOTAL
        assert load.free == len(self._free())
        holders = {place[0] for place in self.places.values() if place is not None}
        assert set(self.pool.leases()) == holders
        assert len(self.pool.leases()) == len(holders)
        assert {lease: set(self.pool.blocks_of(lease)) for lease in holders} == {
            lease: self._held(lease) for lease in holders
        }

    @invariant()
    def the_queue_is_as_asked(self) -> None:
        assert self.pool.load().queued == len(self.waiting)
        first = self.pool.first_waiting
        assert (first is None) == (not self.waiting)
        assert first is None or turn(first) == min(map(turn, self.waiting))

    def teardown(self) -> None:
        """When every lease ends, everybody who waits is served, and then all is free again."""
        while self.pool.leases() or self.waiting:
            for lease in self.pool.leases():
                self.release(lease)
            self.serve()
        assert self.pool.load().free == TOTAL
        self.every_block_is_in_one_place()


TestAccounts = pytest.mark.timeout(400)(Accounts.TestCase)  # for shrinking, should it fail
TestAccounts.settings = settings(max_examples=3 * settings().max_examples)
