"""The ordered stream: numbering, acknowledgements, batches, bounds."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from kvpoll_fsm.channel import Channel
from kvpoll_fsm.errors import ChannelOverflow, Failure, FailureCode
from kvpoll_fsm.messages import (
    MAX_BEATS_PER_FRAME,
    MAX_BLOCKS_PER_GRANT,
    MAX_MESSAGES_PER_FRAME,
    MAX_PACKET_NBYTES,
    MAX_RANKS,
    MAX_ROOM,
    Abort,
    Beat,
    BlockGrant,
    Frame,
    Message,
    Opened,
    PartAck,
    PartOutcome,
    PartReport,
    Quiesced,
    Reserve,
    Resume,
    Withdraw,
    Withdrawn,
    decode,
    encode,
)
from kvpoll_fsm.poll import KVPoll

US, THEM = b"u" * 16, b"t" * 16


def say(number: int) -> Message:
    return Quiesced(room=number, rank=0)


def said(*numbers: int) -> list[Message]:
    return [say(number) for number in numbers]


@pytest.fixture
def us() -> Channel:
    return Channel(US, THEM, outgoing=True)


@pytest.fixture
def them() -> Channel:
    return Channel(THEM, US, outgoing=False)


def push(channel: Channel, *numbers: int) -> None:
    for number in numbers:
        channel.push(say(number))


def test_messages_are_numbered_from_one_and_sent_once(us: Channel) -> None:
    push(us, 1, 2)
    assert us.flush() == [Frame(US, THEM, True, 1, 0, tuple(said(1, 2)))]
    assert us.flush() == []
    push(us, 3)
    assert us.flush() == [Frame(US, THEM, True, 3, 0, tuple(said(3)))]


def test_nothing_is_sent_before_the_peer_is_known(us: Channel) -> None:
    us.target = None
    push(us, 1, 2)
    assert us.flush(ack_now=True) == us.resend() == []
    us = us.clone()
    us.target = THEM
    assert us.flush() == [Frame(US, THEM, True, 1, 0, tuple(said(1, 2)))]


def test_a_heartbeat_has_to_be_to_somebody(us: Channel) -> None:
    us.target = None
    with pytest.raises(AssertionError, match="before the peer is known"):
        us.heartbeat()


def test_delivered_in_order_each_once(us: Channel, them: Channel) -> None:
    push(us, 1, 2, 3)
    (frame,) = us.flush()
    assert them.accept(frame) == said(1, 2, 3)
    assert them.accept(frame) == []
    assert them.received == 3


def test_a_gap_waits_for_the_resend(us: Channel, them: Channel) -> None:
    push(us, 1)
    us.flush()
    push(us, 2)
    (second,) = us.flush()
    assert them.accept(second) == []
    assert them.received == 0
    (again,) = us.resend()
    assert them.accept(again) == said(1, 2)


def test_a_frame_that_overlaps_delivers_what_is_new(us: Channel, them: Channel) -> None:
    push(us, 1, 2)
    (first,) = us.flush()
    assert them.accept(first) == said(1, 2)
    push(us, 3)
    (overlapping,) = us.resend()
    assert overlapping.first_seq == 1
    assert them.accept(overlapping) == said(3)


def test_acknowledged_messages_are_not_resent(us: Channel, them: Channel) -> None:
    push(us, 1, 2)
    (frame,) = us.flush()
    them.accept(frame)
    assert us.accept(them.heartbeat()) == []
    assert (us.acked, us.unacked) == (2, [])
    assert us.resend() == []


def test_an_old_acknowledgement_takes_nothing_back(us: Channel, them: Channel) -> None:
    push(us, 1)
    early = them.heartbeat()
    them.accept(us.flush()[0])
    us.accept(them.heartbeat())
    us.accept(early)
    assert (us.acked, us.unacked) == (1, [])


@pytest.mark.parametrize("ack", [3, 4, 5, MAX_ROOM])
def test_acknowledgement_of_what_was_never_sent_is_ignored(us: Channel, ack: int) -> None:
    push(us, 1, 2)
    us.flush()
    push(us, 3, 4)
    us.accept(Frame(THEM, US, False, 0, ack))
    assert us.acked == 0
    assert us.flush() == [Frame(US, THEM, True, 3, 0, tuple(said(3, 4)))]


def test_what_arrived_is_owed_an_acknowledgement_until_any_frame_goes(us: Channel, them: Channel) -> None:
    push(us, 1)
    (frame,) = us.flush()
    them.accept(frame)
    assert them.owes_ack
    assert them.flush() == [], "an acknowledgement alone can wait"
    assert them.flush(ack_now=True) == [Frame(THEM, US, False, 0, 1)]
    assert them.flush(ack_now=True) == []
    them.accept(frame)
    assert them.owes_ack, "a duplicate means that our acknowledgement was lost"
    push(them, 9)
    assert them.flush() == [Frame(THEM, US, False, 1, 1, tuple(said(9)))]
    assert not them.owes_ack


def test_heartbeats_and_acknowledgements_ask_for_no_answer(us: Channel, them: Channel) -> None:
    them.accept(us.heartbeat())
    assert not them.owes_ack
    assert them.flush(ack_now=True) == []


def test_beats_travel_with_a_heartbeat(us: Channel) -> None:
    beats = (Beat(True, 42, 0, 1, 1, "queued", 0, True),)
    assert us.heartbeat(beats) == Frame(US, THEM, True, 0, 0, (), beats)


def test_overflow_takes_nothing_and_ends_with_an_acknowledgement(us: Channel) -> None:
    us.limit = 2
    push(us, 1, 2)
    with pytest.raises(ChannelOverflow) as caught:
        push(us, 3)
    assert caught.value.limit == 2
    assert us.unacked == said(1, 2)
    us.flush()
    with pytest.raises(ChannelOverflow):
        push(us, 3)
    us.accept(Frame(THEM, US, False, 0, 1))
    push(us, 3)
    assert us.unacked == said(2, 3)


# ---------------------------------------------------------------------------------------------- batches

IDS: dict[str, Any] = {
    "room": MAX_ROOM,
    "rank": MAX_RANKS - 1,
    "sender_generation": MAX_ROOM,
    "receiver_generation": MAX_ROOM,
}
WIDE = chr(0x1F600)
NAME = WIDE * 128
FAILURE = Failure(FailureCode.TransportUnavailable, MAX_RANKS - 1, KVPoll.Transferring, False, WIDE * 1000)
BLOCKS = tuple(range((1 << 31) - MAX_BLOCKS_PER_GRANT, 1 << 31))
TOKENS = tuple((f"{number:02}" + WIDE * 126, b"x" * 1024) for number in range(16))
PART = (1 << 31) - 1

LARGEST: dict[str, Message] = {
    "few blocks, many transports": Reserve(
        **IDS, ranks=MAX_RANKS, dummy=True, grant=BlockGrant(PART, MAX_ROOM, BLOCKS[:1], TOKENS)
    ),
    "many blocks": Resume(**IDS, sent_tokens=MAX_ROOM, grant=BlockGrant(PART, MAX_ROOM, BLOCKS, TOKENS)),
    "no grant": Reserve(**IDS, ranks=MAX_RANKS),
    "opened": Opened(**IDS, required=MAX_RANKS, total_tokens=MAX_ROOM),
    "report": PartReport(
        **IDS,
        part=PART,
        offset=MAX_ROOM,
        tokens=MAX_ROOM,
        total_tokens=MAX_ROOM,
        is_last=True,
        transport=NAME,
        checksum=b"c" * 16,
    ),
    "ack": PartAck(**IDS, part=PART, failure=FAILURE),
    "outcome": PartOutcome(**IDS, part=PART, is_last=True, state=KVPoll.Failed, failure=FAILURE, quiescent=False),
    "abort": Abort(**IDS, failure=FAILURE, quiescent=True),
    "withdraw": Withdraw(**IDS, part=PART),
    "withdrawn": Withdrawn(**IDS, part=PART, ok=True),
    "quiesced": Quiesced(**IDS),
}


@pytest.mark.parametrize("name", LARGEST)
def test_every_frame_fits_a_packet_even_of_the_largest_messages(us: Channel, name: str) -> None:
    count = 24 if name == "many blocks" else 2 * MAX_MESSAGES_PER_FRAME + 1
    for _ in range(count):
        us.push(LARGEST[name])
    frames = us.flush()
    assert [frame.first_seq for frame in frames] == [
        1 + sum(len(frame.messages) for frame in frames[:at]) for at in range(len(frames))
    ]
    assert sum(len(frame.messages) for frame in frames) == count
    for frame in frames:
        packet = encode(frame)
        assert len(packet) <= MAX_PACKET_NBYTES
        assert decode(packet) == frame


def test_a_full_heartbeat_fits_a_packet(us: Channel) -> None:
    beat = Beat(True, MAX_ROOM, MAX_RANKS - 1, MAX_ROOM, MAX_ROOM, WIDE * 32, MAX_ROOM, True)
    frame = us.heartbeat((beat,) * MAX_BEATS_PER_FRAME)
    assert decode(encode(frame)) == frame


def test_many_messages_go_in_few_frames(us: Channel, them: Channel) -> None:
    numbers = range(1, 1001)
    push(us, *numbers)
    frames = us.flush()
    assert len(frames) == -(-1000 // MAX_MESSAGES_PER_FRAME)
    assert list(itertools.chain.from_iterable(map(them.accept, frames))) == said(*numbers)


# -------------------------------------------------------------------------------------- clone() and key()


def busy() -> Channel:
    """A channel with something in every field."""
    channel = Channel(US, THEM, outgoing=True, limit=10)
    push(channel, 1, 2)
    channel.flush()
    channel.accept(Frame(THEM, US, False, 1, 1, tuple(said(7))))
    channel.push(Resume(room=3, rank=0, sent_tokens=1, grant=BlockGrant(1, 128, (0,), (("tcp", b"token"),))))
    return channel


def test_a_clone_is_equal_and_shares_nothing() -> None:
    original, twin = busy(), busy().clone()
    assert {name: getattr(twin, name) for name in Channel.__slots__} == {
        name: getattr(original, name) for name in Channel.__slots__
    }
    key = twin.key()
    assert hash(key) == hash(original.key())
    push(twin, 4)
    twin.flush()
    twin.accept(Frame(THEM, US, False, 2, 3, tuple(said(8))))
    assert original.key() == key != twin.key()
    copy = original.clone()
    push(original, 4)
    assert copy.key() == key


def test_key_tells_every_change_from_the_others() -> None:
    channel = busy()
    keys = [channel.key()]
    push(channel, 5)
    keys.append(channel.key())
    channel.flush()
    keys.append(channel.key())
    channel.accept(Frame(THEM, US, False, 0, 3))
    keys.append(channel.key())
    channel.accept(Frame(THEM, US, False, 2, 3, tuple(said(8))))
    keys.append(channel.key())
    channel.heartbeat()
    keys.append(channel.key())
    assert len(set(keys)) == len(keys)
