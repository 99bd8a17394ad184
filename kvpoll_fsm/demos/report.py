"""What the processes said about the rooms, put side by side and compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kvpoll_fsm.demos.plan import Plan
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.selection import Policy

__all__ = ["Account", "Report", "RoomReport", "same_hashes"]

_SUCCESS = KVPoll.Success.name


@dataclass
class Account:
    """One side of a room, in the words of the process that had it.

    Attributes:
        states: The states gone through, from the handle's history.
        parts: The parts that had an outcome: number, tokens, is_last, transport, and, at the sender, why others
            were passed over.
        sha256: Of every field in this process's memory.
        failure: Why it did not end in Success.
        sent_s: When the sender was given the data; the machine's monotonic clock.
        ended_s: When it ended, by the same clock.
        over: The process has had its last word on this room.
    """

    states: list[str] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list)
    sha256: dict[str, str] = field(default_factory=dict)
    failure: str | None = None
    sent_s: float | None = None
    ended_s: float | None = None
    over: bool = False

    @property
    def state(self) -> str:
        """Where it stands, as far as is known."""
        return self.states[-1] if self.states else "not opened"

    @property
    def succeeded(self) -> bool:
        """It ended in Success."""
        return self.over and self.failure is None and self.state == _SUCCESS


@dataclass
class RoomReport:
    """One room on all sides."""

    plan: Plan
    room: int
    sender: Account
    receivers: list[Account]

    @property
    def accounts(self) -> list[Account]:
        """The sender's first, then the receivers' by rank."""
        return [self.sender, *self.receivers]

    @property
    def over(self) -> bool:
        """All sides are."""
        return all(account.over for account in self.accounts)

    @property
    def ok(self) -> bool:
        """Success on all sides, and equal bytes."""
        same = all(self.same(rank) for rank in range(len(self.receivers)))
        return same and all(account.succeeded for account in self.accounts)

    @property
    def seconds(self) -> float | None:
        """From the sender getting its data to the last receiver's Success."""
        ends = [account.ended_s for account in self.receivers if account.succeeded]
        if self.sender.sent_s is None or len(ends) != len(self.receivers):
            return None
        return max(end for end in ends if end is not None) - self.sender.sent_s

    @property
    def gb_per_s(self) -> float | None:
        """Bytes that reached all ranks together, per second."""
        seconds = self.seconds
        return self.plan.room_nbytes * self.plan.ranks / 1e9 / seconds if seconds else None

    @property
    def choices(self) -> list[str]:
        """Which transports carried it and why these."""
        policy = Policy.parse(self.plan.transport)
        first = f"the first of {policy}, and it works between these processes"
        if policy.mode == "require":
            first = "as required"
        used = dict.fromkeys((part["transport"], part["passed_over"]) for part in self.sender.parts)
        return [f"{transport}: {why or first}" for transport, why in used]

    def same(self, rank: int) -> bool:
        """A receiver's hashes are the sender's."""
        names = [field.name for field in self.plan.layout.fields]
        return same_hashes(names, self.sender.sha256, self.receivers[rank].sha256)

    def problems(self) -> Iterator[str]:
        """Why it is not ok, a sentence per side."""
        sides = ["sender", *(f"receiver {rank}" for rank in range(len(self.receivers)))]
        for side, account in zip(sides, self.accounts, strict=True):
            if not account.succeeded:
                yield f"room {self.room}, {side}, {account.state}: {account.failure or 'did not end'}"
        for rank, account in enumerate(self.receivers):
            if account.succeeded and not self.same(rank):
                yield f"room {self.room}, receiver {rank}: its SHA-256 differ from the sender's"

    def as_json(self) -> dict[str, Any]:
        """The room's part of the document that `--json` prints."""
        return {
            "room": self.room,
            "ok": self.ok,
            "total_tokens": self.plan.tokens,
            "seconds": self.seconds,
            "gb_per_s": self.gb_per_s,
            "sender_states": self.sender.states,
            "transport_choices": self.choices,
            "sender_failure": self.sender.failure,
            "sender_sha256": self.sender.sha256,
            "receivers": [
                {
                    "rank": rank,
                    "states": account.states,
                    "parts": account.parts,
                    "failure": account.failure,
                    "sha256": account.sha256,
                    "sha256_equal": self.same(rank),
                }
                for rank, account in enumerate(self.receivers)
            ],
        }


class Report:
    """All rooms of a demo."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.rooms = {
            room: RoomReport(plan, room, Account(), [Account() for _ in range(plan.ranks)])
            for room in plan.room_numbers
        }
        self.trouble: list[str] = []

    @property
    def ok(self) -> bool:
        """Every room is, and no process had trouble."""
        return not self.trouble and all(room.ok for room in self.rooms.values())

    @property
    def seconds(self) -> float | None:
        """From the first room's data to the last room's Success."""
        starts = [room.sender.sent_s for room in self.rooms.values() if room.sender.sent_s is not None]
        accounts = [account for room in self.rooms.values() for account in room.receivers]
        ends = [account.ended_s for account in accounts if account.ended_s is not None]
        return max(ends) - min(starts) if starts and ends else None

    def account(self, side: str, rank: int, room: int) -> Account:
        """One side of a room."""
        return self.rooms[room].sender if side == "sender" else self.rooms[room].receivers[rank]

    def problems(self) -> list[str]:
        """Everything that is not ok."""
        return [*self.trouble, *(line for room in self.rooms.values() for line in room.problems())]

    def as_json(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        return {
            "ok": self.ok,
            "seconds": self.seconds,
            "problems": self.problems(),
            "rooms": [room.as_json() for room in self.rooms.values()],
        }


def same_hashes(names: list[str], sent: dict[str, str], arrived: dict[str, str]) -> bool:
    """Both sides have hashed every field, and got the same."""
    return sorted(sent) == sorted(arrived) == sorted(names) and sent == arrived
