"""Traces: what is read back is what was written, and `check` finds what does not hold."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpoll_fsm.errors import MalformedMessage
from kvpoll_fsm.trace import (
    EndpointRecord,
    MessageRecord,
    PartEntry,
    Record,
    StateRecord,
    check,
    decode_line,
    encode_line,
)

TX, RX = "aa" * 16, "bb" * 16


def state(name: str, side: str = "sender", **more: Any) -> StateRecord:
    here: dict[str, Any] = {"at_s": 1.0, "endpoint": TX, "side": side, "room": 1, "rank": 0, "generation": 1}
    if side == "receiver":
        here |= {"endpoint": RX, "peer": TX, "sender_generation": 1}
    return StateRecord(**(here | more), state=name)


def part(number: int, offset: int, tokens: int, is_last: bool, side: str = "sender", **more: Any) -> PartEntry:
    here: dict[str, Any] = {"at_s": 1.0, "endpoint": TX, "side": side, "room": 1, "rank": 0, "generation": 1}
    if side == "receiver":
        here |= {"endpoint": RX, "peer": TX, "sender_generation": 1}
    return PartEntry(**(here | more), part=number, offset=offset, tokens=tokens, is_last=is_last)


def resumed(side: str) -> list[Record]:
    """2,000 tokens through 1,024, as one side sees it."""
    return [
        state("Bootstrapping", side),
        state("WaitingForInput", side),
        part(0, 0, 1024, False, side),
        state("Transferring", side),
        part(1, 1024, 976, True, side),
        state("Success", side),
    ]


def test_both_ends_of_a_good_transfer_have_no_problems() -> None:
    assert check([*resumed("sender"), *resumed("receiver")]) == []


def test_a_trace_that_lacks_the_beginning_is_checked_from_where_it_begins() -> None:
    assert check(resumed("sender")[3:]) == []
    assert check(resumed("sender")[4:]) == []


@pytest.mark.parametrize(
    ("records", "problem"),
    [
        ([state("Success"), state("Failed")], "Failed after Success, which nothing leaves"),
        ([state("Transferring"), state("WaitingForInput")], "no row leads from Transferring to WaitingForInput"),
        ([state("Bootstrapping"), state("Melting")], "there is no state Melting"),
        ([part(0, 0, 8, False), part(2, 8, 8, True)], "part 2 after part 0"),
        ([part(0, 0, 8, True), part(1, 8, 8, True)], "part 1 after part 0"),
        ([part(0, 0, 8, False), part(1, 9, 8, True)], "begins at token 9"),
        ([part(0, 0, 8, False), state("Transferring"), state("Success")], "Success without its last part"),
        ([state("Success")], "Success without its last part"),
    ],
)
def test_what_one_side_did_wrong_is_found(records: list[Record], problem: str) -> None:
    assert any(problem in found for found in check(records)), check(records)


def test_a_receiver_may_not_succeed_without_its_sender() -> None:
    failed = [*resumed("sender")[:-1], state("Failed")]
    assert any("Success while its sender is Failed" in found for found in check([*failed, *resumed("receiver")]))


def test_a_sender_may_succeed_without_a_receiver() -> None:
    assert check([*resumed("sender"), *resumed("receiver")[:-2], state("Failed", "receiver")]) == []


def test_both_sides_must_mean_the_same_range() -> None:
    other = [part(0, 0, 512, False, "receiver")]
    assert any("covers another range" in found for found in check([*resumed("sender"), *other]))


def test_lives_of_a_room_are_told_apart() -> None:
    again = [state("Bootstrapping", generation=2), state("Failed", generation=2)]
    assert check([*resumed("sender"), *again]) == []


@pytest.mark.parametrize(
    "record",
    [
        EndpointRecord(1.5, TX, 7),
        state("Success", cause="none"),
        part(0, 0, 8, True),
        MessageRecord(1.5, TX, RX, "in", {"kind": "Bye"}),
    ],
)
def test_a_record_survives_its_line(record: Record) -> None:
    line = encode_line(record)
    assert line.endswith(b"\n")
    assert decode_line(line) == record


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_line_raises_anything_but_malformed_message(line: bytes) -> None:
    with contextlib.suppress(MalformedMessage):
        decode_line(line)


def test_an_endless_line_is_refused_unread() -> None:
    with pytest.raises(MalformedMessage, match="at most"):
        decode_line(b" " * ((1 << 20) + 1))
