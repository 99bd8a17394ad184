"""How rooms fared by transport: counted while they run, in memory that grows with the transports and nothing else.

A room counts for every transport that it tried, as a success where it needed no other one. So a transport that fails
shows, though the room went on by another and ended in Success.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from kvpoll_fsm.commands import Preflight, StartPart
from kvpoll_fsm.errors import FailureCode
from kvpoll_fsm.inputs import Input, PartWritten, Preflighted
from kvpoll_fsm.layout import Layout
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.session import RoomKey, Session

__all__ = ["COUNTED", "Histogram", "Meter"]

NONE = "none"
"""What rooms count for that ended before any transport was tried."""
OTHER = "other"
"""What a receiver's parts count for that its sender says came by a transport this endpoint does not have."""

COUNTED = (Preflight, StartPart)
"""The commands that are counted."""

Feed = Callable[[RoomKey, Input], None]


class Histogram:
    """Durations, in buckets whose bounds grow by 9%: a percentile is right to 5%, from 10 us to 3 hours."""

    LEAST_S = 1e-5
    PER_OCTAVE = 8
    BUCKETS = 30 * PER_OCTAVE

    def __init__(self) -> None:
        self.count = 0
        self.most_s = 0.0
        self._buckets = [0] * self.BUCKETS

    def add(self, seconds: float) -> None:
        """Count one."""
        place = int(math.log2(max(seconds, self.LEAST_S) / self.LEAST_S) * self.PER_OCTAVE)
        self._buckets[min(place, self.BUCKETS - 1)] += 1
        self.count += 1
        self.most_s = max(self.most_s, seconds)

    def percentile(self, share: float) -> float | None:
        """What that share of the durations do not exceed; None if there are none."""
        if not self.count:
            return None
        reached = itertools.accumulate(self._buckets)
        place = next(place for place, seen in enumerate(reached) if seen >= share * self.count)
        middle_s: float = self.LEAST_S * 2 ** ((place + 0.5) / self.PER_OCTAVE)
        return min(middle_s, self.most_s)

    def shown(self) -> dict[str, float | int | None]:
        """The usual percentiles."""
        points = {f"p{round(share * 100)}": self.percentile(share) for share in (0.5, 0.9, 0.99)}
        rounded = {name: None if value is None else float(f"{value:.3g}") for name, value in points.items()}
        return {**rounded, "max": float(f"{self.most_s:.3g}") if self.count else None, "count": self.count}


@dataclass
class _Tally:
    """One transport, on one side."""

    rooms: int = 0
    succeeded: int = 0
    parts: int = 0
    nbytes: int = 0
    reissued: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    latency: Histogram = field(default_factory=Histogram)

    def ended(self, cause: str | None) -> None:
        """A room is over that tried it; `cause` is why that was no success."""
        self.rooms += 1
        if cause is None:
            self.succeeded += 1
        else:
            self.causes[cause] += 1

    def shown(self) -> dict[str, Any]:
        return {
            "rooms": self.rooms,
            "succeeded": self.succeeded,
            "success_share": round(self.succeeded / self.rooms, 6) if self.rooms else None,
            "failures": dict(self.causes),
            "parts": self.parts,
            "nbytes": self.nbytes,
        }


class _Run:
    """One live room of a sender.

    Attributes:
        supplied_s: When its host had data for the first time.
        part_nbytes: Bytes of the part under way, on one rank.
        tried: The transports it has tried, and why each has not served; "" while it serves.
        failed_on: By rank, the transport on which the part under way has failed.
    """

    __slots__ = ("failed_on", "part_nbytes", "supplied_s", "tried")

    def __init__(self) -> None:
        self.supplied_s: float | None = None
        self.part_nbytes = 0
        self.tried: dict[str, str] = {}
        self.failed_on: dict[int, str] = {}


_UNTRIED = _Run()
"""A room that has only been opened."""


class Meter:
    """Told of by those who carry out what the core decides. Used by the driver's thread alone."""

    def __init__(self, layout: Layout, names: Iterable[str], now: Callable[[], float] = time.monotonic) -> None:
        """Store what is needed.

        Args:
            layout: Of the endpoint's pool.
            names: The transports that rooms are counted for.
            now: The clock.
        """
        self._layout = layout
        self._names = frozenset(names)
        self._now = now
        self._began_s = now()
        self._tallies: dict[tuple[str, str], _Tally] = {}
        self._live = 0
        self._runs: dict[RoomKey, _Run] = {}

    def opened(self) -> None:
        """A room was opened."""
        self._live += 1

    def supplied(self, key: RoomKey) -> None:
        """The host of a sender's live room has data: its duration counts from here on."""
        run = self._run(key)
        if run.supplied_s is None:
            run.supplied_s = self._now()

    def commanded(self, key: RoomKey, command: Preflight | StartPart) -> None:
        """The session of a sender's live room wants this done."""
        run = self._run(key)
        if isinstance(command, StartPart):
            self._part(run, command)
        else:
            run.tried.setdefault(command.transport, "")

    def feeding(self, feed: Feed) -> Feed:
        """What feeds a session, and tells us."""

        def fed(key: RoomKey, event: Input) -> None:
            if isinstance(event, PartWritten):
                self._written(key, event)
            elif isinstance(event, Preflighted) and not (event.ok or event.shut):
                self._unserved(key, event.transport, FailureCode.TransportUnavailable)
            feed(key, event)

        return fed

    def ended(self, key: RoomKey, session: Session) -> None:
        """A room has come to its last state."""
        self._live -= 1
        if key.side == "sender":
            self._sent(self._runs.pop(key, _UNTRIED), session)
        else:
            self._received(session)

    def forget(self, key: RoomKey) -> None:
        """Nothing more is heard of a room; what it had asked for before it ended may have come after that."""
        self._runs.pop(key, None)

    def report(self) -> dict[str, Any]:
        """What was counted, as plain data."""
        sides: dict[str, dict[str, Any]] = {"sent": {}, "received": {}}
        for (side, name), tally in sorted(self._tallies.items()):
            more = {"reissued": tally.reissued, "latency_s": tally.latency.shown()} if side == "sent" else {}
            sides[side][name] = {**tally.shown(), **more}
        return {"seconds": round(self._now() - self._began_s, 3), "live": self._live, **sides}

    def _tally(self, side: str, name: str) -> _Tally:
        return self._tallies.setdefault((side, name), _Tally())

    # A sender's room

    def _run(self, key: RoomKey) -> _Run:
        """What is noted of a live room; nothing is of one that has only been opened."""
        run = self._runs.get(key)
        if run is None:
            run = self._runs[key] = _Run()
        return run

    def _part(self, run: _Run, command: StartPart) -> None:
        run.part_nbytes = self._layout.part_nbytes(command.tokens, first=command.part == 0)
        if not command.attempt:
            run.failed_on.clear()
        for target in command.targets:
            if not target.shut:
                run.tried.setdefault(target.transport, "")
            before = run.failed_on.pop(target.rank, None)
            if before is not None:
                self._tally("sent", before).reissued += 1

    def _written(self, key: RoomKey, event: PartWritten) -> None:
        run = self._runs.get(key)
        if run is None:
            return
        if event.ok:
            tally = self._tally("sent", event.transport)
            tally.parts += 1
            tally.nbytes += run.part_nbytes
            return
        if event.shut:  # it was not tried
            return
        run.failed_on[event.rank] = event.transport
        if not (event.collateral or event.ours):
            self._unserved(key, event.transport, FailureCode.TransportFailed)

    def _unserved(self, key: RoomKey, name: str, code: FailureCode) -> None:
        run = self._runs.get(key)
        if run is not None:
            run.tried[name] = run.tried.get(name) or code.value

    def _sent(self, run: _Run, session: Session) -> None:
        failure = session.failure
        for name, cause in run.tried.items():
            self._tally("sent", name).ended(cause or (failure.code.value if failure else None))
        if not run.tried:
            self._tally("sent", NONE).ended(failure.code.value if failure else None)
        elif run.supplied_s is not None and session.state is KVPoll.Success:
            first = next(iter(run.tried))
            self._tally("sent", first).latency.add(self._now() - run.supplied_s)

    # A receiver's

    def _received(self, session: Session) -> None:
        by: dict[str, list[int]] = {}
        for part in session.parts:
            name = part.transport if part.transport in self._names else OTHER
            nbytes = self._layout.part_nbytes(part.tokens, first=part.part == 0) if part.tokens else 0
            by.setdefault(name, []).append(nbytes)
        cause = session.failure.code.value if session.failure else None
        for name, sizes in by.items():
            tally = self._tally("received", name)
            tally.ended(cause)
            tally.parts += len(sizes)
            tally.nbytes += sum(sizes)
        if not by:
            self._tally("received", NONE).ended(cause)
