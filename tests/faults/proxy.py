"""A TCP proxy that misbehaves on order: it holds, flips, delays, records and cuts what passes."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

__all__ = ["Proxy"]

PIECE_NBYTES = 1 << 16
KEEP_NBYTES = 32 << 20
"""Most bytes held per direction; more stays with whoever sends it."""


class _Pipe:
    """One direction of one connection."""

    def __init__(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        self.source = source
        self.sink = sink
        self.up = up
        self.pieces: deque[tuple[float, bytes]] = deque()
        self.kept_nbytes = 0
        self.taken_nbytes = 0
        self.ended = False
        self.passed_end = False

    def drop(self) -> None:
        """Let nothing more pass."""
        self.pieces.clear()
        self.kept_nbytes = 0
        self.ended = self.passed_end = True


class Proxy:
    """Forwards connections to `target`. `up` is the direction of whoever connects to us.

    Attributes:
        port: Where it listens, on 127.0.0.1.
        target: The port connections are forwarded to; set before the first comes.
    """

    def __init__(self) -> None:
        self.target = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._changed = threading.Condition()
        self._pipes: list[_Pipe] = []
        self._allowance: int | None = None
        self._held_down = False
        self._flip_at: int | None = None
        self._delay_s = 0.0
        self._refuses = False
        self._record: bytearray | None = None
        self._over = False
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()

    # Orders, from any thread

    def hold(self, after_nbytes: int = 0) -> None:
        """Let this many more bytes pass upwards, over all connections, and keep what comes after them."""
        with self._changed:
            self._allowance = after_nbytes
        self._wake()

    def hold_down(self) -> None:
        """Keep what comes downwards."""
        with self._changed:
            self._held_down = True

    def release(self) -> None:
        """Forward what was held, and what comes."""
        with self._changed:
            self._allowance, self._held_down = None, False
        self._wake()

    def flip(self, at_byte: int) -> None:
        """Flip one bit of that byte of what goes upwards, counted per connection."""
        with self._changed:
            self._flip_at = at_byte

    def delay(self, seconds: float) -> None:
        """Keep everything for so long."""
        with self._changed:
            self._delay_s = seconds

    def refuse(self, refuses: bool = True) -> None:
        """Close every new connection at once."""
        with self._changed:
            self._refuses = refuses

    def record(self) -> bytearray:
        """Note what goes upwards from now on."""
        with self._changed:
            self._record = bytearray()
            return self._record

    def cut(self) -> int:
        """Reset every connection and forget what was held; returns how many there were."""
        with self._changed:
            count = len(self._pipes) // 2
            for pipe in self._pipes:
                _reset(pipe.source)
            self._pipes.clear()
        self._wake()
        return count

    def wait_held(self, nbytes: int, timeout_s: float = 10.0) -> bool:
        """Wait until so many bytes are held on their way up."""
        return self._wait(lambda: sum(p.kept_nbytes for p in self._pipes if p.up) >= nbytes, timeout_s)

    def wait_connections(self, count: int, timeout_s: float = 10.0) -> bool:
        """Wait until there are so many connections."""
        return self._wait(lambda: len(self._pipes) == 2 * count, timeout_s)

    def close(self) -> None:
        """End the thread and all connections."""
        self._over = True
        self._wake()
        self._thread.join()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The thread

    def _wait(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(condition, timeout_s)

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    def _run(self) -> None:
        while not self._over:
            poller, timeout_ms = self._poller()
            ready = dict(poller.poll(timeout_ms))
            with self._changed:
                if self._wake_fd in ready:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._wake_fd)
                if self._listening.fileno() in ready:
                    self._accept()
                for pipe in list(self._pipes):
                    if pipe in self._pipes:
                        self._move(pipe)
                self._changed.notify_all()
        for pipe in self._pipes:
            _reset(pipe.source)
        self._listening.close()
        os.close(self._wake_fd)

    def _poller(self) -> tuple[select.poll, float | None]:
        poller, masks = select.poll(), {self._wake_fd: select.POLLIN, self._listening.fileno(): select.POLLIN}
        timeout_ms = None
        with self._changed:
            for pipe in self._pipes:
                masks.setdefault(pipe.source.fileno(), 0)
                masks.setdefault(pipe.sink.fileno(), 0)
                if not pipe.ended and pipe.kept_nbytes < KEEP_NBYTES:
                    masks[pipe.source.fileno()] |= select.POLLIN
                if pipe.pieces and self._may_pass(pipe):
                    left_s = pipe.pieces[0][0] - time.monotonic()
                    if left_s <= 0:
                        masks[pipe.sink.fileno()] |= select.POLLOUT
                    else:
                        timeout_ms = min(timeout_ms or 1e9, left_s * 1000 + 1)
        for fd, mask in masks.items():
            if mask:
                poller.register(fd, mask)
        return poller, timeout_ms

    def _accept(self) -> None:
        client, _ = self._listening.accept()
        if self._refuses:
            return _reset(client)
        server = socket.socket()
        try:
            server.connect(("127.0.0.1", self.target))
        except OSError:
            server.close()
            return _reset(client)
        for sock in (client, server):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._pipes += [_Pipe(client, server, True), _Pipe(server, client, False)]

    def _may_pass(self, pipe: _Pipe) -> bool:
        return self._allowance != 0 if pipe.up else not self._held_down

    def _move(self, pipe: _Pipe) -> None:
        self._take(pipe)
        try:
            self._give(pipe)
        except BlockingIOError:
            return
        except OSError:  # nobody takes it any more; what goes the other way may still arrive
            pipe.drop()
        pair = [other for other in self._pipes if pipe.source in (other.source, other.sink)]
        if all(other.passed_end for other in pair):
            self._pipes = [other for other in self._pipes if other not in pair]
            pipe.source.close()
            pipe.sink.close()

    def _take(self, pipe: _Pipe) -> None:
        while not pipe.ended and pipe.kept_nbytes < KEEP_NBYTES:
            try:
                piece = pipe.source.recv(PIECE_NBYTES)
            except BlockingIOError:
                return
            except OSError:  # reset, as by a process that was killed; what it had sent is on its way all the same
                piece = b""
            pipe.ended = not piece
            if piece:
                pipe.pieces.append((time.monotonic() + self._delay_s, self._spoiled(pipe, piece)))
                pipe.kept_nbytes += len(piece)
                pipe.taken_nbytes += len(piece)

    def _spoiled(self, pipe: _Pipe, piece: bytes) -> bytes:
        if not pipe.up:
            return piece
        if self._record is not None:
            self._record += piece
        at = -1 if self._flip_at is None else self._flip_at - pipe.taken_nbytes
        if not 0 <= at < len(piece):
            return piece
        self._flip_at = None
        return piece[:at] + bytes([piece[at] ^ 0x10]) + piece[at + 1 :]

    def _give(self, pipe: _Pipe) -> None:
        while pipe.pieces and self._may_pass(pipe) and pipe.pieces[0][0] <= time.monotonic():
            due, piece = pipe.pieces[0]
            most = len(piece) if self._allowance is None or not pipe.up else min(len(piece), self._allowance)
            sent = pipe.sink.send(piece[:most])
            pipe.kept_nbytes -= sent
            if pipe.up and self._allowance is not None:
                self._allowance -= sent
            if sent == len(piece):
                pipe.pieces.popleft()
            else:
                pipe.pieces[0] = (due, piece[sent:])
        if pipe.ended and not pipe.pieces and not pipe.passed_end:
            pipe.passed_end = True
            pipe.sink.shutdown(socket.SHUT_WR)


def _reset(sock: socket.socket) -> None:
    """Close so that the other end gets a reset, not an end of file."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
