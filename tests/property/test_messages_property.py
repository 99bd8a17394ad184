"""The decoder under fire: whatever comes in, a packet or one of two typed errors comes out."""

from __future__ import annotations

import tracemalloc
import typing
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpoll_fsm import messages
from kvpoll_fsm.errors import Failure, FailureCode, MalformedMessage
from kvpoll_fsm.messages import MAX_PACKET_NBYTES, MAX_RANKS, MAX_ROOM, Frame, Message, Packet, decode, encode
from kvpoll_fsm.poll import KVPoll
from tests.fuzz.choices import Choices
from tests.fuzz.decoders import packet as decodes_or_is_refused
from tests.fuzz.mutate import change_one

# Every kind of packet, with values anywhere within their bounds.

counts = st.integers(0, MAX_ROOM)
positives = st.integers(1, MAX_ROOM)
ranks = st.integers(0, MAX_RANKS - 1)
sizes = st.integers(1, MAX_RANKS)
parts = st.integers(0, (1 << 31) - 1)
names = st.text(min_size=1, max_size=10)
incarnations = st.binary(min_size=16, max_size=16)


def tuples_of(values: st.SearchStrategy[Any], least: int = 0) -> st.SearchStrategy[Any]:
    return st.lists(values, min_size=least, max_size=3).map(tuple)


def different(values: st.SearchStrategy[Any], least: int = 0, by: str = "") -> st.SearchStrategy[Any]:
    """Tuples in which no name comes twice."""
    name = (lambda value: getattr(value, by)) if by else (lambda value: value[0] if isinstance(value, tuple) else value)
    return st.lists(values, min_size=least, max_size=3, unique_by=name).map(tuple)


failures = st.builds(
    Failure,
    st.sampled_from(FailureCode),
    st.none() | ranks,
    st.sampled_from(KVPoll),
    st.booleans(),
    st.text(max_size=20),
)
grants = st.builds(
    messages.BlockGrant,
    parts,
    positives,
    different(parts, 1),
    different(st.tuples(names, st.binary(max_size=20)), 1),
)
fields = st.builds(messages.FieldSpec, names, st.text(max_size=32), tuples_of(st.integers(1, 1 << 40)), st.booleans())
offers = st.builds(messages.TransportOffer, names, st.binary(max_size=20), tuples_of(st.binary(max_size=20)))
beats = st.builds(
    messages.Beat,
    st.booleans(),
    counts,
    ranks,
    counts,
    counts,
    st.text(max_size=32),
    counts,
    st.booleans(),
    st.booleans(),
    counts,
)
own: dict[type[msgspec.Struct], dict[str, st.SearchStrategy[Any]]] = {
    messages.Reserve: {"ranks": sizes, "dummy": st.booleans(), "grant": st.none() | grants},
    messages.Resume: {"sent_tokens": counts, "grant": grants},
    messages.Opened: {"required": sizes, "total_tokens": st.none() | positives},
    messages.PartReport: {
        "part": parts,
        "offset": counts,
        "tokens": positives,
        "total_tokens": positives,
        "is_last": st.booleans(),
        "transport": names,
        "checksum": st.none() | incarnations,
        "failure": st.none() | failures,
    },
    messages.PartAck: {"part": parts, "failure": st.none() | failures},
    messages.PartOutcome: {
        "part": parts,
        "is_last": st.booleans(),
        "state": st.sampled_from(KVPoll),
        "failure": st.none() | failures,
        "quiescent": st.booleans(),
    },
    messages.FencePart: {"part": parts, "transport": names, "attempt": counts},
    messages.PartFenced: {
        "part": parts,
        "transport": names,
        "attempt": counts,
        "token": st.none() | st.binary(max_size=20),
    },
    messages.Withdraw: {"part": parts},
    messages.Withdrawn: {"part": parts, "ok": st.booleans()},
    messages.Abort: {"failure": failures, "quiescent": st.booleans()},
    messages.Quiesced: {},
}
ids = {"room": counts, "rank": ranks, "sender_generation": counts, "receiver_generation": counts}
said = st.one_of(st.just(messages.Bye()), *(st.builds(kind, **ids, **values) for kind, values in own.items()))
introduction = {
    "incarnation": incarnations,
    "min_version": st.integers(0, 1),
    "max_version": st.integers(1, 1 << 16),
    "fields": different(fields, by="name"),
    "block_tokens": st.integers(1, (1 << 31) - 1),
    "transports": different(offers, by="name"),
}
frames = st.builds(Frame, incarnations, incarnations, st.booleans(), counts, counts, tuples_of(said), tuples_of(beats))
packets: st.SearchStrategy[Packet] = st.one_of(
    frames,
    st.builds(messages.Hello, **introduction),
    st.builds(messages.Welcome, **introduction, answers=incarnations),
    st.builds(messages.Stranger, incarnations, incarnations),
)


def test_every_kind_is_generated() -> None:
    assert {*own, messages.Bye} == set(typing.get_args(Message))
    for kind, values in own.items():
        assert {*ids, *values} == set(kind.__struct_fields__)
    assert set(introduction) == set(messages.Hello.__struct_fields__)
    assert len(messages.Beat.__struct_fields__) == 10


@given(packets)
def test_what_is_within_bounds_survives(packet: Packet) -> None:
    again = decode(encode(packet))
    assert again == packet
    assert hash(again) == hash(packet)


# Everything else.


def plain(packet: Packet) -> dict[str, Any]:
    """A packet as the map that travels."""
    return typing.cast("dict[str, Any]", msgspec.msgpack.decode(encode(packet)))


def maps_in(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from maps_in(part)


@given(st.binary(max_size=300))
def test_arbitrary_bytes(data: bytes) -> None:
    decodes_or_is_refused(data)


@given(
    packets.map(encode),
    st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=4),
    st.sampled_from(["flip", "insert", "delete"]),
)
def test_pain_24_mutated_packets(data: bytes, edits: list[tuple[int, int]], how: str) -> None:
    mutated = bytearray(data)
    for at, value in edits:
        where = at % len(mutated)
        mutated[where : where + (how != "insert")] = b"" if how == "delete" else bytes([value])
    decodes_or_is_refused(bytes(mutated))


@given(packets.map(encode), packets.map(encode), st.data())
def test_packets_cut_and_joined(first: bytes, second: bytes, data: st.DataObject) -> None:
    decodes_or_is_refused(first[: data.draw(st.integers(0, len(first)))] + second)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(),
    st.text(max_size=40),
    st.binary(max_size=20),
    st.builds(msgspec.msgpack.Ext, st.integers(-128, 127), st.binary(max_size=12)),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(packets.map(plain), st.data())
def test_packets_with_any_value_in_any_place(packet: dict[str, Any], data: st.DataObject) -> None:
    place = data.draw(st.sampled_from(list(maps_in(packet))))
    place[data.draw(st.sampled_from(sorted(place) or ["x"]))] = data.draw(values)
    decodes_or_is_refused(msgspec.msgpack.encode(packet))


@given(packets.map(plain), st.lists(st.binary(min_size=8, max_size=24), min_size=1, max_size=3))
def test_packets_with_a_neighbouring_value_in_some_places(packet: dict[str, Any], decisions: list[bytes]) -> None:
    """A number by one off, a text cut short, a list with something twice: what is nearly right."""
    changed = packet
    for each in decisions:
        changed = change_one(changed, Choices(each))
    try:
        data = msgspec.msgpack.encode(changed)
    except OverflowError:  # no number of MessagePack's
        return
    decodes_or_is_refused(data)


@given(st.sampled_from([*typing.get_args(Packet), *typing.get_args(Message)]), st.data())
def test_maps_of_a_known_kind_with_anything_in_them(kind: type[msgspec.Struct], data: st.DataObject) -> None:
    body = data.draw(st.fixed_dictionaries({}, optional=dict.fromkeys(kind.__struct_fields__, values)))
    value = {"kind": kind.__name__, **body}
    frame = plain(Frame(b"u" * 16, b"t" * 16, True))
    decodes_or_is_refused(msgspec.msgpack.encode(value))
    decodes_or_is_refused(msgspec.msgpack.encode({**frame, "messages": [value]}))


# Little input, much memory: what a length claims is not believed.

BYE = msgspec.msgpack.encode(messages.Bye())
CLAIMS = {
    "list": b"\x82\xa4kind\xa5Frame\xa8messages\xdd\xff\xff\xff\xff",
    "map": b"\x82\xa4kind\xa5Frame\xa8messages\xdf\xff\xff\xff\xff",
    "bytes": b"\x82\xa4kind\xa5Hello\xabincarnation\xc6\xff\xff\xff\xff",
    "text": b"\x82\xa4kind\xdb\xff\xff\xff\xff",
    "ignored list": b"\x82\xa4kind\xa3Bye\xa3new\xdd\xff\xff\xff\xff",
    "nested": b"\x81\xa3new" + b"\x91" * (MAX_PACKET_NBYTES - 8),
    "many": b"\x82\xa4kind\xa5Frame\xa8messages\xdd" + (300_000).to_bytes(4, "big") + BYE * 300_000,
    "too long": bytes(MAX_PACKET_NBYTES + 1),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_no_packet_takes_much_more_memory_than_its_bytes(name: str) -> None:
    data = CLAIMS[name]
    tracemalloc.start()
    try:
        with pytest.raises(MalformedMessage):
            decode(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 16
