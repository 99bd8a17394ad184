"""The receiving side: one thread accepts connections, one per connection reads frames into place."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from kvpoll_common.door import Refused, note_stranger
from kvpoll_common.grants import Grant, Grants
from kvpoll_fsm.errors import MalformedMessage
from kvpoll_tcp import wire
from kvpoll_tcp.crew import Crew
from kvpoll_tcp.handshake import Descriptor, meet
from kvpoll_tcp.inbox import Inbox
from kvpoll_tcp.settings import TcpSettings
from kvpoll_tcp.sockets import Broken, Plug, Sock, advance, prepare, receive_timeout
from kvpoll_tcp.tls import TlsSocket
from kvpoll_tcp.wire import Ack, Entry, Head, Verdict

__all__ = ["Landing", "Listener"]

_log = logging.getLogger("kvpoll_tcp")

_FENCE_LOOK_S = 0.1
"""How long reading into the destination may wait: the longest a silent peer can hold up a fence."""
_CUT_SHORT = "the peer closed the connection in the middle of a frame"
_FIRST_NBYTES = wire.HEAD_NBYTES + wire.ENTRY_NBYTES


@dataclass(frozen=True)
class Landing:
    """Where bytes may land: the regions by number, and who may write to them."""

    regions: Mapping[int, memoryview]
    grants: Grants


class Listener:
    """Accepts connections and keeps an eye on how many there are.

    Attributes:
        refusals: Whom and what was turned away.
    """

    def __init__(self, identity: Descriptor, landing: Landing, settings: TcpSettings, crew: Crew) -> None:
        self.refusals = landing.grants.refusals
        self._identity = identity
        self._landing = landing
        self._settings = settings
        self._crew = crew
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._strangers: dict[Reader, None] = {}  # in order of arrival
        self._known: set[Reader] = set()
        self._plug = Plug()

    def start(self, listening: socket.socket) -> None:
        """Begin to accept; the socket is ours from here on.

        Raises:
            RuntimeError: The system has no thread left to give.
        """
        self._plug.insert(listening)
        self._crew.start("accept", lambda: self._accept_all(listening))

    def stop(self) -> None:
        """End the port and all connections; no byte lands any more once the crew has been joined."""
        self._closing.set()
        self._plug.cut()
        with self._lock:
            readers = [*self._strangers, *self._known]
        for reader in readers:
            reader.cut()

    def admit(self, reader: Reader) -> None:
        """A stranger has proved himself.

        Raises:
            Refused: There are too many already.
        """
        with self._lock:
            same = sum(other.host == reader.host for other in self._known)
            if len(self._known) >= self._settings.max_connections or same >= self._settings.max_connections_per_peer:
                raise Refused("too many connections", f"{len(self._known)} are open, {same} of them from there")
            self._strangers.pop(reader, None)
            self._known.add(reader)

    def forget(self, reader: Reader) -> None:
        """A connection has ended."""
        with self._lock:
            self._strangers.pop(reader, None)
            self._known.discard(reader)

    def _accept_all(self, listening: socket.socket) -> None:
        while not self._closing.is_set():
            try:
                self._accept(listening)
            except (OSError, RuntimeError) as error:
                if not self._closing.is_set():
                    # Out of file descriptors or threads, as a rule: some will come free.
                    self.refusals.add("a connection cannot be accepted", str(error))
                    self._closing.wait(0.1)
        self._plug.pull()

    def _accept(self, listening: socket.socket) -> None:
        sock, address = listening.accept()
        plug = Plug()
        plug.insert(sock)
        reader = Reader(sock, plug, f"{address[0]}:{address[1]}", self._identity, self._landing)
        try:
            self._make_room(reader)
            self._crew.start(f"read-{reader.peer}", lambda: reader.run(self, self._settings))
        except (OSError, RuntimeError):
            plug.pull()
            self.forget(reader)
            raise

    def _make_room(self, reader: Reader) -> None:
        """Count a stranger. Too many: one goes of those from where most come, the oldest."""
        with self._lock:
            surplus = self._surplus() if len(self._strangers) >= self._settings.max_strangers else None
            if surplus is not None:
                del self._strangers[surplus]
            self._strangers[reader] = None
        if surplus is not None:
            self.refusals.add("too many that have not proved themselves", f"from={surplus.peer}")
            surplus.cut()
        if self._closing.is_set():
            reader.cut()

    def _surplus(self) -> Reader:
        """An honest stranger does not stay one for long, and does not come in crowds."""
        crowds = Counter(reader.host for reader in self._strangers)
        host, _ = crowds.most_common(1)[0]
        return next(reader for reader in self._strangers if reader.host == host)


class Reader:
    """One connection: its frames are read into place and answered, one after the other."""

    def __init__(self, sock: socket.socket, plug: Plug, peer: str, identity: Descriptor, landing: Landing) -> None:
        self.peer = peer
        self._socket: Sock = sock
        self._plain = sock
        self._plug = plug
        self._is_cut = False
        self._writer = b""
        self._identity = identity
        self._regions = landing.regions
        self._grants = landing.grants
        self._inbox = Inbox()
        self._answers = bytearray()

    @property
    def host(self) -> str:
        """The network address it came from."""
        return self.peer.rpartition(":")[0]

    def cut(self) -> None:
        """End the connection soon. For any thread."""
        self._is_cut = True
        self._plug.cut()

    def run(self, listener: Listener, settings: TcpSettings) -> None:
        """The thread: the handshake, then frames until the connection ends."""
        try:
            if self._is_met(listener, settings):
                self._serve()
        except (OSError, MalformedMessage) as error:
            _log.info("connection from %s ended: %s", self.peer, error)
        except Exception:
            # A mistake of ours. The peer sees the connection end, and its tickets fail.
            # Logged as text: a record that keeps the traceback would keep the arenas' memory in use.
            _log.error("connection from %s given up:\n%s", self.peer, traceback.format_exc())
        finally:
            self._plug.pull()
            listener.forget(self)

    def _is_met(self, listener: Listener, settings: TcpSettings) -> bool:
        """Let the visitor prove himself; False if he was turned away, which is counted."""
        try:
            self._meet(listener, settings)
        except (OSError, MalformedMessage, Refused) as error:
            if not self._is_cut:
                why = Refused("TLS failed", str(error)) if isinstance(error, ssl.SSLError) else error
                note_stranger(listener.refusals, why, f"from={self.peer}")
            return False
        return True

    def _meet(self, listener: Listener, settings: TcpSettings) -> None:
        prepare(self._plain, settings)
        deadline = time.monotonic() + settings.handshake_s
        if settings.tls is not None:
            secured = TlsSocket(self._plain, settings.tls[0], server_side=True)
            secured.shake_hands(deadline)
            self._socket = secured
        left_s = deadline - time.monotonic()
        self._writer = meet(self._socket, self._identity, left_s, lambda: listener.admit(self))

    def _serve(self) -> None:
        try:
            while self._frame():
                pass
        except MalformedMessage:
            self._answer()  # what came before it has landed all the same
            raise

    def _frame(self) -> bool:
        """Read one frame and answer it; False once the peer has closed the connection between two."""
        if not self._inbox.has(_FIRST_NBYTES) and not self._fetch(_FIRST_NBYTES, may_end=True):
            return False
        head = Head.unpack(self._inbox.peek(wire.HEAD_NBYTES))
        nbytes = wire.HEAD_NBYTES + wire.ENTRY_NBYTES * head.entries
        self._fetch(nbytes)
        entries = head.unpack_entries(self._inbox.take(nbytes)[wire.HEAD_NBYTES :])
        if not self._inbox.has(head.nbytes):
            self._answer()  # before the grant is entered, for a peer that does not listen would hold up its fence
        verdict = self._land(head, entries)
        self._answers += Ack(head.ticket, head.index, verdict).pack()
        return True

    def _fetch(self, nbytes: int, may_end: bool = False) -> bool:
        """Have so many bytes in the inbox; False if the peer has closed the connection and there are none."""
        while not self._inbox.has(nbytes):
            self._answer()
            got = self._socket.recv_into(self._inbox.room(nbytes))
            if not got and may_end and not self._inbox.nbytes:
                return False
            if not got:
                raise Broken(_CUT_SHORT)
            self._inbox.add(got)
        return True

    def _answer(self) -> None:
        """Send the answers that are due: those to several small frames that came together go together."""
        if self._answers:
            answers, self._answers = self._answers, bytearray()
            self._socket.sendall(answers, socket.MSG_NOSIGNAL)

    def _land(self, head: Head, entries: list[Entry]) -> Verdict:
        """Read the payload into place, or drop what may not go there."""
        verdict, left = Verdict.unknown_token, head.nbytes
        grant = self._grants.enter(head.token, self._writer, self.cut)
        if grant is not None:
            try:
                verdict, left = self._pour(grant, entries, left)
            finally:
                self._grants.leave(grant)
        while left:
            self._fetch(1)
            left -= len(self._inbox.take(min(left, self._inbox.nbytes)))
        return verdict

    def _pour(self, grant: Grant, entries: list[Entry], left: int) -> tuple[Verdict, int]:
        """Read into place until all is there or the grant is revoked; returns how much was not read."""
        # What is granted lies inside its region, so this checks against both.
        if not grant.admits([(region, offset, nbytes) for region, nbytes, offset in entries]):
            self._grants.refusals.add("a write outside the granted ranges", f"from={self.peer}")
            return Verdict.out_of_range, left
        regions = self._regions
        views = [regions[region][offset : offset + nbytes] for region, nbytes, offset in entries]
        left -= self._inbox.pour(views)
        if not left:
            return Verdict.landed, 0
        receive_timeout(self._socket, _FENCE_LOOK_S)
        try:
            while left and not grant.revoked:
                got = self._receive(views)
                advance(views, got)
                left -= got
        finally:
            receive_timeout(self._socket, 0)
        return (Verdict.revoked if left else Verdict.landed), left

    def _receive(self, views: list[memoryview]) -> int:
        try:
            # One call for all of it, rather than one for every 64 KiB: less processor time, and next to a
            # busy Python thread each call would wait for the interpreter again.
            got = self._socket.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]
        except BlockingIOError:
            return 0  # nothing came for a while: time to look whether the grant still stands
        if not got:
            raise Broken(_CUT_SHORT)
        return got
