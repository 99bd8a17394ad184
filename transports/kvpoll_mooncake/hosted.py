"""An engine in a thread of this process: for memory that cannot be given to another one.

It is ended by letting go of it, which closes its connections: then nothing lands through it, and no source is read.
That takes about a second, for which Mooncake holds the interpreter; and a call of Mooncake's that hangs must return
first.
"""

from __future__ import annotations

import ctypes
import logging
import os
import socket
import threading
import traceback
from collections.abc import Mapping

import msgspec

from kvpoll_common.loop import Reactor
from kvpoll_fsm.errors import MalformedMessage
from kvpoll_fsm.spi import Region
from kvpoll_mooncake import frames
from kvpoll_mooncake.frames import Command, Event, Register, Setup
from kvpoll_mooncake.roles import Master
from kvpoll_mooncake.stream import Stream
from kvpoll_mooncake.worker import Worker

__all__ = ["Hosted"]

_log = logging.getLogger("kvpoll_mooncake")
_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


class Hosted:
    """One engine's thread. Used by the reactor's thread alone."""

    def __init__(self, reactor: Reactor, master: Master, name: str) -> None:
        """Store what is needed.

        Args:
            reactor: Whose turn it is to listen to the engine.
            master: Hears what it says.
            name: For the thread and the log.
        """
        self._reactor = reactor
        self._master = master
        self._name = name
        self._stream: Stream | None = None

    def start(self, setup: Setup, environment: Mapping[str, str], regions: Mapping[int, Region]) -> None:
        """Start it.

        Raises:
            OSError: The system has no thread or file descriptor to give.
        """
        os.environ.update(environment)  # read by Mooncake when it is imported
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        # A daemon: a call of Mooncake's that hangs must not keep the program from ending.
        thread = threading.Thread(target=_serve, args=(theirs,), name=f"kvpoll-{self._name}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            ours.close()
            theirs.close()
            raise OSError(str(error)) from error
        ours.setblocking(False)
        self._stream = Stream(self._reactor, ours, self, frames.FRAME_NBYTES)
        self.send(setup)
        for region in regions.values():
            self.register(region)

    @property
    def pid(self) -> int:
        """The process it runs in: this one."""
        return os.getpid()

    def send(self, command: Command) -> None:
        """Tell it something."""
        if self._stream is not None:
            self._stream.send(frames.encode(command))

    def register(self, region: Region) -> None:
        """Give it a region."""
        nbytes = len(region.buffer)
        address = ctypes.addressof(ctypes.c_char.from_buffer(region.buffer))
        self.send(Register(region.number, nbytes, address, None))

    def kill(self) -> None:
        """Let it be let go of; `Master.gone` follows once it is. May be called twice."""
        if self._stream is not None:
            self._stream.finish()

    @property
    def is_alive(self) -> bool:
        """It has been started, and not been seen to end."""
        return self._stream is not None

    def end(self) -> None:
        """Let it be let go of; nobody is told. For when the reactor's thread is no more."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def last_words(self) -> str:
        """Nothing: Mooncake writes to this process's own standard error."""
        return ""

    def received(self, frame: bytes) -> None:
        """It says something.

        Raises:
            MalformedMessage: Nonsense.
        """
        try:
            event = _decoder.decode(frame)
        except ValueError as error:
            raise MalformedMessage(f"an engine that talks nonsense: {error}") from error
        self._master.heard(self, event)

    def ended(self, error: Exception) -> None:
        """It has been let go of."""
        self._stream = None
        self._master.gone(self, "let go of")


def _serve(sock: socket.socket) -> None:
    """Serve until the adapter ends the connection; the socket is closed once the engine is no more."""
    worker = Worker(sock)
    try:
        worker.run()
    except Exception:  # the adapter learns of it by the socket's end
        _log.error("an engine's thread failed:\n%s", traceback.format_exc())
    finally:
        worker.let_go()
        sock.close()
