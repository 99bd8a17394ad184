"""Which bytes of ours may be written under which token, and when a token is certainly dead.

The driver grants, revokes and fences; the threads that read connections enter and leave. A token is fenced
once it is revoked and nobody is inside. `fence` says so later, `end` waits for it: where a room takes the writer's
word that nothing is under way, nobody is inside, unless the word was a lie.
"""

from __future__ import annotations

import bisect
import hmac
import itertools
import logging
import secrets
import threading
from collections.abc import Callable, Iterable, Sequence

from kvpoll_common.outbox import Outbox
from kvpoll_fsm.refusals import Refusals
from kvpoll_fsm.spi import Fenced, Range

__all__ = ["TOKEN_NBYTES", "Grant", "Grants"]

TOKEN_NBYTES = 16
LEAVE_S = 5.0
"""How long `end` waits for those inside: system calls that were cut off, or a copy of some MiB."""
LIED = "was still writing under a token when its room took the word that it was not"


class Grant:
    """The ranges one token admits.

    `revoked` turns True once and is read without a lock: who is inside looks at it between any two system
    calls, and `Grants.fence` waits until he has left. `writer` is who used the token first: nobody else may.
    `cuts` end the connections of those inside.
    """

    __slots__ = ("_ends", "_starts", "cuts", "fences", "inside", "revoked", "token", "writer")

    def __init__(self, token: bytes, ranges: Sequence[Range]) -> None:
        self.token = token
        self.writer = b""
        self.revoked = False
        self.inside = 0
        self.fences: list[int] = []
        self.cuts: set[Callable[[], None]] = set()
        self._starts: dict[int, list[int]] = {}
        self._ends: dict[int, list[int]] = {}
        for region, offset, nbytes in sorted([(each.region, each.offset, each.nbytes) for each in ranges]):
            self._append(region, offset, offset + nbytes)

    def _append(self, region: int, start: int, end: int) -> None:
        ends = self._ends.get(region)
        if ends is None:
            self._starts[region], self._ends[region] = [start], [end]
        elif start <= ends[-1]:
            ends[-1] = max(ends[-1], end)  # neighbours are one: a write may span blocks that lie side by side
        else:
            self._starts[region].append(start)
            ends.append(end)

    def admits(self, entries: Iterable[tuple[int, int, int]]) -> bool:
        """Whether each (region, offset, bytes) lies inside one range."""
        starts, ends, find = self._starts, self._ends, bisect.bisect_right
        for region, offset, nbytes in entries:
            at = find(starts.get(region, ()), offset) - 1
            if at < 0 or offset + nbytes > ends[region][at]:
                return False
        return True


class Grants:
    """All grants of one transport that are alive.

    Attributes:
        refusals: Whom and what the transport turned away.
    """

    def __init__(self, outbox: Outbox, transport: str) -> None:
        self.refusals = Refusals(transport, logging.getLogger(f"kvpoll_{transport}"))
        self._lock = threading.Condition(threading.Lock())
        self._outbox = outbox
        self._grants: dict[bytes, Grant] = {}
        self._numbers = itertools.count()

    def add(self, ranges: Sequence[Range]) -> bytes:
        """Admit writes to these ranges, which the caller has checked; returns the token."""
        grant = Grant(secrets.token_bytes(TOKEN_NBYTES), ranges)
        with self._lock:
            self._grants[grant.token] = grant
        return grant.token

    def revoke(self, token: bytes) -> None:
        """Let nobody in any more."""
        with self._lock:
            self._revoke(token)

    def end(self, token: bytes) -> None:
        """Revoke, and see off whoever is inside: once this returns, no byte lands under the token.

        Raises:
            TimeoutError: He did not go; the blocks may still be written to.
        """
        with self._lock:
            grant = self._revoke(token)
            cuts = tuple(grant.cuts) if grant is not None else ()
        if grant is None:
            return
        self.refusals.add(LIED)
        for cut in cuts:
            cut()
        with self._lock:
            if not self._lock.wait_for(lambda: not grant.inside, LEAVE_S):
                raise TimeoutError(f"a revoked token is still written under after {LEAVE_S:g} s")

    def fence(self, token: bytes) -> int:
        """Revoke; `Fenced` with the number returned follows once nobody is inside."""
        number = next(self._numbers)
        with self._lock:
            grant = self._revoke(token)
            if grant is not None:
                grant.fences.append(number)
        if grant is None:
            self._outbox.put(Fenced(number))
        return number

    def enter(self, token: bytes, writer: bytes = b"?", cut: Callable[[], None] | None = None) -> Grant | None:
        """Go inside in order to write, or None if that is not allowed. Whoever enters must leave.

        Args:
            token: Under which.
            writer: Who.
            cut: Makes the writer leave soon; None if he does so by himself. For any thread.
        """
        with self._lock:
            grant = self._grants.get(token)
            if grant is None or grant.revoked:
                return None
            grant.writer = grant.writer or writer
            if hmac.compare_digest(grant.writer, writer):
                grant.inside += 1
                grant.cuts |= set() if cut is None else {cut}
                return grant
        self.refusals.add("a write under the token of another writer")
        return None

    def leave(self, grant: Grant) -> None:
        """Promise to write no more."""
        with self._lock:
            grant.inside -= 1
            if grant.inside:
                return
            grant.cuts.clear()
            if not grant.revoked:
                return
            self._grants.pop(grant.token, None)
            fences, grant.fences = grant.fences, []
            self._lock.notify_all()
        self._outbox.put(*map(Fenced, fences))

    def _revoke(self, token: bytes) -> Grant | None:
        """Revoke; returns the grant if somebody is still inside."""
        grant = self._grants.get(token)
        if grant is None:
            return None
        grant.revoked = True
        if grant.inside:
            return grant
        del self._grants[token]
        return None
