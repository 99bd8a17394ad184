"""The control plane's sockets: one ROUTER that peers come to, one DEALER per peer we go to.

Used by the driver's thread alone. Sends never block: a packet that cannot be taken now is lost here, and the
channel above sends it again.
"""

from __future__ import annotations

import errno
import logging
import math
import time
from collections import deque
from collections.abc import Iterator

import zmq

from kvpoll_fsm.address import Address
from kvpoll_fsm.connection import Origin
from kvpoll_fsm.errors import AddressError, LimitReached, MalformedMessage, UnsupportedVersion
from kvpoll_fsm.limits import DEFAULT, Limits
from kvpoll_fsm.messages import Hello, Packet, decode, encode
from kvpoll_fsm.refusals import Refusals
from kvpoll_fsm.security import Keys
from kvpoll_fsm.zap import UNTRUSTED, Zap

__all__ = ["Control"]

log = logging.getLogger("kvpoll_fsm")
READ_S = 0.02
"""How long one turn may be spent on what has arrived: a flood must not keep timers and other peers waiting."""
SOCKETS_BESIDES = 8
"""More than the sockets of a context that are not DEALERs."""
MAX_KEEPALIVE_IDLE_S = 32767
"""What Linux takes (tcp(7), TCP_KEEPIDLE)."""
MALFORMED = "malformed packet"
_MORE = zmq.NOBLOCK | zmq.SNDMORE


class Control:
    """Sockets by connection number.

    Args:
        listen: Where the ROUTER binds; port 0 takes any free one.
        keys: With keys, only peers whose public key is trusted are spoken to, and all of it is encrypted.
        limits: How much is read, and how many sockets there may be.

    Attributes:
        refusals: Who was turned away, and what was dropped.
    """

    def __init__(
        self, listen: Address, keys: Keys | None = None, limits: Limits = DEFAULT, peer_lost_s: float = 5.0
    ) -> None:
        self.listen = listen
        self._peer_lost_s = peer_lost_s
        self.refusals = Refusals("control", log)
        self._keys = keys
        self._limits = limits
        self._zap: Zap | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._router: zmq.Socket[bytes] | None = None
        self._dealers: dict[int, zmq.Socket[bytes]] = {}
        self._routes: dict[int, bytes] = {}
        self._poller = zmq.Poller()
        self._ready: list[zmq.Socket[bytes]] = []

    def start(self) -> Address:
        """Bind, and return the address with its real port.

        Raises:
            AddressError: The address cannot be bound.
        """
        self._context = zmq.Context(io_threads=1)
        self._context.set(zmq.MAX_SOCKETS, self._limits.callees + SOCKETS_BESIDES)
        self._router = self._socket(zmq.ROUTER, self.listen)
        self._zap = Zap(self._context, self._router, self._keys, self.refusals)
        self._zap.open()
        for socket in self._zap.sockets:
            self._poller.register(socket, zmq.POLLIN)
        if self._keys is not None:
            self._keys.protect_listener(self._router)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        port = str(self.listen.port) if self.listen.port else "*"
        try:
            self._router.bind(str(self.listen).rpartition(":")[0] + ":" + port)
        except zmq.ZMQError as error:
            self.close()
            raise AddressError(str(self.listen), f"cannot listen there: {error}") from error
        self._poller.register(self._router, zmq.POLLIN)
        bound = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        public = self._keys.public if self._keys else None
        return self.listen.with_port(int(bound.rpartition(":")[2])).with_key(public)

    def watch(self, fd: int, *, writable: bool = False) -> None:
        """Let `wait()` end when `fd` is readable too, or when it is writable, if that is asked."""
        self._poller.register(fd, zmq.POLLIN | (zmq.POLLOUT if writable else 0))

    def unwatch(self, fd: int) -> None:
        """Stop watching; before `fd` is closed."""
        self._poller.unregister(fd)

    def wait(self, timeout_s: float | None) -> set[int]:
        """Wait for packets or a watched fd; returns the watched fds that are readable."""
        timeout_ms = None if timeout_s is None else max(0, -int(-timeout_s * 1000 // 1))
        ready = [each for each, _ in self._poller.poll(timeout_ms)]
        self._ready = [each for each in ready if not isinstance(each, int)]
        return {each for each in ready if isinstance(each, int)}

    def connect(self, conn: int, address: Address) -> None:
        """Open the DEALER of an outgoing connection, unless it is open.

        Raises:
            LimitReached: The context or the process has no socket left to give.
        """
        if conn in self._dealers:
            return
        try:
            dealer = self._socket(zmq.DEALER, address)
        except zmq.ZMQError as error:
            if error.errno == errno.EMFILE:
                raise LimitReached("sockets", len(self._dealers)) from error
            raise
        if self._keys is not None and address.key is not None:
            self._keys.protect_caller(dealer, address.key)
        dealer.connect(address.place)
        self._poller.register(dealer, zmq.POLLIN)
        self._dealers[conn] = dealer

    def route(self, conn: int, identity: bytes) -> None:
        """Replies of an incoming connection go to this ROUTER identity from now on."""
        self._routes[conn] = identity

    def hang_up(self, conn: int) -> None:
        """Forget a connection."""
        self._routes.pop(conn, None)
        dealer = self._dealers.pop(conn, None)
        if dealer is not None:
            self._poller.unregister(dealer)
            dealer.close(linger=200)

    def send(self, conn: int, packet: Packet) -> bool:
        """Hand a packet to the connection's socket; False if it is lost for now."""
        identity = self._routes.get(conn)
        if identity is not None:
            return self.reply(identity, packet)
        dealer = self._dealers.get(conn)
        return dealer is not None and _try_send(dealer, [encode(packet)])

    def reply(self, identity: bytes, packet: Packet) -> bool:
        """Send to whoever has this ROUTER identity; False if it is lost for now."""
        return self._router is not None and _try_send(self._router, [identity, encode(packet)])

    def read(self) -> Iterator[tuple[Origin, bytes, Packet | UnsupportedVersion]]:
        """The packets that `wait` has seen arrive: (where from, ROUTER identity, packet). The sockets take turns.

        Malformed ones are counted and logged. One in a version we do not speak comes as its error too, so
        that the peer can be told.
        """
        if not self._ready:
            return
        names = {dealer: conn for conn, dealer in self._dealers.items()}
        turns = deque([socket for socket in self._ready if socket is self._router or socket in names])
        if len(turns) < len(self._ready) and self._zap is not None:
            self._zap.answer(_arrived)
        ends_s = time.monotonic() + READ_S
        while turns and time.monotonic() < ends_s:
            socket = turns.popleft()
            if socket.closed:
                continue
            for frames in _arrived(socket, 1):
                turns.append(socket)
                yield from self._taken(names.get(socket), frames)

    def close(self) -> None:
        """Close all sockets; packets handed over are given a moment to leave."""
        for dealer in self._dealers.values():
            dealer.close(linger=200)
        if self._zap is not None:
            self._zap.close()
        if self._router is not None:
            self._router.close(linger=200)
        if self._context is not None:
            self._context.term()
        self._dealers.clear()
        self._context = self._router = self._zap = None

    @property
    def malformed(self) -> int:
        """Packets dropped because they are none of ours, or of a version that is not."""
        return self.refusals.count(MALFORMED)

    @property
    def refused(self) -> int:
        """Peers turned away because their key is not trusted."""
        return self.refusals.count(UNTRUSTED)

    def _taken(
        self, conn: int | None, frames: list[zmq.Frame]
    ) -> Iterator[tuple[Origin, bytes, Packet | UnsupportedVersion]]:
        if conn is not None:
            yield from self._decoded(Origin(conn), b"", frames[-1].buffer)
        elif len(frames) != 2:
            self._drop(f"{len(frames)} message parts")
        else:
            identity, frame = frames
            key = str(frame.get("User-Id")) if self._keys is not None else ""
            for origin, _, packet in self._decoded(Origin(key=key), identity.bytes, frame.buffer):
                if isinstance(packet, Hello):
                    origin = origin._replace(host=str(frame.get("Peer-Address")))
                yield origin, identity.bytes, packet

    def _decoded(
        self, origin: Origin, identity: bytes, data: bytes | memoryview
    ) -> Iterator[tuple[Origin, bytes, Packet | UnsupportedVersion]]:
        try:
            yield origin, identity, decode(data)
        except UnsupportedVersion as error:
            self._drop(str(error))
            yield origin, identity, error
        except MalformedMessage as error:
            self._drop(str(error))

    def _drop(self, why: str) -> None:
        self.refusals.add(MALFORMED, f"why={why[:200]}")

    def _socket(self, kind: int, address: Address) -> zmq.Socket[bytes]:
        if self._context is None:
            raise AssertionError("start() comes first")
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 4096)
        socket.setsockopt(zmq.RCVHWM, 4096)
        socket.setsockopt(zmq.MAXMSGSIZE, self._limits.message_nbytes)
        socket.setsockopt(zmq.HANDSHAKE_IVL, math.ceil(self._limits.handshake_s * 1000))
        socket.setsockopt(zmq.RECONNECT_IVL, 50)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        if address.is_v6:
            socket.setsockopt(zmq.IPV6, 1)
        self._give_up_dead_hosts(socket)
        return socket

    def _give_up_dead_hosts(self, socket: zmq.Socket[bytes]) -> None:
        """Close connections to hosts that vanished without a word; a router would keep them, and an fd each.

        TCP's own probes, which the kernel of a process that is merely stopped still answers. One that is closed too
        early is connected again, and the channel sends again.
        """
        idle_s = min(math.ceil(self._peer_lost_s), MAX_KEEPALIVE_IDLE_S)
        socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, idle_s)
        socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 1)
        socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
        socket.setsockopt(
            zmq.TCP_MAXRT, math.ceil(self._peer_lost_s * 2000)
        )  # probes rest while bytes are unacknowledged


def _try_send(socket: zmq.Socket[bytes], parts: list[bytes]) -> bool:
    try:
        for part in parts[:-1]:
            socket.send(part, _MORE)
        socket.send(parts[-1], zmq.NOBLOCK)
    except zmq.Again:
        return False
    except zmq.ZMQError as error:
        if error.errno == zmq.EHOSTUNREACH:
            return False
        raise
    return True


def _arrived(socket: zmq.Socket[bytes], most: int = 256) -> Iterator[list[zmq.Frame]]:
    """The messages that have arrived, with what ZeroMQ knows of who sent them."""
    for _ in range(most):
        try:
            yield socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return
