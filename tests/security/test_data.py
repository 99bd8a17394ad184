"""The data plane of tcp: whoever is not entitled changes no byte, while an honest part is on its way. Pain 24.

Eve knows the data port. In some tests she knows the secret as well, so she is a peer that misbehaves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from kvpoll_fsm import BlockPool, Endpoint, Field, KVPoll, Layout, Receiver, Sender
from kvpoll_tcp.receiver import Reader
from tests.helpers import SOON_S, endpoint, make_data, on_driver, open_pair, same, until
from tests.security.scene import settle, state_of
from tests.transports import raw
from tests.transports.raw import Raw, entry, frame, hello

UNKNOWN, OUT_OF_RANGE = 1, 2
FOREIGN = "a write under the token of another writer"


class Scene:
    """A part of room 1 that has left the sender and not yet landed, and a room 2 that waits for its sender."""

    def __init__(self, tx: Endpoint, rx: Endpoint, gate: threading.Event) -> None:
        self.tx, self.rx, self._gate = tx, rx, gate
        self.data = make_data(100)
        self.sender, self.receiver = open_pair(tx, rx, 1)
        self.sender.send(self.data)
        until(lambda: held(rx), "the honest frame")
        self.early: Receiver = rx.receiver(2, peer=str(tx.address))
        until(lambda: on_driver(tx, lambda: len(tx.driver.core.parking)) == 1, "the reservation")
        settle(tx, rx)

    @property
    def transport(self) -> Any:
        return self.rx.driver.transports["tcp"]

    @property
    def descriptor(self) -> bytes:
        return self.transport.descriptor()  # type: ignore[no-any-return]

    @property
    def tokens(self) -> list[bytes]:
        return list(self.transport._grants._grants)

    def state(self) -> dict[str, Any]:
        grants = {token: grant.revoked for token, grant in self.transport._grants._grants.items()}
        return {"tx": on_driver(self.tx, lambda: state_of(self.tx)), "rx": self.rx_state(), "grants": grants}

    def rx_state(self) -> dict[str, Any]:
        return on_driver(self.rx, lambda: state_of(self.rx))  # type: ignore[no-any-return]

    def refused(self) -> dict[str, int]:
        return self.rx.refused()["tcp"]

    def finish(self) -> None:
        self._gate.set()
        assert same(self.receiver.result(timeout=SOON_S), self.data)
        assert self.sender.wait(SOON_S) is KVPoll.Success
        late: Sender = self.tx.sender(2, required_ranks=1)
        late.send(self.data)
        assert same(self.early.result(timeout=SOON_S), self.data)


def held(rx: Endpoint) -> bool:
    listener: Any = rx.driver.transports["tcp"]._listener  # type: ignore[attr-defined]
    return any(getattr(reader, "is_held", False) for reader in listener._known)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing of an honest writer lands before it is set, though its frame and its token have been read."""
    gate, pour = threading.Event(), Reader._pour

    def wait(self: Any, *arguments: Any) -> Any:
        if self._writer != raw.WRITER:
            self.is_held = True
            assert gate.wait(30)
        return pour(self, *arguments)

    monkeypatch.setattr(Reader, "_pour", wait)
    yield gate
    gate.set()


@pytest.fixture
def scene(gate: threading.Event) -> Iterator[Scene]:
    with endpoint("tcp") as tx, endpoint("tcp") as rx:
        yield Scene(tx, rx, gate)


# Who does not know the secret


def transcript(scene: Scene) -> tuple[bytes, bytes]:
    """What an honest sender said in its handshake: Hello and proof, as a listener on the wire has them."""
    with Raw(scene.descriptor, shake_hands=False) as visitor:
        said = hello(visitor.peer["incarnation"])
        visitor.send(said)
        proof = raw.proof(visitor.peer["secret"], b"kvpoll-tcp sender", said, visitor.read(raw.HELLO_NBYTES))
        visitor.send(proof)
        visitor.read(32)
    return said, proof


def replay(visitor: Raw, scene: Scene) -> str:
    said, proof = transcript(scene)
    visitor.send(said)
    visitor.read(raw.HELLO_NBYTES)
    visitor.send(proof + frame(scene.tokens[0], [entry(0, 4, 0)], b"oops"))
    return "does not know our secret"


def guess(visitor: Raw, scene: Scene) -> str:
    said = hello(visitor.peer["incarnation"])
    visitor.send(said)
    visitor.send(raw.proof(bytes(32), b"kvpoll-tcp sender", said, visitor.read(raw.HELLO_NBYTES)))
    return "does not know our secret"


def reflect(visitor: Raw, scene: Scene) -> str:
    """Ask the receiver itself for the proof, by playing its own words back to it."""
    visitor.send(hello(visitor.peer["incarnation"]))
    theirs = visitor.read(raw.HELLO_NBYTES)
    with Raw(scene.descriptor, shake_hands=False) as second:
        second.send(theirs)
        second.read(raw.HELLO_NBYTES)
        second.send(raw.proof(bytes(32), b"kvpoll-tcp receiver", theirs, theirs))
        assert second.is_dropped()
    visitor.send(bytes(32))
    return "does not know our secret"


def another_start(visitor: Raw, scene: Scene) -> str:
    said = hello(b"i" * 16)
    visitor.send(said)
    theirs = visitor.read(raw.HELLO_NBYTES)
    visitor.send(raw.proof(visitor.peer["secret"], b"kvpoll-tcp sender", said, theirs))
    return "means another start of this endpoint, or another endpoint"


def cut(visitor: Raw, scene: Scene) -> str:
    visitor.send(hello(visitor.peer["incarnation"])[:-1])
    visitor.finish()
    return "left, or took too long, before the handshake was over"


@pytest.mark.parametrize("attack", [replay, guess, reflect, another_start, cut])
def test_pain_24_who_cannot_prove_the_secret_is_not_heard(scene: Scene, attack: Callable[[Raw, Scene], str]) -> None:
    before = scene.state()
    with Raw(scene.descriptor, shake_hands=False) as visitor:
        reason = attack(visitor, scene)
        assert visitor.is_dropped()
    until(lambda: scene.refused().get(reason), f"{reason} to be counted")
    assert scene.state() == before
    scene.finish()


# Who knows the secret, and has no token of its own


def test_frames_that_were_heard_land_nothing_on_another_connection(scene: Scene) -> None:
    """A token is bound to the transport that used it first, and that was the honest one."""
    before = scene.state()
    ((token, grant),) = [item for item in scene.transport._grants._grants.items() if item[1].writer]
    with Raw(scene.descriptor) as eve:
        for region, starts in grant._starts.items():
            eve.send(frame(token, [entry(region, 1, start) for start in starts], b"o" * len(starts)))
            assert eve.verdict() == UNKNOWN
    assert scene.refused() == {FOREIGN: len(grant._starts)}
    assert scene.state() == before
    scene.finish()


def test_guessed_tokens_land_nothing(scene: Scene) -> None:
    before = scene.state()
    token = scene.tokens[0]
    guesses = [bytes(16), b"\xff" * 16, token[::-1], token[:-1] + bytes([token[-1] ^ 1])]
    with Raw(scene.descriptor) as eve:
        for each in guesses:
            eve.send(frame(each, [entry(0, 4, 0)], b"oops"))
            assert eve.verdict() == UNKNOWN
    assert scene.state() == before
    scene.finish()


def test_truncated_and_malformed_frames_land_nothing(scene: Scene) -> None:
    before = scene.state()
    whole = frame(scene.tokens[0], [entry(0, 4, 0), entry(1, 4, 0)], b"oopsoops")
    for length in (1, 39, 41, 70):
        with Raw(scene.descriptor) as eve:
            eve.send(whole[:length])
            eve.finish()
            assert eve.is_dropped()
    for spoiled in (frame(scene.tokens[0], [entry(0, 4, 0)], b"", nbytes=0xFFFFFFFF), b"\xee" * len(whole)):
        with Raw(scene.descriptor) as eve:
            eve.send(spoiled)
            assert eve.is_dropped()
    assert scene.state() == before
    scene.finish()


# Who has a token: for what, and how long

TINY = Layout(4, [Field("x", "int64")])
RANGE = "a write outside the granted ranges"


def test_a_token_admits_its_own_blocks_and_ends_with_its_room() -> None:
    with endpoint("tcp", pool=BlockPool(TINY, 8)) as tx, endpoint("tcp", pool=BlockPool(TINY, 8)) as rx:
        transport: Any = rx.driver.transports["tcp"]
        rooms = []
        for room in (1, 2):
            rooms.append(rx.receiver(room, peer=str(tx.address), tokens=8))
            until(lambda room=room: len(transport._grants._grants) == room, "the grant")  # type: ignore[misc]
        (mine, own), (_, other) = transport._grants._grants.items()
        before = bytes(rx.pool.regions()[0].buffer)
        foreign, size = other._starts[0][0], len(before)
        wrong = [(0, foreign), (0, size), (0, size - 4), (0, (1 << 64) - 8), (7, own._starts[0][0])]
        with Raw(transport.descriptor()) as eve:
            for region, offset in wrong:
                eve.send(frame(mine, [entry(0, 8, own._starts[0][0]), entry(region, 8, offset)], b"overflow" * 2))
                assert eve.verdict() == OUT_OF_RANGE
            assert rx.refused()["tcp"] == {RANGE: len(wrong)}
            for receiver in rooms:
                receiver.abort("enough")
                assert receiver.wait_quiescent(SOON_S)
            eve.send(frame(mine, [entry(0, 8, own._starts[0][0])], b"too late"))
            assert eve.verdict() == UNKNOWN
        assert bytes(rx.pool.regions()[0].buffer) == before
        assert not transport._grants._grants


def test_a_token_ends_with_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same blocks are granted again and again; who kept an old token cannot write into a later part."""
    with endpoint("tcp", pool=BlockPool(TINY, 8)) as tx, endpoint("tcp", pool=BlockPool(TINY, 8)) as rx:
        transport: Any = rx.driver.transports["tcp"]
        tokens: list[bytes] = []
        verdicts: list[int] = []
        with Raw(transport.descriptor()) as eve:
            pour = Reader._pour

            def try_the_old_ones(self: Any, grant: Any, *arguments: Any) -> Any:
                for token in tokens:
                    eve.send(frame(token, [entry(0, 8, grant._starts[0][0])], b"too late"))
                    verdicts.append(eve.verdict())
                result = pour(self, grant, *arguments)
                tokens.append(grant.token)
                return result

            monkeypatch.setattr(Reader, "_pour", try_the_old_ones)
            data = {"x": np.arange(20)}
            tx.sender(1, required_ranks=1).send(data)
            receiver = rx.receiver(1, peer=str(tx.address), tokens=8)
            assert same(receiver.result(timeout=SOON_S), data)
        assert len(set(tokens)) == 3
        assert verdicts == [UNKNOWN] * 3
