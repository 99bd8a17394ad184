"""What people write: addresses, policies, layouts, deadlines, settings of endpoints and of the tcp transport."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from kvpoll_common.addresses import split_advertised
from kvpoll_fsm.address import Address
from kvpoll_fsm.config import Config
from kvpoll_fsm.connection import introduction
from kvpoll_fsm.deadlines import GATES, Deadlines
from kvpoll_fsm.errors import AddressError, InvalidInput, PolicyError
from kvpoll_fsm.layout import ITEMSIZE, Field, Layout
from kvpoll_fsm.messages import Hello, decode, encode
from kvpoll_fsm.selection import Policy
from kvpoll_tcp.settings import TcpSettings
from tests.fuzz.choices import Choices

PLACE = re.compile(r"tcp://(\*|[A-Za-z0-9._-]+|\[[0-9a-fA-F:.]+(%[A-Za-z0-9._-]+)?\]):[0-9]{1,5}")
"""What ZeroMQ is given."""


def address(data: bytes) -> None:
    """An address: one that reads back as itself, or AddressError."""
    text = data.decode("utf-8", "surrogateescape")
    try:
        taken = Address.parse(text)
    except AddressError:
        return
    assert PLACE.fullmatch(taken.place), taken.place
    assert Address.parse(str(taken)) == taken
    assert Address.parse(taken.place) == taken.with_key(None)
    assert taken.with_port(9).port == 9
    assert not (taken.is_loopback and taken.is_wildcard)
    try:
        assert taken.require_reachable() is taken
    except AddressError:
        assert taken.is_wildcard or not taken.port


def policy(data: bytes) -> None:
    """A policy: one that reads back as itself and uses nothing it does not name, or PolicyError."""
    text = data.decode("utf-8", "surrogateescape")
    try:
        taken = Policy.parse(text)
    except PolicyError:
        return
    assert Policy.parse(str(taken)) == taken
    assert taken.names
    assert set(taken.names) <= {name.strip() for name in text.rpartition(":")[2].split(",")}
    assert taken.candidates(taken.names, taken.names) == taken.names
    assert len(taken.names) == 1 or taken.mode == "prefer"


def advertised(data: bytes) -> None:
    """Where peers reach the data port: host and port, or AddressError."""
    try:
        _, port = split_advertised(data.decode("utf-8", "surrogateescape"))
    except AddressError:
        return
    assert port is None or 0 < port < 1 << 16


NUMBERS: tuple[Any, ...] = (0, 1, 2, 128, -1, 1 << 31, 1 << 40, 1 << 63, 10**400, True, 0.5, float("nan"), 1e300)
VALUES: tuple[Any, ...] = (*NUMBERS, None, "", "auto", "numpy", "tcp", b"x", (), [], {}, (1, 2), {"tcp": {}}, object)


def value(choices: Choices) -> Any:
    return choices.text(12) if choices.flag(4) else choices.pick(VALUES)


def field(choices: Choices) -> Field:
    name = choices.text(140) if choices.flag(4) else choices.pick(("x", "embeddings", "aux", ""))
    dtype = value(choices) if choices.flag(4) else choices.pick(list(ITEMSIZE))
    shape = tuple(choices.pick(NUMBERS) if choices.flag(8) else 1 + choices.below(9) for _ in range(choices.below(18)))
    return Field(name, dtype, value(choices) if choices.flag(8) else shape, choices.flag())


def layout(data: bytes) -> None:
    """A layout: one that a peer can be told of and agrees with, or InvalidInput."""
    choices = Choices(data)
    try:
        fields = [field(choices) for _ in range(choices.below(5))]
        taken = Layout(choices.pick(NUMBERS) if choices.flag() else 1 + choices.below(512), fields)
    except InvalidInput:
        return
    hello = Hello(**introduction(bytes(16), taken, ()))
    heard = decode(encode(hello))
    assert heard == hello
    theirs = [Field(f.name, f.dtype, f.shape, f.per_room) for f in hello.fields]
    assert taken.differences(theirs) == ()
    assert Layout(1, theirs).fingerprint == taken.fingerprint


def build(made: Callable[..., Any], names: tuple[str, ...], choices: Choices) -> Any:
    """Something made of keyword settings, or None if it says InvalidInput."""
    wanted = {choices.pick(names): value(choices) for _ in range(1 + choices.below(4))}
    try:
        return made(**wanted)
    except InvalidInput:
        return None


CLOCKS = tuple(Deadlines.__dataclass_fields__)
TCP = tuple(TcpSettings.__dataclass_fields__)
OF_CONFIG = ("deadlines", "checksum", "arrays", "isolation", "transport_options", "workers")


def settings(data: bytes) -> None:
    """Keyword settings of any type: taken and usable, or InvalidInput."""
    choices = Choices(data)
    deadlines = build(Deadlines, CLOCKS, choices)
    if deadlines is not None:
        assert all(deadlines.of(*gate) > 0 for gate in GATES)
    tcp = build(TcpSettings, TCP, choices)
    if tcp is not None:
        assert tcp.streams >= 1
        assert tcp.handshake_s > 0
    try:
        listen = Address.parse(choices.text(30) if choices.flag(4) else "tcp://127.0.0.1:0")
    except AddressError:
        return

    def config(**more: Any) -> Config:
        return Config(**{"listen": listen, "advertise": None, "policy": Policy("require", ("tcp",)),
                         "deadlines": Deadlines(), **more})  # fmt: skip

    taken = build(config, OF_CONFIG, choices)
    if taken is not None:
        assert isinstance(taken.options_of("tcp"), dict)
        assert taken.listen.is_loopback, "others could reach an endpoint without keys"
