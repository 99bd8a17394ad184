"""Links to peers' data ports: one per (connection, transport), reached before anything is promised."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kvpoll_fsm.errors import KvpollError
from kvpoll_fsm.messages import TransportOffer
from kvpoll_fsm.spi import Link, LinkDown, LinkUp, Transport

__all__ = ["Links"]

log = logging.getLogger("kvpoll_fsm")
Answer = Callable[[bool, str], None]


@dataclass
class _Entry:
    link: Link
    up: bool = False
    waiting: list[Answer] = field(default_factory=list)


class Links:
    """The data links of one endpoint. Used by the driver's thread alone."""

    def __init__(self, transports: Mapping[str, Transport]) -> None:
        self._transports = transports
        self._links: dict[tuple[int, str], _Entry] = {}
        self._numbers: dict[tuple[str, int], tuple[int, str]] = {}
        self._connecting: set[tuple[int, str]] = set()

    @property
    def idle(self) -> bool:
        """No link is being made."""
        return not self._connecting

    def reach(self, conn: int, offer: TransportOffer | None, name: str, answer: Answer) -> None:
        """Make sure that the peer's data port answers through transport `name`, then call `answer`.

        Args:
            conn: The connection to the peer.
            offer: What the peer offers for this transport, or None if it does not.
            name: The transport.
            answer: Called once with (reached, why not).
        """
        entry = self._links.get((conn, name))
        if entry is not None and entry.up:
            return answer(True, "")
        if entry is None:
            if offer is None or name not in self._transports:
                return answer(False, "the peer does not offer it" if offer is None else "it is not in use here")
            try:
                entry = self._connect(conn, offer)
            except Exception as error:  # a transport's own code may raise anything
                return answer(False, str(error) if isinstance(error, KvpollError) else repr(error))
        entry.waiting.append(answer)

    def get(self, conn: int, name: str) -> Link | None:
        """The link that was reached, or None."""
        entry = self._links.get((conn, name))
        return entry.link if entry else None

    def completed(self, name: str, completion: LinkUp | LinkDown) -> None:
        """A link of transport `name` works, or does not."""
        place = self._numbers.get((name, completion.link))
        if place is None:
            return
        entry = self._links[place]
        self._connecting.discard(place)
        entry.up = isinstance(completion, LinkUp)
        if isinstance(completion, LinkDown):
            return self._drop(place, completion.reason)
        waiting, entry.waiting = entry.waiting, []
        _answer_all(waiting, True, "")

    def hang_up(self, conn: int) -> None:
        """The peer is gone: its links end, and with them what is in flight on them."""
        for place in [place for place in self._links if place[0] == conn]:
            self._drop(place, "the peer is gone")

    def lost(self, name: str, why: str) -> None:
        """The transport has been closed."""
        for place in [place for place in self._links if place[1] == name]:
            self._drop(place, why)

    def _connect(self, conn: int, offer: TransportOffer) -> _Entry:
        link = self._transports[offer.name].connect(offer.descriptor, offer.regions)
        entry = _Entry(link)
        self._links[conn, offer.name] = entry
        self._connecting.add((conn, offer.name))
        self._numbers[offer.name, link.number] = (conn, offer.name)
        return entry

    def _drop(self, place: tuple[int, str], why: str) -> None:
        entry = self._links.pop(place)
        self._connecting.discard(place)
        self._numbers.pop((place[1], entry.link.number), None)
        try:
            entry.link.close()
        except Exception:  # those who wait must be answered all the same
            log.exception("link of transport %s did not close", place[1])
        _answer_all(entry.waiting, False, why)


def _answer_all(waiting: list[Answer], ok: bool, why: str) -> None:
    for answer in waiting:
        try:
            answer(ok, why)
        except Exception:  # this one's room has lost its link; the others must be answered too
            log.exception("an answer about a link was not taken")
