"""CURVE keys: only peers with a trusted key are spoken to, in both directions. Pain 24."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest

from kvpoll_fsm import BlockPool, Deadlines, Endpoint, FailureCode, Field, KVPoll, Layout
from kvpoll_fsm.errors import AddressError, InvalidInput
from kvpoll_fsm.security import Keys, generate_keys
from tests.helpers import ISOLATION

LAYOUT = Layout(8, [Field("x", "float32", (4,))])
SOON = Deadlines(bootstrap_s=1.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Keys of tx, rx and a stranger; `trusted` holds those of tx and rx."""
    (tmp_path / "trusted").mkdir()
    for name in ("tx", "rx", "stranger"):
        public, _ = generate_keys(tmp_path / name, name)
        if name != "stranger":
            shutil.copy(public, tmp_path / "trusted")
    return tmp_path


def endpoint(folder: Path, name: str, authorized: str = "trusted") -> Endpoint:
    keys = folder / name / f"{name}.key_secret"
    settings = {"authorized": folder / authorized, "deadlines": SOON, "isolation": os.environ[ISOLATION]}
    return Endpoint(pool=BlockPool(LAYOUT, 8), keys=keys, **settings)


def test_two_endpoints_that_trust_each_other(folder: Path) -> None:
    data = np.ones((20, 4), np.float32)
    with endpoint(folder, "tx") as tx, endpoint(folder, "rx") as rx:
        assert "?curve=" in str(tx.address)
        sender, receiver = tx.sender(1), rx.receiver(1, peer=str(tx.address))
        sender.send({"x": data})
        assert np.array_equal(receiver.result(10)["x"], data)


def test_pain_24_a_peer_with_a_key_that_is_not_trusted_changes_nothing(folder: Path) -> None:
    shutil.copytree(folder / "trusted", folder / "wide")
    shutil.copy(folder / "stranger" / "stranger.key", folder / "wide")
    with endpoint(folder, "tx") as tx, endpoint(folder, "stranger", "wide") as stranger:
        sender, receiver = tx.sender(1), stranger.receiver(1, peer=str(tx.address))
        assert receiver.wait(10) is KVPoll.Failed
        failure = receiver.failure
        assert failure is not None
        assert failure.code is FailureCode.DeadlinePassed
        assert tx.driver._control.refused >= 1
        assert not tx.driver.core.connections
        assert sender.poll() is not KVPoll.Success


def test_a_peer_without_keys_is_refused_before_anything_is_sent(folder: Path) -> None:
    with endpoint(folder, "tx") as tx, Endpoint(pool=BlockPool(LAYOUT, 8), deadlines=SOON, isolation="thread") as bare:
        with pytest.raises(AddressError, match="wants keys"):
            bare.receiver(1, peer=str(tx.address))
        with pytest.raises(AddressError, match="key is missing"):
            tx.receiver(1, peer=str(bare.address))
        receiver = bare.receiver(2, peer=str(tx.address).partition("?")[0])
        assert receiver.wait(10) is KVPoll.Failed
        assert not tx.driver.core.connections


def test_an_address_with_another_key_is_refused(folder: Path) -> None:
    stranger = Keys.load(folder / "stranger" / "stranger.key_secret", folder / "trusted")
    with endpoint(folder, "tx") as tx, endpoint(folder, "rx") as rx:
        forged = str(tx.address.with_key(stranger.public))
        with pytest.raises(AddressError, match="authorized"):
            rx.receiver(1, peer=forged)


def test_key_files(folder: Path) -> None:
    secret = folder / "tx" / "tx.key_secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    keys = Keys.load(secret, folder / "trusted")
    assert len(keys.public) == len(keys.secret) == 40
    assert len(keys.authorized) == 2
    assert keys.secret.decode() not in repr(keys)
    with pytest.raises(InvalidInput, match="exists already"):
        generate_keys(folder / "tx", "tx")
    with pytest.raises(InvalidInput, match="use letters"):
        generate_keys(folder, "../x")


def test_bad_key_files_are_told_apart(folder: Path, tmp_path: Path) -> None:
    secret, trusted = folder / "tx" / "tx.key_secret", folder / "trusted"
    with pytest.raises(InvalidInput, match="kvpoll keygen"):
        Keys.load(folder / "nobody.key_secret", trusted)
    public = folder / "tx" / "tx.key"
    public.chmod(0o600)
    with pytest.raises(InvalidInput, match="holds no secret key"):
        Keys.load(public, trusted)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match=r"holds no \.key file"):
        Keys.load(secret, tmp_path / "empty")
    secret.chmod(0o644)
    with pytest.raises(InvalidInput, match="chmod 600"):
        Keys.load(secret, trusted)


def test_keys_and_authorized_go_together(folder: Path) -> None:
    with pytest.raises(InvalidInput, match="go together"):
        Endpoint(pool=BlockPool(LAYOUT, 8), keys=folder / "tx" / "tx.key_secret")


@pytest.mark.parametrize("listen", ["tcp://192.0.2.1:0", "tcp://[2001:db8::1]:0"])
def test_beyond_this_machine_only_with_keys_or_on_ones_own_word(listen: str) -> None:
    with pytest.raises(AddressError, match="insecure=True"):
        Endpoint(pool=BlockPool(LAYOUT, 8), listen=listen)
    Endpoint(pool=BlockPool(LAYOUT, 8), listen=listen, insecure=True)
