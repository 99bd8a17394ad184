from __future__ import annotations

import errno
import fcntl
import gc
import mmap
import os

import numpy as np
import pytest

from kvpoll_fsm.arena import BlockPool
from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.layout import Field, Layout
from kvpoll_fsm.segment import Segment

LAYOUT = Layout(4, [Field("x", "int64", (3,)), Field("aux", "int8", per_room=True)])


def open_memfds() -> list[str]:
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:  # the one that listed the folder
            continue
    return [link for link in links if "kvpoll-arena" in link]


def test_what_is_written_to_the_file_is_in_the_memory() -> None:
    segment = Segment(10_000)
    assert segment.fd is not None
    assert not any(segment.buffer)
    os.pwrite(segment.fd, b"hello", 5000)
    assert segment.buffer[5000:5005] == b"hello"
    assert not os.get_inheritable(segment.fd)
    assert os.fstat(segment.fd).st_mode & 0o777 == 0o600


def test_the_file_keeps_its_size_and_its_seals() -> None:
    segment = Segment(10_000)
    assert segment.fd is not None
    for size in (9_999, 10_001):
        with pytest.raises(PermissionError):
            os.ftruncate(segment.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(segment.fd, 1033, 8)  # F_ADD_SEALS: write


def test_the_memory_outlives_the_file_descriptor_and_nothing_is_left_in_the_end() -> None:
    gc.collect()
    before = open_memfds()
    segment = Segment(10_000)
    view = segment.buffer[:5]
    segment.close()
    segment.close()
    del segment
    view[:] = b"still"
    del view
    forgotten = Segment(10)
    assert len(open_memfds()) > len(before)
    del forgotten
    gc.collect()
    assert open_memfds() == before


def test_a_pool_hands_out_its_files_until_it_is_closed() -> None:
    gc.collect()
    before = open_memfds()
    pool = BlockPool(LAYOUT, 2)
    x, aux = pool.regions()
    assert None not in (x.fd, aux.fd)
    assert x.fd != aux.fd
    pool.view("x")[1, 2, 0] = 7
    assert x.fd is not None
    assert int.from_bytes(os.pread(x.fd, 8, (4 + 2) * 3 * 8), "little") == 7
    pool.close()
    del x, aux
    gc.collect()
    assert open_memfds() == before


def test_an_adopted_pool_has_no_files() -> None:
    pool = BlockPool.adopt(LAYOUT, {"x": np.zeros((2, 4, 3), np.int64), "aux": np.zeros(2, np.int8)})
    assert [region.fd for region in pool.regions()] == [None, None]


def test_a_forked_child_shares_the_memory() -> None:
    pool = BlockPool(LAYOUT, 2)
    child = os.fork()
    if child == 0:
        pool.view("x")[0, 0, 0] = 42
        os._exit(0)
    os.waitpid(child, 0)
    assert pool.view("x")[0, 0, 0] == 42


@pytest.mark.parametrize("lacks", ["the call", "the kernel's leave"])
def test_without_memfd_the_memory_is_private(monkeypatch: pytest.MonkeyPatch, lacks: str) -> None:
    def denied(*_: object) -> int:
        raise OSError(errno.ENOSYS, "no")

    if lacks == "the call":
        monkeypatch.delattr(os, "memfd_create")
    else:
        monkeypatch.setattr(os, "memfd_create", denied)
    segment = Segment(mmap.PAGESIZE + 1)
    assert segment.fd is None
    segment.buffer[-1] = 1
    segment.close()


def test_more_than_memory_is_an_error_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_memfds()
    with pytest.raises((OSError, OverflowError)):
        Segment(1 << 60)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "ftruncate", full)
    with pytest.raises(InvalidInput, match="no memory for 2 blocks"):
        BlockPool(LAYOUT, 2)
    assert open_memfds() == before
