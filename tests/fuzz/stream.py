"""The tcp transport's two ends, each with a script in place of the socket.

The script cuts what it sends into pieces, lets the reader's timeout pass between them, revokes and fences tokens
there, and ends in the middle or not. What must have become of the memory and of each frame is worked out a second
time, from the text of `kvpoll_tcp.wire`.
"""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from kvpoll_common.grants import Grants
from kvpoll_common.handshake import HELLO_NBYTES
from kvpoll_common.outbox import Outbox
from kvpoll_fsm.spi import Fenced, Range
from kvpoll_tcp.crew import Crew
from kvpoll_tcp.handshake import Descriptor
from kvpoll_tcp.receiver import Landing, Listener, Reader
from kvpoll_tcp.settings import TcpSettings
from kvpoll_tcp.sockets import Plug
from tests.fuzz.choices import Choices
from tests.transports import raw

REGION_NBYTES = (600, 300)
CANARY, OLD = 0xC5, 0x11
NONCE = b"n" * 32
IDENTITY = Descriptor(1, "127.0.0.1", 4711, b"i" * 16, b"s" * 32)
SETTINGS = TcpSettings()
ACK = struct.Struct("<HBBIQ")
HEAD = struct.Struct("<HBBIQIHH16s")
ENTRY = struct.Struct("<HHIQ")


class Script:
    """A connected socket whose other end has all its words ready.

    Attributes:
        said: What was sent to it.
        on_pause: Called when a receive is made to time out.
        answer: Called with all that was said so far; what it returns is sent next.
    """

    def __init__(self, data: bytes, choices: Choices) -> None:
        self._data = bytearray(data)
        self._choices = choices
        self.said = b""
        self.on_pause: Callable[[], None] = lambda: None
        self.answer: Callable[[bytes], bytes] = lambda said: b""

    def recv_into(self, view: memoryview, nbytes: int = 0, flags: int = 0) -> int:
        return self._pour([view[: nbytes or len(view)]])

    def recvmsg_into(self, views: list[memoryview], ancbufsize: int = 0, flags: int = 0) -> tuple[int]:
        if self._choices.flag(4):
            self.on_pause()
            raise BlockingIOError
        return (self._pour(views),)

    def recv(self, nbytes: int, flags: int = 0) -> bytes:
        view = memoryview(bytearray(nbytes))
        return bytes(view[: self._pour([view])])

    def sendall(self, data: bytes, flags: int = 0) -> None:
        self.said += data
        self._data += self.answer(self.said)

    def _pour(self, views: Sequence[memoryview]) -> int:
        """Some of the bytes that are left, or 0 at the end."""
        space = min(sum(map(len, views)), len(self._data))
        left = nbytes = min(space, 1 + self._choices.below(64)) if self._choices.flag() else space
        for view in views:
            piece = self._data[: min(left, len(view))]
            view[: len(piece)] = piece
            del self._data[: len(piece)]
            left -= len(piece)
        return nbytes

    def setblocking(self, flag: bool) -> None: ...

    def setsockopt(self, *args: Any) -> None: ...

    def shutdown(self, how: int) -> None: ...

    def close(self) -> None: ...

    def getsockname(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    getpeername = getsockname


def as_socket(script: Script) -> socket.socket:
    return cast("socket.socket", script)


class Errors(logging.Handler):
    """What is logged as a mistake of ours."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextmanager
def no_mistakes() -> Iterator[None]:
    """Nothing is logged as a mistake of ours."""
    errors, log = Errors(), logging.getLogger("kvpoll_tcp")
    log.addHandler(errors)
    try:
        yield
    finally:
        log.removeHandler(errors)
    assert not errors.texts, errors.texts[0]


@dataclass
class Place:
    """The memory of a receiver and its grants: canaries, and ranges in between that may be written to.

    Attributes:
        ends: Tokens that were revoked while bytes were arriving.
        fences: Fences asked for.
    """

    regions: list[bytearray] = field(default_factory=lambda: [bytearray([CANARY]) * n for n in REGION_NBYTES])
    outbox: Outbox = field(default_factory=Outbox)
    ranges: list[list[Range]] = field(default_factory=list)
    tokens: list[bytes] = field(default_factory=list)
    ends: set[bytes] = field(default_factory=set)
    fences: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.grants = Grants(self.outbox, "tcp")
        self.landing = Landing({at: memoryview(region) for at, region in enumerate(self.regions)}, self.grants)
        self.grant(Range(0, 100, 50))
        self.grant(Range(0, 200, 100), Range(1, 10, 80))
        self.grant(Range(0, 400, 16), Range(0, 416, 16), Range(0, 300, 8))
        self.grant(Range(1, 200, 100))
        self.grants.revoke(self.tokens[3])

    def grant(self, *ranges: Range) -> None:
        self.tokens.append(self.grants.add(ranges))
        self.ranges.append([*ranges])
        for each in ranges:
            self.regions[each.region][each.offset : each.offset + each.nbytes] = bytes([OLD]) * each.nbytes

    def admits(self, token: bytes, entry: tuple[int, int, int]) -> bool:
        """Whether one range, or neighbours, of a live token hold all bytes of an entry. Byte by byte."""
        number, nbytes, offset = entry
        if token not in self.tokens[:3]:
            return False
        held = {
            (r.region, at) for r in self.ranges[self.tokens.index(token)] for at in range(r.offset, r.offset + r.nbytes)
        }
        return nbytes <= 1000 and all((number, offset + at) in held for at in range(nbytes))

    def writable(self) -> set[tuple[int, int]]:
        """Every byte that some live token admits."""
        return {(r.region, at) for rs in self.ranges[:3] for r in rs for at in range(r.offset, r.offset + r.nbytes)}


@dataclass
class Expected:
    """What a stream of frames must lead to.

    Attributes:
        cut: Places of the last frame, if it is not whole; some of its bytes may be there or not.
        sound: The connection ends between two frames, by the peer's wish.
    """

    regions: list[bytearray]
    verdicts: list[tuple[int, int, int]] = field(default_factory=list)
    cut: set[tuple[int, int]] = field(default_factory=set)
    sound: bool = True


def expect(stream: bytes, place: Place) -> Expected:
    """Read the frames of a stream as `kvpoll_tcp.wire` describes them, with nothing revoked on the way."""
    result = Expected([bytearray(region) for region in place.regions])
    while stream:
        result.sound = False
        if len(stream) < HEAD.size + ENTRY.size:
            return result
        magic, kind, flags, index, ticket, nbytes, count, zero, token = HEAD.unpack_from(stream)
        right = (
            (magic, kind, zero) == (0x564B, 1, 0) and flags in (0, 1) and 1 <= count <= 1024 and 1 <= nbytes <= 4 << 20
        )
        packed, payload = stream[HEAD.size :][: count * ENTRY.size], stream[HEAD.size + count * ENTRY.size :]
        if not right or len(packed) < count * ENTRY.size:
            return result
        read = [ENTRY.unpack_from(packed, at * ENTRY.size) for at in range(count)]
        if any(none or not size for _, none, size, _ in read) or sum(size for _, _, size, _ in read) != nbytes:
            return result
        entries = [(number, size, offset) for number, _, size, offset in read]
        verdict = 1 if token not in place.tokens[:3] else 0 if all(place.admits(token, e) for e in entries) else 2
        places = (
            [(number, offset + at) for number, size, offset in entries for at in range(size)] if not verdict else []
        )
        if len(payload) < nbytes:
            result.cut = set(places)
            return result
        for (number, at), byte in zip(places, payload, strict=False):
            result.regions[number][at] = byte
        result.verdicts.append((verdict, index, ticket))
        result.sound, stream = True, payload[nbytes:]
    return result


def frames(choices: Choices, place: Place) -> bytes:
    """Some frames, most of them right, then perhaps a byte of all that changed, a piece doubled or cut out."""
    stream = bytearray(b"".join(frame(choices, place) for _ in range(1 + choices.below(5))))
    for _ in range(choices.below(3)):
        at, length = choices.below(len(stream) + 1), choices.below(80)
        edit = choices.below(4)
        if edit == 0:
            stream[at : at + 1] = bytes([choices.below(256)])
        elif edit == 1:
            del stream[at : at + length]
        elif edit == 2:
            stream[at:at] = stream[choices.below(len(stream) + 1) :][:length]
        else:
            stream[at:at] = choices.blob(40)
    return bytes(stream)


def frame(choices: Choices, place: Place) -> bytes:
    """A frame that is right, or has one thing wrong."""
    which = choices.below(3)
    entries = []
    for _ in range(1 + choices.below(3)):
        ranges = place.ranges[which]
        into = choices.pick(ranges)
        start, size = choices.below(into.nbytes), 1 + choices.below(into.nbytes)
        entries.append((into.region, min(size, into.nbytes - start), into.offset + start))
    wrong: dict[str, Any] = {}
    if choices.flag(3):
        at = choices.below(len(entries))
        number, size, offset = entries[at]
        more = choices.pick((1, -1, 8, 1 << 30, (1 << 63) - 1))
        entries[at] = choices.pick(((number + 1, size, offset), (number, size, (offset + more) % (1 << 64)),
                                    (number, (size + more) % (1 << 32), offset), (number, 0, offset)))  # fmt: skip
    if choices.flag(3):
        name, values = choices.pick(WRONG)
        wrong[name] = choices.pick(values)
    token = choices.pick((*place.tokens, b"unknown" + bytes(9))) if choices.flag(4) else place.tokens[which]
    payload = bytes([choices.below(256)]) * min(sum(size for _, size, _ in entries), 500)
    packed = [raw.entry(number, size, offset) for number, size, offset in entries]
    return raw.frame(token, packed, payload, **{"ticket": choices.below(9), "index": choices.below(4), **wrong})


WRONG: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("nbytes", (0, 1, 4 << 20, (4 << 20) + 1, (1 << 32) - 1)),
    ("count", (0, 1, 2, 1024, 1025, 0xFFFF)),
    ("magic", (0x564A,)),
    ("kind", (0, 2)),
    ("flags", (0, 2, 255)),
    ("zero", (1,)),
    ("ticket", ((1 << 64) - 1,)),
    ("index", ((1 << 32) - 1,)),
)


def reader(data: bytes) -> None:
    """Frames of somebody who knows the secret: bytes land as written, or not at all, and nowhere else."""
    choices, place = Choices(data), Place()
    revokes = choices.flag(3)
    stream = frames(choices, place)
    expected = expect(stream, place)
    script = Script(raw.hello(IDENTITY.incarnation, NONCE), choices)
    script.answer = lambda said: proof(said) + stream if len(said) == HELLO_NBYTES else b""

    def revoke() -> None:
        token = choices.pick(place.tokens[:3])
        if revokes and choices.flag(3):
            place.ends.add(token)
            place.grants.revoke(token)
            if choices.flag():
                place.fences.append(place.grants.fence(token))

    script.on_pause = revoke
    ran(script, place)
    answers = script.said[HELLO_NBYTES + 32 :]
    assert len(answers) % ACK.size == 0
    said = [ACK.unpack_from(answers, at) for at in range(0, len(answers), ACK.size)]
    assert all(answer[:2] == (0x564B, 2) for answer in said)
    if not place.ends:
        assert [(verdict, index, ticket) for _, _, verdict, index, ticket in said] == expected.verdicts
    assert len(said) == len(expected.verdicts), "a revoked token ends no frame and no connection"
    unharmed(place, expected)
    all_dead(place)


def proof(said: bytes) -> bytes:
    return raw.proof(IDENTITY.secret, b"kvpoll-tcp sender", raw.hello(IDENTITY.incarnation, NONCE), said)


def ran(script: Script, place: Place) -> Listener:
    """A connection, from its first byte to its end."""
    listener = Listener(IDENTITY, place.landing, SETTINGS, Crew())
    plug = Plug()
    plug.insert(as_socket(script))
    with no_mistakes():
        Reader(as_socket(script), plug, "script", IDENTITY, place.landing).run(listener, SETTINGS)
    return listener


def unharmed(place: Place, expected: Expected) -> None:
    """Every byte is what it must be; where a frame was cut short or its token revoked, it may be the old one."""
    loose = set(expected.cut)
    for token in place.ends:
        ranges = place.ranges[place.tokens.index(token)]
        loose |= {(r.region, at) for r in ranges for at in range(r.offset, r.offset + r.nbytes)}
    assert loose <= place.writable()
    for number, (region, wanted) in enumerate(zip(place.regions, expected.regions, strict=True)):
        if region != wanted:
            wrong = [at for at in range(len(region)) if region[at] != wanted[at] and (number, at) not in loose]
            assert not wrong, f"region {number}: bytes {wrong[:9]}"


def all_dead(place: Place) -> None:
    """Nobody is inside any more: what was to be fenced has been, once, and every token can be, at once."""
    place.fences += [place.grants.fence(token) for token in place.tokens]
    assert sorted(fenced.fence for fenced in place.outbox.take() if isinstance(fenced, Fenced)) == place.fences


def stranger(data: bytes) -> None:
    """Anything, said by somebody who does not know the secret: not a byte lands, no frame is answered."""
    choices, place = Choices(data), Place()
    before = [bytes(region) for region in place.regions]
    hello = raw.hello(IDENTITY.incarnation, NONCE)
    opening = choices.pick((hello, hello[:-1], raw.hello(b"o" * 16, NONCE, version=choices.below(3)), choices.rest()))
    script = Script(opening, choices)
    secret = choices.pick((b"x" * 32, b"", IDENTITY.secret[:-1]))
    role = choices.pick((b"kvpoll-tcp sender", b"kvpoll-tcp receiver"))
    known = IDENTITY.secret if role.endswith(b"receiver") else secret
    more = frames(choices, place)

    def answer(said: bytes) -> bytes:
        mirrored = said[-32:] if choices.flag(4) else raw.proof(known, role, opening, said)
        return mirrored + more

    script.answer = answer
    ran(script, place)
    assert len(script.said) in (0, HELLO_NBYTES)
    assert [bytes(region) for region in place.regions] == before
    all_dead(place)
