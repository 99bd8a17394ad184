"""What travels over one connection. Numbers are little-endian; version 1.

Opening, once: as `kvpoll_common.handshake` has it, with the sender as the caller and the magic "KVPOLTCP". A token is
good for the first writer that uses it. Where both ends have TLS, all of this is said inside it.

Then frames, sender -> receiver, each at most 4 MiB of payload:

    Head     H magic  B kind=1  B flags (1: the ticket's last frame)  I index of the frame in its ticket
             Q ticket  I payload bytes  H entries (1 to 1,023)  H zero  16s token
    Entries  H region  H zero  I bytes  Q destination offset      (as many as the head says)
    Payload  the entries' bytes, one after the other

and for each frame, in their order, one answer, receiver -> sender:

    Ack      H magic  B kind=2  B verdict  I index  Q ticket

Verdict `landed` is sent once the payload is in the destination's memory. The others say why it is not; the
payload was read all the same, so the connection and the other tickets go on. Whatever breaks the rules above
(a wrong magic or kind, no entry or too many, an empty entry, sizes that do not add up, a set zero field)
ends the connection before a byte of its payload is read.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from kvpoll_common.handshake import Kind
from kvpoll_fsm.errors import MalformedMessage

__all__ = [
    "ACK_NBYTES",
    "ENTRY_NBYTES",
    "FRAME_NBYTES",
    "HEAD_NBYTES",
    "KIND",
    "MAX_ENTRIES",
    "MAX_OFFSET",
    "TOKEN_NBYTES",
    "Ack",
    "Entry",
    "Head",
    "Verdict",
]

KIND = Kind("tcp", b"KVPOLTCP", version=1)
FRAME_MAGIC = 0x564B

FRAME_NBYTES = 4 << 20
"""Most payload bytes of a frame. A cancel takes effect at the end of one."""
MAX_ENTRIES = 1024
"""Most entries of a frame: one call reads them into place (IOV_MAX)."""
MAX_OFFSET = (1 << 63) - 1
TOKEN_NBYTES = 16

_HEAD = struct.Struct(f"<HBBIQIHH{TOKEN_NBYTES}s")
_ENTRY = struct.Struct("<HHIQ")
_ACK = struct.Struct("<HBBIQ")

HEAD_NBYTES = _HEAD.size
ENTRY_NBYTES = _ENTRY.size
ACK_NBYTES = _ACK.size

_DATA, _ANSWER = 1, 2
_LAST = 1

Entry = tuple[int, int, int]
"""(region, bytes, destination offset)."""


class Verdict(enum.IntEnum):
    """What became of a frame."""

    landed = 0
    unknown_token = 1
    out_of_range = 2
    revoked = 3

    @property
    def reason(self) -> str:
        """The verdict as a sentence for people."""
        return _REASONS[self]


_REASONS = {
    Verdict.landed: "the bytes are in place",
    Verdict.unknown_token: "the receiver does not know the token, or not from this writer, or has revoked it",
    Verdict.out_of_range: "a write lies outside the ranges that the token admits",
    Verdict.revoked: "the receiver revoked the token while the bytes were arriving",
}


@dataclass(slots=True)
class Head:
    """What precedes a frame's entries and payload."""

    ticket: int
    index: int
    last: bool
    nbytes: int
    entries: int
    token: bytes

    def pack(self, entries: Sequence[Entry]) -> bytes:
        """The head and its entries as bytes."""
        flags = _LAST if self.last else 0
        first = (FRAME_MAGIC, _DATA, flags, self.index, self.ticket)
        packed = _HEAD.pack(*first, self.nbytes, self.entries, 0, self.token)
        flat = [number for region, nbytes, offset in entries for number in (region, 0, nbytes, offset)]
        return packed + struct.pack("<" + "HHIQ" * len(entries), *flat)

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> Head:
        """Read the first `HEAD_NBYTES` bytes.

        Raises:
            MalformedMessage: No head, or sizes beyond the limits.
        """
        magic, kind, flags, index, ticket, nbytes, entries, zero, token = _HEAD.unpack_from(data)
        if magic != FRAME_MAGIC or kind != _DATA or flags > _LAST or zero:
            raise MalformedMessage("a frame that does not begin like one")
        if not 0 < nbytes <= FRAME_NBYTES or not 0 < entries <= MAX_ENTRIES:
            raise MalformedMessage(f"a frame of {nbytes} bytes in {entries} entries")
        return cls(ticket, index, bool(flags), nbytes, entries, token)

    def unpack_entries(self, data: bytes | memoryview) -> list[Entry]:
        """Read the entries, `ENTRY_NBYTES` each.

        Raises:
            MalformedMessage: An empty entry, or sizes that do not add up to the payload.
        """
        read = list(_ENTRY.iter_unpack(data))
        entries: list[Entry] = [
            (region, nbytes, offset) for region, zero, nbytes, offset in read if nbytes and not zero
        ]
        if len(entries) < len(read):
            raise MalformedMessage("a frame with an entry that is none")
        total = sum([nbytes for _, nbytes, _ in entries])
        if total != self.nbytes:
            raise MalformedMessage(f"a frame of {self.nbytes} bytes whose entries have {total}")
        return entries


@dataclass(slots=True)
class Ack:
    """The answer to one frame."""

    ticket: int
    index: int
    verdict: Verdict

    def pack(self) -> bytes:
        """As bytes."""
        return _ACK.pack(FRAME_MAGIC, _ANSWER, self.verdict, self.index, self.ticket)

    @classmethod
    def unpack_all(cls, data: bytes | memoryview) -> list[Ack]:
        """Read a whole number of answers.

        Raises:
            MalformedMessage: Something else.
        """
        acks = []
        for magic, kind, verdict, index, ticket in _ACK.iter_unpack(data):
            if magic != FRAME_MAGIC or kind != _ANSWER or verdict not in _REASONS:
                raise MalformedMessage("an answer that is none")
            acks.append(cls(ticket, index, Verdict(verdict)))
        return acks
