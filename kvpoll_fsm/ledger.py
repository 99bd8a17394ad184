"""Which tokens of a room have been committed, and the one place `is_last` comes from."""

from __future__ import annotations

from msgspec import Struct

from kvpoll_fsm.errors import InvalidInput

__all__ = ["Ledger", "is_last_part", "part_tokens"]


def is_last_part(sent_tokens: int, part_tokens: int, total_tokens: int) -> bool:
    """The rule for `is_last`: this part completes the room."""
    return sent_tokens + part_tokens == total_tokens


def part_tokens(remaining: int, capacities: tuple[int, ...], ready: int) -> int:
    """How many tokens the next part carries, the same on every rank.

    Args:
        remaining: Tokens not committed yet.
        capacities: What each rank granted, in tokens.
        ready: Tokens the source has ready beyond those committed.
    """
    return min(remaining, ready, *capacities)


class Ledger(Struct, gc=False):
    """The committed token range of one room. Parts are committed in order, so one number tells it.

    Attributes:
        covered_tokens: Tokens [0, covered) have been committed.
        total_tokens: Tokens of the whole room, or None until the sender has told.
    """

    covered_tokens: int = 0
    total_tokens: int | None = None

    def learn_total(self, total_tokens: int) -> None:
        """Note the total; it may be learnt again but never change.

        Raises:
            InvalidInput: It differs from what was said before, or is less than what is covered.
        """
        if total_tokens < 1 or total_tokens < self.covered_tokens:
            raise InvalidInput(f"a total of {total_tokens} tokens is less than the {self.covered_tokens} covered")
        if self.total_tokens not in (None, total_tokens):
            raise InvalidInput(f"the total was {self.total_tokens} tokens and cannot become {total_tokens}")
        self.total_tokens = total_tokens

    @property
    def remaining_tokens(self) -> int | None:
        """Tokens not committed yet, or None while the total is unknown."""
        return None if self.total_tokens is None else self.total_tokens - self.covered_tokens

    @property
    def complete(self) -> bool:
        """Every token has been committed."""
        return self.total_tokens is not None and self.covered_tokens == self.total_tokens

    def is_last(self, offset: int, tokens: int) -> bool:
        """Whether a part of `tokens` at `offset` completes the room.

        Raises:
            InvalidInput: The total is unknown, or the range is empty, does not start where coverage ends,
                or exceeds the total.
        """
        if self.total_tokens is None:
            raise InvalidInput(f"a part at token {offset} of a room whose total is not known yet")
        if offset != self.covered_tokens:
            raise InvalidInput(f"a part at token {offset} where {self.covered_tokens} tokens are covered")
        if tokens < 1 or offset + tokens > self.total_tokens:
            raise InvalidInput(f"a part of {tokens} tokens at {offset} in a room of {self.total_tokens}")
        return is_last_part(offset, tokens, self.total_tokens)

    def commit(self, offset: int, tokens: int) -> bool:
        """Extend coverage by one part and return whether that was the last.

        Raises:
            InvalidInput: As `is_last`.
        """
        last = self.is_last(offset, tokens)
        self.covered_tokens += tokens
        return last

    def clone(self) -> Ledger:
        """A copy that shares nothing."""
        return Ledger(self.covered_tokens, self.total_tokens)

    def key(self) -> tuple[int, int | None]:
        """Canonical plain value of the state."""
        return (self.covered_tokens, self.total_tokens)
