"""One transport in a process of its own, which a test calls, stops and kills: `remote.Remote` is the other end.

Run as `python -m kvpoll_fsm.testing.conformance.peer FD FACTORY OPTIONS`, where FD is a socket (see `wire`), and
the rest is a `Spec`. Ends when the socket does.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import select
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from kvpoll_fsm.errors import KvpollError
from kvpoll_fsm.spi import Completion, Gathers, LeaseId, Link, Range, Region, Transport, Write
from kvpoll_fsm.testing.conformance import wire
from kvpoll_fsm.testing.conformance.spec import Spec

__all__ = ["Server", "main"]

_PR_SET_PDEATHSIG = 1  # prctl(2)


class Server:
    """Does what it is told, and in between what a driver does: it asks for completions, and flushes."""

    def __init__(self, pipe: socket.socket, transport: Transport) -> None:
        self._pipe = pipe
        self._transport = transport
        self._links: dict[int, Link] = {}
        self._news: list[Completion] = []
        self._arenas: list[mmap.mmap] = []
        self._is_running = False

    def serve(self) -> bool:
        """Until the socket ends; returns False if the process is to end without closing the transport."""
        while True:
            self._wait()
            if self._is_running:
                self._turn()
            if not self._has_call():
                continue
            data, fds = wire.receive(self._pipe)
            if not data:
                return True
            call = msgspec.msgpack.decode(data, type=wire.Call)
            if call.method == "abandon":
                return False
            wire.send(self._pipe, self._answer(call, fds))

    def close(self) -> None:
        """Close the transport, and let go of the memory."""
        self._transport.close()
        for arena in self._arenas:
            arena.close()

    def _wait(self) -> None:
        poller = select.poll()
        poller.register(self._pipe, select.POLLIN)
        fileno = self._transport.fileno() if self._is_running else None
        if fileno is not None:
            poller.register(fileno, select.POLLIN)
        poller.poll(1 if self._is_running and fileno is None else 50)

    def _has_call(self) -> bool:
        poller = select.poll()
        poller.register(self._pipe, select.POLLIN)
        return bool(poller.poll(0))

    def _turn(self) -> None:
        if isinstance(self._transport, Gathers):
            self._transport.flush()
        self._news += self._transport.completions()

    def _answer(self, call: wire.Call, fds: list[int]) -> wire.Answer:
        try:
            if call.link is not None:
                return wire.Answer(self._of_link(self._links[call.link], call))
            method: Callable[..., Any] = getattr(self, f"_do_{call.method}")
            return wire.Answer(method(*call.arguments, *fds))
        except Exception as error:  # the test is told, whatever it is
            text = str(error) if isinstance(error, KvpollError) else repr(error)
            return wire.Answer(raised=[kind.__name__ for kind in type(error).__mro__], text=text)

    def _of_link(self, link: Link, call: wire.Call) -> Any:
        if call.method == "submit":
            writes, token = call.arguments
            return link.submit(msgspec.convert(writes, list[Write]), token)
        return getattr(link, call.method)(*call.arguments)

    # The calls of a transport

    def _do_start(self) -> None:
        self._transport.start()
        self._is_running = True

    def _do_descriptor(self) -> bytes:
        return self._transport.descriptor()

    def _do_register(self, number: int, nbytes: int, fd: int) -> bytes:
        arena = mmap.mmap(fd, nbytes)
        self._arenas.append(arena)
        return self._transport.register(Region(number, memoryview(arena), fd))

    def _do_grant(self, lease: Any, ranges: Any) -> bytes:
        return self._transport.grant(msgspec.convert(lease, LeaseId), msgspec.convert(ranges, list[Range]))

    def _do_revoke(self, token: bytes) -> None:
        self._transport.revoke(token)

    def _do_fence(self, token: bytes) -> int:
        return self._transport.fence(token)

    def _do_connect(self, descriptor: bytes, regions: list[bytes]) -> int:
        link = self._transport.connect(descriptor, regions)
        self._links[link.number] = link
        return link.number

    def _do_completions(self) -> list[Any]:
        news, self._news = self._news, []
        return wire.news_of(news)

    def _do_close(self) -> list[Any]:
        self._is_running = False
        self._transport.close()
        self._news += self._transport.completions()
        return self._do_completions()


def _die_with_parent() -> None:
    """Also while stopped, when the end of the socket is not seen."""
    with contextlib.suppress(OSError, AttributeError):  # no Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(fd: str, factory: str, options: str) -> None:
    """Serve one test."""
    _die_with_parent()
    with socket.socket(fileno=int(fd)) as pipe:
        server = Server(pipe, Spec.parse(factory, options).make())
        if server.serve():
            server.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
