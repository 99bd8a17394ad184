"""The scenes `kvpoll explore` goes through: every kind of fault, alone and with those it could hide behind."""

from __future__ import annotations

from kvpoll_fsm.testing.scene import Budget, Scene

__all__ = ["FULL", "QUICK"]

QUICK: tuple[Scene, ...] = (
    Scene("two parts", parts=2),
    Scene("two ranks, two parts", ranks=2, parts=2),
    Scene("a dummy rank", ranks=2, parts=2, dummies=(1,)),
    Scene("extend runs out of blocks", parts=3, pool=2, resume="extend"),
    Scene("two rooms, one block", rooms=(1, 2)),
    Scene("lost and repeated", parts=2, faults=Budget(lose=2, repeat=1)),
    Scene("two ranks, a loss", ranks=2, parts=2, faults=Budget(lose=1)),
    Scene("an abort", parts=2, faults=Budget(abort=1)),
    Scene("a deadline too early", parts=2, faults=Budget(deadline=1)),
    Scene("a failed write", ranks=2, faults=Budget(fail=1)),
    Scene("a late write and an abort", parts=2, faults=Budget(late=1, abort=1)),
    Scene("a crash", parts=2, faults=Budget(crash=1)),
    Scene("taken for lost", parts=2, faults=Budget(part=1)),
    Scene("taken for lost, and a late write", parts=2, faults=Budget(part=1, late=1)),
    Scene("the next transport", parts=2, transports=("a", "b"), faults=Budget(late=1)),
    Scene("used again", faults=Budget(reopen=1)),
)

FULL: tuple[Scene, ...] = (
    *QUICK,
    Scene("three ranks", ranks=3),
    Scene("two ranks, three parts, a loss", ranks=2, parts=3, faults=Budget(lose=1)),
    Scene("two ranks, the next transport", ranks=2, parts=2, transports=("a", "b"), faults=Budget(late=1)),
    Scene("the next transport, both fail", parts=2, transports=("a", "b"), faults=Budget(late=1, fail=1)),
    Scene("two ranks, an abort", ranks=2, parts=2, faults=Budget(abort=1), opened=True),
    Scene("two ranks, a crash", ranks=2, faults=Budget(crash=1), opened=True),
    Scene("two ranks, taken for lost", ranks=2, faults=Budget(part=1), opened=True),
    Scene("two ranks, a deadline too early", ranks=2, parts=2, faults=Budget(deadline=1), opened=True),
    Scene("a crash and a loss", parts=2, faults=Budget(crash=1, lose=1)),
    Scene("a crash and a late write", parts=2, faults=Budget(crash=1, late=1)),
    Scene("an abort and a loss", parts=2, faults=Budget(abort=1, lose=1)),
    Scene("aborts on both sides", parts=2, faults=Budget(abort=2)),
    Scene("two rooms, two parts", rooms=(1, 2), parts=2, ordered=True),
    Scene("used again, and a loss", faults=Budget(reopen=1, lose=1)),
    Scene("used again, and a late write", faults=Budget(reopen=1, late=1)),
    Scene("two rooms, an abort", rooms=(1, 2), faults=Budget(abort=1), ordered=True),
    Scene("each pool given to the other room", ranks=2, rooms=(1, 2), source_pool=2, ordered=True),
)
