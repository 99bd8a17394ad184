"""The mover's smaller parts: reading the host's memory, results, settings, frames."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest

from kvpoll_fsm import BlockPool, Deadlines, Endpoint, Field, InvalidInput, KVPoll, Layout, Limits
from kvpoll_fsm.config import Config
from kvpoll_fsm.errors import Failure, FailureCode
from kvpoll_fsm.mover import frames
from kvpoll_fsm.mover.launch import launch
from kvpoll_fsm.mover.memory import HostSource, can_read
from kvpoll_fsm.mover.results import INLINE_NBYTES, KEPT_NBYTES, Results, SharedResults, arrays
from kvpoll_fsm.mover.settings import config_of, layout_of, plain_config, plain_layout
from kvpoll_fsm.security import generate_keys
from kvpoll_fsm.selection import Policy
from kvpoll_fsm.sources import StagedElsewhere, Unreadable
from tests.helpers import FIELDS, LAYOUT, until
from tests.mover.movers import away, worth

# Memory of another process

HOLDS = """
import array
held = array.array("I", range(1 << 18))
print(held.buffer_info()[0], flush=True)
input()
"""
WANTED = np.arange(1 << 18, dtype=np.uint32).tobytes()


@pytest.fixture
def other() -> Any:
    """A process that holds 1 MB of known bytes; tells where."""
    with subprocess.Popen([sys.executable, "-c", HOLDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        yield process.pid, int(process.stdout.readline())
        process.stdin.write(b"\n")


class Elsewhere(StagedElsewhere):
    """What a source that cannot be read names instead of itself."""

    def stage(self, command: Any, then: Any) -> None:
        raise AssertionError("nobody asked for that")


def test_another_process_is_read(other: tuple[int, int]) -> None:
    pid, address = other
    assert can_read(pid, address, WANTED[:16])
    assert not can_read(pid, address + 1, WANTED[:16])
    assert not can_read(pid, 8, WANTED[:16])
    assert not can_read(1 << 22, address, WANTED[:16])


def test_thousands_of_pieces(other: tuple[int, int]) -> None:
    pid, address = other
    arena = bytearray(1 << 20)
    source = HostSource(LAYOUT, 1, pid, (address,), Elsewhere())
    pieces = [(at, (1 << 20) - 256 - at, 256) for at in range(0, 1 << 20, 256)]
    assert len(pieces) > 4000
    source.fill(0, memoryview(arena), pieces)
    assert bytes(arena) == b"".join(WANTED[at : at + 256] for at in range((1 << 20) - 256, -1, -256))
    source.fill(0, memoryview(arena), [(0, 1, 255)])
    assert bytes(arena[:255]) == WANTED[1:256]


def test_memory_that_is_not_there_is_an_error(other: tuple[int, int]) -> None:
    pid, _ = other
    source = HostSource(LAYOUT, 1, pid, (8,), Elsewhere())
    with pytest.raises(Unreadable, match=f"the memory of process {pid} cannot be read: Bad address"):
        source.fill(0, memoryview(bytearray(16)), [(0, 0, 16)])
    gone = HostSource(LAYOUT, 1, 1 << 22, (8,), Elsewhere())
    with pytest.raises(Unreadable, match="No such process"):
        gone.fill(0, memoryview(bytearray(16)), [(0, 0, 16)])


def test_memory_that_ends_in_the_middle_is_an_error(other: tuple[int, int]) -> None:
    pid, address = other
    source = HostSource(LAYOUT, 1, pid, (address,), Elsewhere())
    with pytest.raises(Unreadable, match="only 16 bytes are there"):
        source.fill(0, memoryview(bytearray(32)), [(0, 0, 16), (16, 8 - address, 16)])


# Results

BIG = Layout(16, [Field("x", "uint8", (1000,))])


class Both:
    """The mover's and the host's side, in one process."""

    def __init__(self) -> None:
        self.there = Results()
        self.freed: list[int] = []
        self.here = SharedResults(self.free)

    def free(self, number: int, again: bool) -> None:
        self.freed.append(number)
        self.there.free(number, again=again)

    def tell(self) -> list[str]:
        said = self.there.unsaid()
        for event, fds in said:
            if isinstance(event, frames.NewSegment):
                self.here.add(event.segment, event.nbytes, *fds)
            elif isinstance(event, frames.Dropped):
                self.here.drop(event.segment)
        return [type(event).__name__ for event, _ in said]

    def carry(self, tokens: int, fill: int) -> np.ndarray[Any, Any]:
        place = self.there.destination(BIG, tokens)
        place._buffers[0][:] = bytes([fill]) * (1000 * tokens)
        held = place.result
        self.tell()
        memory = self.here.buffer(held.take(), bytes(held.inline or b""))
        x: np.ndarray[Any, Any] = arrays(BIG, tokens, memory, "numpy")["x"]
        return x


def test_a_small_result_travels_inline() -> None:
    both = Both()
    x = both.carry(INLINE_NBYTES // 1024, 7)
    assert x.shape == (INLINE_NBYTES // 1024, 1000)
    assert (x == 7).all()
    x[:] = 8
    del x
    assert (both.tell(), both.freed) == ([], [])


def test_a_segment_is_used_again_once_no_array_of_it_is_left() -> None:
    both = Both()
    first = both.carry(100, 1)
    second = both.carry(100, 2)
    part = first[3:5]
    del first
    gc.collect()
    assert both.freed == []
    third = both.carry(100, 3)
    assert [int(x[0, 0]) for x in (part, second, third)] == [1, 2, 3]
    del part
    assert both.freed == [1]
    place = both.there.destination(BIG, 100)
    assert place.result.take() == 1
    assert both.tell() == []


def test_a_segment_that_a_forked_child_may_have_is_not_used_again() -> None:
    """The child's arrays are the same memory, which would change under it."""
    both = Both()
    x = both.carry(100, 1)
    both.here.before_fork()
    del x
    assert both.freed == [1]
    assert both.tell() == ["Dropped"]
    y = both.carry(100, 2)
    del y
    assert both.freed == [1, 2]
    assert both.there.destination(BIG, 100).result.take() == 2


def test_what_nobody_takes_is_given_back() -> None:
    both = Both()
    for _ in range(5):
        both.there.destination(BIG, 100)
    assert both.tell() == ["NewSegment"]
    assert not both.there.has_unsaid


def test_no_more_than_so_much_memory_waits() -> None:
    both, many = Both(), KEPT_NBYTES // 3 // 1000
    before = worth()["mapped"]
    kept = [both.carry(many, number) for number in range(4)]
    assert worth()["mapped"] == before + 8, "once in either side"
    kept.clear()
    gc.collect()
    assert both.there.has_unsaid
    assert set(both.tell()) == {"Dropped"}
    assert worth()["mapped"] <= before + 6


def test_a_mapped_segment_takes_no_descriptor_of_the_host() -> None:
    both = Both()
    both.there.destination(BIG, 100)
    [(event, [fd])] = both.there.unsaid()
    assert isinstance(event, frames.NewSegment)
    before = worth().get("/memfd", 0)
    both.here.add(event.segment, event.nbytes, fd)
    assert worth()["/memfd"] == before - 1


def test_a_room_of_no_tokens_or_too_many_is_refused() -> None:
    for tokens in (0, -1):
        with pytest.raises(InvalidInput, match=f"a room of {tokens} tokens"):
            Results().destination(BIG, tokens)
    with pytest.raises(InvalidInput, match="no memory for a result of"):
        Results().destination(BIG, 1 << 50)


# Settings


def test_settings_come_back_as_they_were(tmp_path: Path) -> None:
    keys = {"keys": generate_keys(tmp_path, "me")[1], "authorized": tmp_path}
    options = {"tcp": {"streams": 3, "data_ports": [4000, 4100], "folder": tmp_path}}
    config = Endpoint(
        pool=BlockPool(LAYOUT, blocks=2),
        listen="tcp://127.0.0.1:0",
        advertise="tcp://localhost:4711",
        transports="prefer:shm,tcp",
        deadlines=Deadlines(heartbeat_s=0.25),
        checksum=True,
        workers=3,
        insecure=True,
        trace=tmp_path / "trace",
        limits=Limits(orphans_per_peer=3),
        transport_options=options,
        standby=("memory", "shm"),
        control_socket=tmp_path / "socket",
        **keys,  # type: ignore[arg-type]
    ).config
    plain = msgspec.msgpack.decode(msgspec.msgpack.encode(plain_config(config, config.listen)))
    back = config_of(plain)
    others = {
        *("arrays", "isolation", "mover_nice", "mover_cpus", "transport_options", "trace", "standby", "control_socket")
    }
    for field in fields(Config):
        if field.name not in others:
            assert getattr(back, field.name) == getattr(config, field.name), field.name
    assert str(back.trace) == str(config.trace)
    assert str(back.control_socket) == str(config.control_socket)
    assert back.names == config.names == ("shm", "tcp", "memory")
    switched = config_of({**plain, "policy": "tcp", "canary": ("shm", 0.25)})
    assert switched.canary == (Policy.parse("shm"), 0.25)
    assert set(switched.names) == set(config.names), "whatever the policy was, all that was loaded is loaded"
    assert back.transport_options == {"tcp": {**options["tcp"], "folder": str(tmp_path)}}


def test_what_is_no_plain_data_is_named() -> None:
    config = Endpoint(pool=BlockPool(LAYOUT, blocks=2), transport_options={"tcp": {"x": object()}}).config
    with pytest.raises(InvalidInput, match="transport_options: <object object"):
        plain_config(config, config.listen)


def test_a_layout_comes_back_as_it_was() -> None:
    plain = msgspec.msgpack.decode(
        msgspec.msgpack.encode(plain_layout(LAYOUT)), type=tuple[int, list[tuple[str, str, tuple[int, ...], bool]]]
    )
    assert layout_of(plain).fields == tuple(FIELDS)
    assert layout_of(plain).block_tokens == LAYOUT.block_tokens


# Frames


def test_messages_are_told_apart_by_their_tags() -> None:
    for union in (frames.Command, frames.Event):
        tags = [kind.__struct_config__.tag for kind in get_args(union)]
        assert sorted(tags) == list(range(1, len(tags) + 1))


def test_a_change_comes_back_as_it_was() -> None:
    failure = Failure.of(FailureCode.MoverLost, "why", state=KVPoll.Transferring, rank=2)
    said = frames.Changed(7, 0b11, failure=failure, quiescent=True, total_tokens=9, segment=2, inline=b"x")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode([said]), type=list[frames.Event]) == [said]


# A mover nobody wants


def test_a_mover_ends_with_its_pipe() -> None:
    mover = launch()
    process = mover.pid
    assert not away(process)
    assert mover.end() == "exit status 1"
    assert away(process)


def test_a_mover_that_hangs_is_killed() -> None:
    mover = launch()
    os.kill(mover.pid, 19)
    assert mover.end(within_s=0.1) == "killed by SIGKILL"
    until(lambda: away(mover.pid))
