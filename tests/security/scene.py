"""An honest pair with work under way, all that an attack must leave as it is, and peers that speak by hand."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.auth

from kvpoll_fsm import Endpoint, KVPoll, Receiver, Sender
from kvpoll_fsm.connection import introduction
from kvpoll_fsm.messages import Abort, Bye, Frame, Hello, Message, Packet, Reserve, Welcome, decode, encode
from kvpoll_fsm.security import generate_keys
from kvpoll_memory import Faults
from tests.helpers import LAYOUT, SOON_S, Data, endpoint, make_data, on_driver, open_pair, parked, same, until

MOVING, PARKED = 1, 2
"""The rooms of a scene: one whose part is on its way, one whose sender has not come."""
Settings = dict[str, Any]


def key_settings(folder: Path, *names: str) -> dict[str, Settings]:
    """Settings of endpoints that all trust each other, by name."""
    return {name: {"keys": generate_keys(folder, name)[1], "authorized": folder} for name in names}


class Scene:
    """tx sends to rx: a part is held on its way, a reservation is parked."""

    def __init__(self, tx: Endpoint, rx: Endpoint, faults: Faults) -> None:
        self.tx, self.rx, self.faults = tx, rx, faults
        self.data: Data = make_data(100)
        faults.hold()
        self.sender, self.receiver = open_pair(tx, rx, MOVING)
        self.sender.send(self.data)
        until(lambda: faults.submitted, "the first write")
        self.early = rx.receiver(PARKED, peer=str(tx.address))
        until(lambda: parked(tx) == 1, "the reservation")

    def state(self) -> dict[str, Any]:
        """Every room, table, block and byte of both ends; how the clocks stand and whom a stranger is, apart."""
        return {name: on_driver(end, lambda end=end: state_of(end)) for name, end in (("tx", self.tx), ("rx", self.rx))}

    def settled(self) -> dict[str, Any]:
        """The state once acknowledgements are through."""
        settle(self.tx, self.rx)
        return self.state()

    def refused(self, plane: str = "control") -> dict[str, int]:
        return self.tx.refused()[plane]

    def finish(self) -> None:
        """The honest rooms end as if nothing had been."""
        self.faults.release()
        assert same(self.receiver.result(timeout=SOON_S), self.data)
        assert self.sender.wait(SOON_S) is KVPoll.Success
        late: Sender = self.tx.sender(PARKED, required_ranks=1)
        late.send(self.data)
        assert same(self.early.result(timeout=SOON_S), self.data)


def settle(*ends: Endpoint) -> None:
    """Wait until every acknowledgement is through."""

    def quiet() -> bool:
        return not any(on_driver(end, lambda end=end: _busy(end)) for end in ends)

    until(quiet, "acknowledgements")


def _busy(end: Endpoint) -> bool:
    core = end.driver.core
    return bool(core.unacked or core.owes_ack)


def state_of(end: Endpoint) -> dict[str, Any]:
    core = end.driver.core
    regions = [hashlib.sha256(region.buffer).hexdigest() for region in end.pool.regions()]
    honest = [c for c in core.connections.values() if c.offers]
    return {
        "rooms": [session.key() for session in core.sessions.values()],
        "parked": core.parking.key(),
        "blocks": core.accounts.load(),
        "peers": [(c.key(), dict(c.offers), c.block_tokens) for c in honest],
        "routes": {c.number: end.driver._control._routes.get(c.number) for c in honest},
        "bytes": regions,
    }


@contextmanager
def scene(tx: Settings | None = None, rx: Settings | None = None, **both: Any) -> Iterator[Scene]:
    faults = Faults()
    options = {"memory": {"faults": faults}}
    with (
        endpoint(transport_options=options, **both, **(tx or {})) as sending,
        endpoint(**both, **(rx or {})) as receiving,
    ):
        yield Scene(sending, receiving, faults)


class ByHand:
    """A peer without any code of ours but the codec: says what a test likes to an endpoint's control port."""

    def __init__(self, victim: Endpoint, own: Settings | None = None, *, name: bytes = b"e" * 16) -> None:
        self.name, self.target = name, victim.driver.core.options.incarnation
        self.seq = self.received = 0
        self._heard: deque[Message] = deque()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVTIMEO, int(SOON_S * 1000))
        if own is not None:
            public, secret = zmq.auth.load_certificate(own["keys"])
            self.curve(public, secret or b"", victim.address.key or b"")
        self.socket.connect(victim.address.place)

    def curve(self, public: bytes, secret: bytes, server: bytes) -> None:
        self.socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
        self.socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        self.socket.setsockopt(zmq.CURVE_SERVERKEY, server)

    def say(self, packet: Packet | bytes) -> None:
        self.socket.send(packet if isinstance(packet, bytes) else encode(packet))

    def hear(self, kind: type[Any]) -> Any:
        """The next packet of a kind."""
        while True:
            packet = decode(self.socket.recv())
            if isinstance(packet, kind):
                return packet

    def hello(self, name: bytes | None = None) -> bytes:
        """Introduce ourselves; returns the victim's incarnation."""
        self.say(hello(name or self.name))
        welcome: Welcome = self.hear(Welcome)
        return welcome.incarnation

    def frame(self, *messages: Message, ack: int = 0) -> None:
        """Room messages, in order; the victim must have welcomed us."""
        self.say(Frame(self.name, self.target, True, self.seq + 1, ack, messages))
        self.seq += len(messages)

    def told(self, kind: type[Any] = Abort) -> Any:
        """The next room message of a kind."""
        while True:
            while self._heard:
                message = self._heard.popleft()
                if isinstance(message, kind):
                    return message
            frame: Frame = self.hear(Frame)
            self._heard.extend(frame.messages[max(0, self.received + 1 - frame.first_seq) :])
            self.received = max(self.received, frame.first_seq + len(frame.messages) - 1)

    def close(self) -> None:
        """Say goodbye, so that nobody waits for our acknowledgement."""
        if self.socket.closed:
            return
        if self.seq:
            self.frame(Bye())
        self.socket.close(linger=1000 if self.seq else 0)
        self._context.term()

    def __enter__(self) -> ByHand:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def hello(name: bytes) -> Hello:
    return Hello(**introduction(name, LAYOUT, ()))


def reserve(room: int, rank: int = 0, ranks: int = 1) -> Reserve:
    return Reserve(room=room, rank=rank, ranks=ranks, receiver_generation=1)


def many(stack: ExitStack, victim: Endpoint, count: int, own: Settings | None = None) -> list[ByHand]:
    """So many peers by hand, each with a name of its own."""
    return [
        stack.enter_context(ByHand(victim, own, name=number.to_bytes(2, "big") * 8)) for number in range(1, count + 1)
    ]


def as_sent(packet: Packet) -> dict[str, Any]:
    """A packet as plain values, to be spoiled."""
    plain: dict[str, Any] = msgspec.msgpack.decode(encode(packet))
    return plain


__all__ = [
    "MOVING",
    "PARKED",
    "ByHand",
    "Receiver",
    "Scene",
    "as_sent",
    "hello",
    "key_settings",
    "many",
    "reserve",
    "scene",
    "settle",
    "state_of",
]
