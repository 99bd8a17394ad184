"""The pipe between host and mover, alone."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from kvpoll_fsm.mover.pipe import Pipe
from tests.helpers import SOON_S, until
from tests.mover.movers import worth

Ends = tuple[Pipe[Any], Pipe[Any]]


@pytest.fixture
def ends() -> Iterator[Ends]:
    here, there = (Pipe[Any](end, Any) for end in socket.socketpair())
    yield here, there
    here.close()
    there.close()


def hear(pipe: Pipe[Any], count: int) -> list[Any]:
    """So many messages."""
    heard: list[Any] = []

    def enough() -> bool:
        pipe.wait(0.01)
        heard.extend(pipe.read())
        return len(heard) >= count

    until(enough, "messages")
    return heard


def test_messages_come_in_order(ends: Ends) -> None:
    here, there = ends
    for number in range(5000):
        here.post(number)
    assert here.flush()
    assert not here.waiting
    assert hear(there, 5000) == list(range(5000))


def test_a_full_socket_is_no_wait_and_loses_nothing(ends: Ends) -> None:
    here, there = ends
    wanted = [bytes([n]) * 100_000 for n in range(100)]
    for part in wanted:
        here.post(part)
    assert here.flush() is False
    assert here.waiting
    heard: list[Any] = []
    while len(heard) < 100:
        heard += there.read()
        here.flush()
    assert heard == wanted
    assert not here.waiting


def test_what_follows_is_done_once_all_has_left_and_in_order(ends: Ends) -> None:
    here, there = ends
    done: list[str] = []
    here.send([b"x" * 3_000_000], [], lambda: done.append("large"))
    here.send(["small"], [], lambda: done.append("small"))
    assert done == []
    heard = there.read()
    while len(heard) < 2:
        here.flush()
        heard += there.read()
    assert (heard[1], done) == ("small", ["large", "small"])


def test_more_messages_than_one_frame_of_posted_ones_takes(ends: Ends) -> None:
    """`sent` is called when the last of them has left, whatever was posted before."""
    here, there = ends
    for number in range(3000):
        here.post(number)
    done: list[int] = []
    here.send([b"x" * 1000] * 3000, [], lambda: done.append(1))
    assert done == []
    heard: list[Any] = []
    while not done:
        heard += there.read()
        here.flush()
    heard += there.read()
    while len(heard) < 6000:
        heard += there.read()
    assert heard[:3000] == list(range(3000))
    assert len(heard) == 6000


def test_descriptors_come_with_their_frame_and_are_closed_here(ends: Ends) -> None:
    here, there = ends
    before = worth()
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(200)]
    here.send(["two hundred"], fds)
    assert hear(there, 1) == ["two hundred"]
    assert len(there.fds) == 200
    assert not any(os.get_inheritable(fd) for fd in there.fds)
    there.close()
    assert worth()["/dev/null"] == before.get("/dev/null", 0)


def test_descriptors_that_nobody_will_hear_of_are_closed(ends: Ends) -> None:
    here, there = ends
    before = worth().get("/dev/null", 0)
    here.send([b"x" * 3_000_000], [])
    here.send(["more"], [os.open("/dev/null", os.O_RDONLY)])
    assert worth()["/dev/null"] == before + 1
    there.close()
    here.flush()
    assert worth().get("/dev/null", 0) == before


def test_what_was_said_before_the_end_is_heard_even_by_who_cannot_answer(ends: Ends) -> None:
    """The other side has died; a failing send must not hide its last words."""
    here, there = ends
    there.send(["first"], [os.open("/dev/null", os.O_RDONLY)])
    there.send(["second"], [os.open("/dev/null", os.O_RDONLY)])
    there.send(["last"], [])
    there.close()
    here.post("too late")
    assert here.flush()
    assert not here.waiting
    heard: list[Any] = []
    while not here.ended:
        heard += here.read()
    assert heard == ["first", "second", "last"]
    assert len(here.fds) == 2


def test_the_end_is_seen(ends: Ends) -> None:
    here, there = ends
    assert (here.read(), here.ended) == ([], False)
    there.close()
    there.close()
    assert (here.read(), here.ended) == ([], True)
    here.drain(SOON_S)


def test_half_a_frame_waits_for_the_rest() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        pipe = Pipe[Any](theirs, Any)
        body = msgspec.msgpack.encode(["hello"])
        frame = len(body).to_bytes(4, "little") + body
        for byte in frame[:-1]:
            ours.send(bytes([byte]))
            assert pipe.read() == []
        ours.send(frame[-1:] + frame)
        assert pipe.read() == ["hello", "hello"]
        ours.send(b"\1\0\0\0\xc1")
        with pytest.raises(msgspec.MsgspecError):
            pipe.read()
        pipe.close()


def test_a_message_that_cannot_be_encoded_takes_no_other_with_it(ends: Ends) -> None:
    here, there = ends
    here.post("one")
    with pytest.raises(UnicodeEncodeError):
        here.post("\ud800")
    with pytest.raises(TypeError):
        here.post(object())
    here.post("two")
    here.flush()
    assert hear(there, 2) == ["one", "two"]


def test_many_threads_may_post(ends: Ends) -> None:
    here, there = ends

    def post(first: int) -> None:
        for number in range(first, first + 2000):
            here.post(number)
            here.flush()

    threads = [threading.Thread(target=post, args=(i * 2000,)) for i in range(8)]
    for thread in threads:
        thread.start()
    heard: list[int] = []

    def all_heard() -> bool:
        heard.extend(there.read())
        if not any(thread.is_alive() for thread in threads):
            here.flush()
        return len(heard) >= 16_000

    until(all_heard)
    for thread in threads:
        thread.join()
    assert sorted(heard) == list(range(16_000))
    for first in range(0, 16_000, 2000):
        mine = [number for number in heard if first <= number < first + 2000]
        assert mine == sorted(mine), "each thread's own, in its order"


def test_a_signal_handler_may_post_in_the_middle_of_a_post(ends: Ends) -> None:
    here, there = ends
    handled = 0

    def handler(number: int, frame: object) -> None:
        nonlocal handled
        handled += 1
        here.post("from the handler")
        here.flush()

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        heard: list[Any] = []
        posted = 0
        while handled < 100 or posted < 2000:
            here.post(posted)
            posted += 1
            here.flush()
            heard += there.read()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    here.flush()
    heard += there.read()
    assert [said for said in heard if said != "from the handler"] == list(range(posted))
    assert heard.count("from the handler") == handled
