"""Which rooms the next heartbeat through a connection speaks of.

A beat holds until the next one replaces it, so a room that has nothing new to say is not spoken of: a heartbeat costs
what has happened since the last one, not what there is. A beat is not sequenced and may be lost; so the peer confirms
the frames that brought some, by their serial, and what it has not confirmed is said again, as it stands by then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvpoll_fsm.session import RoomKey

__all__ = ["News"]


class News:
    """The rooms of one connection that have something to say, and those whose last word has not been confirmed."""

    __slots__ = ("_due", "_said", "_serial")

    def __init__(self) -> None:
        self._due: dict[RoomKey, None] = {}
        self._said: dict[int, Sequence[RoomKey]] = {}
        self._serial = 0

    def add(self, key: RoomKey) -> None:
        """The room has something to say."""
        self._due[key] = None

    def add_all(self, keys: Iterable[RoomKey]) -> None:
        """So have these."""
        self._due.update(dict.fromkeys(keys))

    def take(self) -> dict[RoomKey, None]:
        """The rooms to speak of now, each given once, until `said` tells that it was spoken of in vain."""
        taken, self._due = self._due, {}
        for keys in self._said.values():
            taken.update(dict.fromkeys(keys))
        self._said.clear()
        return taken

    def said(self, keys: Sequence[RoomKey]) -> int:
        """These are spoken of in one frame; returns its serial, or 0 if there are none."""
        if not keys:
            return 0
        self._serial += 1
        self._said[self._serial] = keys
        return self._serial

    def confirmed(self, serials: Iterable[int]) -> None:
        """The peer has heard what was said in these frames."""
        for serial in serials:
            self._said.pop(serial, None)

    def clone(self) -> News:
        """A copy that shares nothing mutable."""
        copy = News()
        copy._due, copy._said, copy._serial = dict(self._due), dict(self._said), self._serial
        return copy
