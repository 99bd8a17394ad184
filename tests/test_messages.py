"""The codec: every kind survives the way, everything else is a typed error and nothing is a crash."""

from __future__ import annotations

import dataclasses
import tracemalloc
import typing
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpoll_fsm import messages
from kvpoll_fsm.errors import Failure, FailureCode, MalformedMessage, UnsupportedVersion
from kvpoll_fsm.messages import (
    MAX_BEATS_PER_FRAME,
    MAX_BLOCKS_PER_GRANT,
    MAX_MESSAGES_PER_FRAME,
    MAX_PACKET_NBYTES,
    MAX_RANKS,
    MAX_ROOM,
    PROTOCOL,
    Abort,
    Beat,
    BlockGrant,
    Bye,
    FieldSpec,
    Frame,
    Hello,
    Message,
    Opened,
    Packet,
    PartAck,
    PartOutcome,
    PartReport,
    Quiesced,
    Reserve,
    Resume,
    Stranger,
    TransportOffer,
    Welcome,
    Withdraw,
    Withdrawn,
    decode,
    encode,
    negotiate,
    to_builtins,
)
from kvpoll_fsm.poll import KVPoll

US, THEM = b"u" * 16, b"t" * 16
IDS = {"room": 42, "rank": 1, "sender_generation": 7, "receiver_generation": 9}
GRANT = BlockGrant(1, 1024, (5, 0, 7), (("tcp", b"token"), ("shm", b"")))
FAILURE = Failure.of(FailureCode.ChecksumMismatch, "part 1", state=KVPoll.Transferring, rank=1)

MESSAGES: list[Message] = [
    Reserve(**IDS, ranks=2),
    Reserve(room=0, rank=0, ranks=1, dummy=True),
    Reserve(**IDS, ranks=2, grant=GRANT),
    Resume(**IDS, sent_tokens=1024, grant=GRANT),
    Opened(**IDS, required=2),
    Opened(**IDS, required=2, total_tokens=2000),
    PartReport(**IDS, part=1, offset=1024, tokens=976, total_tokens=2000, is_last=True, transport="tcp"),
    PartReport(
        **IDS,
        part=0,
        offset=0,
        tokens=1024,
        total_tokens=2000,
        is_last=False,
        transport="tcp",
        checksum=b"c" * 16,
    ),
    PartAck(**IDS, part=1),
    PartAck(**IDS, part=1, failure=FAILURE),
    PartOutcome(**IDS, part=1, is_last=True, state=KVPoll.Success),
    PartOutcome(**IDS, part=1, is_last=False, state=KVPoll.Failed, failure=FAILURE, quiescent=False),
    Withdraw(**IDS, part=1),
    Withdrawn(**IDS, part=1, ok=False),
    Abort(**IDS, failure=FAILURE),
    Abort(**IDS, failure=FAILURE, quiescent=True),
    Quiesced(**IDS),
    Bye(),
]
FIELDS = (FieldSpec("embeddings", "bfloat16", (3584,), False), FieldSpec("aux", "int64", (), True))
OFFERS = (TransportOffer("tcp", b"descriptor", (b"region 0", b"region 1")), TransportOffer("memory", b""))
BEATS = (Beat(True, 42, 1, 7, 9, "queued", 123, True), Beat(False, 42, 1, 7, 9, "", 0, False))
INTRODUCTION: dict[str, Any] = {
    "incarnation": US,
    "min_version": PROTOCOL[0],
    "max_version": PROTOCOL[1],
    "fields": FIELDS,
    "block_tokens": 128,
    "transports": OFFERS,
}
PACKETS: list[Packet] = [
    Hello(**INTRODUCTION),
    Hello(incarnation=US, min_version=1, max_version=1),
    Welcome(**INTRODUCTION, answers=THEM),
    Frame(US, THEM, True),
    Frame(US, THEM, False, 3, 2, (), BEATS),
    Frame(US, THEM, True, MAX_ROOM, MAX_ROOM, tuple(MESSAGES), BEATS),
    Stranger(US, THEM),
    *(Frame(US, THEM, True, 1, 0, (message,)) for message in MESSAGES),
]


def kind_of(value: object) -> str:
    inner = value.messages if isinstance(value, Frame) and len(value.messages) == 1 else (value,)
    return type(inner[0]).__name__


def plain(packet: Packet) -> dict[str, Any]:
    """A packet as the map that travels."""
    return typing.cast("dict[str, Any]", msgspec.msgpack.decode(encode(packet)))


def pack(value: object) -> bytes:
    return msgspec.msgpack.encode(value)


def refused(data: bytes, match: str = ".") -> None:
    with pytest.raises(MalformedMessage, match=match):
        decode(data)


# ------------------------------------------------------------------------------------- the way there


def test_samples_hold_every_kind() -> None:
    assert {type(message) for message in MESSAGES} == set(typing.get_args(Message))
    assert {type(packet) for packet in PACKETS} == set(typing.get_args(Packet))


@pytest.mark.parametrize("packet", PACKETS, ids=kind_of)
@pytest.mark.parametrize("container", [bytes, bytearray, memoryview])
def test_round_trip(packet: Packet, container: type) -> None:
    again = decode(container(encode(packet)))
    assert again == packet
    assert type(again) is type(packet)
    assert hash(again) == hash(packet)


@pytest.mark.parametrize("packet", PACKETS, ids=kind_of)
def test_plain_values_for_traces(packet: Packet) -> None:
    assert msgspec.convert(to_builtins(packet), Packet) == packet


def test_values_come_back_in_their_types() -> None:
    frame = decode(encode(Frame(US, THEM, True, 1, 0, (MESSAGES[11],))))
    assert isinstance(frame, Frame)
    (message,) = frame.messages
    assert isinstance(message, PartOutcome)
    assert message.state is KVPoll.Failed
    assert isinstance(message.failure, Failure)
    assert message.failure.code is FailureCode.ChecksumMismatch


def test_transports_of_a_grant() -> None:
    assert GRANT.transports == ("tcp", "shm")
    assert (GRANT.token("tcp"), GRANT.token("shm")) == (b"token", b"")
    with pytest.raises(KeyError):
        GRANT.token("mooncake")


def test_largest_grants_fit_a_packet() -> None:
    blocks = tuple(range((1 << 31) - MAX_BLOCKS_PER_GRANT, 1 << 31))
    tokens = tuple((chr(0x10000 + n) * 128, b"x" * 1024) for n in range(16))
    grant = BlockGrant((1 << 31) - 1, MAX_ROOM, blocks, tokens)
    frame = Frame(US, THEM, True, 1, 0, (Resume(**IDS, sent_tokens=MAX_ROOM, grant=grant),))
    assert decode(encode(frame)) == frame


# ------------------------------------------------------------------------------- what newer peers add


def maps_in(value: Any) -> Iterator[dict[str, Any]]:
    """Every map in a packet that has fields (and not the keys of something else)."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from maps_in(part)


@pytest.mark.parametrize("packet", PACKETS, ids=kind_of)
def test_unknown_optional_fields_are_ignored_at_every_level(packet: Packet) -> None:
    value = plain(packet)
    for place in list(maps_in(value)):
        place["new_in_version_2"] = {"nested": [1, b"\xff", None]}
    assert decode(pack(value)) == packet


def test_what_is_appended_to_a_list_like_value_is_ignored() -> None:
    value = plain(PACKETS[4])
    value["beats"] = [[*beat, "new"] for beat in value["beats"]]
    assert decode(pack(value)) == PACKETS[4]


@pytest.mark.parametrize("packet", PACKETS, ids=kind_of)
def test_fields_may_come_in_any_order(packet: Packet) -> None:
    value = plain(packet)
    for place in list(maps_in(value)):
        items = list(place.items())
        place.clear()
        place.update(reversed(items))
    assert decode(pack(value)) == packet


@pytest.mark.parametrize(
    ("lowest", "highest", "version"),
    [
        (0, 0, None),
        (0, 1, 1),
        (1, 1, 1),
        (1, 2, 1),
        (0, 65536, 1),
        (2, 2, None),
        (2, 1, None),
        (9, 65536, None),
    ],
)
def test_version_ranges(lowest: int, highest: int, version: int | None) -> None:
    hello = Hello(incarnation=US, min_version=lowest, max_version=highest)
    welcome = Welcome(incarnation=US, min_version=lowest, max_version=highest, answers=THEM)
    for packet in (hello, welcome):
        if version is None:
            with pytest.raises(UnsupportedVersion) as caught:
                decode(encode(packet))
            assert (caught.value.ours, caught.value.theirs) == (PROTOCOL, (lowest, highest))
        else:
            assert decode(encode(packet)) == packet
            assert negotiate(packet) == version


@pytest.mark.parametrize("ours", [(low, high) for high in range(5) for low in range(high + 1)])
@pytest.mark.parametrize("theirs", [(low, high) for high in range(5) for low in range(high + 1)])
def test_highest_common_version_is_used(ours: tuple[int, int], theirs: tuple[int, int]) -> None:
    hello = Hello(incarnation=US, min_version=theirs[0], max_version=theirs[1])
    common = {*range(ours[0], ours[1] + 1)} & {*range(theirs[0], theirs[1] + 1)}
    if common:
        assert negotiate(hello, ours) == max(common)
    else:
        with pytest.raises(UnsupportedVersion):
            negotiate(hello, ours)


# ----------------------------------------------------------------------------------- what is malformed


@pytest.mark.parametrize("kind", ["", "hello", "Reserve", "Goodbye", None, 7, b"Hello", ["Hello"]])
def test_unknown_kind_of_packet(kind: object) -> None:
    refused(pack({**plain(PACKETS[1]), "kind": kind}))


@pytest.mark.parametrize("kind", ["", "Hello", "Frame", "Renew", None, 7])
def test_unknown_kind_of_message(kind: object) -> None:
    value = plain(Frame(US, THEM, True, 1, 0, (Quiesced(**IDS),)))
    value["messages"][0]["kind"] = kind
    refused(pack(value))


@pytest.mark.parametrize(
    "value", [None, True, 0, -1, 1.5, "Hello", b"Hello", [], [1], {}, {"kind": "Hello"}, {1: 2}]
)
def test_not_even_a_packet(value: object) -> None:
    refused(pack(value))


@pytest.mark.parametrize("message", MESSAGES, ids=kind_of)
def test_a_required_field_left_out(message: Message) -> None:
    required = {field.encode_name for field in msgspec.structs.fields(message) if field.required}
    for name in [*required, "kind"]:
        value = plain(Frame(US, THEM, True, 1, 0, (message,)))
        del value["messages"][0][name]
        refused(pack(value))


@pytest.mark.parametrize("packet", PACKETS[:4] + [PACKETS[6]], ids=kind_of)
def test_a_required_field_of_a_packet_left_out(packet: Packet) -> None:
    for field in msgspec.structs.fields(packet):
        if field.required:
            value = plain(packet)
            del value[field.encode_name]
            refused(pack(value), "missing required field")


def test_a_required_field_of_a_failure_left_out() -> None:
    for field in dataclasses.fields(Failure):
        value = plain(Frame(US, THEM, True, 1, 0, (Abort(**IDS, failure=FAILURE),)))
        del value["messages"][0]["failure"][field.name]
        refused(pack(value), "missing required field")


OUT_OF_BOUNDS: list[Message] = [
    Quiesced(room=-1, rank=0),
    Quiesced(room=MAX_ROOM + 1, rank=0),
    Quiesced(room=0, rank=-1),
    Quiesced(room=0, rank=MAX_RANKS),
    Quiesced(room=0, rank=0, sender_generation=-1),
    Quiesced(room=0, rank=0, receiver_generation=MAX_ROOM + 1),
    Reserve(room=0, rank=0, ranks=0),
    Reserve(room=0, rank=0, ranks=MAX_RANKS + 1),
    Opened(room=0, rank=0, required=0),
    Opened(room=0, rank=0, required=1, total_tokens=0),
    Withdraw(room=0, rank=0, part=-1),
    Withdraw(room=0, rank=0, part=1 << 31),
    PartReport(room=0, rank=0, part=0, offset=-1, tokens=1, total_tokens=1, is_last=True, transport="x"),
    PartReport(room=0, rank=0, part=0, offset=0, tokens=0, total_tokens=1, is_last=True, transport="x"),
    PartReport(room=0, rank=0, part=0, offset=0, tokens=1, total_tokens=0, is_last=True, transport="x"),
    PartReport(room=0, rank=0, part=0, offset=0, tokens=1, total_tokens=1, is_last=True, transport=""),
    PartReport(room=0, rank=0, part=0, offset=0, tokens=1, total_tokens=1, is_last=True, transport="x" * 129),
    *(
        PartReport(
            room=0,
            rank=0,
            part=0,
            offset=0,
            tokens=1,
            total_tokens=1,
            is_last=True,
            transport="x",
            checksum=b"c" * nbytes,
        )
        for nbytes in (0, 15, 17)
    ),
    PartOutcome(room=0, rank=0, part=0, is_last=True, state=typing.cast("KVPoll", 5)),
    PartOutcome(room=0, rank=0, part=0, is_last=True, state=typing.cast("KVPoll", "Success")),
    Withdrawn(room=0, rank=0, part=0, ok=typing.cast("bool", 1)),
    *(
        Reserve(room=0, rank=0, ranks=1, grant=grant)
        for grant in (
            BlockGrant(0, 0, (1,), (("tcp", b""),)),
            BlockGrant(0, 1, (), (("tcp", b""),)),
            BlockGrant(0, 1, (-1,), (("tcp", b""),)),
            BlockGrant(0, 1, (1 << 31,), (("tcp", b""),)),
            BlockGrant(0, 1, tuple(range(MAX_BLOCKS_PER_GRANT + 1)), (("tcp", b""),)),
            BlockGrant(0, 1, (1,), ()),
            BlockGrant(0, 1, (1,), (("", b""),)),
            BlockGrant(0, 1, (1,), (("tcp", b"x" * 1025),)),
            BlockGrant(0, 1, (1,), tuple((str(n), b"") for n in range(17))),
            BlockGrant(0, 1, (1,), typing.cast(Any, (("tcp",),))),
            BlockGrant(0, 1, (1,), typing.cast(Any, (("tcp", b"", b""),))),
        )
    ),
]


@pytest.mark.parametrize("message", OUT_OF_BOUNDS, ids=kind_of)
def test_values_out_of_bounds_in_messages(message: Message) -> None:
    refused(encode(Frame(US, THEM, True, 1, 0, (message,))))


@pytest.mark.parametrize(
    "packet",
    [
        Stranger(b"", THEM),
        Stranger(US, THEM + b"x"),
        Frame(US[:15], THEM, True),
        Frame(US, THEM, True, -1),
        Frame(US, THEM, True, 0, MAX_ROOM + 1),
        Frame(US, THEM, True, 1, 0, (Bye(),) * (MAX_MESSAGES_PER_FRAME + 1)),
        Frame(US, THEM, True, 1, 0, (), BEATS[:1] * (MAX_BEATS_PER_FRAME + 1)),
        Frame(US, THEM, True, 1, 0, (), (Beat(True, 42, MAX_RANKS, 7, 9, "queued", 123, True),)),
        Frame(US, THEM, True, 1, 0, (), (Beat(True, 42, 1, 7, 9, "x" * 33, 123, True),)),
        Frame(US, THEM, True, 1, 0, (), (Beat(True, 42, 1, 7, 9, "queued", -1, True),)),
        Hello(**{**INTRODUCTION, "incarnation": b"short"}),
        Hello(**{**INTRODUCTION, "min_version": -1}),
        Hello(**{**INTRODUCTION, "max_version": (1 << 16) + 1}),
        Hello(**{**INTRODUCTION, "block_tokens": 0}),
        Hello(**{**INTRODUCTION, "block_tokens": 1 << 31}),
        Hello(**{**INTRODUCTION, "fields": FIELDS[:1] * 65}),
        Hello(**{**INTRODUCTION, "fields": (FieldSpec("", "int8", (), False),)}),
        Hello(**{**INTRODUCTION, "fields": (FieldSpec("x", "i" * 33, (), False),)}),
        Hello(**{**INTRODUCTION, "fields": (FieldSpec("x", "int8", (1,) * 17, False),)}),
        Hello(**{**INTRODUCTION, "fields": (FieldSpec("x", "int8", (0,), False),)}),
        Hello(**{**INTRODUCTION, "fields": (FieldSpec("x", "int8", ((1 << 40) + 1,), False),)}),
        Hello(**{**INTRODUCTION, "transports": OFFERS[:1] * 17}),
        Hello(**{**INTRODUCTION, "transports": (TransportOffer("x", b"d" * ((1 << 16) + 1)),)}),
        Hello(**{**INTRODUCTION, "transports": (TransportOffer("x", b"", (b"",) * 65),)}),
        Welcome(**INTRODUCTION, answers=b""),
    ],
    ids=kind_of,
)
def test_values_out_of_bounds_in_packets(packet: Packet) -> None:
    refused(encode(packet), "not a packet")


@pytest.mark.parametrize(
    ("name", "value"),
    [("code", "Bored"), ("rank", "1"), ("state", 5), ("state", "Failed"), ("retryable", 1), ("detail", b"x")],
)
def test_a_failure_that_makes_no_sense(name: str, value: object) -> None:
    packet = plain(Frame(US, THEM, True, 1, 0, (Abort(**IDS, failure=FAILURE),)))
    packet["messages"][0]["failure"][name] = value
    refused(pack(packet))


def test_a_failure_of_a_talkative_peer_is_cut() -> None:
    packet = plain(Frame(US, THEM, True, 1, 0, (Abort(**IDS, failure=FAILURE),)))
    packet["messages"][0]["failure"]["detail"] = "x" * 1_000_000
    frame = decode(pack(packet))
    assert isinstance(frame, Frame)
    (message,) = frame.messages
    assert isinstance(message, Abort)
    assert message.failure.detail == "x" * 1000


def test_a_packet_too_long_is_not_even_read() -> None:
    longest = encode(Stranger(US, THEM)) + b"\xc1" * MAX_PACKET_NBYTES
    refused(longest, f"at most {MAX_PACKET_NBYTES}")
    refused(longest[:MAX_PACKET_NBYTES], "not a packet")


@pytest.mark.parametrize("packet", PACKETS, ids=kind_of)
def test_truncated_anywhere(packet: Packet) -> None:
    data = encode(packet)
    for end in range(len(data)):
        refused(data[:end])


@pytest.mark.parametrize("packet", PACKETS, ids=kind_of)
def test_bytes_after_the_end(packet: Packet) -> None:
    refused(encode(packet) + b"\xc0")


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1x", b"\x82\xa4kind\xa5Frame\xa1x" + b"\x91"])
def test_nested_too_deep(opening: bytes) -> None:
    refused(opening * (1_000_000 // len(opening)))


@pytest.mark.parametrize("name", [b"messages", b"beats", b"unknown", b"source"])
@pytest.mark.parametrize("header", [b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9"])
def test_a_length_that_lies_costs_no_memory(name: bytes, header: bytes) -> None:
    data = b"\x82\xa4kind\xa5Frame" + bytes([0xA0 | len(name)]) + name + header + b"\xff" * 4
    tracemalloc.start()
    try:
        refused(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


# -------------------------------------------------------------------------------------------- fuzzing


def decodes_or_is_refused(data: bytes) -> None:
    """Nothing but the two errors comes out, and what is taken can be said again."""
    try:
        packet = decode(data)
    except (MalformedMessage, UnsupportedVersion):
        return
    assert decode(encode(packet)) == packet
    hash(packet)


@given(st.binary(max_size=300))
def test_arbitrary_bytes(data: bytes) -> None:
    decodes_or_is_refused(data)


@given(
    st.sampled_from([encode(packet) for packet in PACKETS]),
    st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=4),
    st.sampled_from(["flip", "insert", "delete"]),
)
def test_mutated_packets(data: bytes, edits: list[tuple[int, int]], how: str) -> None:
    mutated = bytearray(data)
    for at, value in edits:
        where = at % len(mutated)
        mutated[where : where + (how != "insert")] = b"" if how == "delete" else bytes([value])
    decodes_or_is_refused(bytes(mutated))


@given(st.sampled_from([encode(packet) for packet in PACKETS]), st.data())
def test_packets_cut_and_joined(first: bytes, data: st.DataObject) -> None:
    second = data.draw(st.sampled_from([encode(packet) for packet in PACKETS]))
    decodes_or_is_refused(first[: data.draw(st.integers(0, len(first)))] + second)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(),
    st.text(max_size=40),
    st.binary(max_size=20),
    st.just(US),
    st.datetimes().map(lambda when: msgspec.msgpack.Ext(-1, when.isoformat().encode())),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from(PACKETS), st.data())
def test_packets_with_any_value_in_any_place(packet: Packet, data: st.DataObject) -> None:
    value = plain(packet)
    place = data.draw(st.sampled_from(list(maps_in(value))))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(values)
    decodes_or_is_refused(pack(value))


@given(st.sampled_from([*typing.get_args(Packet), *typing.get_args(Message)]), st.data())
def test_maps_of_a_known_kind_with_anything_in_them(kind: type[msgspec.Struct], data: st.DataObject) -> None:
    names = [field.encode_name for field in msgspec.structs.fields(kind)]
    body = data.draw(st.fixed_dictionaries({}, optional={name: values for name in names}))
    value = {"kind": kind.__name__, **body}
    decodes_or_is_refused(pack(value))
    decodes_or_is_refused(pack({**plain(PACKETS[3]), "messages": [value]}))


rooms = st.integers(0, MAX_ROOM)
ranks = st.integers(0, MAX_RANKS - 1)
failures = st.builds(
    Failure,
    st.sampled_from(FailureCode),
    st.none() | ranks,
    st.sampled_from(KVPoll),
    st.booleans(),
    st.text(max_size=40),
)


@given(rooms, ranks, rooms, rooms, failures, st.booleans())
def test_any_values_within_bounds_survive(
    room: int, rank: int, sender: int, receiver: int, failure: Failure, quiescent: bool
) -> None:
    ids = {"room": room, "rank": rank, "sender_generation": sender, "receiver_generation": receiver}
    abort = Abort(**ids, failure=failure, quiescent=quiescent)
    frame = Frame(US, THEM, quiescent, sender, receiver, (abort, PartAck(**ids, part=0, failure=failure)))
    assert decode(encode(frame)) == frame


def test_every_public_name_exists() -> None:
    assert all(hasattr(messages, name) for name in messages.__all__)
