"""A socket between host and mover that never makes its user wait.

A frame is its length (4 bytes, little-endian) and a list of messages. File descriptors travel with the frame that
tells of them.
"""

from __future__ import annotations

import array
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import msgspec

__all__ = ["Pipe"]

_LENGTH = struct.Struct("<I")
_READ_NBYTES = 256 << 10
_MAX_FDS = 253  # the kernel takes no more in one message
_FDS_NBYTES = socket.CMSG_SPACE(_MAX_FDS * 4)
_CLOEXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_NOSIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)
_MOST_MESSAGES = 1024
M = TypeVar("M")


class _Frame:
    """Bytes on their way, the descriptors that go with the first of them, and what to do when all have left."""

    __slots__ = ("data", "fds", "sent")

    def __init__(self, data: memoryview, fds: list[int], sent: Callable[[], None] | None) -> None:
        self.data = data
        self.fds = fds
        self.sent = sent


class Pipe(Generic[M]):
    """One end. `post` and `flush` are for any thread and for signal handlers, `read` for one thread.

    Attributes:
        fds: Descriptors that have arrived, for whoever reads to take over.
        ended: The other side is gone, and all that it has sent was read.
    """

    def __init__(self, sock: socket.socket, messages: Any) -> None:
        """Take over a stream socket.

        Args:
            sock: Connected; becomes non-blocking.
            messages: The type of what is read.
        """
        sock.setblocking(False)
        self._socket = sock
        self._queue: deque[Any] = deque()
        self._frames: deque[_Frame] = deque()
        self._flushing = threading.Lock()
        self._buffer = memoryview(bytearray(_READ_NBYTES))
        self._received = bytearray()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[list[M]] = msgspec.msgpack.Decoder(list[messages])
        self.fds: deque[int] = deque()
        self.ended = self._deaf = False

    def fileno(self) -> int:
        """Readable when there is something to read."""
        return self._socket.fileno()

    def post(self, message: Any) -> None:
        """Leave a message for the next `flush`.

        Raises:
            TypeError, ValueError: It cannot be encoded; others are not affected.
        """
        self._queue.append(msgspec.Raw(self._encoder.encode(message)))
        if self._deaf:
            self._queue.clear()

    @property
    def waiting(self) -> bool:
        """There is something that the socket has not taken yet."""
        return bool(self._frames or self._queue)

    def flush(self) -> bool:
        """Send what has been posted, as far as the socket takes it; False if it did not take all.

        Where another thread, or this one further up, is at it, that one does it.
        """
        while self._queue or self._frames:
            if not self._flushing.acquire(blocking=False):
                return True
            try:
                if self._queue:
                    self._pack_posted()
                if not self._send():
                    return self._deaf
            finally:
                self._flushing.release()
        return True

    def send(self, messages: Sequence[Any], fds: list[int], sent: Callable[[], None] | None = None) -> None:
        """Send messages in a frame of their own, after those posted before; `sent` is called once all has left.

        Only where one thread uses the pipe. The descriptors are taken over, and closed once they have left.
        """
        while self._queue:
            self._pack_posted()
        self._pack(messages, fds, sent)
        self.flush()

    def read(self) -> list[M]:
        """What has arrived, without waiting; `ended` tells whether more can come. New descriptors go to `fds`.

        Raises:
            msgspec.MsgspecError: The other side talks nonsense.
        """
        while True:
            try:
                nbytes, ancillary, _, _ = self._socket.recvmsg_into([self._buffer], _FDS_NBYTES, _CLOEXEC)
            except BlockingIOError:
                break
            except OSError:
                self.ended = True
                break
            self.fds.extend(_descriptors(ancillary))
            if not nbytes:
                self.ended = True
                break
            self._received += self._buffer[:nbytes]
            if nbytes < _READ_NBYTES:
                break
        return self._decode()

    def wait(self, timeout_s: float | None, *others: int) -> set[int]:
        """Wait until there is something to read, the socket takes what is left over, or one of `others` is readable.

        Returns:
            The file descriptors of which that is true, ours among them; none if the time has passed.
        """
        poll = select.poll()
        poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._frames else 0))
        for fd in others:
            poll.register(fd, select.POLLIN)
        return {fd for fd, _ in poll.poll(None if timeout_s is None else max(0, int(timeout_s * 1000) + 1))}

    def drain(self, for_s: float) -> None:
        """Send what is left, for so long at most."""
        ends_s = time.monotonic() + for_s
        while not self.ended and not self.flush() and time.monotonic() < ends_s:
            poll = select.poll()
            poll.register(self._socket, select.POLLOUT)
            poll.poll(100)

    def close(self) -> None:
        """Close the socket, and descriptors nobody has taken. Not in a signal handler. May be called twice."""
        with self._flushing:
            self._forget()
        self.abandon()

    def abandon(self) -> None:
        """Close what a forked child has of it; who held a lock at the fork does not come along."""
        self._socket.close()
        while self.fds:
            os.close(self.fds.popleft())

    def _forget(self) -> None:
        """The other side will not hear what is left; what it has said before may still be read."""
        self._deaf = True
        self._queue.clear()
        while self._frames:
            _close_all(self._frames.popleft().fds)

    def _pack_posted(self) -> None:
        """Make a frame of what has been posted."""
        messages: list[Any] = []
        while self._queue and len(messages) < _MOST_MESSAGES:
            messages.append(self._queue.popleft())
        self._pack(messages, [], None)

    def _pack(self, messages: Sequence[Any], fds: list[int], sent: Callable[[], None] | None) -> None:
        body = self._encoder.encode(messages)
        self._frames.append(_Frame(memoryview(_LENGTH.pack(len(body)) + body), fds, sent))

    def _send(self) -> bool:
        """Send frames until the socket takes no more; False if some are left."""
        while self._frames:
            frame = self._frames[0]
            try:
                if frame.fds:
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", frame.fds))]
                    taken = self._socket.sendmsg([frame.data], rights, _NOSIGNAL)
                    _close_all(frame.fds)
                else:
                    taken = self._socket.send(frame.data, _NOSIGNAL)
            except BlockingIOError:
                return False
            except OSError:  # the other side is gone; who reads finds out
                self._forget()
                return False
            frame.data = frame.data[taken:]
            if not frame.data:
                self._frames.popleft()
                if frame.sent is not None:
                    frame.sent()
        return True

    def _decode(self) -> list[M]:
        messages: list[M] = []
        at, received = 0, self._received
        while len(received) - at >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(received, at)
            end = at + _LENGTH.size + size
            if len(received) < end:
                break
            messages += self._decoder.decode(bytes(received[at + _LENGTH.size : end]))
            at = end
        del received[:at]
        return messages


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> array.array[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return found
