"""Forged packets and messages, and whom a packet, genuine or not, may concern."""

from __future__ import annotations

from typing import Any

import msgspec

from kvpoll_fsm import messages
from kvpoll_fsm.deadlines import Gate
from kvpoll_fsm.errors import MalformedMessage, UnsupportedVersion
from kvpoll_fsm.messages import Beat, Frame, Message, Packet, decode, encode
from kvpoll_fsm.receiver_session import ReceiverSession
from kvpoll_fsm.sender_session import SenderSession
from kvpoll_fsm.session import RoomKey, Session
from kvpoll_fsm.testing.hosts import Host
from tests.fuzz.choices import Choices
from tests.fuzz.mutate import change_one


def not_meant(host: Host, packet: Packet) -> list[RoomKey]:
    """The rooms of a host that a packet cannot concern. Those that wait for blocks may get some that others lose."""
    if not isinstance(packet, Frame):
        return []
    found = [
        connection
        for connection in host.core.connections.values()
        if (connection.channel.source, connection.channel.target) == (packet.target, packet.source)
    ]
    said = [*packet.messages, *packet.beats]
    return [
        key
        for key, session in host.core.sessions.items()
        if session.gate is not Gate.waiting_blocks
        and not any(concerns(key, session, connection.number, one) for connection in found for one in said)
    ]


def concerns(key: RoomKey, session: Session, conn: int, said: Message | Beat) -> bool:
    """Whether what was said through a connection may change a room, by what is written in `messages`."""
    if isinstance(said, messages.Bye):
        return True
    if said.room != key.room:
        return False
    if isinstance(session, ReceiverSession):
        same_sender = session.sender_generation in (0, said.sender_generation)
        return same_sender and (conn, said.rank, said.receiver_generation) == (
            session.options.conn,
            key.rank,
            key.generation,
        )
    ours = said.sender_generation in (0, key.generation)
    slot = session.slots.get(said.rank) if isinstance(session, SenderSession) else None
    bound = slot is not None and (slot.conn, slot.generation) == (conn, said.receiver_generation)
    return ours and (bound or isinstance(said, messages.Reserve))


def forged(packet: Packet, choices: Choices) -> Packet | None:
    """A packet that differs in one place, as it comes out of the decoder; None if that refuses it."""
    plain: Any = msgspec.msgpack.decode(encode(packet))
    return _accepted(change_one(plain, choices))


def forged_message(message: Message, choices: Choices) -> Message | None:
    """A message that differs in one place, likewise."""
    plain: Any = msgspec.msgpack.decode(encode(Frame(bytes(16), bytes(16), True, messages=(message,))))
    plain["messages"][0] = change_one(plain["messages"][0], choices)
    packet = _accepted(plain)
    return packet.messages[0] if isinstance(packet, Frame) and packet.messages else None


def _accepted(plain: Any) -> Packet | None:
    try:
        return decode(msgspec.msgpack.encode(plain))
    except (MalformedMessage, UnsupportedVersion, OverflowError):
        return None
