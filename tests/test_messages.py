"""The codec: every kind survives the way, everything else is a typed error and nothing is a crash."""

from __future__ import annotations

import dataclasses
import tracemalloc
import typing
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from kvpoll_fsm import messages
from kvpoll_fsm.errors import Failure, FailureCode, MalformedMessage, UnsupportedVersion
from kvpoll_fsm.messages import Abort, Frame, Hello, Message, Packet, Quiesced, decode, encode
from kvpoll_fsm.poll import KVPoll

US, THEM = b"u" * 16, b"t" * 16
IDS: dict[str, Any] = {"room": 42, "rank": 1, "sender_generation": 7, "receiver_generation": 9}
GRANT = messages.BlockGrant(1, 1024, (5, 0, 7), (("tcp", b"token"), ("shm", b"")))
FAILURE = Failure.of(FailureCode.ChecksumMismatch, "part 1", state=KVPoll.Transferring, rank=1)


def report(**changes: Any) -> messages.PartReport:
    said = {"part": 1, "offset": 1024, "tokens": 976, "total_tokens": 2000, "is_last": True, "transport": "tcp"}
    return messages.PartReport(**{**IDS, **said, **changes})


MESSAGES: list[Message] = [
    messages.Reserve(**IDS, ranks=2),
    messages.Reserve(room=0, rank=0, ranks=1, dummy=True),
    messages.Reserve(**IDS, ranks=2, grant=GRANT),
    messages.Resume(**IDS, sent_tokens=1024, grant=GRANT),
    messages.Opened(**IDS, required=2),
    messages.Opened(**IDS, required=2, total_tokens=2000),
    report(),
    report(part=0, offset=0, tokens=1024, is_last=False, checksum=b"c" * 16),
    messages.PartAck(**IDS, part=1),
    messages.PartAck(**IDS, part=1, failure=FAILURE),
    messages.PartOutcome(**IDS, part=1, is_last=True, state=KVPoll.Success),
    messages.PartOutcome(**IDS, part=1, is_last=False, state=KVPoll.Failed, failure=FAILURE, quiescent=False),
    messages.FencePart(**IDS, part=1, transport="tcp", attempt=2),
    messages.PartFenced(**IDS, part=1, transport="tcp", attempt=2, token=b"t"),
    messages.Withdraw(**IDS, part=1),
    messages.Withdrawn(**IDS, part=1, ok=False),
    Abort(**IDS, failure=FAILURE),
    Abort(**IDS, failure=FAILURE, quiescent=True),
    Quiesced(**IDS),
    messages.Bye(),
]
FIELDS = (messages.FieldSpec("embeddings", "bfloat16", (3584,), False), messages.FieldSpec("aux", "int64", (), True))
OFFERS = (messages.TransportOffer("tcp", b"card", (b"0", b"1")), messages.TransportOffer("memory", b""))
BEATS = (messages.Beat(True, 42, 1, 7, 9, "queued", 123, True), messages.Beat(False, 42, 1, 7, 9, "", 0, False))
INTRODUCTION: dict[str, Any] = {"incarnation": US, "min_version": 1, "max_version": 1, "block_tokens": 128}
INTRODUCTION |= {"fields": FIELDS, "transports": OFFERS}
PACKETS: list[Packet] = [
    Hello(**INTRODUCTION),
    Hello(incarnation=US, min_version=1, max_version=1),
    messages.Welcome(**INTRODUCTION, answers=THEM),
    Frame(US, THEM, True),
    Frame(US, THEM, False, 3, 2, (), BEATS),
    Frame(US, THEM, True, messages.MAX_ROOM, messages.MAX_ROOM, tuple(MESSAGES), BEATS),
    messages.Stranger(US, THEM),
    *(Frame(US, THEM, True, 1, 0, (message,)) for message in MESSAGES),
]

ABORTING = Frame(US, THEM, True, 1, 0, (Abort(**IDS, failure=FAILURE),))


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


def test_samples_hold_every_kind() -> None:
    assert {type(message) for message in MESSAGES} == set(typing.get_args(Message))
    assert {type(packet) for packet in PACKETS} == set(typing.get_args(Packet))


def test_limits_are_part_of_the_protocol() -> None:
    limits = {name: value for name, value in vars(messages).items() if name.startswith("MAX_")}
    assert limits == {
        "MAX_PACKET_NBYTES": 1 << 22,
        "MAX_SENT_NBYTES": 1 << 20,
        "MAX_ROOM": (1 << 63) - 1,
        "MAX_BLOCKS_PER_GRANT": 1 << 16,
        "MAX_MESSAGES_PER_FRAME": 256,
        "MAX_BEATS_PER_FRAME": 4096,
        "MAX_HEARD_PER_FRAME": 256,
        "MAX_RANKS": 4096,
    }
    assert messages.PROTOCOL == (1, 1)


def test_defaults_are_part_of_the_protocol_because_they_are_left_out() -> None:
    reserve = messages.Reserve(room=1, rank=0, ranks=1)
    frame = plain(Frame(US, THEM, True, messages=(reserve, messages.PartAck(room=1, rank=0, part=0))))
    assert frame.keys() == {"kind", "source", "target", "outgoing", "messages"}
    assert [message.keys() - {"kind", "room", "rank"} for message in frame["messages"]] == [{"ranks"}, {"part"}]
    assert (reserve.sender_generation, reserve.receiver_generation, reserve.dummy, reserve.grant) == (0, 0, False, None)
    assert messages.PartOutcome(room=1, rank=0, part=0, is_last=True, state=KVPoll.Success).quiescent
    assert not Abort(room=1, rank=0, failure=FAILURE).quiescent
    assert (Frame(US, THEM, True).first_seq, Frame(US, THEM, True).ack) == (0, 0)


@pytest.mark.parametrize("packet", PACKETS, ids=kind_of)
@pytest.mark.parametrize("container", [bytes, bytearray, memoryview])
def test_round_trip(packet: Packet, container: type) -> None:
    again = decode(container(encode(packet)))
    assert again == packet
    assert type(again) is type(packet)
    assert hash(again) == hash(packet)


@pytest.mark.parametrize("packet", PACKETS, ids=kind_of)
def test_plain_values_for_traces(packet: Packet) -> None:
    assert msgspec.convert(messages.to_builtins(packet), Packet) == packet


def test_values_come_back_in_their_types() -> None:
    (message,) = typing.cast("Frame", decode(encode(Frame(US, THEM, True, 1, 0, (MESSAGES[11],))))).messages
    assert isinstance(message, messages.PartOutcome)
    assert message.state is KVPoll.Failed
    assert isinstance(message.failure, Failure)
    assert message.failure.code is FailureCode.ChecksumMismatch


def test_transports_of_a_grant() -> None:
    assert GRANT.transports == ("tcp", "shm")
    assert (GRANT.token("tcp"), GRANT.token("shm")) == (b"token", b"")
    with pytest.raises(KeyError):
        GRANT.token("mooncake")


def test_largest_grants_fit_a_packet() -> None:
    blocks = tuple(range((1 << 31) - messages.MAX_BLOCKS_PER_GRANT, 1 << 31))
    tokens = tuple((chr(0x10000 + n) * 128, b"x" * 1024) for n in range(16))
    grant = messages.BlockGrant((1 << 31) - 1, messages.MAX_ROOM, blocks, tokens)
    frame = Frame(US, THEM, True, 1, 0, (messages.Resume(**IDS, sent_tokens=messages.MAX_ROOM, grant=grant),))
    assert decode(encode(frame)) == frame


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
    welcome = messages.Welcome(incarnation=US, min_version=lowest, max_version=highest, answers=THEM)
    for packet in (hello, welcome):
        if version is None:
            with pytest.raises(UnsupportedVersion) as caught:
                decode(encode(packet))
            assert (caught.value.ours, caught.value.theirs) == (messages.PROTOCOL, (lowest, highest))
        else:
            assert decode(encode(packet)) == packet
            assert messages.negotiate(packet) == version


@pytest.mark.parametrize("ours", [(low, high) for high in range(5) for low in range(high + 1)])
@pytest.mark.parametrize("theirs", [(low, high) for high in range(5) for low in range(high + 1)])
def test_highest_common_version_is_used(ours: tuple[int, int], theirs: tuple[int, int]) -> None:
    hello = Hello(incarnation=US, min_version=theirs[0], max_version=theirs[1])
    common = {*range(ours[0], ours[1] + 1)} & {*range(theirs[0], theirs[1] + 1)}
    if common:
        assert messages.negotiate(hello, ours) == max(common)
    else:
        with pytest.raises(UnsupportedVersion):
            messages.negotiate(hello, ours)


@pytest.mark.parametrize("kind", ["", "hello", "Reserve", "Goodbye", None, 7, b"Hello", ["Hello"]])
def test_unknown_kind_of_packet(kind: object) -> None:
    refused(pack({**plain(PACKETS[1]), "kind": kind}))


@pytest.mark.parametrize("kind", ["", "Hello", "Frame", "Renew", None, 7])
def test_unknown_kind_of_message(kind: object) -> None:
    value = plain(Frame(US, THEM, True, 1, 0, (Quiesced(**IDS),)))
    value["messages"][0]["kind"] = kind
    refused(pack(value))


@pytest.mark.parametrize("value", [None, True, 0, -1, 1.5, "Hello", b"Hello", [], [1], {}, {"kind": "Hello"}, {1: 2}])
def test_not_even_a_packet(value: object) -> None:
    refused(pack(value))


@pytest.mark.parametrize("message", MESSAGES, ids=kind_of)
def test_a_required_field_left_out(message: Message) -> None:
    required = {field.encode_name for field in msgspec.structs.fields(message) if field.required}
    for name in [*required, "kind"]:
        value = plain(Frame(US, THEM, True, 1, 0, (message,)))
        del value["messages"][0][name]
        refused(pack(value))


@pytest.mark.parametrize("packet", [*PACKETS[:4], PACKETS[6]], ids=kind_of)
def test_a_required_field_of_a_packet_left_out(packet: Packet) -> None:
    for field in msgspec.structs.fields(packet):
        if field.required:
            value = plain(packet)
            del value[field.encode_name]
            refused(pack(value), "missing required field")


def test_a_required_field_of_a_failure_left_out() -> None:
    for field in dataclasses.fields(Failure):
        value = plain(ABORTING)
        del value["messages"][0]["failure"][field.name]
        refused(pack(value), "missing required field")


OUT_OF_BOUNDS: list[Message] = [
    Quiesced(room=-1, rank=0),
    Quiesced(room=messages.MAX_ROOM + 1, rank=0),
    Quiesced(room=0, rank=-1),
    Quiesced(room=0, rank=messages.MAX_RANKS),
    Quiesced(room=0, rank=0, sender_generation=-1),
    Quiesced(room=0, rank=0, receiver_generation=messages.MAX_ROOM + 1),
    messages.Reserve(room=0, rank=0, ranks=0),
    messages.Reserve(room=0, rank=0, ranks=messages.MAX_RANKS + 1),
    messages.Opened(room=0, rank=0, required=0),
    messages.Opened(room=0, rank=0, required=1, total_tokens=0),
    messages.Withdraw(room=0, rank=0, part=-1),
    messages.Withdraw(room=0, rank=0, part=1 << 31),
    report(offset=-1),
    report(tokens=0),
    report(total_tokens=0),
    report(transport=""),
    report(transport="x" * 129),
    *(report(checksum=b"c" * nbytes) for nbytes in (0, 15, 17)),
    messages.PartOutcome(room=0, rank=0, part=0, is_last=True, state=typing.cast("KVPoll", 5)),
    messages.PartOutcome(room=0, rank=0, part=0, is_last=True, state=typing.cast("KVPoll", "Success")),
    messages.Withdrawn(room=0, rank=0, part=0, ok=typing.cast("bool", 1)),
    *(
        messages.Reserve(room=0, rank=0, ranks=1, grant=grant)
        for grant in (
            messages.BlockGrant(0, 0, (1,), (("tcp", b""),)),
            messages.BlockGrant(0, 1, (), (("tcp", b""),)),
            messages.BlockGrant(0, 1, (-1,), (("tcp", b""),)),
            messages.BlockGrant(0, 1, (1 << 31,), (("tcp", b""),)),
            messages.BlockGrant(0, 1, tuple(range(messages.MAX_BLOCKS_PER_GRANT + 1)), (("tcp", b""),)),
            messages.BlockGrant(0, 1, (1,), ()),
            messages.BlockGrant(0, 1, (1,), (("", b""),)),
            messages.BlockGrant(0, 1, (1,), (("tcp", b"x" * 1025),)),
            messages.BlockGrant(0, 1, (1,), tuple((str(n), b"") for n in range(17))),
            messages.BlockGrant(0, 1, (1,), typing.cast(Any, (("tcp",),))),
            messages.BlockGrant(0, 1, (1,), typing.cast(Any, (("tcp", b"", b""),))),
        )
    ),
]


def test_values_at_the_bounds_are_taken() -> None:
    tiny = messages.BlockGrant(0, 1, (0,), (("x", b""),))
    fields = tuple(messages.FieldSpec(f"x{n}", "", (1, 1 << 40), False) for n in range(64))
    offers = tuple(messages.TransportOffer(f"x{n}", b"d" * (1 << 16)) for n in range(16))
    bounds: dict[str, Any] = {"min_version": 0, "max_version": 1 << 16, "block_tokens": 1, "fields": fields}
    hello = Hello(incarnation=US, **bounds, transports=offers)
    said = (messages.Reserve(room=0, rank=4095, ranks=1, grant=tiny), report(tokens=1, total_tokens=1, transport="x"))
    for packet in (hello, Frame(US, THEM, True, 1, 0, said)):
        assert decode(encode(packet)) == packet


GRANT_AS_SENT = {"part": 0, "tokens": 1, "blocks": [1, 2], "tokens_by_transport": [["tcp", b"t"], ["shm", b"u"]]}
INTRODUCTION_AS_SENT = {"kind": "Hello", "incarnation": US, "min_version": 1, "max_version": 1}


def room_message(kind: str, **fields: Any) -> bytes:
    """A frame with one message as a peer might encode it, which is not bound to our types."""
    frame = {"kind": "Frame", "source": US, "target": THEM, "outgoing": True, "first_seq": 1}
    return msgspec.msgpack.encode({**frame, "messages": [{"kind": kind, "room": 1, "rank": 0, **fields}]})


@pytest.mark.parametrize(
    ("packet", "what"),
    [
        (room_message("Reserve", ranks=1, grant={**GRANT_AS_SENT, "blocks": [1, 2, 1]}), "block"),
        (room_message("Resume", sent_tokens=1, grant={**GRANT_AS_SENT, "blocks": [7, 7]}), "block"),
        (room_message("Reserve", ranks=1, grant={**GRANT_AS_SENT, "tokens_by_transport": [["a", b""]] * 2}), "trans"),
        (msgspec.msgpack.encode({**INTRODUCTION_AS_SENT, "transports": [{"name": "a", "descriptor": b""}] * 2}), "tra"),
        (msgspec.msgpack.encode({**INTRODUCTION_AS_SENT, "fields": [["x", "int8", [], False]] * 2}), "field"),
    ],
)
def test_what_comes_twice_is_malformed(packet: bytes, what: str) -> None:
    with pytest.raises(MalformedMessage, match=f"a {what}.* comes twice"):
        decode(packet)


def test_a_failure_of_a_newer_peer_keeps_its_meaning() -> None:
    """The kind of cause is not known here; that it is one, where, whether to try again and the sentence are."""
    failure = {"code": "BatteryEmpty", "rank": 3, "state": 2, "retryable": True, "detail": "rank 3 ran out of power"}
    (abort,) = decode(room_message("Abort", failure=failure)).messages  # type: ignore[union-attr]
    assert abort.failure == Failure(FailureCode.Unknown, 3, KVPoll.WaitingForInput, True, "rank 3 ran out of power")
    assert decode(encode(Frame(US, THEM, True, 1, 0, (abort,)))).messages == (abort,)  # type: ignore[union-attr]
    for code in (7, None, b"Aborted"):
        refused(room_message("Abort", failure={**failure, "code": code}))


@pytest.mark.parametrize("message", OUT_OF_BOUNDS, ids=kind_of)
def test_values_out_of_bounds_in_messages(message: Message) -> None:
    refused(encode(Frame(US, THEM, True, 1, 0, (message,))))


@pytest.mark.parametrize(
    "packet",
    [
        messages.Stranger(b"", THEM),
        messages.Stranger(US, THEM + b"x"),
        Frame(US[:15], THEM, True),
        Frame(US, THEM, True, -1),
        Frame(US, THEM, True, 0, messages.MAX_ROOM + 1),
        Frame(US, THEM, True, 1, 0, (messages.Bye(),) * (messages.MAX_MESSAGES_PER_FRAME + 1)),
        Frame(US, THEM, True, 1, 0, (), BEATS[:1] * (messages.MAX_BEATS_PER_FRAME + 1)),
        Frame(US, THEM, True, 1, 0, (), (messages.Beat(True, 42, messages.MAX_RANKS, 7, 9, "queued", 123, True),)),
        Frame(US, THEM, True, 1, 0, (), (messages.Beat(True, 42, 1, 7, 9, "x" * 33, 123, True),)),
        Frame(US, THEM, True, 1, 0, (), (messages.Beat(True, 42, 1, 7, 9, "queued", -1, True),)),
        Hello(**{**INTRODUCTION, "incarnation": b"short"}),
        Hello(**{**INTRODUCTION, "min_version": -1}),
        Hello(**{**INTRODUCTION, "max_version": (1 << 16) + 1}),
        Hello(**{**INTRODUCTION, "block_tokens": 0}),
        Hello(**{**INTRODUCTION, "block_tokens": 1 << 31}),
        Hello(**{**INTRODUCTION, "fields": tuple(messages.FieldSpec(f"x{n}", "int8", (), False) for n in range(65))}),
        Hello(**{**INTRODUCTION, "fields": (messages.FieldSpec("", "int8", (), False),)}),
        Hello(**{**INTRODUCTION, "fields": (messages.FieldSpec("x", "i" * 33, (), False),)}),
        Hello(**{**INTRODUCTION, "fields": (messages.FieldSpec("x", "int8", (1,) * 17, False),)}),
        Hello(**{**INTRODUCTION, "fields": (messages.FieldSpec("x", "int8", (0,), False),)}),
        Hello(**{**INTRODUCTION, "fields": (messages.FieldSpec("x", "int8", ((1 << 40) + 1,), False),)}),
        Hello(**{**INTRODUCTION, "transports": tuple(messages.TransportOffer(f"x{n}", b"") for n in range(17))}),
        Hello(**{**INTRODUCTION, "transports": (messages.TransportOffer("x", b"d" * ((1 << 16) + 1)),)}),
        Hello(**{**INTRODUCTION, "transports": (messages.TransportOffer("x", b"", (b"",) * 65),)}),
        messages.Welcome(**INTRODUCTION, answers=b""),
    ],
    ids=kind_of,
)
def test_values_out_of_bounds_in_packets(packet: Packet) -> None:
    refused(encode(packet), "not a packet")


@pytest.mark.parametrize(
    ("name", "value"),
    [("code", 1), ("rank", "1"), ("state", 5), ("state", "Failed"), ("retryable", 1), ("detail", b"x")],
)
def test_a_failure_that_makes_no_sense(name: str, value: object) -> None:
    packet = plain(ABORTING)
    packet["messages"][0]["failure"][name] = value
    refused(pack(packet))


def test_a_failure_of_a_talkative_peer_is_cut() -> None:
    packet = plain(ABORTING)
    packet["messages"][0]["failure"]["detail"] = "x" * 1_000_000
    (message,) = typing.cast("Frame", decode(pack(packet))).messages
    assert isinstance(message, Abort)
    assert message.failure.detail == "x" * 1000


def test_a_packet_too_long_is_not_even_read() -> None:
    longest = encode(messages.Stranger(US, THEM)) + b"\xc1" * messages.MAX_PACKET_NBYTES
    refused(longest, f"at most {messages.MAX_PACKET_NBYTES}")
    refused(longest[: messages.MAX_PACKET_NBYTES], "not a packet")


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
