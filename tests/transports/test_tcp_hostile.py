"""Whoever reaches the data port without being entitled changes no byte and hurts nobody else."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvpoll_common.grants import LIED
from kvpoll_fsm.spi import Link, LinkDown, Range, Write
from kvpoll_fsm.testing.conformance.sides import MIB, SIZES, Pair, Side, until, untouched
from kvpoll_tcp import TcpTransport
from tests.transports import raw
from tests.transports.raw import Raw, entry, frame, hello

CANARY = 0xC5


class Scene(Pair):
    """A pair whose link works, and a receiver full of canaries."""

    def __init__(self, **settings: float) -> None:
        super().__init__(Side(TcpTransport(), filled=True), Side(TcpTransport(**settings)))
        self.descriptor = self.rx.transport.descriptor()
        self.link: Link = self.tx.connect(self.rx)
        self.up(self.link)

    def still_works(self) -> None:
        """The good link does, and its byte is taken back."""
        self.done(self.link.submit([Write(0, 1, 0, 1)], self.rx.grant(Range(0, 0, 1))))
        self.rx.arenas[0][0] = 0

    def refused(self) -> dict[str, int]:
        transport: Any = self.rx.transport
        return dict(transport.refused())

    def unharmed(self) -> None:
        self.still_works()
        untouched(self.rx)


@pytest.fixture
def scene() -> Iterator[Scene]:
    scene = Scene()
    yield scene
    scene.close()


def wrong_secret(visitor: Raw) -> None:
    ours = hello(visitor.peer["incarnation"])
    visitor.send(ours)
    theirs = visitor.read(raw.HELLO_NBYTES)
    visitor.send(raw.proof(b"s" * 32, b"kvpoll-tcp sender", ours, theirs))


def mirrored_role(visitor: Raw) -> None:
    ours = hello(visitor.peer["incarnation"])
    visitor.send(ours)
    theirs = visitor.read(raw.HELLO_NBYTES)
    visitor.send(raw.proof(visitor.peer["secret"], b"kvpoll-tcp receiver", ours, theirs))


def wrong_version(visitor: Raw) -> None:
    ours = hello(visitor.peer["incarnation"], version=2)
    visitor.send(ours)
    theirs = visitor.read(raw.HELLO_NBYTES)
    assert theirs.startswith(hello(visitor.peer["incarnation"], b"", writer=b""))  # says which version it speaks
    with contextlib.suppress(ConnectionError):  # dropped already
        visitor.send(raw.proof(visitor.peer["secret"], b"kvpoll-tcp sender", ours, theirs))


@pytest.mark.parametrize(
    "visit",
    [
        lambda visitor: visitor.send(b"GET / HTTP/1.1\r\nHost: kvpoll.example\r\nAccept: */*\r\n\r\n" * 2),
        lambda visitor: visitor.send(bytes(1000)),
        lambda visitor: visitor.send(hello(visitor.peer["incarnation"], magic=b"KVPOLTCQ")),
        lambda visitor: visitor.finish(),
        lambda visitor: (visitor.send(b"KVPO"), visitor.finish()),
        wrong_version,
        wrong_secret,
        mirrored_role,
    ],
)
def test_pain_24_strangers_are_dropped(scene: Scene, visit: Callable[[Raw], None]) -> None:
    with Raw(scene.descriptor, shake_hands=False) as visitor:
        visit(visitor)
        assert visitor.is_dropped()
    scene.unharmed()


def test_strangers_who_hang_up_at_once_hold_up_nobody(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(50):
        visitor = Raw(scene.descriptor, shake_hands=False)
        visitor.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        visitor.close()
    scene.up(scene.tx.connect(scene.rx))
    scene.unharmed()
    assert not [record for record in caplog.records if record.levelname != "INFO"]


def test_an_old_conversation_cannot_be_played_back(scene: Scene) -> None:
    with Raw(scene.descriptor, shake_hands=False) as visitor:
        ours = hello(visitor.peer["incarnation"])
        visitor.send(ours)
        theirs = visitor.read(raw.HELLO_NBYTES)
        heard = raw.proof(visitor.peer["secret"], b"kvpoll-tcp sender", ours, theirs)
        visitor.send(heard)
        visitor.read(32)
    with Raw(scene.descriptor, shake_hands=False) as visitor:
        visitor.send(ours)
        assert visitor.read(raw.HELLO_NBYTES) != theirs
        visitor.send(heard)
        assert visitor.is_dropped()
    scene.unharmed()


def test_frames_before_the_proof_do_not_count(scene: Scene) -> None:
    with Raw(scene.descriptor, shake_hands=False) as visitor:
        token = scene.rx.grant()
        visitor.send(hello(visitor.peer["incarnation"]) + frame(token, [entry(0, 4, 0)], b"oops"))
        visitor.read(raw.HELLO_NBYTES)
        assert visitor.is_dropped()
    scene.unharmed()


MALFORMED: dict[str, Callable[[bytes], bytes]] = {
    "garbage": lambda token: b"\xee" * 200,
    "magic": lambda token: frame(token, [entry(0, 4, 0)], b"oops", magic=0x564C),
    "kind": lambda token: frame(token, [entry(0, 4, 0)], b"oops", kind=2),
    "flags": lambda token: frame(token, [entry(0, 4, 0)], b"oops", flags=2),
    "reserved": lambda token: frame(token, [entry(0, 4, 0)], b"oops", zero=1),
    "reserved in an entry": lambda token: frame(token, [entry(0, 4, 0, zero=1)], b"oops"),
    "no entries": lambda token: frame(token, [entry(0, 4, 0)], b"oops", count=0),
    "too many entries": lambda token: frame(token, [entry(0, 1, n) for n in range(1025)], b"o" * 1025),
    "empty": lambda token: frame(token, [entry(0, 0, 0)], b"", nbytes=0),
    "empty entry": lambda token: frame(token, [entry(0, 4, 0), entry(0, 0, 9)], b"oops"),
    "more than the entries": lambda token: frame(token, [entry(0, 4, 0)], b"oops!"),
    "less than the entries": lambda token: frame(token, [entry(0, 5, 0)], b"oops"),
    "oversized": lambda token: frame(token, [entry(0, 4 * MIB + 1, 0)], b"oops", nbytes=4 * MIB + 1),
    "huge": lambda token: frame(token, [entry(0, 0xFFFFFFFF, 0)], b"oops", nbytes=0xFFFFFFFF),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_frames_end_the_connection(scene: Scene, name: str) -> None:
    with Raw(scene.descriptor) as visitor:
        visitor.send(MALFORMED[name](scene.rx.grant()))
        assert visitor.is_dropped()
    scene.unharmed()


@pytest.mark.parametrize("cut", [1, 39, 41, 60, 73])
def test_truncated_frames_land_nothing(scene: Scene, cut: int) -> None:
    whole = frame(scene.rx.grant(), [entry(0, 4, 0), entry(0, 4, 9)], b"oopsoops")
    with Raw(scene.descriptor) as visitor:
        visitor.send(whole[: min(cut, len(whole) - 8)])
        visitor.finish()
        assert visitor.is_dropped()
    scene.unharmed()


def test_a_truncated_payload_stays_within_the_grant_and_frees_the_token(scene: Scene) -> None:
    token = scene.rx.grant(Range(0, 100, 8))
    with Raw(scene.descriptor) as visitor:
        visitor.send(frame(token, [entry(0, 8, 100)], b"12345678")[:-3])
        visitor.finish()
        assert visitor.is_dropped()
    scene.fence(token)
    assert scene.rx.arenas[0][100:108] == b"12345\0\0\0"
    scene.rx.arenas[0][100:108] = bytes(8)
    scene.unharmed()


@pytest.mark.parametrize(
    ("entries", "verdict"),
    [
        ([entry(0, 4, 99)], 2),
        ([entry(0, 4, 105)], 2),
        ([entry(0, 2, 100), entry(0, 2, SIZES[0] - 1)], 2),
        ([entry(0, 4, (1 << 64) - 2)], 2),
        ([entry(1, 4, 100)], 2),
        ([entry(65535, 4, 100)], 2),
        ([entry(0, 4, 104)], 0),
    ],
)
def test_writes_outside_the_grant_are_answered(scene: Scene, entries: list[bytes], verdict: int) -> None:
    token = scene.rx.grant(Range(0, 100, 8))
    with Raw(scene.descriptor) as visitor:
        visitor.send(frame(token, entries, b"oops"))
        assert visitor.verdict() == verdict
        visitor.send(frame(b"?" * 16, [entry(0, 4, 100)], b"oops", index=5))
        assert visitor.verdict(index=5) == 1
    scene.rx.arenas[0][104:108] = bytes(4)
    scene.unharmed()


def test_a_refused_frame_does_not_disturb_the_next(scene: Scene) -> None:
    token = scene.rx.grant(Range(0, 0, 3 * MIB))
    with Raw(scene.descriptor) as visitor:
        visitor.send(frame(b"?" * 16, [entry(0, 4 * MIB, 0)], bytes(4 * MIB)))
        visitor.send(frame(token, [entry(0, MIB, MIB), entry(0, 5, 7)], b"x" * MIB + b"hello"))
        assert (visitor.verdict(), visitor.verdict()) == (1, 0)
    assert scene.rx.arenas[0][0:16] == bytes(7) + b"hello" + bytes(4)
    assert scene.rx.arenas[0][MIB : 2 * MIB] == b"x" * MIB


def test_a_silent_writer_cannot_hold_up_a_fence(scene: Scene) -> None:
    token, other = scene.rx.grant(), scene.rx.grant()
    with Raw(scene.descriptor) as visitor:
        whole = frame(token, [entry(0, MIB, MIB)], b"x" * MIB)
        visitor.send(whole[:1000])
        until(lambda: scene.rx.arenas[0][MIB] == ord("x"), "the first bytes")
        scene.fence(token)
        scene.rx.arenas[0][MIB : 2 * MIB] = bytes(MIB)
        visitor.send(whole[1000:] + frame(other, [entry(1, 1, 0)], b"y"))
        assert (visitor.verdict(), visitor.verdict()) == (3, 0)  # the connection goes on
    assert scene.rx.arenas[1][0] == ord("y")
    scene.rx.arenas[1][0] = 0
    scene.unharmed()


def test_a_frame_under_a_token_that_is_being_fenced_is_refused(scene: Scene) -> None:
    token = scene.rx.grant()
    with Raw(scene.descriptor) as visitor, Raw(scene.descriptor) as second:
        whole = frame(token, [entry(0, MIB, MIB)], b"x" * MIB)
        visitor.send(whole[:1000])
        until(lambda: scene.rx.arenas[0][MIB] == ord("x"), "the first bytes")
        fences = [scene.rx.transport.fence(token) for _ in range(2)]
        second.send(whole)
        assert second.verdict() == 1
        scene.until(lambda: sorted(scene.rx.fenced) == fences, "the fences")


def test_a_writer_that_said_it_was_done_and_was_not_changes_nothing_any_more(scene: Scene) -> None:
    """A room that takes a sender's word gives the blocks to the next one at once."""
    token = scene.rx.grant()
    with Raw(scene.descriptor) as liar:
        whole = frame(token, [entry(0, MIB, MIB)], b"x" * MIB)
        liar.send(whole[:-1000])
        until(lambda: scene.rx.arenas[0][MIB] == ord("x"), "the first bytes")
        scene.rx.transport.revoke(token)
        scene.rx.arenas[0][:] = bytes(len(scene.rx.arenas[0]))
        with contextlib.suppress(ConnectionError):
            liar.send(whole[-1000:])
        assert liar.is_dropped()
    assert scene.refused()[LIED] == 1
    assert not any(scene.rx.arenas[0][MIB:])
    scene.unharmed()


# Too many, too slow


def test_slow_strangers_are_dropped() -> None:
    scene = Scene(handshake_s=0.2)
    visitors = [Raw(scene.descriptor, shake_hands=False) for _ in range(5)]
    visitors[1].send(b"KVPO")
    assert all(visitor.is_dropped() for visitor in visitors)
    for visitor in visitors:
        visitor.close()
    scene.unharmed()
    scene.close()


def test_a_trickle_does_not_stretch_the_deadline() -> None:
    scene = Scene(handshake_s=0.2)
    with Raw(scene.descriptor, shake_hands=False) as visitor:
        visitor.socket.settimeout(0.02)
        data = iter(hello(visitor.peer["incarnation"])[:-1])

        def dropped() -> bool:
            try:
                visitor.socket.send(bytes([next(data)]))
                return visitor.socket.recv(1) == b""
            except TimeoutError:
                return False
            except ConnectionError:
                return True

        until(dropped, "the drop")  # StopIteration: all but the last byte were waited for
    scene.close()


def test_idle_strangers_make_room_for_honest_peers() -> None:
    scene = Scene(handshake_s=60, max_strangers=4)
    visitors = [Raw(scene.descriptor, shake_hands=False) for _ in range(10)]
    assert all(visitor.is_dropped() for visitor in visitors[:6])
    scene.up(scene.tx.connect(scene.rx))
    scene.unharmed()
    for visitor in visitors:
        visitor.close()
    scene.close()


def test_connections_are_limited() -> None:
    scene = Scene(max_connections=2)
    with Raw(scene.descriptor) as visitor:
        third = scene.tx.connect(scene.rx)
        scene.until(lambda: scene.tx.links.get(third.number) == [False], "the refusal")
        scene.unharmed()
        visitor.send(frame(scene.rx.grant(), [entry(0, 1, 0)], b"\0"))
        assert visitor.verdict() == 0
    until(lambda: sum("read-" in thread.name for thread in threading.enumerate()) == 1, "the place to come free")
    scene.done(third.submit([Write(0, 0, 0, 1)], scene.rx.grant()))
    scene.close()


def test_connections_of_one_address_are_limited() -> None:
    scene = Scene(max_connections_per_peer=2)
    with Raw(scene.descriptor), Raw(scene.descriptor, shake_hands=False) as third:
        ours = hello(third.peer["incarnation"])
        third.send(ours)
        third.send(raw.proof(third.peer["secret"], b"kvpoll-tcp sender", ours, third.read(raw.HELLO_NBYTES)))
        assert third.is_dropped()
        Raw(scene.descriptor, source="127.0.0.2").close()
    assert scene.refused() == {"too many connections": 1}
    scene.unharmed()
    scene.close()


def test_a_flood_from_one_address_does_not_put_out_strangers_from_another() -> None:
    scene = Scene(handshake_s=60, max_strangers=4)
    with Raw(scene.descriptor, shake_hands=False, source="127.0.0.2") as honest:
        flood = [Raw(scene.descriptor, shake_hands=False, source="127.0.0.3") for _ in range(40)]
        until(lambda: scene.refused().get("too many that have not proved themselves") == 37, "the flood to be cut")
        honest.shake_hands()
        honest.send(frame(scene.rx.grant(), [entry(0, 1, 0)], b"\0"))
        assert honest.verdict() == 0
        for visitor in flood:
            visitor.close()
    scene.unharmed()
    scene.close()


def test_a_token_is_good_for_the_first_writer_alone(scene: Scene) -> None:
    token = scene.rx.grant()
    with (
        Raw(scene.descriptor) as first,
        Raw(scene.descriptor, writer=b"v" * 16) as thief,
        Raw(scene.descriptor) as lane,
    ):
        for visitor, verdict in ((first, 0), (thief, 1), (lane, 0), (thief, 1)):
            visitor.send(frame(token, [entry(0, 1, 0)], b"\0" if verdict == 0 else b"!"))
            assert visitor.verdict() == verdict
    assert scene.refused() == {"a write under the token of another writer": 2}
    scene.unharmed()


def test_a_flood_of_strangers_fills_no_log(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for _ in range(100):
        with Raw(scene.descriptor, shake_hands=False) as visitor:
            visitor.send(bytes(raw.HELLO_NBYTES))
            assert visitor.is_dropped()
    until(lambda: scene.refused() == {"does not speak our protocol": 100}, "the count")
    assert len(caplog.records) == 7
    scene.unharmed()


# Receivers that are none


class Impostor:
    """Listens where the receiver should, and answers as a test likes."""

    def __init__(self, descriptor: bytes, behave: Callable[[socket.socket, Impostor], None]) -> None:
        self.peer = raw.read_descriptor(descriptor)
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.received = b""
        self._behave = behave
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def descriptor(self) -> bytes:
        return raw.write_descriptor({**self.peer, "port": self.port})

    def _run(self) -> None:
        sock, _ = self.listening.accept()
        self.listening.close()  # a second attempt is refused
        with sock:
            sock.settimeout(20)
            self._behave(sock, self)
            try:
                while data := sock.recv(65536):
                    self.received += data
            except ConnectionError:
                pass

    def close(self) -> None:
        self._thread.join()


def greet(sock: socket.socket, impostor: Impostor, **wrong: object) -> None:
    """The handshake, with the right secret unless told otherwise."""
    ours = hello(wrong.get("incarnation", impostor.peer["incarnation"]), version=int(str(wrong.get("version", 1))))  # type: ignore[arg-type]
    theirs = sock.recv(raw.HELLO_NBYTES, socket.MSG_WAITALL)
    sock.sendall(ours)
    if sock.recv(32, socket.MSG_WAITALL):
        secret = wrong.get("secret", impostor.peer["secret"])
        sock.sendall(raw.proof(secret, b"kvpoll-tcp receiver", theirs, ours))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("behave", "reason"),
    [
        (lambda sock, me: greet(sock, me, secret=b"s" * 32), "secret"),
        (lambda sock, me: greet(sock, me, version=9), "version 9"),
        (lambda sock, me: greet(sock, me, incarnation=b"i" * 16), "restarted"),
        (lambda sock, me: sock.sendall(b"SSH-2.0-OpenSSH_9.9\r\n" * 5), "protocol"),
        (lambda sock, me: sock.shutdown(socket.SHUT_RDWR), ""),
    ],
)
def test_an_impostor_gets_no_data(scene: Scene, behave: Callable[[socket.socket, Impostor], None], reason: str) -> None:
    impostor = Impostor(scene.descriptor, behave)
    link = scene.tx.transport.connect(impostor.descriptor(), scene.rx.regions)
    ticket = link.submit([Write(0, 0, 0, 1000)], b"t" * 16)
    assert scene.failed(ticket).quiescent
    scene.until(lambda: link.number in scene.tx.links, "the refusal")
    assert not any(scene.tx.links[link.number])
    assert reason in next(seen.reason for seen in scene.tx.seen if isinstance(seen, LinkDown))
    link.close()
    impostor.close()
    assert len(impostor.received) <= raw.HELLO_NBYTES + 32


@pytest.mark.parametrize(
    "answer",
    [
        b"\xee" * 64,
        raw.ACK.pack(raw.FRAME_MAGIC, 2, 9, 0, 0),
        raw.ACK.pack(raw.FRAME_MAGIC, 1, 0, 0, 0),
        raw.ACK.pack(raw.FRAME_MAGIC, 2, 0, 1, 0),
        raw.ACK.pack(raw.FRAME_MAGIC, 2, 0, 0, 999),
    ],
)
def test_wrong_answers_break_the_link(scene: Scene, answer: bytes) -> None:
    def behave(sock: socket.socket, impostor: Impostor) -> None:
        greet(sock, impostor)
        sock.recv(1)
        sock.sendall(answer)

    impostor = Impostor(scene.descriptor, behave)
    link = scene.tx.transport.connect(impostor.descriptor(), scene.rx.regions)
    failed = scene.failed(link.submit([Write(0, 0, 0, 10)], b"t" * 16))
    assert (failed.quiescent, failed.source_free) == (False, True)
    scene.until(lambda: scene.tx.links[link.number] == [True, False], "the news")
    link.close()
    impostor.close()


def test_an_answer_to_nothing_breaks_the_link(scene: Scene) -> None:
    def behave(sock: socket.socket, impostor: Impostor) -> None:
        greet(sock, impostor)
        sock.sendall(raw.ACK.pack(raw.FRAME_MAGIC, 2, 0, 0, 0))

    impostor = Impostor(scene.descriptor, behave)
    link = scene.tx.transport.connect(impostor.descriptor(), scene.rx.regions)
    scene.until(lambda: scene.tx.links.get(link.number) == [True, False], "the news")
    link.close()
    impostor.close()


def test_a_wrong_answer_does_not_take_back_a_right_one(scene: Scene) -> None:
    def behave(sock: socket.socket, impostor: Impostor) -> None:
        greet(sock, impostor)
        left = 2 * (56 + 10)
        while left:
            left -= len(sock.recv(left))
        sock.sendall(b"".join(raw.ACK.pack(raw.FRAME_MAGIC, 2, 0, 0, ticket) for ticket in (0, 999)))

    impostor = Impostor(scene.descriptor, behave)
    link = scene.tx.transport.connect(impostor.descriptor(), scene.rx.regions)
    first, second = (link.submit([Write(0, 0, 0, 10)], b"t" * 16) for _ in range(2))
    scene.done(first)
    assert not scene.failed(second).quiescent
    link.close()
    impostor.close()


def test_answers_may_come_in_pieces(scene: Scene) -> None:
    answer = raw.ACK.pack(raw.FRAME_MAGIC, 2, 0, 0, 0)

    def behave(sock: socket.socket, impostor: Impostor) -> None:
        greet(sock, impostor)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.recv(1)
        for byte in answer:
            sock.sendall(bytes([byte]))

    impostor = Impostor(scene.descriptor, behave)
    link = scene.tx.transport.connect(impostor.descriptor(), scene.rx.regions)
    ticket = link.submit([Write(0, 0, 0, 10)], b"t" * 16)
    assert ticket == 0
    scene.done(ticket)
    link.close()
    impostor.close()


# Anything at all


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=300),
    nbytes=st.integers(0, 0xFFFFFFFF) | st.integers(0, 64),
    count=st.integers(0, 0xFFFF) | st.integers(0, 4),
    entries=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 64), st.integers(0, 1 << 64)), max_size=4),
)
def test_no_bytes_sent_change_what_is_not_granted(
    scene: Scene, data: bytes, nbytes: int, count: int, entries: list[tuple[int, int, int]]
) -> None:
    packed = [entry(region, size, offset % (1 << 64)) for region, size, offset in entries]
    token = scene.rx.grant(Range(1, 100, 50))
    with Raw(scene.descriptor) as visitor:
        visitor.send(frame(token, packed, data, nbytes=nbytes, count=count))
        visitor.finish()
        try:
            while visitor.socket.recv(4096):
                pass
        except ConnectionError:
            pass
    scene.rx.transport.revoke(token)
    scene.rx.arenas[1][100:150] = bytes(50)
    assert not any(scene.rx.arenas[1][:])
    assert not any(scene.rx.arenas[0][:4096])
