"""What shall go wrong, said by the test beforehand or while it happens.

Tickets are counted per transport in the order of their submission, from 0; `Faults.submitted` is the number
of the next one. Faults belong to the transport of the writing side, except `hold_fences`, which belongs to
the receiving side. All methods may be called from any thread.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace

__all__ = ["Faults", "Plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of one ticket.

    Attributes:
        held: Nothing happens to it for now.
        failure: It ends Failed, for this reason.
        after_nbytes: So many bytes are written first.
        late: It ends Failed without being quiescent, and what it did not write is written later.
        reading: What is written later is read from the source only then.
        landing: Now is later.
        collateral: The failure is put down to another ticket's trouble.
        flips: Positions in the ticket's bytes where one bit arrives wrong.
    """

    held: bool = False
    failure: str | None = None
    after_nbytes: int = 0
    late: bool = False
    reading: bool = False
    landing: bool = False
    collateral: bool = False
    flips: tuple[int, ...] = ()


@dataclass(slots=True)
class _Switches:
    """Faults that concern no single ticket."""

    hold_all: bool = False
    refusal: str | None = None
    breaking: str | None = None
    hold_fences: bool = False


@dataclass(slots=True)
class Faults:
    """Faults to come. Without any call on it nothing goes wrong."""

    submitted: int = 0
    _plans: dict[int, Plan] = field(default_factory=dict)
    _switches: _Switches = field(default_factory=_Switches)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def hold(self, nth: int | None = None) -> None:
        """Let ticket `nth`, or every ticket, hang until `release`. A cancel ends it all the same."""
        if nth is None:
            self._switches.hold_all = True
        else:
            self._change(nth, held=True)

    def release(self, nth: int | None = None) -> None:
        """Let ticket `nth`, or all, go on."""
        if nth is not None:
            return self._change(nth, held=False)
        with self._lock:
            self._switches.hold_all = False
            self._plans = {number: replace(plan, held=False) for number, plan in self._plans.items()}

    def fail(self, nth: int, reason: str = "injected", after_nbytes: int = 0, *, collateral: bool = False) -> None:
        """End ticket `nth` Failed and quiescent, after a part of it was written."""
        self._change(nth, failure=reason, after_nbytes=after_nbytes, collateral=collateral)

    def fail_late(
        self,
        nth: int,
        reason: str = "injected",
        after_nbytes: int = 0,
        *,
        reading: bool = False,
        collateral: bool = False,
    ) -> None:
        """End ticket `nth` Failed but not quiescent: the rest of its bytes lands at `land`, then Quiesced.

        With `reading` the source is not free before, as with RDMA: what it holds then is what lands.
        """
        changes = {"late": True, "reading": reading, "collateral": collateral}
        self._change(nth, failure=reason, after_nbytes=after_nbytes, **changes)

    def land(self, nth: int) -> None:
        """Let the bytes of a ticket that failed late arrive now, where its token still admits them."""
        self._change(nth, landing=True)

    def flip(self, nth: int, at: int = 0) -> None:
        """Let byte `at` of ticket `nth` arrive with a wrong bit."""
        self._change(nth, flips=(*self.plan(nth).flips, at))

    def refuse_links(self, reason: str = "refused") -> None:
        """Answer every connect, and every submit, with LinkDown until `accept_links`."""
        self._switches.refusal = reason

    def accept_links(self) -> None:
        """Let links work again; each comes up with its next submit."""
        self._switches.refusal = None

    def break_links(self, reason: str = "broken") -> None:
        """Take every link down once; tickets in flight end Failed and quiescent."""
        self._switches.breaking = reason

    def hold_fences(self) -> None:
        """Keep back `Fenced` until `release_fences`; nothing lands under the token meanwhile, either."""
        self._switches.hold_fences = True

    def release_fences(self) -> None:
        """Report fences again."""
        self._switches.hold_fences = False

    # What follows is for the transport.

    def count(self) -> int:
        """Number one more ticket."""
        with self._lock:
            self.submitted += 1
            return self.submitted - 1

    def plan(self, nth: int) -> Plan:
        """What becomes of ticket `nth`, as things stand."""
        plan = self._plans.get(nth, Plan())
        return replace(plan, held=True) if self._switches.hold_all else plan

    @property
    def refusal(self) -> str | None:
        """Why links are refused, if they are."""
        return self._switches.refusal

    @property
    def fences_held(self) -> bool:
        """Whether `Fenced` is kept back."""
        return self._switches.hold_fences

    def take_breaking(self) -> str | None:
        """Why links break just now, once."""
        with self._lock:
            reason, self._switches.breaking = self._switches.breaking, None
            return reason

    def _change(self, nth: int, **changes: object) -> None:
        with self._lock:
            self._plans[nth] = replace(self._plans.get(nth, Plan()), **changes)  # type: ignore[arg-type]
