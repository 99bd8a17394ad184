"""Memory that another process can be given: a file without a name (memfd), mapped, every page present."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import weakref

__all__ = ["Segment"]

_TOUCH_NBYTES = 64 << 20
_F_ADD_SEALS, _F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1033, 1, 2, 4  # fcntl(2); the module lacks some


class Segment:
    """Page-aligned bytes, zero at first. A forked child shares them.

    The memory stays as long as anybody, here or in another process, has it mapped; nothing is left of it in the
    file system, however a process ends.

    Attributes:
        buffer: All of it, writable.
        fd: The memfd, sealed against any change of size; None where the system gives no memfd: the memory is
            then private, and a forked child has a copy.
    """

    __slots__ = ("__weakref__", "_close", "buffer", "fd")

    def __init__(self, nbytes: int) -> None:
        """Take the memory and touch every page of it: a first touch makes a copy five times as slow.

        Args:
            nbytes: At least 1.

        Raises:
            OSError: There is no memory for it.
            OverflowError: There is no such number of bytes.
        """
        # A memfd takes any size and ends the process when it is touched; this asks the kernel beforehand.
        mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
        self.fd = _memfd(nbytes)
        if self.fd is None:
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            self._close = weakref.finalize(self, os.close, self.fd)
            memory = mmap.mmap(self.fd, nbytes)
        with contextlib.suppress(OSError):  # A kernel without huge pages does with small ones.
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.buffer = memoryview(memory)
        for start in range(0, nbytes, _TOUCH_NBYTES):
            pages = self.buffer[start : start + _TOUCH_NBYTES : mmap.PAGESIZE]
            pages[:] = bytes(len(pages))

    def close(self) -> None:
        """Close the file descriptor; the memory goes once nobody uses it. May be called twice."""
        if self.fd is not None:
            self._close()


def _memfd(nbytes: int) -> int | None:
    """A memfd of this size, or None where there are none."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        fd = os.memfd_create("kvpoll-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:  # not built into the kernel, or forbidden
        return None
    try:
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_SEAL)
        os.fchmod(fd, 0o600)  # who is given it for reading cannot open it for writing, unless the owner or root
    except OSError:
        os.close(fd)
        raise
    return fd
