"""Which transport carries a part: the endpoint's policy over what both sides offer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from kvpoll_fsm.errors import PolicyError

__all__ = ["Policy"]


@dataclass(frozen=True, slots=True)
class Policy:
    """A closed, ordered list of transports. One that is not named is never used.

    Attributes:
        mode: `require` (exactly one) or `prefer` (the first that works).
        names: Transport names, best first.
    """

    mode: str
    names: tuple[str, ...]

    @classmethod
    def parse(cls, text: str | Policy) -> Policy:
        """Read `require:x`, its short form `x`, or `prefer:a,b`.

        Raises:
            PolicyError: An unknown mode, no name, a name twice, or several names under `require`.
        """
        if isinstance(text, Policy):
            return text
        if not isinstance(text, str):
            raise PolicyError(repr(text), "is not a string")
        head, colon, tail = text.partition(":")
        mode, listed = (head.strip(), tail) if colon else ("require", head)
        names = tuple(name.strip() for name in listed.split(","))
        if mode not in ("require", "prefer"):
            raise PolicyError(text, f"unknown mode {mode!r}")
        if not all(name.replace("_", "").replace("-", "").isalnum() for name in names):
            raise PolicyError(text, "names no transport, or one with odd characters")
        if len(set(names)) != len(names):
            raise PolicyError(text, "names a transport twice")
        if mode == "require" and len(names) > 1:
            raise PolicyError(text, "require takes exactly one transport")
        return cls(mode, names)

    def candidates(self, ours: Collection[str], theirs: Collection[str]) -> tuple[str, ...]:
        """The transports this policy allows that both sides have, best first."""
        return tuple([name for name in self.names if name in ours and name in theirs])

    def missing(self, ours: Collection[str], theirs: Collection[str]) -> tuple[str, ...]:
        """Why the transports before the first candidate are none: which side does not have them."""
        missing: tuple[str, ...] = ()
        for name in self.names:
            if name in ours and name in theirs:
                break
            missing += (f"{name}: the {'receiver' if name in ours else 'sender'} does not have it",)
        return missing

    def __str__(self) -> str:
        return f"{self.mode}:{','.join(self.names)}"
