"""Where control sockets are: in a folder that is the user's own, named after the process they belong to."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import stat
import tempfile
import time
from pathlib import Path

from kvpoll_fsm.errors import InvalidInput

__all__ = ["SUFFIX", "folder", "is_dead", "new_socket", "sockets", "sweep"]

SUFFIX = ".sock"
UNBORN = "~"
"""Behind the name of a socket that nobody listens at yet."""
UNBORN_S = 60.0


def folder() -> Path:
    """The user's folder for control sockets; it may not be there yet."""
    return _folders()[0]


def _folders() -> list[Path]:
    """Where control sockets may be, best first: not every shell has the same environment as the endpoint."""
    uid = os.geteuid()
    runtimes = dict.fromkeys((os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{uid}"))
    usable = [Path(runtime) for runtime in runtimes if runtime and os.access(runtime, os.W_OK | os.X_OK)]
    home = Path(tempfile.gettempdir()) / f"kvpoll-{uid}"
    return [*(runtime / "kvpoll" for runtime in usable if runtime.stat().st_uid == uid), home]


def new_socket() -> Path:
    """A path for a new control socket, in the user's folder, which is made if need be.

    Raises:
        InvalidInput: The folder cannot be made, or others could put something there.
    """
    home = folder()
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        _check(home)
    except OSError as error:
        raise InvalidInput(f'control_socket="auto": {error}; give a path') from error
    return home / f"{os.getpid()}-{secrets.token_hex(3)}{SUFFIX}"


def sockets() -> list[Path]:
    """The control sockets of the user, those of processes that are gone included.

    Raises:
        InvalidInput: They are where others could have put something.
    """
    found: list[Path] = []
    for home in _folders():
        with contextlib.suppress(FileNotFoundError):
            _check(home)
            found += sorted(path for path in home.iterdir() if path.suffix == SUFFIX)
    return found


def sweep() -> None:
    """Remove the sockets of processes that are gone from the user's folder."""
    for path in folder().iterdir():
        try:
            unborn = path.name.endswith(SUFFIX + UNBORN) and time.time() - path.stat().st_mtime > UNBORN_S
            if unborn or (path.suffix == SUFFIX and is_dead(path)):
                path.unlink()
        except FileNotFoundError:  # somebody else sweeps, too
            continue


def is_dead(path: Path) -> bool:
    """Nobody listens at this socket any more."""
    if not stat.S_ISSOCK(path.lstat().st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        caller.setblocking(False)
        return caller.connect_ex(str(path)) == errno.ECONNREFUSED


def _check(home: Path) -> None:
    """Nobody but the user can put anything into the folder."""
    found = home.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise InvalidInput(f"{home} is no folder: remove it")
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise InvalidInput(f"{home} must be yours alone: chown it to yourself and chmod 700 it, or remove it")
