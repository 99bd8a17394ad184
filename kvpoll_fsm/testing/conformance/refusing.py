"""What is impossible is an error at once; what is not admitted does not land."""

from __future__ import annotations

import pytest

from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.spi import Failed, Range, Region, Write
from kvpoll_fsm.testing.conformance.base import Base, Bench
from kvpoll_fsm.testing.conformance.sides import HUGE, SIZES, lease, same, untouched

__all__ = ["Refusing"]

IMPOSSIBLE: dict[str, list[Write]] = {
    "nothing": [],
    "zero bytes": [Write(0, 0, 0, 0)],
    "zero bytes among others": [Write(0, 0, 0, 8), Write(0, 0, 8, 0)],
    "fewer than zero bytes": [Write(0, 0, 0, -1)],
    "beyond the source's end": [Write(0, SIZES[0] - 7, 0, 8)],
    "before the source's beginning": [Write(0, -1, 0, 8)],
    "from the source's end": [Write(1, SIZES[1], 0, 1)],
    "before the destination's beginning": [Write(0, 0, -1, 8)],
    "a region that is not registered": [Write(2, 0, 0, 8)],
    "more bytes than a ticket may carry": [*HUGE, Write(1, 0, 0, 1)],
}
GRANTED = (Range(0, 1000, 1000), Range(0, 2500, 500), Range(1, 0, 100))
NOT_GRANTED: dict[str, Write] = {
    "one byte before": Write(0, 0, 999, 10),
    "one byte behind": Write(0, 0, 2990, 11),
    "between two ranges": Write(0, 0, 2000, 1),
    "all around": Write(0, 0, 0, 10_000),
    "another region": Write(1, 0, 1000, 10),
    "beyond the region": Write(0, 0, SIZES[0] - 5, 10),
    "far beyond the region": Write(0, 0, 1 << 40, 10),
    "as far as numbers go": Write(0, 0, (1 << 63) - 11, 10),
}
TOKENS = {"empty": b"", "16 bytes": b"x" * 16, "32 bytes": b"x" * 32, "1 KiB": b"x" * 1024}


class Refusing(Base):
    """Writes out of range, tokens that are not ours, memory and descriptors that are none."""

    @pytest.mark.parametrize("case", IMPOSSIBLE)
    def test_impossible_writes_are_errors(self, bench: Bench, case: str) -> None:
        """`submit` raises InvalidInput, and nothing else is harmed."""
        with pytest.raises(InvalidInput):
            bench.link.submit(IMPOSSIBLE[case], bench.rx.grant())
        bench.done(bench.submit(Write(0, 0, 9, 1)))
        same([Write(0, 0, 9, 1)], bench.tx, bench.rx)

    @pytest.mark.parametrize("case", NOT_GRANTED)
    def test_what_is_not_granted_is_refused(self, bench: Bench, case: str) -> None:
        """The ticket fails, and not a byte lands outside the ranges."""
        token = bench.rx.grant(*GRANTED)
        wrong = NOT_GRANTED[case]
        writes = [Write(0, 0, 1000, 10), wrong, Write(1, 0, 0, 10)]
        if bench.tx.transport.capabilities.scatter_entries < len(writes):
            writes = [wrong]
        self._refused(bench, token, *writes)
        if not self.refuses_whole:  # what is admitted may have landed
            for each in GRANTED:
                bench.rx.arenas[each.region][each.offset : each.offset + each.nbytes] = bytes(each.nbytes)
        untouched(bench.rx)
        self.goes_on(bench, bench.link, Write(0, 0, 1000, 10))

    @pytest.mark.parametrize("case", TOKENS)
    def test_a_foreign_token_writes_nothing(self, bench: Bench, case: str) -> None:
        """One that nobody has granted, of any length."""
        bench.rx.grant()
        self._refused(bench, TOKENS[case], Write(0, 0, 0, 100))
        untouched(bench.rx)
        self.goes_on(bench, bench.link, Write(0, 0, 0, 10))

    def test_a_token_of_another_receiver_writes_nothing(self, bench: Bench) -> None:
        """A token is good for whoever granted it."""
        token = bench.tx.grant()
        self._refused(bench, token, Write(0, 0, 0, 100))
        untouched(bench.rx)

    def test_a_token_that_was_changed_writes_nothing(self, bench: Bench) -> None:
        """Who has one token cannot make another from it."""
        bench.rx.grant()
        good = bench.rx.grant(Range(0, 0, 100))
        for at in (0, len(good) // 2, len(good) - 1):
            changed = bytes([*good[:at], good[at] ^ 1, *good[at + 1 :]])
            self._refused(bench, changed, Write(0, 0, 0, 100))
        untouched(bench.rx)

    def test_a_revoked_token_writes_nothing(self, bench: Bench) -> None:
        """Revoking twice, or what is unknown, is ignored; other tokens are as good as before."""
        token, other = bench.rx.grant(), bench.rx.grant()
        bench.rx.transport.revoke(token)
        bench.rx.transport.revoke(token)
        bench.rx.transport.revoke(b"unknown")
        self._refused(bench, token, Write(0, 0, 0, 100))
        untouched(bench.rx)
        if self.is_mild:
            bench.done(bench.link.submit([Write(0, 0, 0, 100)], other))

    @pytest.mark.parametrize(
        "wrong", [Range(0, -1, 5), Range(0, 0, 0), Range(0, SIZES[0], 1), Range(1, 0, SIZES[1] + 1), Range(2, 0, 1)]
    )
    def test_a_grant_outside_the_regions_is_an_error(self, bench: Bench, wrong: Range) -> None:
        """`grant` raises InvalidInput."""
        with pytest.raises(InvalidInput):
            bench.rx.transport.grant(lease(), [Range(0, 0, 1), wrong])

    def test_a_region_that_cannot_be_written_is_an_error(self, bench: Bench) -> None:
        """`register` raises InvalidInput; for a number that is taken, too."""
        with pytest.raises(InvalidInput):
            bench.rx.transport.register(Region(2, memoryview(b"read only")))
        with pytest.raises(InvalidInput):
            bench.rx.transport.register(Region(2, memoryview(bytearray(8))[::2]))
        with pytest.raises(InvalidInput):
            bench.rx.transport.register(Region(0, memoryview(bytearray(8))))

    @pytest.mark.parametrize("garbage", [b"", b"garbage", b"\x80", b"\xff" * 64])
    def test_a_descriptor_that_is_none_is_an_error(self, bench: Bench, garbage: bytes) -> None:
        """`connect` raises InvalidInput, for that of the transport and for those of regions."""
        with pytest.raises(InvalidInput):
            bench.tx.transport.connect(garbage, bench.rx.regions)
        with pytest.raises(InvalidInput):
            bench.tx.transport.connect(bench.rx.transport.descriptor(), [garbage])

    def _refused(self, bench: Bench, token: bytes, *writes: Write) -> None:
        """The ticket fails, and no byte of it lands any more."""
        (end,) = bench.calm(token, bench.link.submit(writes, token))
        assert isinstance(end, Failed), end
        assert end.quiescent or not self.refuses_whole, end
