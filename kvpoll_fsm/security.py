"""Who may talk to an endpoint: CURVE keys for the control plane.

Key files are ZeroMQ certificates, as `zmq.auth` writes and reads them: NAME.key holds the public key,
NAME.key_secret both. An endpoint with keys talks only to peers whose public key is in its folder of authorized
keys, in both directions, and everything said is encrypted. The data plane's secrets travel inside.
"""

from __future__ import annotations

import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path

import zmq
import zmq.auth
import zmq.utils.z85

from kvpoll_fsm.address import Address
from kvpoll_fsm.errors import AddressError, InvalidInput

__all__ = ["Keys", "check_peer", "generate_keys"]


@dataclass(frozen=True)
class Keys:
    """An endpoint's own key pair, and the public keys it trusts. Keys are Z85 text, 40 bytes.

    Attributes:
        public: What peers must have in their folder.
        secret: Never shown or sent.
        authorized: Public keys of the peers that may connect, or be connected to.
    """

    public: bytes
    secret: bytes = field(repr=False)
    authorized: frozenset[bytes]

    @classmethod
    def load(cls, secret_file: str | Path, authorized_dir: str | Path) -> Keys:
        """Read the key files.

        Args:
            secret_file: NAME.key_secret, readable by its owner alone.
            authorized_dir: A folder with the NAME.key files of trusted peers.

        Raises:
            InvalidInput: A file or folder that is missing, unreadable, no key file, or open to others.
        """
        path = Path(secret_file)
        try:
            exposed = path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
            public, secret = zmq.auth.load_certificate(path)
            trusted = zmq.auth.load_certificates(Path(authorized_dir))
        except (OSError, ValueError, IndexError) as error:  # IndexError: a line without a value
            raise InvalidInput(f"keys: {error}; make key files with `kvpoll keygen`") from error
        if exposed:
            raise InvalidInput(f"keys: {path} is open to other users: chmod 600 {path}")
        if secret is None:
            raise InvalidInput(f"keys: {path} holds no secret key: give the .key_secret file")
        if not trusted:
            raise InvalidInput(f"keys: {authorized_dir} holds no .key file, so no peer could connect")
        if not all(map(_is_key, (public, secret, *trusted))) or zmq.curve_public(secret) != public:
            raise InvalidInput(f"keys: {path} or a file in {authorized_dir} was changed: a key in it is none")
        return cls(public, secret, frozenset(trusted))

    def protect_listener(self, router: zmq.Socket[bytes]) -> None:
        """Make a socket that peers come to speak CURVE; whom it admits is decided by `admits`."""
        router.setsockopt(zmq.CURVE_SERVER, 1)
        router.setsockopt(zmq.CURVE_SECRETKEY, self.secret)
        router.setsockopt(zmq.ZAP_DOMAIN, b"kvpoll")

    def protect_caller(self, dealer: zmq.Socket[bytes], server_key: bytes) -> None:
        """Make a socket that goes to a peer speak CURVE to exactly the holder of `server_key`."""
        dealer.setsockopt(zmq.CURVE_PUBLICKEY, self.public)
        dealer.setsockopt(zmq.CURVE_SECRETKEY, self.secret)
        dealer.setsockopt(zmq.CURVE_SERVERKEY, server_key)

    def admits(self, public: bytes) -> bool:
        """Whether the holder of this public key (Z85) is trusted."""
        return public in self.authorized


def check_peer(keys: Keys | None, address: Address) -> None:
    """Refuse a peer that could not be spoken to, before anything is sent.

    Raises:
        AddressError: Only one side has keys, or the peer's key is not trusted.
    """
    if keys is None and address.key is not None:
        raise AddressError(address.place, "the endpoint there wants keys: pass keys= and authorized=")
    if keys is not None and (address.key is None or not keys.admits(address.key)):
        raise AddressError(address.place, "its public key is missing or not in the folder of authorized keys")


def _is_key(text: bytes) -> bool:
    """Whether ZeroMQ takes this for a key: 32 bytes in Z85."""
    try:
        return len(text) == 40 and len(zmq.utils.z85.decode(text)) == 32
    except (ValueError, KeyError, struct.error):  # another character, or five that are too large a number
        return False


def generate_keys(directory: str | Path, name: str) -> tuple[Path, Path]:
    """Make a key pair: DIRECTORY/NAME.key for peers, DIRECTORY/NAME.key_secret (mode 0600) for the endpoint.

    Raises:
        InvalidInput: The files exist, the name has odd characters, or the folder cannot be written.
    """
    folder = Path(directory)
    if not name or not all(c.isalnum() or c in "-_." for c in name):
        raise InvalidInput(f"name={name!r}: use letters, digits, '-', '_' and '.'")
    try:
        if (folder / f"{name}.key").exists() or (folder / f"{name}.key_secret").exists():
            raise InvalidInput(f"{folder / name}.key exists already: delete it, or choose another name")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        public, secret = zmq.auth.create_certificates(folder, name)
        Path(secret).chmod(0o600)
    except OSError as error:
        raise InvalidInput(f"keys: {error}") from error
    return Path(public), Path(secret)
