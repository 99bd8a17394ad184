"""Reading another process's memory: what lets the mover fetch a host's arrays while the host does something else.

`process_vm_readv(2)`: one copy, no turn of the host's interpreter. The kernel allows it to a process of the same user
unless it is told otherwise (Yama's `ptrace_scope`, a container's seccomp profile), so it is tried before it is used.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.layout import Layout
from kvpoll_fsm.sources import StagedElsewhere, Unreadable
from kvpoll_fsm.staging import Piece

__all__ = ["HostSource", "address_of", "allow_reading", "can_read"]

_IOV_MAX = 1024
_CALL_NBYTES = 256 << 20
_PR_SET_PTRACER = 0x59616D61
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
_readv = getattr(_libc, "process_vm_readv", None)
if _readv is not None:
    _readv.restype = ctypes.c_ssize_t
    _vectors = (ctypes.POINTER(_IoVec), ctypes.c_ulong)
    _readv.argtypes = (ctypes.c_int, *_vectors, *_vectors, ctypes.c_ulong)


def address_of(buffer: memoryview) -> int:
    """Where writable bytes lie."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def allow_reading(pid: int) -> None:
    """Allow one process to read our memory where the system asks for that (Yama's mode 1)."""
    with contextlib.suppress(OSError):
        if _YAMA.read_text().strip() == "1":
            _libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(pid), 0, 0, 0)


def can_read(pid: int, address: int, expected: bytes) -> bool:
    """Whether process `pid`'s memory can be read; it holds `expected` at `address`."""
    found = bytearray(len(expected))
    try:
        _read(pid, [(address_of(memoryview(found)), address, len(found))])
    except InvalidInput:
        return False
    return bytes(found) == expected


def _read(pid: int, spans: Sequence[tuple[int, int, int]]) -> None:
    """Copy (to our address, from theirs, bytes) spans.

    Raises:
        InvalidInput: It is not allowed, or their memory is not there.
    """
    if _readv is None:
        raise InvalidInput("this system has no process_vm_readv")
    n = len(spans)
    ours, theirs = (_IoVec * n)(), (_IoVec * n)()
    for i, (to, origin, nbytes) in enumerate(spans):
        ours[i].base, ours[i].nbytes = to, nbytes
        theirs[i].base, theirs[i].nbytes = origin, nbytes
    moved = _readv(pid, ours, n, theirs, n, 0)
    if moved != sum(nbytes for _, _, nbytes in spans):
        why = os.strerror(ctypes.get_errno()) if moved < 0 else f"only {moved} bytes are there"
        raise InvalidInput(f"the memory of process {pid} cannot be read: {why}")


class HostSource:
    """A room's data in the host's memory.

    Attributes:
        layout: What they are.
        total_tokens: Tokens in every token field.
    """

    __slots__ = ("_addresses", "_instead", "_pid", "layout", "total_tokens")

    def __init__(
        self, layout: Layout, total_tokens: int, pid: int, addresses: tuple[int, ...], instead: StagedElsewhere
    ) -> None:
        """Store what is needed.

        Args:
            layout: What they are.
            total_tokens: Tokens in every token field.
            pid: The host.
            addresses: Where every field's bytes begin.
            instead: For memory that turns out to be unreadable: a device's own, or another process may read us by now.
        """
        self.layout = layout
        self.total_tokens = total_tokens
        self._pid = pid
        self._addresses = addresses
        self._instead = instead

    def fill(self, field_number: int, arena: memoryview, pieces: Sequence[Piece]) -> None:
        """Copy pieces of a field's bytes into an arena.

        Raises:
            Unreadable: The host's memory cannot be read.
        """
        ours, theirs = address_of(arena), self._addresses[field_number]
        spans = iter([(ours + to, theirs + at, n) for whole in pieces for to, at, n in _cut(whole)])
        while some := list(islice(spans, _IOV_MAX)):
            try:
                _read(self._pid, some)
            except InvalidInput as error:
                raise Unreadable(str(error), self._instead) from None


def _cut(piece: Piece) -> list[Piece]:
    """A piece in lengths that one call takes."""
    to, at, nbytes = piece
    return [(to + i, at + i, min(_CALL_NBYTES, nbytes - i)) for i in range(0, nbytes, _CALL_NBYTES)]
