"""Memory that another process can be given: a file without a name (memfd), mapped, every page present."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import weakref

__all__ = ["NoMemfd", "Segment", "new_memfd"]

_TOUCH_NBYTES = 64 << 20
_POPULATE = getattr(mmap, "MAP_POPULATE", 0)
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

    def __init__(self, nbytes: int, fd: int | None = None) -> None:
        """Take the memory and touch every page of it: a first touch makes a copy five times as slow.

        Args:
            nbytes: At least 1.
            fd: A segment's memfd that another process has passed on, which is taken over; None makes one.

        Raises:
            OSError: There is no memory for it.
            OverflowError: There is no such number of bytes.
        """
        # A memfd takes any size and ends the process when it is touched; this asks the kernel beforehand.
        mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
        self.fd = _memfd(nbytes) if fd is None else fd
        if self.fd is None:
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            self._close = weakref.finalize(self, os.close, self.fd)
            memory = mmap.mmap(self.fd, nbytes, flags=mmap.MAP_SHARED | (_POPULATE if fd is not None else 0))
        with contextlib.suppress(OSError):  # A kernel without huge pages does with small ones.
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.buffer = memoryview(memory)
        if fd is not None:  # its pages are there
            return
        for start in range(0, nbytes, _TOUCH_NBYTES):
            pages = self.buffer[start : start + _TOUCH_NBYTES : mmap.PAGESIZE]
            pages[:] = bytes(len(pages))

    def close(self) -> None:
        """Close the file descriptor; the memory goes once nobody uses it. May be called twice."""
        if self.fd is not None:
            self._close()


def _memfd(nbytes: int) -> int | None:
    """A memfd of this size, or None where there are none."""
    try:
        return new_memfd("kvpoll-arena", nbytes)
    except NoMemfd:
        return None


def new_memfd(name: str, nbytes: int) -> int:
    """A file of zeros that lives in memory alone; its size is fixed, and it is closed on exec.

    Raises:
        NoMemfd: The system gives none.
        OSError: There is no memory for it.
    """
    if not hasattr(os, "memfd_create"):
        raise NoMemfd("this system has no memfd")
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:  # not built into the kernel, or forbidden
        raise NoMemfd(str(error)) from error
    try:
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_SEAL)
        os.fchmod(fd, 0o600)  # who is given it for reading cannot open it for writing, unless the owner or root
    except OSError:
        os.close(fd)
        raise
    return fd


class NoMemfd(OSError):
    """There is no memory that another process could be given."""
