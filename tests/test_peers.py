"""The connections of an endpoint: called, answered, found, spoken through, forgotten."""

from __future__ import annotations

from typing import Any

import pytest

from kvpoll_fsm.channel import Channel
from kvpoll_fsm.connection import Connection, Origin, introduction, name_of
from kvpoll_fsm.effects import Outbox, Transmit
from kvpoll_fsm.errors import LimitReached
from kvpoll_fsm.layout import Field, Layout
from kvpoll_fsm.limits import Limits
from kvpoll_fsm.messages import Bye, Frame, Hello, Quiesced, Welcome
from kvpoll_fsm.peers import Peers

OURS, PEER = b"o" * 16, b"p" * 16
LAYOUT = Layout(4, [Field("x", "int8")])


@pytest.fixture
def peers() -> Peers:
    return Peers(OURS, LAYOUT, (), Outbox())


def transmitted(peers: Peers) -> list[tuple[int, Any]]:
    """The packets since the last look, by connection."""
    effects, peers._out.effects = peers._out.effects, []
    return [(effect.conn, effect.packet) for effect in effects if isinstance(effect, Transmit)]


def hello(incarnation: bytes = PEER) -> Hello:
    return Hello(**introduction(incarnation, LAYOUT, ()))


def test_calling_says_hello_under_a_name_of_its_own(peers: Peers) -> None:
    names = set()
    for number in (1, 2):
        connection = peers.call("there")
        ((conn, packet),) = transmitted(peers)
        assert (conn, connection.number) == (number, number)
        assert isinstance(packet, Hello)
        assert packet.incarnation == connection.channel.source == name_of(OURS, number)
        names.add(packet.incarnation)
    assert len(names) == 2
    assert peers.connected_to("there") is peers.connections[1]
    assert peers.connected_to("elsewhere") is None


def test_answering_the_same_caller_twice_is_one_connection(peers: Peers) -> None:
    first, second = peers.answer(hello()), peers.answer(hello())
    assert first is second
    assert [type(packet) for _, packet in transmitted(peers)] == [Welcome, Welcome]
    assert peers.answer(hello(b"q" * 16)) is not first
    assert first.channel.source == OURS


def test_a_connection_is_found_by_both_names(peers: Peers) -> None:
    called, answered = peers.call("there"), peers.answer(hello())
    called.channel.target = PEER
    assert peers.find(called.channel.source, PEER, outgoing=True) is called
    assert peers.find(OURS, PEER, outgoing=False) is answered
    assert peers.find(OURS, PEER, outgoing=True) is None
    assert peers.find(OURS, b"q" * 16, outgoing=False) is None


def test_what_is_pushed_is_flushed_once(peers: Peers) -> None:
    conn = peers.answer(hello()).number
    transmitted(peers)
    peers.push(conn, Bye())
    peers.push(99, Bye())
    assert peers.owes_ack
    assert peers.unacked == 1
    peers.flush(ack_now=False)
    ((_, frame),) = transmitted(peers)
    assert frame.messages == (Bye(),)
    peers.flush(ack_now=True)
    assert transmitted(peers) == []
    assert not peers.owes_ack


def test_an_acknowledgement_waits_for_company(peers: Peers) -> None:
    one = peers.answer(hello())
    transmitted(peers)
    one.channel.accept(Frame(PEER, OURS, outgoing=True, first_seq=1, messages=(Bye(),)))
    peers.must_flush(one.number)
    peers.flush(ack_now=False)
    assert transmitted(peers) == []
    assert peers.owes_ack
    peers.flush(ack_now=True)
    ((_, frame),) = transmitted(peers)
    assert (frame.ack, frame.messages) == (1, ())


def test_hello_is_repeated_and_then_what_is_not_acknowledged(peers: Peers) -> None:
    one = peers.call("there")
    peers.push(one.number, Bye())
    peers.flush(ack_now=False)
    transmitted(peers)
    peers.resend_tick()
    assert [type(packet) for _, packet in transmitted(peers)] == [Hello]
    one.channel.target = PEER
    for _ in range(3):
        peers.resend_tick()
    ((_, frame),) = transmitted(peers)
    assert frame.messages == (Bye(),)


def test_the_last_words_are_sent_before_a_connection_is_forgotten(peers: Peers) -> None:
    one = peers.answer(hello())
    transmitted(peers)
    peers.push(one.number, Bye())
    peers.remove(one.number)
    ((_, frame),) = transmitted(peers)
    assert frame.messages == (Bye(),)
    assert not peers.connections
    peers.flush(ack_now=True)
    peers.resend_tick()
    assert transmitted(peers) == []
    assert peers.unacked == 0


def test_a_channel_that_is_full_is_named_until_it_is_removed(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    one = peers.answer(hello())
    one.channel = Channel(OURS, PEER, outgoing=False, limit=1)
    peers.push(one.number, Bye())
    peers.push(one.number, Quiesced(room=1, rank=0))
    assert list(peers.overflowed) == [one.number]
    peers.remove(one.number)
    assert not peers.overflowed


def test_a_copy_shares_nothing_and_speaks_elsewhere(peers: Peers) -> None:
    one = peers.answer(hello())
    peers.push(one.number, Bye())
    other = Outbox()
    copy, before = peers.clone(other), peers.key()
    transmitted(peers)
    assert copy.key() == before
    assert hash(copy.key()) == hash(before)
    peers.flush(ack_now=False)
    peers.call("there")
    assert copy.key() == before != peers.key()
    copy.flush(ack_now=False)
    copy.call("there")
    assert copy.key() == peers.key()
    assert [effect.conn for effect in other.effects if isinstance(effect, Transmit)] == [1, 2]


# Limits and origins


def known(peers: Peers, incarnation: bytes, origin: Origin, *, spoken: bool = False) -> Connection:
    connection = peers.answer(hello(incarnation), origin)
    connection.channel.received = int(spoken)
    return connection


def limited(**limits: int) -> Peers:
    return Peers(OURS, LAYOUT, (), Outbox(), Limits(**limits))


def test_the_oldest_that_said_only_hello_makes_place() -> None:
    peers = limited(callers=3)
    peers.call("elsewhere")  # one that we opened does not count
    first = known(peers, b"1" * 16, Origin(key="a"), spoken=True)
    second = known(peers, b"2" * 16, Origin(key="b"))
    assert peers.place_for(Origin(key="c")) is None
    third = known(peers, b"3" * 16, Origin(key="c"))
    assert peers.place_for(Origin(key="d")) is second
    second.channel.received = third.channel.received = 1
    with pytest.raises(LimitReached, match="callers=3"):
        peers.place_for(Origin(key="d"))
    peers.remove(first.number)
    assert peers.place_for(Origin(key="d")) is None


@pytest.mark.parametrize("crowd", [Origin(key="a"), Origin(host="192.0.2.7")])
def test_a_crowd_is_of_one_key_or_else_of_one_address(crowd: Origin) -> None:
    peers = limited(callers_per_peer=2)
    known(peers, b"1" * 16, crowd, spoken=True)
    stranger = known(peers, b"2" * 16, crowd)
    assert peers.place_for(Origin(key="other", host="192.0.2.7")) is None
    assert peers.place_for(crowd) is stranger
    stranger.channel.received = 1
    with pytest.raises(LimitReached, match="callers_per_peer=2"):
        peers.place_for(crowd)


def test_calls_are_limited() -> None:
    peers = limited(callees=2)
    known(peers, b"1" * 16, Origin())
    for place in ("a", "b"):
        peers.call(place)
    with pytest.raises(LimitReached, match="callees=2"):
        peers.call("c")


def test_who_may_speak_over_a_connection(peers: Peers) -> None:
    called, other = peers.call("there"), peers.call("elsewhere")
    came = known(peers, PEER, Origin(key="a", host="192.0.2.7"))
    assert came.account == "a"
    assert called.account == f"#{called.number}"
    assert called.fits(Origin(called.number))
    assert not called.fits(Origin(other.number))
    assert not called.fits(Origin(key="a"))
    assert came.fits(Origin(key="a", host="192.0.2.8"))
    assert not came.fits(Origin(key="b", host="192.0.2.7"))
    assert not came.fits(Origin(called.number))
    assert came.clone().fits(Origin(key="a"))
    assert peers.clone(Outbox()).caller(PEER) is not None
    peers.remove(came.number)
    assert peers.caller(PEER) is None
