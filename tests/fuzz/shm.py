"""What shm takes from others: packets, descriptors, and orders to copy."""

from __future__ import annotations

import msgspec

from kvpoll_common.grants import Grants
from kvpoll_common.outbox import Outbox
from kvpoll_fsm.errors import InvalidInput, MalformedMessage
from kvpoll_fsm.spi import MAX_TICKET_NBYTES, Range
from kvpoll_shm import wire
from kvpoll_shm.copying import Copying, Landing
from kvpoll_shm.handshake import read_descriptor
from tests.fuzz.choices import Choices

WRITER = b"w" * 16
SOURCE_NBYTES = 300
TARGET_NBYTES = 500
OLD = 0xEE
GRANTED = [(1, 100, 50), (1, 150, 20), (1, 200, 100), (2, 10, 80)]
"""(region, offset, bytes); the first two are neighbours."""


def shm_packet(data: bytes) -> None:
    """A packet of the connection: one of its messages, the same when said again, or MalformedMessage."""
    try:
        message = wire.decode(data)
    except MalformedMessage:
        return
    assert wire.decode(wire.encode(message)) == message
    for order in message.orders if isinstance(message, wire.Orders) else (message,):
        try:
            entries = order.unpack() if isinstance(order, wire.Order) else [(0, 1, 0, 0)]
        except MalformedMessage:
            continue
        assert 0 < len(entries) <= wire.MAX_ENTRIES
        assert all(nbytes > 0 for _, nbytes, _, _ in entries)
        assert sum(nbytes for _, nbytes, _, _ in entries) <= MAX_TICKET_NBYTES


def shm_descriptor(data: bytes) -> None:
    """What a peer offers for shm: a descriptor that does not show its secret, or InvalidInput."""
    try:
        found = read_descriptor(data)
    except InvalidInput:
        return
    assert read_descriptor(msgspec.msgpack.encode(found)) == found
    assert len(found.secret) == 32
    assert repr(found) == f"Descriptor({found.socket})"


def shm_order(data: bytes) -> None:
    """An order to copy: every byte as it says, or none; nothing outside of what is granted, nothing left under way."""
    choices = Choices(data)
    sources = {1: bytes(range(256)) + bytes(44), 2: bytes(100) + bytes(range(200))}
    targets = {region: bytearray([OLD]) * TARGET_NBYTES for region in (1, 2)}
    outbox = Outbox()
    grants = Grants(outbox, "shm")
    token = grants.add([Range(*each) for each in GRANTED])
    order = wire.Order(7, choices.pick((token, token, b"x" * 16)), order_entries(choices))
    landing = Landing({region: memoryview(target) for region, target in targets.items()}, grants)
    copying = Copying(order, WRITER, {region: memoryview(source) for region, source in sources.items()}, landing)
    verdict = None
    try:
        while verdict is None:
            verdict = copying.advance()
    except MalformedMessage:
        copying.leave()
    expected = expect(order, token, sources) if verdict is not None else None
    assert (verdict is wire.Verdict.landed) == (expected is not None)
    assert targets == (expected or {region: bytearray([OLD]) * TARGET_NBYTES for region in targets})
    fence = grants.fence(token)
    assert [each.fence for each in outbox.take()] == [fence], "somebody is still inside"


def order_entries(choices: Choices) -> bytes:
    """A few entries, most of them right; or any bytes."""
    if choices.flag(6):
        return choices.rest()
    packed = b""
    for _ in range(1 + choices.below(3)):
        region, start, size = choices.pick(GRANTED)
        skip = choices.below(size)
        nbytes = 1 + choices.below(size - skip)
        entry = [region, 0, nbytes, choices.below(SOURCE_NBYTES - nbytes), start + skip]
        if choices.flag(3):
            at = choices.below(5)
            edge = choices.pick((0, 1, entry[at] + 1, entry[at] * 2, 1 << 15, (1 << 16) - 1, (1 << 63) - 1))
            entry[at] = min(edge, (1 << (16, 16, 32, 64, 64)[at]) - 1)
        packed += wire._ENTRY.pack(*entry)
    return packed[: len(packed) - choices.below(8) * choices.flag(8)]


def expect(order: wire.Order, token: bytes, sources: dict[int, bytes]) -> dict[int, bytearray] | None:
    """What the memory holds after the order, read by hand, or None if any of it is not allowed."""
    if order.token != token:
        return None
    admitted = {(region, at) for region, offset, nbytes in GRANTED for at in range(offset, offset + nbytes)}
    targets = {region: bytearray([OLD]) * TARGET_NBYTES for region in (1, 2)}
    for at in range(0, len(order.entries), 24):
        region, _, nbytes, src, dst = wire._ENTRY.unpack_from(order.entries, at)
        if nbytes > TARGET_NBYTES or not all((region, dst + each) in admitted for each in range(nbytes)):
            return None
        if src + nbytes > len(sources[region]):
            return None
        targets[region][dst : dst + nbytes] = sources[region][src : src + nbytes]
    return targets
