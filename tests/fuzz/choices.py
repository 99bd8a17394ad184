"""Decisions read from bytes, so that one program is driven by hypothesis, by atheris and by a file of the corpus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Choices:
    """Bytes taken as decisions, first to last. Once they are used up, every decision is the first one."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        """Whether some bytes are left."""
        return self._at < len(self._data)

    def take(self, nbytes: int) -> bytes:
        """The next bytes, fewer at the end."""
        taken = self._data[self._at : self._at + nbytes]
        self._at += len(taken)
        return taken

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._data))

    def below(self, bound: int) -> int:
        """A number from 0 to `bound` - 1."""
        width = max(1, (bound - 1).bit_length() + 7 >> 3)
        return int.from_bytes(self.take(width), "little") % bound

    def flag(self, one_in: int = 2) -> bool:
        """False at first, True in one of so many cases."""
        return self.below(one_in) == one_in - 1

    def pick(self, values: Sequence[T]) -> T:
        """One of these."""
        return values[self.below(len(values))]

    def blob(self, most: int) -> bytes:
        """Some bytes."""
        return self.take(self.below(most + 1))

    def text(self, most: int) -> str:
        """Some text, of any characters that UTF-8 has."""
        return self.blob(most).decode("utf-8", "replace")
