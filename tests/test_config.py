from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvpoll_fsm import Address, AddressError, Deadlines, Endpoint, InvalidInput, PolicyError
from kvpoll_fsm.config import Config
from kvpoll_fsm.security import Keys, generate_keys
from kvpoll_fsm.selection import Policy
from tests.helpers import pool

HERE = Address.parse("tcp://127.0.0.1:0")
PLAIN = Config(HERE, None, Policy.parse("tcp"), Deadlines())


def config(**settings: Any) -> Config:
    return replace(PLAIN, **settings)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"checksum": "on"}, r"checksum='on': choose one of 'auto', True, False"),
        ({"checksum": 1}, r"checksum=1"),
        ({"arrays": "jax"}, r"arrays='jax': choose one of 'auto', 'numpy', 'torch'"),
        ({"isolation": "fork"}, r"isolation='fork': choose one of 'auto', 'process', 'thread'"),
        ({"workers": 0}, r"workers=0: give 1 to 64"),
        ({"workers": 65}, r"workers=65"),
        ({"workers": True}, r"workers=True"),
        ({"workers": 2.0}, r"workers=2.0"),
        ({"deadlines": 5}, r"deadlines=5"),
        ({"transport_options": {"tcq": {}}}, r"transport_options.*'tcq'"),
        ({"transport_options": {"tcp": 5}}, r"transport_options.*'tcp'"),
    ],
)
def test_a_bad_setting_is_named(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidInput, match=problem):
        config(**settings)


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "[::]"])
def test_a_wildcard_needs_an_address_for_peers(host: str) -> None:
    anywhere = Address.parse(f"tcp://{host}:0")
    with pytest.raises(AddressError, match="advertise="):
        config(listen=anywhere)
    with pytest.raises(AddressError, match="wildcard"):
        config(listen=anywhere, advertise=anywhere, insecure=True)
    assert config(listen=anywhere, advertise=HERE, insecure=True).advertise == HERE


def test_pain_24_beyond_this_machine_only_with_keys() -> None:
    there = Address.parse("tcp://10.0.0.1:0")
    with pytest.raises(AddressError, match=r"10\.0\.0\.1.*keys=, or insecure=True"):
        config(listen=there)
    with pytest.raises(AddressError, match="keys="):
        config(advertise=there)
    keys = Keys(b"p" * 40, b"s" * 40, frozenset())
    assert config(listen=there, keys=keys).keys is keys
    assert config(listen=there, insecure=True).insecure


def test_tcp_listens_where_the_control_plane_does_unless_told_otherwise() -> None:
    anywhere = config(listen=Address.parse("tcp://0.0.0.0:0"), advertise=HERE, insecure=True)
    assert anywhere.options_of("tcp") == {"host": "0.0.0.0", "advertise": "127.0.0.1"}
    assert PLAIN.options_of("tcp") == {"host": "127.0.0.1"}
    given = {"tcp": {"host": "::1", "streams": 2}}
    assert config(transport_options=given).options_of("tcp") == {"host": "::1", "streams": 2}
    assert given == {"tcp": {"host": "::1", "streams": 2}}
    assert PLAIN.options_of("memory") == {}


@pytest.mark.parametrize(
    ("settings", "error", "problem"),
    [
        ({"pool": None}, InvalidInput, r"pool=None: give a BlockPool"),
        ({"listen": "127.0.0.1:0"}, AddressError, "write tcp://host:port"),
        ({"listen": "tcp://0.0.0.0:0"}, AddressError, "advertise="),
        ({"listen": "tcp://::1:0"}, AddressError, "brackets"),
        ({"advertise": "tcp://*:5"}, AddressError, "wildcard|keys="),
        ({"transports": "fastest:tcp"}, PolicyError, "unknown mode 'fastest'"),
        ({"transports": "require:tcp,memory"}, PolicyError, "exactly one"),
        ({"transports": "prefer:tcp,tcp"}, PolicyError, "twice"),
        ({"transports": ""}, PolicyError, "names no transport"),
        ({"transports": 5}, PolicyError, "not a string"),
        ({"deadlines": {"stall_s": 1}}, InvalidInput, "deadlines="),
        ({"keys": "me.key_secret"}, InvalidInput, "go together"),
    ],
)
def test_an_endpoint_that_cannot_work_is_not_made(
    settings: dict[str, Any], error: type[Exception], problem: str
) -> None:
    with pytest.raises(error, match=problem):
        Endpoint(**{"pool": pool(1), **settings})


def test_keys_must_be_there_and_closed_to_others(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="kvpoll keygen"):
        Endpoint(pool=pool(1), keys=tmp_path / "me.key_secret", authorized=tmp_path)
    public, secret = generate_keys(tmp_path, "me")
    assert Endpoint(pool=pool(1), keys=secret, authorized=tmp_path).config.keys is not None
    secret.chmod(0o644)
    with pytest.raises(InvalidInput, match="chmod 600"):
        Endpoint(pool=pool(1), keys=secret, authorized=tmp_path)
    public.chmod(0o600)
    with pytest.raises(InvalidInput, match=r"give the \.key_secret file"):
        Endpoint(pool=pool(1), keys=public, authorized=tmp_path)


def test_its_text_does_not_show_what_transports_were_given() -> None:
    assert "hunter2" not in repr(config(transport_options={"tcp": {"password": "hunter2"}}))
