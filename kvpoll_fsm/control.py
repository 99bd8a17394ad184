"""The control plane's sockets: one ROUTER that peers come to, one DEALER per peer we go to.

Used by the driver's thread alone. Sends never block: a packet that cannot be taken now is lost here, and the
channel above sends it again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import zmq
import zmq.utils.z85

from kvpoll_fsm.address import Address
from kvpoll_fsm.errors import AddressError, MalformedMessage, UnsupportedVersion
from kvpoll_fsm.messages import MAX_PACKET_NBYTES, Packet, decode, encode
from kvpoll_fsm.security import Keys

__all__ = ["Control"]

log = logging.getLogger("kvpoll_fsm")
MAX_READS_PER_TURN = 256


class Control:
    """Sockets by connection number.

    Args:
        listen: Where the ROUTER binds; port 0 takes any free one.
        keys: With keys, only peers whose public key is trusted are spoken to, and all of it is encrypted.

    Attributes:
        malformed: Packets dropped because they are none of ours, or of a version that is not.
        refused: Peers refused because their key is not trusted.
    """

    def __init__(self, listen: Address, keys: Keys | None = None) -> None:
        self.listen = listen
        self.malformed = 0
        self.refused = 0
        self._keys = keys
        self._gate: zmq.Socket[bytes] | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._router: zmq.Socket[bytes] | None = None
        self._dealers: dict[int, zmq.Socket[bytes]] = {}
        self._routes: dict[int, bytes] = {}
        self._poller = zmq.Poller()

    def start(self) -> Address:
        """Bind, and return the address with its real port.

        Raises:
            AddressError: The address cannot be bound.
        """
        self._context = zmq.Context(io_threads=1)
        self._router = self._socket(zmq.ROUTER, self.listen)
        if self._keys is not None:
            self._open_gate()
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

    def watch(self, fd: int) -> None:
        """Let `wait()` end when `fd` is readable too."""
        self._poller.register(fd, zmq.POLLIN)

    def wait(self, timeout_s: float | None) -> set[int]:
        """Wait for packets or a watched fd; returns the watched fds that are readable."""
        timeout_ms = None if timeout_s is None else max(0, -int(-timeout_s * 1000 // 1))
        return {ready for ready, _ in self._poller.poll(timeout_ms) if isinstance(ready, int)}

    def connect(self, conn: int, address: Address) -> None:
        """Open the DEALER of an outgoing connection, unless it is open."""
        if conn in self._dealers:
            return
        dealer = self._socket(zmq.DEALER, address)
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

    def read(self) -> Iterator[tuple[int | None, bytes, Packet | UnsupportedVersion]]:
        """The packets that have arrived: (outgoing connection or None, ROUTER identity, packet).

        Malformed ones are counted and logged. One in a version we do not speak comes as its error too, so
        that the peer can be told.
        """
        self._answer_gate()
        if self._router is not None:
            for parts in _arrived(self._router):
                if len(parts) == 2:
                    yield from self._decoded(None, parts[0], parts[1])
                else:
                    self._drop(f"{len(parts)} message parts")
        for conn, dealer in list(self._dealers.items()):
            for parts in _arrived(dealer):
                yield from self._decoded(conn, b"", parts[-1])

    def close(self) -> None:
        """Close all sockets; packets handed over are given a moment to leave."""
        for dealer in self._dealers.values():
            dealer.close(linger=200)
        for socket in (self._router, self._gate):
            if socket is not None:
                socket.close(linger=200)
        if self._context is not None:
            self._context.term()
        self._dealers.clear()
        self._context = self._router = self._gate = None

    def check_peer(self, address: Address) -> None:
        """Refuse a peer that could not be spoken to, before anything is sent.

        Raises:
            AddressError: Only one side has keys, or the peer's key is not trusted.
        """
        if self._keys is None and address.key is not None:
            raise AddressError(address.place, "the endpoint there wants keys: pass keys= and authorized=")
        if self._keys is not None and (address.key is None or not self._keys.admits(address.key)):
            raise AddressError(address.place, "its public key is missing or not in the folder of authorized keys")

    def _open_gate(self) -> None:
        """Answer ZeroMQ's question whom to admit (ZAP, RFC 27). Bound before any peer can come."""
        if self._context is None:
            raise AssertionError("start() comes first")
        self._gate = self._context.socket(zmq.REP)
        self._gate.bind("inproc://zeromq.zap.01")
        self._poller.register(self._gate, zmq.POLLIN)

    def _answer_gate(self) -> None:
        if self._gate is None or self._keys is None:
            return
        for question in _arrived(self._gate):
            version, request = (*question, b"", b"")[:2]
            public = zmq.utils.z85.encode(question[6]) if len(question) == 7 and len(question[6]) == 32 else b""
            admitted = self._keys.admits(public)
            if not admitted:
                self.refused += 1
                log.warning("peer refused count=%d key=%s", self.refused, public.decode() or "none")
            status = [b"200", b"OK"] if admitted else [b"400", b"unknown key"]
            self._gate.send_multipart([version, request, *status, public, b""])

    def _decoded(
        self, conn: int | None, identity: bytes, data: bytes
    ) -> Iterator[tuple[int | None, bytes, Packet | UnsupportedVersion]]:
        try:
            yield conn, identity, decode(data)
        except UnsupportedVersion as error:
            self._drop(str(error))
            yield conn, identity, error
        except MalformedMessage as error:
            self._drop(str(error))

    def _drop(self, why: str) -> None:
        self.malformed += 1
        if self.malformed & (self.malformed - 1) == 0:  # the 1st, 2nd, 4th, 8th, ...: a flood fills no log
            log.warning("control packet dropped count=%d why=%s", self.malformed, why)

    def _socket(self, kind: int, address: Address) -> zmq.Socket[bytes]:
        if self._context is None:
            raise AssertionError("start() comes first")
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 4096)
        socket.setsockopt(zmq.RCVHWM, 4096)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_PACKET_NBYTES)
        socket.setsockopt(zmq.RECONNECT_IVL, 50)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        if address.is_v6:
            socket.setsockopt(zmq.IPV6, 1)
        return socket


def _try_send(socket: zmq.Socket[bytes], parts: list[bytes]) -> bool:
    try:
        socket.send_multipart(parts, zmq.NOBLOCK)
    except zmq.Again:
        return False
    except zmq.ZMQError as error:
        if error.errno == zmq.EHOSTUNREACH:
            return False
        raise
    return True


def _arrived(socket: zmq.Socket[bytes]) -> Iterator[list[bytes]]:
    for _ in range(MAX_READS_PER_TURN):
        try:
            yield socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
