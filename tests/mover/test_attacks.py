"""What a host, or a system, may do to an endpoint with a mover."""

from __future__ import annotations

import ctypes
import errno
import gc
import logging
import mmap
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from kvpoll_fsm import Endpoint, FailureCode, KVPoll, TransferFailed
from kvpoll_fsm.mover import memory
from tests.helpers import SOON_S, failed, make_data, open_pair, pool, run_script, same, transfer, until
from tests.mover.movers import LOSABLE, children, engine, moved, pid, worth

S = KVPoll.Success


@contextmanager
def _roomy(transports: str = "shm") -> Iterator[tuple[Endpoint, Endpoint]]:
    with moved(transports, pool=pool(64)) as tx, moved(transports, pool=pool(64)) as rx:
        yield tx, rx


# Sources


def _secret(nbytes: int) -> mmap.mmap:
    """Memory that no other process can read, as a device's is."""
    fd = ctypes.CDLL(None).syscall(447, 0)  # memfd_secret(2)
    if fd < 0:
        pytest.skip("this kernel has no memfd_secret")
    try:
        os.ftruncate(fd, nbytes)
        return mmap.mmap(fd, nbytes)
    finally:
        os.close(fd)


def test_a_source_that_the_mover_cannot_read_is_staged_by_the_host() -> None:
    data = make_data(1000)
    secret = np.frombuffer(_secret(1 << 20), np.uint16, 8000).reshape(1000, 8)
    secret[:] = data["embeddings"]
    with _roomy("tcp") as (tx, rx):
        sender, receiver = open_pair(tx, rx, 1)
        sender.send({**data, "embeddings": secret})
        assert same(receiver.result(SOON_S), data)
        assert len(sender.parts) > 1
        transfer(tx, rx, 2)


NOT_READABLE_LATER = """
import ctypes
from tests.helpers import pool, transfer
from tests.mover.movers import LOSABLE, children, engine, moved, pid, worth
with moved("tcp", pool=pool(64)) as tx, moved("tcp", pool=pool(64)) as rx:
    transfer(tx, rx, 1, tokens=1000)
    assert ctypes.CDLL(None).prctl(4, 0, 0, 0, 0) == 0  # PR_SET_DUMPABLE
    transfer(tx, rx, 2, tokens=1000)
    print("fine")
"""


@pytest.mark.slow
def test_a_host_that_may_not_be_read_any_more_stages_by_itself() -> None:
    done = run_script(NOT_READABLE_LATER)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def test_memory_that_is_not_there_cannot_be_read() -> None:
    assert not memory.can_read(os.getpid(), 8, b"x")


# Forks


@pytest.mark.slow
def test_a_child_forked_while_a_mover_starts_does_not_hide_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child has both ends of the socket."""
    real, kin = subprocess.Popen, []

    def start(*args: Any, **options: Any) -> Any:
        child = os.fork()
        if child == 0:
            signal.pause()
        kin.append(child)
        return real(*args, **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    try:
        with moved(deadlines=LOSABLE) as tx:
            monkeypatch.undo()
            sender = tx.sender(1)
            os.kill(pid(tx), signal.SIGKILL)
            assert failed(sender).code is FailureCode.MoverLost
    finally:
        for child in kin:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_a_forked_child_keeps_its_parents_results() -> None:
    """Their memory is shared: once the parent has dropped them, no other room may be received into it."""
    data = [make_data(20_000, seed=seed) for seed in range(4)]
    with _roomy() as (tx, rx):

        def got(room: int) -> Any:
            sender, receiver = open_pair(tx, rx, room, tokens=512)
            sender.send(data[room])
            result = receiver.result(SOON_S)
            sender.clear()
            receiver.clear()
            return result

        kept = got(0)
        hear, say = os.pipe()
        child = os.fork()
        if child == 0:
            os.read(hear, 1)
            os._exit(0 if same(kept, data[0]) else 1)
        del kept
        for room in (1, 2, 3):
            gc.collect()
            assert same(got(room), data[room])
        gc.collect()
        os.write(say, b"x")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        results = engine(rx)._results
        until(lambda: not results._in_use, "every result is given back")
        assert not results._inherited
        os.close(hear)
        os.close(say)


# A host that is short of something


def test_a_result_that_cannot_be_taken_loses_the_mover_and_not_the_endpoint() -> None:
    with _roomy() as (tx, rx):
        transfer(tx, rx, 1)
        sender, receiver = open_pair(tx, rx, 2)
        until(lambda: receiver.poll() is KVPoll.WaitingForInput)
        limits, taken = resource.getrlimit(resource.RLIMIT_NOFILE), []
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, limits[1]))
        try:
            while True:
                taken.append(os.dup(0))
        except OSError:  # no descriptor is left
            sender.send(make_data(20_000))
            receiver.wait(SOON_S)
        finally:
            for fd in taken:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        with pytest.raises(TransferFailed, match="no file descriptor is left"):
            receiver.result(SOON_S)
        until(lambda: _works(tx, rx), "another mover")


_numbers = iter(range(100, 10_000))


def _works(tx: Endpoint, rx: Endpoint) -> bool:
    sender, receiver = open_pair(tx, rx, next(_numbers))
    sender.send(make_data(40))
    return receiver.wait(SOON_S) is S


def test_a_start_with_too_few_descriptors_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = os.dup, iter(range(2))

    def dup(fd: int) -> int:
        if next(left, None) is None:
            raise OSError(errno.EMFILE, "too many open files")
        return real(fd)

    blocks = pool(4)
    gc.collect()
    before, kin = worth(), children()
    with monkeypatch.context() as patch:
        patch.setattr(os, "dup", dup)
        with pytest.raises(OSError, match="too many open files"):
            moved(pool=blocks).start()
    gc.collect()
    until(lambda: worth() == before, "nothing left")
    assert children() == kin


class _Broken(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise RuntimeError("a log handler that raises")


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_a_log_handler_that_raises_ends_no_rooms(isolation: str, capsys: pytest.CaptureFixture[str]) -> None:
    broken, log = _Broken(logging.INFO), logging.getLogger("kvpoll_fsm")
    level = log.level
    log.addHandler(broken)
    log.setLevel(logging.INFO)
    try:
        with moved("tcp", isolation=isolation) as tx, moved("tcp", isolation=isolation) as rx:
            transfer(tx, rx, 1)
            transfer(tx, rx, 2)
    finally:
        log.removeHandler(broken)
        log.setLevel(level)
    assert "a log handler that raises" in capsys.readouterr().err
