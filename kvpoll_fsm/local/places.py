"""Where control sockets are: in a folder that is the user's own, named after the process they belong to."""

from __future__ import annotations

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
    uid = os.geteuid()
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{uid}"
    if os.access(runtime, os.W_OK | os.X_OK) and Path(runtime).stat().st_uid == uid:
        return Path(runtime) / "kvpoll"
    return Path(tempfile.gettempdir()) / f"kvpoll-{uid}"


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
    """The control sockets in the user's folder, those of processes that are gone included.

    Raises:
        InvalidInput: Others could have put something there.
    """
    home = folder()
    try:
        _check(home)
        return sorted(path for path in home.iterdir() if path.suffix == SUFFIX)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InvalidInput(f"{error}") from error


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
