"""What all transports prove to each other before anything else is read."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvpoll_mooncake.handshake
import kvpoll_shm.handshake
import kvpoll_tcp.handshake
from kvpoll_common.door import Refused
from kvpoll_common.handshake import HELLO_NBYTES, PROOF_NBYTES, WRONG_SECRET, Called, Caller, Kind, Opening, said_in
from kvpoll_fsm.errors import InvalidInput, MalformedMessage
from kvpoll_mooncake import wire as mooncake
from kvpoll_shm import wire as shm
from kvpoll_tcp import wire as tcp
from tests.transports import raw

WRITER = b"w" * 16
KINDS = {kind.name: kind for kind in (tcp.KIND, shm.KIND, mooncake.KIND)}


@dataclass(frozen=True)
class Us:
    """Who is called."""

    incarnation: bytes = b"i" * 16
    secret: bytes = b"s" * 32


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


def opened(kind: Kind, us: Us = Us(), theirs: Us = Us()) -> tuple[Caller, Called, bytes]:
    """Both have said hello; returns the caller's proof, too."""
    caller, called = Caller(kind, theirs, WRITER), Called(kind, us)
    said: list[bytes] = []
    called.hear(caller.hello, said.append)
    return caller, called, caller.prove(said[0])


def test_both_are_convinced(kind: Kind) -> None:
    caller, called, proof = opened(kind)
    assert called.writer == b""
    answer = called.check(proof)
    assert called.writer == WRITER
    caller.check(answer)


def test_what_is_said_by_hand(kind: Kind) -> None:
    """The bytes do not change by accident, and each field of both Hellos is in each proof."""
    caller, called = Caller(kind, Us(), WRITER), Called(kind, Us())
    said: list[bytes] = []
    called.hear(caller.hello, said.append)
    nonces = caller.hello[26:58], said[0][26:58]
    ours = raw.hello(b"i" * 16, nonces[0], kind.magic)
    theirs = raw.hello(b"i" * 16, nonces[1], kind.magic, writer=bytes(16))
    assert (caller.hello, said[0]) == (ours, theirs)
    role = f"kvpoll-{kind.name} ".encode()
    assert caller.prove(theirs) == raw.proof(b"s" * 32, role + b"sender", ours, theirs)
    assert called.check(caller.prove(theirs)) == raw.proof(b"s" * 32, role + b"receiver", ours, theirs)
    assert (len(ours), kind.version, len(kind.magic)) == (HELLO_NBYTES, 1, 8)


def test_magics_and_names_differ() -> None:
    assert len({kind.magic for kind in KINDS.values()}) == len(KINDS) == 3
    assert set(KINDS) == {"tcp", "shm", "mooncake"}


def test_every_connection_has_its_own_nonces(kind: Kind) -> None:
    said: list[bytes] = []
    for _ in range(50):
        caller = Caller(kind, Us(), WRITER)
        said.append(caller.hello)
        Called(kind, Us()).hear(caller.hello, said.append)
    assert len({hello[26:58] for hello in said}) == 100


def test_a_proof_holds_for_one_conversation(kind: Kind) -> None:
    caller, _, proof = opened(kind)
    again = Called(kind, Us())
    again.hear(caller.hello, lambda hello: None)
    with pytest.raises(Refused, match=WRONG_SECRET):
        again.check(proof)
    assert again.writer == b""
    other, called, _ = opened(kind)
    answer = called.check(other.prove(called._ours))
    late, _, _ = opened(kind)
    with pytest.raises(Refused, match="does not know the peer's secret"):
        late.check(answer)


def test_ones_own_proof_is_none_of_the_other_side(kind: Kind) -> None:
    caller, called, proof = opened(kind)
    with pytest.raises(Refused, match="does not know the peer's secret"):
        caller.check(proof)
    answer = called.check(proof)
    with pytest.raises(Refused, match=WRONG_SECRET):
        called.check(answer)


@pytest.mark.parametrize("other", KINDS.values(), ids=KINDS.keys())
def test_a_proof_for_one_transport_is_none_for_another(kind: Kind, other: Kind) -> None:
    """Not even where secrets, incarnations and Hellos are the same."""
    hellos = b"h" * HELLO_NBYTES * 2
    proofs = {each.proof(b"s" * 32, role, hellos) for each in (kind, other) for role in ("sender", "receiver")}
    assert len(proofs) == (2 if kind is other else 4)
    caller = Caller(other, Us(), WRITER)
    if kind is other:
        return
    answers: list[bytes] = []
    with pytest.raises(MalformedMessage, match=f"does not speak the kvpoll {kind.name} protocol"):
        Called(kind, Us()).hear(caller.hello, answers.append)
    assert not answers
    with pytest.raises(MalformedMessage):
        Caller(kind, Us(), WRITER).prove(caller.hello)


SPOILS: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda proof: b"",
    "zeros": lambda proof: bytes(PROOF_NBYTES),
    "cut": lambda proof: proof[:-1],
    "longer": lambda proof: proof + b"\0",
    "the first byte": lambda proof: bytes([proof[0] ^ 1]) + proof[1:],
    "the last byte": lambda proof: proof[:-1] + bytes([proof[-1] ^ 0x80]),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS.keys())
def test_nearly_a_proof_is_none(kind: Kind, spoil: Callable[[bytes], bytes]) -> None:
    caller, called, proof = opened(kind)
    with pytest.raises(Refused, match=WRONG_SECRET):
        called.check(spoil(proof))
    with pytest.raises(Refused, match="does not know the peer's secret"):
        caller.check(spoil(called.check(proof)))


def test_who_does_not_know_the_secret(kind: Kind) -> None:
    _, called, proof = opened(kind, theirs=Us(secret=b"S" * 32))
    with pytest.raises(Refused, match=WRONG_SECRET):
        called.check(proof)
    caller, called, _ = opened(kind)
    impostor = Called(kind, Us(secret=b"S" * 32))
    said: list[bytes] = []
    impostor.hear(caller.hello, said.append)
    proof = caller.prove(said[0])
    with pytest.raises(Refused, match=WRONG_SECRET):
        impostor.check(proof)
    with pytest.raises(Refused, match="does not know the peer's secret"):
        caller.check(impostor._proof("receiver"))


@pytest.mark.parametrize(
    ("change", "called_says", "caller_says"),
    [
        ({"version": 2}, "speaks another version of the wire format", "the peer speaks version 2"),
        ({"incarnation": b"j" * 16}, "means another start", "the peer was restarted"),
    ],
)
def test_who_means_another(kind: Kind, change: dict[str, Any], called_says: str, caller_says: str) -> None:
    """He is answered, so that he can say why; nothing more is heard of him."""
    other = raw.hello(**{"incarnation": b"i" * 16, "magic": kind.magic, **change})
    answers: list[bytes] = []
    with pytest.raises(Refused, match=called_says):
        Called(kind, Us()).hear(other, answers.append)
    assert len(answers) == 1
    with pytest.raises(Refused, match=caller_says):
        Caller(kind, Us(), WRITER).prove(other)


@given(st.binary(max_size=2 * HELLO_NBYTES))
def test_any_bytes_are_a_hello_or_malformed(data: bytes) -> None:
    for hello in (data, tcp.KIND.magic + data, tcp.KIND.magic + struct.pack("<H", 1) + b"i" * 16 + data):
        answers: list[bytes] = []
        try:
            Called(tcp.KIND, Us()).hear(hello, answers.append)
        except MalformedMessage:
            assert not answers
        except Refused:
            assert len(answers) == 1
        else:
            assert len(hello) == HELLO_NBYTES


def test_other_messages_are_no_opening() -> None:
    assert said_in(Opening(b"x")) == b"x"
    with pytest.raises(MalformedMessage, match="does not introduce itself"):
        said_in(shm.Ready())


READERS: dict[str, Callable[[bytes], object]] = {
    "tcp": kvpoll_tcp.handshake.read_descriptor,
    "shm": kvpoll_shm.handshake.read_descriptor,
    "mooncake": kvpoll_mooncake.handshake.read_descriptor,
}
DEEP = b"\x91" * 100_000
DESCRIPTORS: dict[str, msgspec.Struct] = {
    "tcp": kvpoll_tcp.handshake.new_identity("127.0.0.1", 1),
    "shm": kvpoll_shm.handshake.new_identity("name"),
    "mooncake": kvpoll_mooncake.handshake.new_identity("127.0.0.1", 1, "tcp", "P2PHANDSHAKE"),
}


def fields_of(name: str) -> dict[str, Any]:
    return {field: getattr(DESCRIPTORS[name], field) for field in DESCRIPTORS[name].__struct_fields__}


@pytest.mark.parametrize("name", READERS)
def test_descriptors_are_read_or_refused_by_one_rule(name: str) -> None:
    good = DESCRIPTORS[name]
    fields = fields_of(name)
    assert READERS[name](msgspec.msgpack.encode(fields)) == good
    for change in (
        {"secret": b"short"},
        {"incarnation": b""},
        {"host": ""},
        {"port": 0, "socket": ""},
        {"version": "1"},
    ):
        with pytest.raises(InvalidInput, match=f"no descriptor of a {name} transport"):
            READERS[name](msgspec.msgpack.encode({**fields, **change}))
    for data in (b"", b"\xc1", b"\x91", DEEP, b"\x81\xa1x" + DEEP, msgspec.msgpack.encode(fields)[:-1]):
        with pytest.raises(InvalidInput, match=f"no descriptor of a {name} transport"):
            READERS[name](data)
    with pytest.raises(InvalidInput, match=f"the peer speaks version 2 of the {name} wire format, we speak 1"):
        READERS[name](msgspec.msgpack.encode({**fields, "version": 2}))


@pytest.mark.parametrize("name", ["tcp", "mooncake"])
@pytest.mark.parametrize("host", ["example.org", "127.1", "fe80::1%a b", "fe80::1%" + "x" * 16, "1.2.3.4 "])
def test_a_host_that_is_no_address_is_refused(name: str, host: str) -> None:
    with pytest.raises(InvalidInput, match=f"no descriptor of a {name} transport"):
        READERS[name](msgspec.msgpack.encode({**fields_of(name), "host": host}))


@pytest.mark.parametrize("module", [shm, mooncake])
def test_messages_that_are_too_deep_are_malformed(module: Any) -> None:
    for data in (DEEP, b"\x92\x01" + DEEP, b"\x93\x01\xc4\x00" + DEEP):
        with pytest.raises(MalformedMessage):
            module.decode(data)
