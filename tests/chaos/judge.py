"""What has become of a room, and whether that may be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.chaos.plan import RoomPlan

__all__ = ["Room", "Side", "judged"]

REASONS = {
    "Aborted",
    "Displaced",  # by word of an earlier attempt at another place that was held up in the network
    "PeerLost",
    "OutcomeUnknown",
    "DeadlinePassed",
    "TransportFailed",
    "TransportUnavailable",
    "PoolExhausted",
}
"""What the faults can lead to. Anything else, such as ProtocolError or ChecksumMismatch, is a bug of ours."""
AFTER_SUCCESS = {"PeerLost", "OutcomeUnknown"}
"""How a rank may fail, besides its own host's doing, in a room whose sender succeeded: it was never told."""


@dataclass
class Side:
    """One side of a room that was opened.

    Attributes:
        member: The process it was opened in.
        report: How it ended, as that process told.
    """

    member: Any
    report: dict[str, Any] | None = None

    @property
    def is_over(self) -> bool:
        """It has ended, or its process has died."""
        return self.report is not None or not self.member.alive


@dataclass
class Room:
    """One room of the run."""

    plan: RoomPlan
    digest: str
    must_succeed: bool
    opened_s: float
    steps_left: int
    sides: dict[tuple[str, int], Side] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        """Nothing more is going to be done, and every side whose process lives has ended."""
        return not self.steps_left and all(side.is_over for side in self.sides.values())


def judged(room: Room) -> list[str]:
    """What must not be in this room, which is over."""
    reports = {place: side.report for place, side in room.sides.items() if side.report is not None}
    wrong = [text for place, report in reports.items() for text in _alone(room, place, report)]
    wrong += _together(room, reports)
    if room.must_succeed:
        wanted = {("sender", 0), *(("receiver", rank) for rank in range(len(room.plan.ranks)))}
        wrong += [
            f"{place} should have succeeded: {reports.get(place)}"
            for place in sorted(wanted)
            if not _succeeded(reports.get(place))
        ]
    return [f"room {room.plan.number}, life {room.plan.life}: {text}" for text in wrong]


def _succeeded(report: dict[str, Any] | None) -> bool:
    return report is not None and report["state"] == "Success"


def _alone(room: Room, place: tuple[str, int], report: dict[str, Any]) -> list[str]:
    """What one side's report shows by itself."""
    wrong, history = [], report["history"]
    if report["state"] not in ("Success", "Failed") or history[-1] != report["state"] or history[0] != "Bootstrapping":
        wrong.append(f"{place} has not ended: {report}")
    if {"Success", "Failed"} & set(history[:-1]):
        wrong.append(f"{place} went on after its end: {history}")
    reasonable = report["code"] in REASONS and report["cause_rank"] in (None, *range(len(room.plan.ranks)))
    if report["state"] == "Failed" and not (reasonable and report["detail"]):
        wrong.append(f"{place} failed without a good reason: {report}")
    covered, parts = 0, report["parts"]
    for offset, tokens, is_last in parts:
        if offset != covered or is_last is not (offset + tokens == room.plan.tokens):
            wrong.append(f"{place} has parts that do not join: {parts}")
        covered += tokens
    if report["state"] == "Success" and covered != room.plan.tokens:
        wrong.append(f"{place} succeeded with {covered} of {room.plan.tokens} tokens")
    if report["digest"] not in ("", room.digest):
        wrong.append(f"{place} succeeded with wrong bytes")
    if (
        _succeeded(report)
        and place[0] == "receiver"
        and not report["digest"]
        and not report["touched"]
        and not report["cleared"]
    ):
        wrong.append(f"{place} succeeded without data")
    return wrong


def _together(room: Room, reports: dict[tuple[str, int], dict[str, Any]]) -> list[str]:
    """What the reports of several sides show."""
    sender, wrong = reports.get(("sender", 0)), []
    for place, report in reports.items():
        if place[0] == "sender" or sender is None:
            continue
        if _succeeded(report) and not _succeeded(sender):
            wrong.append(f"{place} succeeded, the sender did not: {sender}")
        if _succeeded(sender) and not _succeeded(report) and not (report["touched"] or report["code"] in AFTER_SUCCESS):
            wrong.append(f"the sender succeeded, {place} failed for no reason of its own: {report}")
    missing = {("receiver", rank) for rank in range(len(room.plan.ranks))} - room.sides.keys()
    if _succeeded(sender) and missing:
        wrong.append(f"the sender succeeded without {sorted(missing)}")
    return wrong
