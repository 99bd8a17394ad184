"""Who and where a process is, in the kernel's words: the host's boot id, a socket's peer, a file's seals."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import socket
import struct
from pathlib import Path

from kvpoll_shm.wire import Place

__all__ = ["Mapping", "boot_id", "listen", "peer_uid", "read_only", "seqpacket"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_F_GET_SEALS, _F_SEAL_SHRINK = 1034, 2  # fcntl(2); the module lacks them in Python 3.10
_CREDENTIALS = struct.Struct("3i")
_BACKLOG = 128


def boot_id() -> str:
    """Names this host until it is started again; the same in all its containers.

    Raises:
        OSError: The kernel does not say.
    """
    return _BOOT_ID.read_text().strip()


def seqpacket() -> socket.socket:
    """A unix socket of packets whose calls never wait.

    Raises:
        OSError: The system has none to give.
    """
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)


def listen() -> tuple[socket.socket, str]:
    """A listening socket under a fresh abstract name, which goes with the last process that has it open.

    Raises:
        OSError: The system has none to give.
    """
    name = f"kvpoll-{secrets.token_hex(16)}"
    listening = seqpacket()
    try:
        listening.bind("\0" + name)
        listening.listen(_BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening, name


def peer_uid(sock: socket.socket) -> int:
    """The user at the other end, as the kernel knows him.

    Raises:
        OSError: The connection is gone.
    """
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(credentials)[1])


def read_only(fd: int) -> int:
    """A file descriptor of the same file that can only be read and mapped for reading; the caller's to close.

    Raises:
        OSError: There is no /proc, or no file descriptor left to give.
    """
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


class Mapping:
    """A peer's region, mapped here for reading.

    Attributes:
        view: The region's bytes.
    """

    def __init__(self, fd: int, place: Place) -> None:
        """Map it. The file descriptor stays the caller's.

        Raises:
            OSError: The file is shorter than said, could be made so while it is read, or cannot be mapped.
        """
        end = place.offset + place.nbytes
        if not fcntl.fcntl(fd, _F_GET_SEALS) & _F_SEAL_SHRINK:
            raise OSError("a region that could be cut while it is read")
        if os.fstat(fd).st_size < end:
            raise OSError(f"a region of {place.nbytes} bytes in a shorter file")
        self._memory = mmap.mmap(fd, end, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        self._memory.madvise(mmap.MADV_DONTFORK)
        with contextlib.suppress(OSError):  # a kernel without huge pages does with small ones
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(self._memory)[place.offset : end]

    def close(self) -> None:
        """Unmap it."""
        self.view.release()
        with contextlib.suppress(BufferError):  # an error report holds a piece of it; it goes with that
            self._memory.close()
