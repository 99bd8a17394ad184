"""The targets find what is wrong: production code is broken in one place, and an input is found that shows it."""

from __future__ import annotations

import bisect
import hmac
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import msgspec
import pytest

from kvpoll_common import handshake
from kvpoll_common.grants import Grant, Grants
from kvpoll_fsm import cli_tools, configuration, inputs, messages
from kvpoll_fsm.address import Address
from kvpoll_fsm.channel import Channel
from kvpoll_fsm.connection import Connection
from kvpoll_fsm.errors import MalformedMessage
from kvpoll_fsm.layout import Field
from kvpoll_fsm.local import service
from kvpoll_fsm.receiver_session import ReceiverSession
from kvpoll_fsm.selection import Policy
from kvpoll_fsm.sender_session import SenderSession
from kvpoll_fsm.trace import decode_line
from kvpoll_shm import wire as shm_wire
from kvpoll_shm.copying import Copying
from kvpoll_tcp import wire
from kvpoll_tcp.backlog import Backlog
from tests.fuzz import decoders
from tests.fuzz.targets import TARGETS, Target

TRIES = 3_000
Break = tuple[str, Any, str, Any]


def admits_one_byte_more(self: Any, entries: list[tuple[int, int, int]]) -> bool:
    for region, offset, nbytes in entries:
        at = bisect.bisect_right(self._starts.get(region, []), offset) - 1
        if at < 0 or offset + nbytes > self._ends[region][at] + 1:
            return False
    return True


def admits_what_lies_between(self: Any, entries: list[tuple[int, int, int]]) -> bool:
    return all(
        region in self._starts and self._starts[region][0] <= offset and offset + nbytes <= self._ends[region][-1]
        for region, offset, nbytes in entries
    )


def leaves_without_a_word(self: Any, grant: Grant) -> None:
    grant.inside -= 1


def entries_unchecked(self: Any, data: bytes) -> list[Any]:
    return [(region, nbytes, offset) for region, _, nbytes, offset in wire._ENTRY.iter_unpack(data)]


def order_unchecked(self: Any) -> list[Any]:
    return [(region, nbytes, src, dst) for region, _, nbytes, src, dst in shm_wire._ENTRY.iter_unpack(self.entries)]


def answered_is_landed(self: Any, ack: wire.Ack, now: float) -> list[Any]:
    if not self._sent:
        raise MalformedMessage("an answer to nothing")
    job, frame = self._sent.popleft()
    job.unanswered -= 1
    job.landed(frame.nbytes)
    return list(self._report(job))


def differences_raise(self: Any, layout: Any, packet: Any) -> Any:
    return layout.differences([Field(f.name, f.dtype, f.shape, f.per_room) for f in packet.fields])


def accept_any_number(self: Any, frame: messages.Frame) -> list[Any]:
    self.owes_ack = bool(frame.messages)
    self.received = max(self.received, frame.first_seq - 1 if frame.messages else 0) + len(frame.messages)
    return list(frame.messages)


def bound_by_rank_alone(self: Any, conn: int, rank: int, generation: int) -> bool:
    return rank in self.slots


def takes_any_message(self: Any, event: Any) -> None:
    handler = self._message_handlers.get(type(event.message))
    if handler is not None:
        handler(self, event.conn, event.message)


def read_from_line_0(name: str) -> Iterator[Any]:
    for number, line in enumerate(Path(name).read_bytes().splitlines()):
        try:
            yield decode_line(line)
        except MalformedMessage as error:
            raise click.UsageError(f"{name}, line {number}: {error}") from None


def decode_without_types(data: bytes) -> Any:
    return msgspec.msgpack.decode(data, type=messages.Packet)


def address_unchecked(text: str) -> Address:
    host, _, port = text.removeprefix("tcp://").rpartition(":")
    return Address(host.strip("[]"), int(port))


def policy_unchecked(text: str) -> Policy:
    mode, _, names = text.rpartition(":")
    return Policy(mode or "require", tuple(names.split(",")))


everybody_knows = SimpleNamespace(new=hmac.new, compare_digest=lambda ours, theirs: True)
takes_anything = {**ReceiverSession._handlers, inputs.MessageReceived: takes_any_message}

BREAKS: dict[str, Break] = {
    "errors of the codec leave": ("packet", decoders, "decode", decode_without_types),
    "lines are counted from 0": ("trace_files", cli_tools, "_read", read_from_line_0),
    "hosts are not looked at": ("address", Address, "parse", address_unchecked),
    "policies are not looked at": ("policy", Policy, "parse", policy_unchecked),
    "any share is believed": ("control_line", service, "read_share", lambda share: share),
    "nobody is to blame": ("config_file", configuration, "_blame", lambda given, error: None),
    "a mistake in a variable is nobody's": ("variables", configuration, "_blame", lambda given, error: None),
    "a range is one byte longer": ("reader", Grant, "admits", admits_one_byte_more),
    "what lies between two ranges is granted": ("reader", Grant, "admits", admits_what_lies_between),
    "the last to leave reports no fence": ("reader", Grants, "leave", leaves_without_a_word),
    "entries need not add up": ("reader", wire.Head, "unpack_entries", entries_unchecked),
    "an order's entries are believed": ("shm_packet", shm_wire.Order, "unpack", order_unchecked),
    "a range of shm is one byte longer": ("shm_order", Grant, "admits", admits_one_byte_more),
    "who has copied does not leave": ("shm_order", Copying, "leave", lambda self: None),
    "any proof will do, for the receiver": ("stranger", handshake, "hmac", everybody_knows),
    "any proof will do, for the sender": ("impostor", handshake, "hmac", everybody_knows),
    "what was answered has landed": ("answers", Backlog, "answered", answered_is_landed),
    "a layout nobody knows raises": ("core", Connection, "differences", differences_raise),
    "numbers of frames are believed": ("core", Channel, "accept", accept_any_number),
    "a rank is bound whatever its life": ("core", SenderSession, "binds", bound_by_rank_alone),
    "a receiver takes anything at any time": ("core", ReceiverSession, "_handlers", takes_anything),
}


def candidates(target: Target) -> Iterator[bytes]:
    """Those that are kept, then any."""
    for path in target.corpus():
        yield path.read_bytes()
    noise = random.Random(target.name)
    for _ in range(TRIES):
        yield noise.randbytes(noise.randrange(min(400, target.most_nbytes)))


def goes_wrong(run: Callable[[bytes], None], data: bytes) -> bool:
    try:
        run(data)
    except Exception:  # whatever leaves a target
        return True
    return False


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_broken_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, holder, attribute, broken = BREAKS[name]
    value = staticmethod(broken) if attribute == "parse" else broken
    monkeypatch.setattr(holder, attribute, value)
    assert any(goes_wrong(TARGETS[target].run, data) for data in candidates(TARGETS[target]))
