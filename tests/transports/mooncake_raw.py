"""The adapters' protocol by hand, for tests of what a well-behaved peer would not do; and a transport's engines."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable
from importlib import metadata
from typing import Any

import msgspec
import pytest

from kvpoll_common.handshake import Called, said_in
from kvpoll_fsm.spi import Failed, Link, LinkDown, Transport
from kvpoll_fsm.testing.conformance.sides import SIZES, Pair, Side, until
from kvpoll_mooncake import handshake, wire
from kvpoll_mooncake.framing import pack
from kvpoll_mooncake.wire import Base, Engine
from tests.transports.raw import hello, proof


def _missing() -> str:
    """What Mooncake lacks here, or nothing."""
    if not [each for each in metadata.distributions() if (each.name or "").startswith("mooncake-transfer-engine")]:
        return "Mooncake's wheel is not installed; there is one for x86-64 Linux and Python 3.10 to 3.13"
    for library in ("libibverbs.so.1", "librdmacm.so.1", "libnuma.so.1", "libcurl.so.4"):
        try:
            ctypes.CDLL(library)
        except OSError:
            return f"{library} is missing: apt-get install libibverbs1 librdmacm1 libnuma1 libcurl4"
    return ""


needs_mooncake = pytest.mark.skipif(bool(_missing()), reason=_missing() or "it is all there")


def changed(transport: Transport, **changes: Any) -> bytes:
    """The transport's descriptor, but for some of it."""
    descriptor = msgspec.msgpack.decode(transport.descriptor())
    return msgspec.msgpack.encode({**descriptor, **changes})


class Peer:
    """One end of a connection, that waits."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.socket.settimeout(20)

    def say(self, *messages: wire.Message | bytes) -> None:
        for message in messages:
            self.socket.sendall(pack(message if isinstance(message, bytes) else wire.encode(message)))

    def hear(self) -> wire.Message | None:
        """The next message, or None at the end of the connection."""
        head = self._exactly(4)
        return wire.decode(self._exactly(struct.unpack("<I", head)[0])) if head else None

    def _exactly(self, nbytes: int) -> bytes:
        data = b""
        while len(data) < nbytes:
            try:
                piece = self.socket.recv(nbytes - len(data))
            except ConnectionResetError:
                return b""
            if not piece:
                return b""
            data += piece
        return data

    def close(self) -> None:
        self.socket.close()


class Writer(Peer):
    """Another adapter's end of a connection to a receiver, as far as it has proved itself."""

    def __init__(self, transport: Transport) -> None:
        self.descriptor = handshake.read_descriptor(transport.descriptor())
        super().__init__(socket.create_connection((self.descriptor.host, self.descriptor.port)))

    def introduce(self, writer: bytes = b"w" * 16, **changes: Any) -> None:
        meant = {"incarnation": self.descriptor.incarnation, "nonce": os.urandom(32), "writer": writer, **changes}
        ours = hello(magic=wire.KIND.magic, **meant)
        self.say(wire.Opening(ours))
        self.hellos = ours, said_in(self.hear())

    def prove(self, secret: bytes | None = None, role: bytes = b"kvpoll-mooncake sender") -> None:
        self.say(wire.Opening(proof(secret or self.descriptor.secret, role, *self.hellos)))

    def join(self) -> Engine:
        """All of the opening; returns the engine."""
        self.introduce()
        self.prove()
        assert isinstance(self.hear(), wire.Opening)
        engine = self.hear()
        assert isinstance(engine, Engine)
        return engine


class Impostor:
    """A receiver's adapter that lies, in a thread: it proves itself and then does what the test says.

    Attributes:
        descriptor: How to connect to it.
        heard: What it was told after the handshake.
    """

    def __init__(self, act: Callable[[Peer], None], speaks: bool = True) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        host, port = self._listening.getsockname()
        self._identity = handshake.new_identity(host, port, "tcp", "P2PHANDSHAKE")
        self.descriptor = msgspec.msgpack.encode(self._identity)
        self.heard: list[wire.Message] = []
        self._act = act
        self._speaks = speaks
        self._connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listening.accept()
            except OSError:
                return
            self._connections.append(sock)
            if self._speaks:
                threading.Thread(target=self._talk, args=(Peer(sock),), daemon=True).start()

    def _talk(self, peer: Peer) -> None:
        with contextlib.suppress(OSError):  # closed by the test, or by the other side
            called = Called(wire.KIND, self._identity)
            first = peer.hear()
            if first is None:
                return
            called.hear(said_in(first), lambda ours: peer.say(wire.Opening(ours)))
            second = peer.hear()
            if second is None:
                return
            peer.say(wire.Opening(called.check(said_in(second))))
            self._act(peer)
            while (message := peer.hear()) is not None:
                self.heard.append(message)

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()
        for sock in self._connections:
            sock.close()


def engine_at(port: int, number: int = 1, address: int = 1 << 45) -> Engine:
    """An engine that listens at a port of this host, or says so."""
    bases = tuple(Base(region, address + (region << 30), size) for region, size in enumerate(SIZES))
    return Engine(number, f"127.0.0.1:{port}", bases)


def down(side: Side, descriptor: bytes) -> tuple[Link, str]:
    """A link to whom this describes, and why it went down."""
    link = side.transport.connect(descriptor, [])
    side.until(lambda: reasons(side, link), "the link to go down")
    return link, reasons(side, link)[0]


def reasons(side: Side, link: Link) -> list[str]:
    """Why a link went down."""
    return [seen.reason for seen in side.seen if isinstance(seen, LinkDown) and seen.link == link.number]


# A transport's engines


def receiving_pid(side: Side) -> int:
    """The process of the engine that receives; 0 while there is none that takes writes."""
    keeper = side.transport._inside.keeper  # type: ignore[attr-defined]
    process = keeper._life.process
    return 0 if keeper.current is None or process is None else int(process.pid)


def sending_pid(link: Link) -> int:
    """The process of the engine that sends over a link; 0 while there is none in use."""
    ours = link.lane._engine  # type: ignore[attr-defined]
    return int(ours.running.pid) if ours.up else 0


def stop(pid: int) -> None:
    """Stop a process; it does not run any more on return."""
    os.kill(pid, signal.SIGSTOP)
    until(lambda: state(pid) == "T", "the process to stop")


def state(pid: int) -> str:
    """What the kernel says of a process."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def command_of(pid: int) -> str:
    """What a process was started as."""
    with open(f"/proc/{pid}/cmdline") as file:
        return file.read()


def is_alive(pid: int) -> bool:
    try:
        return state(pid) not in "ZX"
    except OSError:
        return False


def failed(pair: Pair, ticket: int) -> Failed:
    """How a ticket failed, once nothing of it can land any more."""
    end = pair.failed(ticket)
    pair.until(lambda: end.quiescent or ticket in pair.tx.quiesced, "the ticket to come to rest")
    return end


# Servers


def listening_ports(pid: int) -> set[int]:
    """Where a process listens."""
    sockets = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    ports = set()
    for table in ("tcp", "tcp6"):
        with open(f"/proc/{pid}/net/{table}") as file:
            rows = [line.split() for line in file.readlines()[1:]]
        ports |= {
            int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets
        }
    return ports


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True
