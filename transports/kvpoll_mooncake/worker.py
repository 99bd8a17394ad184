"""What runs one engine: reads commands from a socket, and answers there. In a process of its own, or in a thread."""

from __future__ import annotations

import array
import os
import select
import socket
import threading
import time
from collections import deque
from typing import Any, Protocol

import msgspec

from kvpoll_mooncake import frames
from kvpoll_mooncake.flight import Flights, Submits, cut
from kvpoll_mooncake.frames import P2P, Command, Event, Order, Probe, Register, Setup
from kvpoll_mooncake.framing import LENGTH, pack
from kvpoll_mooncake.memory import map_at

__all__ = ["Worker", "new_engine"]

_READ_NBYTES = 256 << 10
_FDS_NBYTES = socket.CMSG_SPACE(253 * 4)
_SHORTEST_NAP_S, _LONGEST_NAP_S = 20e-6, 2e-3
_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)


class Engine(Submits, Protocol):
    """What is used of a `mooncake.engine.TransferEngine`."""

    def initialize(self, name: str, metadata: str, protocol: str, device: str) -> int:
        """0, or it cannot be used."""
        ...

    def get_rpc_port(self) -> int:
        """Where it listens."""
        ...

    def register_memory(self, address: int, nbytes: int) -> int:
        """0, or it failed."""
        ...

    def send_probe(self, peer: str) -> int:
        """0 if it answers."""
        ...


def new_engine() -> Engine:
    """An engine that is not initialized; imports Mooncake.

    Raises:
        ImportError: It is not installed, or a library that it needs.
    """
    from mooncake.engine import TransferEngine  # not before the environment has been set

    engine: Engine = TransferEngine()
    return engine


class Worker:
    """Serves one adapter over a socket until that ends.

    One thread submits and looks after transfers; a probe, which may hang, has a thread of its own.
    """

    def __init__(self, sock: socket.socket) -> None:
        """Store the socket, which becomes this one's."""
        sock.setblocking(True)
        self._socket = sock
        self._received = bytearray()
        self._fds: deque[int] = deque()
        self._commands: deque[Command] = deque()
        self._saying = threading.Lock()
        self._flights: Flights | None = None
        self._regions: dict[int, tuple[int, int]] = {}
        self._probed: dict[str, str | None] = {}  # segment: None while the probe is out, then what is wrong with it
        self._waiting: list[Order] = []
        self._probes: list[threading.Thread] = []
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def run(self) -> None:
        """Serve until the adapter ends the connection."""
        nap_s = _SHORTEST_NAP_S
        while self._read(wait=self._flights is None or self._flights.idle):
            for _ in range(len(self._commands)):
                self._do(self._commands.popleft())
            if self._flights is None or self._flights.idle:
                continue
            if self._flights.turn():
                nap_s = _SHORTEST_NAP_S
            else:
                time.sleep(nap_s)
                nap_s = min(2 * nap_s, _LONGEST_NAP_S)

    def let_go(self) -> None:
        """Let go of the engine, which ends what it has under way; probes that are out are waited for."""
        for probe in self._probes:
            probe.join()
        self._flights = None
        os.close(self._bell)

    def _say(self, event: Event) -> None:
        """For any thread."""
        with self._saying:
            self._socket.sendall(pack(frames.encode(event)), socket.MSG_NOSIGNAL)

    # Reading

    def _read(self, wait: bool) -> bool:
        """Take the commands that are there; False once the adapter has gone."""
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        poller.register(self._bell, select.POLLIN)
        ready = {fd for fd, _ in poller.poll(None if wait else 0)}
        if self._bell in ready:
            os.eventfd_read(self._bell)
            self._resume()
        return self._receive() if self._socket.fileno() in ready else True

    def _receive(self) -> bool:
        try:
            data, ancillary, _, _ = self._socket.recvmsg(_READ_NBYTES, _FDS_NBYTES, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            return False
        for _, _, packed in ancillary:
            fds = array.array("i")
            fds.frombytes(packed[: len(packed) - len(packed) % fds.itemsize])
            self._fds.extend(fds)
        self._received += data
        while len(self._received) >= LENGTH.size:
            end = LENGTH.size + LENGTH.unpack_from(self._received)[0]
            if len(self._received) < end:
                break
            self._commands.append(_decoder.decode(self._received[LENGTH.size : end]))
            del self._received[:end]
        return bool(data)

    # Commands

    def _do(self, command: Command) -> None:
        if isinstance(command, Setup):
            self._set_up(command)
        elif isinstance(command, Register):
            self._register(command)
        elif isinstance(command, Probe):
            self._probe(command.segment)
        elif isinstance(command, frames.Ping):
            self._say(frames.Pong())
        elif isinstance(command, Order):
            self._take(command)
        else:
            self._cancel(command.ticket)

    def _set_up(self, setup: Setup) -> None:
        try:
            engine: Any = new_engine()
        except ImportError as error:
            return self._say(frames.Unusable(str(error), missing=True))
        if engine.initialize(setup.name, setup.metadata, setup.protocol, setup.device):
            return self._say(frames.Unusable("Mooncake does not initialize", missing=False))
        self._flights = Flights(engine, self._say)
        segment = setup.name
        if setup.metadata == P2P:
            segment = f"{setup.name}:{engine.get_rpc_port()}"
        self._say(frames.Ready(segment))

    def _register(self, order: Register) -> None:
        address, problem = order.address, ""
        try:
            if order.offset is not None:
                address = self._map(order, order.offset)
        except OSError as error:
            problem = f"cannot be mapped: {error}"
        if not problem:
            engine: Any = self._engine()
            result = engine.register_memory(address, order.nbytes)
            problem = f"Mooncake does not register it: {result}" if result else ""
        self._regions[order.region] = (address, order.nbytes)
        self._say(frames.Registered(order.region, address, problem))

    def _map(self, order: Register, offset: int) -> int:
        fd = self._fds.popleft()
        try:
            return map_at(order.address, fd, offset, order.nbytes)
        finally:
            os.close(fd)

    def _engine(self) -> Submits:
        if self._flights is None:
            raise RuntimeError("a command before the engine was made")
        return self._flights.engine

    # Probes, and the orders that wait for them

    def _probe(self, segment: str) -> None:
        if segment in self._probed:
            return
        self._probed[segment] = None
        engine: Any = self._engine()
        probe = threading.Thread(target=self._send_probe, args=(engine, segment), name="kvpoll-probe", daemon=True)
        self._probes = [other for other in self._probes if other.is_alive()]
        self._probes.append(probe)
        probe.start()

    def _send_probe(self, engine: Engine, segment: str) -> None:
        result = engine.send_probe(segment)
        problem = f"a probe failed with {result}" if result else ""
        self._probed[segment] = problem
        try:
            self._say(frames.Probed(segment, problem))
        except OSError:
            return  # the adapter has gone, and with it the bell
        os.eventfd_write(self._bell, 1)

    def _take(self, order: Order) -> None:
        problem = self._probed.get(order.segment)
        if order.segment not in self._probed:
            self._probe(order.segment)
        if problem is None:
            self._waiting.append(order)
            return
        if self._flights is None:
            return
        try:
            pieces = cut(frames.unpack_entries(order.entries), lambda region: self._regions.get(region, (0, 0)))
        except ValueError as error:
            return self._flights.fail(order.ticket, f"refused before Mooncake saw it: {error}")
        if problem:
            return self._flights.fail(order.ticket, problem)
        self._flights.add(order.ticket, order.segment, pieces)

    def _resume(self) -> None:
        """A probe has been answered: take what has waited for it."""
        waiting, self._waiting = self._waiting, []
        for order in waiting:
            self._take(order)

    def _cancel(self, ticket: int) -> None:
        if any(order.ticket == ticket for order in self._waiting):
            self._waiting = [order for order in self._waiting if order.ticket != ticket]
            self._say(frames.Ended(ticket, 0))
        elif self._flights is not None:
            self._flights.cancel(ticket)
