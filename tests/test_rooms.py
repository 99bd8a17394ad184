"""Lives of rooms: open, cleared, found by what a peer says of them."""

from __future__ import annotations

import pytest

from kvpoll_fsm.deadlines import Deadlines
from kvpoll_fsm.errors import DuplicateRoom
from kvpoll_fsm.inputs import MessageReceived, Start
from kvpoll_fsm.messages import Abort, PartAck, Reserve, Withdraw
from kvpoll_fsm.receiver_session import ReceiverOptions, ReceiverSession
from kvpoll_fsm.rooms import Rooms
from kvpoll_fsm.selection import Policy
from kvpoll_fsm.sender_session import SenderOptions, SenderSession
from kvpoll_fsm.session import RoomKey

OPTIONS = SenderOptions(2, Policy("require", ("tcp",)), ("tcp",), 4)


def open_sender(rooms: Rooms, room: int = 7, conn: int = 5) -> RoomKey:
    """A sender's life that binds rank 0, generation 1, of connection `conn`."""
    key = rooms.new_key("sender", room, 0)
    session = SenderSession(key, Deadlines(), OPTIONS)
    session.feed(Start())
    session.feed(MessageReceived(conn, Reserve(room=room, rank=0, ranks=2, receiver_generation=1)))
    rooms.add(key, session)
    return key


def open_receiver(rooms: Rooms, rank: int = 0) -> RoomKey:
    key = rooms.new_key("receiver", 7, rank)
    rooms.add(key, ReceiverSession(key, Deadlines(), ReceiverOptions(5, 2, 1, 4, "drain")))
    return key


def test_a_room_is_open_once() -> None:
    rooms = Rooms()
    key = open_sender(rooms)
    with pytest.raises(DuplicateRoom):
        rooms.new_key("sender", 7, 0)
    assert rooms.new_key("receiver", 7, 0).generation == 2
    assert rooms.is_open(key)
    rooms.clear(key)
    assert not rooms.is_open(key)
    again = open_sender(rooms)
    assert again.generation > key.generation
    rooms.clear(key)  # of the life before: nothing happens
    assert rooms.is_open(again)


def test_the_open_sender_of_a_room() -> None:
    rooms = Rooms()
    assert rooms.open_sender(7) is None
    key = open_sender(rooms)
    assert rooms.open_sender(7) is rooms.sessions[key]
    rooms.clear(key)
    assert rooms.open_sender(7) is None


def test_a_receiver_is_found_by_its_own_generation() -> None:
    rooms = Rooms()
    key = open_receiver(rooms, rank=1)
    assert rooms.to_receiver(PartAck(room=7, rank=1, part=0, receiver_generation=1)) == key
    assert rooms.to_receiver(PartAck(room=7, rank=1, part=0, receiver_generation=2)) is None
    assert rooms.to_receiver(PartAck(room=7, rank=0, part=0, receiver_generation=1)) is None


def test_a_sender_is_found_by_its_generation_or_by_whom_it_binds() -> None:
    rooms = Rooms()
    key = open_sender(rooms)
    assert rooms.to_sender(99, PartAck(room=7, rank=0, part=0, sender_generation=1)) == key
    assert rooms.to_sender(5, PartAck(room=7, rank=0, part=0, sender_generation=2)) is None
    unopened = Withdraw(room=7, rank=0, part=0, receiver_generation=1)
    assert rooms.to_sender(5, unopened) == key
    assert rooms.to_sender(6, unopened) is None
    assert rooms.to_sender(5, Withdraw(room=7, rank=0, part=0, receiver_generation=2)) is None
    assert rooms.to_sender(5, Withdraw(room=8, rank=0, part=0, receiver_generation=1)) is None


def test_a_cleared_life_is_found_as_long_as_it_lasts() -> None:
    rooms = Rooms()
    other = open_sender(rooms, room=8)
    open_receiver(rooms)
    old = open_sender(rooms)
    for key in (other, old, RoomKey("receiver", 7, 0, 2)):
        rooms.clear(key)
    new = open_sender(rooms, conn=6)
    unopened = Withdraw(room=7, rank=0, part=0, receiver_generation=1)
    assert rooms.to_sender(5, unopened) == old
    assert rooms.to_sender(6, unopened) == new
    rooms.forget(old)
    assert rooms.to_sender(5, unopened) is None
    assert old not in rooms.sessions


def test_a_copy_shares_nothing() -> None:
    rooms = Rooms()
    key = open_sender(rooms)
    open_receiver(rooms)
    copy, before = rooms.clone(), rooms.key()
    assert copy.key() == before
    assert hash(copy.key()) == hash(before)
    rooms.clear(key)
    failure = Abort.__struct_fields__
    assert "failure" in failure
    rooms.forget(key)
    assert copy.key() == before != rooms.key()
    assert copy.is_open(key)
    assert copy.new_key("receiver", 9, 0) == rooms.new_key("receiver", 9, 0)
