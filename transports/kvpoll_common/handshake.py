"""How two transports meet: both prove that they know the secret of the called one's descriptor. No input and output.

    caller -> called   Hello   8s magic  H version  16s incarnation meant  32s nonce  16s writer
    called -> caller   Hello   8s magic  H version  16s incarnation found  32s nonce  16s zero
    caller -> called   Proof   32s HMAC-SHA256(secret, role | caller's Hello | called one's Hello)
    called -> caller   Proof   the same for the other role

Numbers are little-endian. Nothing else is read before. Each proof covers both nonces, the prover's role and the
transport's name: neither an old conversation, nor the other side's own proof, nor one made for another transport can
be played back. The writer is the calling transport: all its connections give the same number, nobody else knows it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Protocol, TypeVar

import msgspec
from msgspec import Meta

from kvpoll_common.door import Refused
from kvpoll_fsm.errors import InvalidInput, MalformedMessage

__all__ = [
    "HELLO_NBYTES",
    "PROOF_NBYTES",
    "WRITER_NBYTES",
    "WRONG_SECRET",
    "Called",
    "Caller",
    "Identity",
    "Incarnation",
    "Kind",
    "Opening",
    "Secret",
    "decode_descriptor",
    "fresh",
    "said_in",
]

WRONG_SECRET = "does not know our secret"

PROOF_NBYTES = 32
WRITER_NBYTES = 16
_INCARNATION_NBYTES = 16
_SECRET_NBYTES = 32
_NONCE_NBYTES = 32
_HELLO = struct.Struct(f"<8sH{_INCARNATION_NBYTES}s{_NONCE_NBYTES}s{WRITER_NBYTES}s")
HELLO_NBYTES = _HELLO.size

Incarnation = Annotated[bytes, Meta(min_length=_INCARNATION_NBYTES, max_length=_INCARNATION_NBYTES)]
Secret = Annotated[bytes, Meta(min_length=_SECRET_NBYTES, max_length=_SECRET_NBYTES)]


@dataclass(frozen=True, slots=True)
class Kind:
    """Which transport it is, and which version of its wire format.

    Attributes:
        name: The transport's.
        magic: The first 8 bytes that each side says.
        version: The only one that is spoken.
    """

    name: str
    magic: bytes
    version: int

    def unpack(self, hello: bytes) -> tuple[int, bytes, bytes]:
        """Version, incarnation and writer that a Hello says.

        Raises:
            MalformedMessage: Somebody who does not speak this protocol.
        """
        if len(hello) != HELLO_NBYTES or not hello.startswith(self.magic):
            raise MalformedMessage(f"does not speak the kvpoll {self.name} protocol")
        _, version, incarnation, _, writer = _HELLO.unpack(hello)
        return version, incarnation, writer

    def proof(self, secret: bytes, role: str, hellos: bytes) -> bytes:
        """What one in this role shows; `hellos` are the caller's and the called one's."""
        return hmac.new(secret, f"kvpoll-{self.name} {role}".encode() + hellos, hashlib.sha256).digest()


class Opening(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """A Hello, or a Proof, where a transport sends messages."""

    said: Annotated[bytes, Meta(max_length=HELLO_NBYTES)]


def said_in(message: object) -> bytes:
    """What an Opening says.

    Raises:
        MalformedMessage: Another message.
    """
    if not isinstance(message, Opening):
        raise MalformedMessage("does not introduce itself")
    return message.said


class Identity(Protocol):
    """The part of a descriptor that is proved."""

    @property
    def incarnation(self) -> bytes:
        """Which start of the transport."""
        ...

    @property
    def secret(self) -> bytes:
        """What both sides prove to know."""
        ...


class _Side:
    def __init__(self, kind: Kind, identity: Identity, writer: bytes) -> None:
        self._kind = kind
        self._identity = identity
        nonce = secrets.token_bytes(_NONCE_NBYTES)
        self._ours = _HELLO.pack(kind.magic, kind.version, identity.incarnation, nonce, writer)
        self._hellos = b""

    def _proof(self, role: str) -> bytes:
        return self._kind.proof(self._identity.secret, role, self._hellos)


class Caller(_Side):
    """The caller's half, of one connection: say `hello`, answer with `prove`, end with `check`."""

    def __init__(self, kind: Kind, peer: Identity, writer: bytes = bytes(WRITER_NBYTES)) -> None:
        """Make a fresh Hello for whoever we mean, as the transport of number `writer`."""
        super().__init__(kind, peer, writer)

    @property
    def hello(self) -> bytes:
        """What is said first."""
        return self._ours

    def prove(self, hello: bytes) -> bytes:
        """Our proof, for one who says this.

        Raises:
            MalformedMessage: Whoever answers does not speak this protocol.
            Refused: It is another one, or speaks another version.
        """
        version, incarnation, _ = self._kind.unpack(hello)
        if version != self._kind.version:
            raise Refused(_other_version(self._kind, version))
        if incarnation != self._identity.incarnation:
            raise Refused("another transport answers at the peer's address: the peer was restarted")
        self._hellos = self._ours + hello
        return self._proof("sender")

    def check(self, proof: bytes) -> None:
        """Check the called one's proof.

        Raises:
            Refused: It is none.
        """
        if not hmac.compare_digest(proof, self._proof("receiver")):
            raise Refused("whoever answers at the peer's address does not know the peer's secret")


class Called(_Side):
    """The called one's half, of one connection: `hear` a Hello, `check` a proof, and show the one it returns.

    Attributes:
        writer: The number of the transport that called, once it has proved itself.
    """

    def __init__(self, kind: Kind, identity: Identity) -> None:
        """Make a fresh Hello."""
        super().__init__(kind, identity, bytes(WRITER_NBYTES))
        self.writer = b""

    def hear(self, hello: bytes, answer: Callable[[bytes], object]) -> None:
        """Take the caller's Hello, and say ours by `answer`, even where we part ways: so that he can say why.

        Raises:
            MalformedMessage: He does not speak this protocol; he is not answered.
            Refused: He means another one, or speaks another version.
        """
        version, incarnation, _ = self._kind.unpack(hello)
        answer(self._ours)
        if version != self._kind.version:
            ours = self._kind.version
            raise Refused("speaks another version of the wire format", f"{version}, we speak {ours}")
        if incarnation != self._identity.incarnation:
            raise Refused("means another start of this endpoint, or another endpoint")
        self._hellos = hello + self._ours

    def check(self, proof: bytes) -> bytes:
        """Check the caller's proof; returns ours.

        Raises:
            Refused: He does not know our secret.
        """
        if not hmac.compare_digest(proof, self._proof("sender")):
            raise Refused(WRONG_SECRET)
        _, _, self.writer = self._kind.unpack(self._hellos[:HELLO_NBYTES])
        return self._proof("receiver")


def fresh() -> tuple[bytes, bytes]:
    """A new incarnation and its secret."""
    return secrets.token_bytes(_INCARNATION_NBYTES), secrets.token_bytes(_SECRET_NBYTES)


class _Versioned(Protocol):
    @property
    def version(self) -> int: ...


D = TypeVar("D", bound=_Versioned)


def decode_descriptor(data: bytes, kind: Kind, form: type[D]) -> D:
    """Read what a peer says of its transport.

    Raises:
        InvalidInput: It is no descriptor of this kind, or one of another version.
    """
    try:
        descriptor = msgspec.msgpack.decode(data, type=form)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors too
        raise InvalidInput(f"no descriptor of a {kind.name} transport: {error}") from error
    if descriptor.version != kind.version:
        raise InvalidInput(_other_version(kind, descriptor.version))
    return descriptor


def _other_version(kind: Kind, theirs: int) -> str:
    return f"the peer speaks version {theirs} of the {kind.name} wire format, we speak {kind.version}"
