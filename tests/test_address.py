from __future__ import annotations

import pytest

from kvpoll_fsm import Address, AddressError

KEY = bytes(range(40))


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("tcp://127.0.0.1:0", "127.0.0.1", 0),
        ("tcp://127.0.0.1:65535", "127.0.0.1", 65535),
        ("tcp://[::1]:5555", "::1", 5555),
        ("tcp://[fe80::1%eth0]:7", "fe80::1%eth0", 7),
        ("tcp://node-3.rack_1.example:80", "node-3.rack_1.example", 80),
        ("tcp://0.0.0.0:0", "0.0.0.0", 0),
        ("tcp://*:9", "*", 9),
    ],
)
def test_reads_and_writes_the_same_text(text: str, host: str, port: int) -> None:
    address = Address.parse(text)
    assert (address.host, address.port, address.key) == (host, port, None)
    assert str(address) == text
    assert Address.parse(address) is address


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "write tcp://host:port"),
        ("127.0.0.1:80", "write tcp://host:port"),
        ("udp://127.0.0.1:80", "write tcp://host:port"),
        ("ipc:///tmp/x", "write tcp://host:port"),
        ("tcp://", "the port is a number"),
        ("tcp://127.0.0.1", "the port is a number"),
        ("tcp://127.0.0.1:", "the port is a number"),
        ("tcp://127.0.0.1:port", "the port is a number"),
        ("tcp://127.0.0.1:-1", "the port is a number"),
        ("tcp://127.0.0.1:+1", "the port is a number"),
        ("tcp://127.0.0.1:65536", "the port is a number from 0 to 65535"),
        ("tcp://127.0.0.1:٣", "the port is a number"),
        ("tcp://::1:80", "IPv6 host in brackets"),
        ("tcp://fe80::1:80", "IPv6 host in brackets"),
        ("tcp://[::1:80", "IPv6 host in brackets"),
        ("tcp://[::zz]:80", "IPv6"),
        ("tcp://[127.0.0.1]:80", "IPv6"),
        ("tcp://[]:80", "IPv6"),
        ("tcp://:80", "host is missing"),
        ("tcp://a b:80", "odd characters"),
        ("tcp://user@host:80", "odd characters"),
        ("tcp://host/path:80", "odd characters"),
        ("tcp://1.2.3.4;5.6.7.8:80", "odd characters"),
        ("tcp://bad!host:80", "odd characters"),
        ("tcp://host:80?", "curve="),
        ("tcp://host:80?curve=", "curve="),
        ("tcp://host:80?curve=zz", "curve="),
        ("tcp://host:80?key=" + "00" * 40, "curve="),
        ("tcp://host:80?curve=" + "00" * 39, "curve="),
    ],
)
def test_says_what_is_wrong_with_an_address(text: str, problem: str) -> None:
    with pytest.raises(AddressError, match=problem) as caught:
        Address.parse(text)
    assert caught.value.address == text


@pytest.mark.parametrize("value", [None, 5, b"tcp://127.0.0.1:1", ("127.0.0.1", 1)])
def test_what_is_no_text_is_no_address(value: object) -> None:
    with pytest.raises(AddressError, match="write tcp://host:port"):
        Address.parse(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "*", "[::0]", "[::%eth0]"])
def test_pain_22_nobody_reaches_a_wildcard(host: str) -> None:
    address = Address.parse(f"tcp://{host}:80")
    assert address.is_wildcard
    with pytest.raises(AddressError, match=r"wildcard.*advertise="):
        address.require_reachable()


def test_nobody_reaches_port_0() -> None:
    with pytest.raises(AddressError, match="a peer needs a real port"):
        Address.parse("tcp://127.0.0.1:0").require_reachable()
    address = Address.parse("tcp://127.0.0.1:80")
    assert address.require_reachable() is address


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("127.0.0.1", True),
        ("127.3.2.1", True),
        ("[::1]", True),
        ("localhost", True),
        ("10.0.0.1", False),
        ("[fe80::1%lo]", False),
        ("0.0.0.0", False),
        ("*", False),
        ("example", False),
    ],
)
def test_knows_what_only_this_machine_reaches(host: str, is_loopback: bool) -> None:
    assert Address.parse(f"tcp://{host}:80").is_loopback is is_loopback


def test_the_public_key_travels_in_the_text() -> None:
    address = Address("::1", 5, KEY)
    assert str(address) == f"tcp://[::1]:5?curve={KEY.hex()}"
    assert Address.parse(str(address)) == address
    assert address.place == "tcp://[::1]:5"
    assert address.with_port(6) == Address("::1", 6, KEY)
    assert address.with_key(None) == Address("::1", 5)
