"""Mapping regions where no engine of this endpoint has had them before.

A write that was meant for an earlier engine may still be on its way when the next one listens. It carries an address;
if nothing is there, it is refused.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets

__all__ = ["Addresses", "map_at"]

STEP_NBYTES = 2 << 20
"""What addresses are multiples of: a huge page."""
_FIRST, _LAST = 16 << 40, 80 << 40
"""Linux puts neither programs nor libraries, heaps or stacks there, on x86-64 and on 64-bit ARM."""
_MAP_FIXED_NOREPLACE = 0x100000
_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Addresses:
    """Hands out pieces of the address space, none twice before all have been; from a random place on."""

    def __init__(self) -> None:
        self._next = _FIRST + secrets.randbelow((_LAST - _FIRST) // STEP_NBYTES) * STEP_NBYTES

    def take(self, nbytes: int) -> int:
        """Where the next `nbytes` bytes may go."""
        if self._next + nbytes > _LAST:
            self._next = _FIRST
        start = self._next
        self._next += (nbytes // STEP_NBYTES + 2) * STEP_NBYTES  # with a gap, so that neighbours do not touch
        return start


def map_at(address: int, fd: int, offset: int, nbytes: int) -> int:
    """Map a piece of a file for reading and writing, near a given place; returns where it begins.

    Args:
        address: A multiple of a page. The piece begins in this page, as far in as in the file.
        fd: The file; stays the caller's.
        offset: Where in it the piece begins.
        nbytes: How long it is.

    Raises:
        OSError: The file is too short, or something is there.
    """
    if os.fstat(fd).st_size < offset + nbytes:
        raise OSError(f"a region of {nbytes} bytes in a shorter file")
    skip = offset % mmap.PAGESIZE
    flags = mmap.MAP_SHARED | _MAP_FIXED_NOREPLACE
    found = _libc.mmap(address, nbytes + skip, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, offset - skip)
    if found is None or found == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)}: no place at {address:#x}")
    if found != address:  # a kernel that does not know the flag
        _libc.munmap(found, nbytes + skip)
        raise OSError(f"no place at {address:#x}: needs Linux 4.17 or newer")
    return address + skip
