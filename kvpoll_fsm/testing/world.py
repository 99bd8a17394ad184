"""A world of endpoints without I/O: production cores, a network, memory and clocks that a test commands.

Nothing happens by itself. Every packet, write, copy and timer waits in `pending()` until the test performs
it, in any order it likes; packets may be lost or repeated. Memory is modelled token by token: the value of
token t of a room is (room, t), so a wrong byte shows.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from kvpoll_fsm import inputs
from kvpoll_fsm.commands import (
    CancelPart,
    CancelTimer,
    CopyOut,
    Expose,
    Fence,
    HeldPart,
    Preflight,
    Release,
    SetTimer,
    StartPart,
    Target,
    Verify,
)
from kvpoll_fsm.core import CoreOptions, Do, EndpointCore, Transmit
from kvpoll_fsm.deadlines import Deadlines
from kvpoll_fsm.errors import FailureCode
from kvpoll_fsm.layout import Field, Layout
from kvpoll_fsm.messages import Frame, Hello, Packet, Stranger, TransportOffer, Welcome
from kvpoll_fsm.receiver_session import ReceiverOptions, ReceiverSession
from kvpoll_fsm.selection import Policy
from kvpoll_fsm.sender_session import SenderOptions
from kvpoll_fsm.session import RoomKey

__all__ = ["Delivery", "Host", "Job", "World"]

SENDER = "sender"


@dataclass(frozen=True)
class Delivery:
    """A packet on its way. `conn` is the connection at its source, whose replies find the way back."""

    source: str
    dest: str
    conn: int
    packet: Packet


@dataclass(frozen=True)
class Job:
    """Work that an endpoint was asked to do and has not done yet."""

    host: str
    key: RoomKey
    command: Any
    target: Target | None = None


@dataclass
class Host:
    """One endpoint: its core, its memory (one value per token slot) and what it copied out."""

    name: str
    core: EndpointCore
    memory: dict[tuple[int, int], Any] = field(default_factory=dict)
    out: dict[RoomKey, dict[int, Any]] = field(default_factory=dict)
    exposed: dict[bytes, tuple[RoomKey, int, tuple[int, ...]]] = field(default_factory=dict)
    routes: dict[int, tuple[str, int]] = field(default_factory=dict)
    timers: dict[tuple[RoomKey | None, str], int] = field(default_factory=dict)

    @property
    def block_tokens(self) -> int:
        """Tokens per block of this endpoint's pool."""
        return self.core.options.layout.block_tokens

    def slot(self, blocks: tuple[int, ...], token: int) -> tuple[int, int]:
        """Where token `token` of a part lies: (block, place in it)."""
        return blocks[token // self.block_tokens], token % self.block_tokens


class World:
    """One sending endpoint, any number of receiving ones, and everything between them.

    Attributes:
        hosts: The endpoints, by name; the sending one is "sender".
        network: Packets on their way, oldest first.
        jobs: Work asked for and not done, oldest first.
    """

    def __init__(self, deadlines: Deadlines | None = None) -> None:
        self.deadlines = deadlines or Deadlines()
        self.hosts: dict[str, Host] = {}
        self.network: list[Delivery] = []
        self.jobs: list[Job] = []
        self._tokens = itertools.count(1)

    def add_host(self, name: str, blocks: int, block_tokens: int, managed: bool = True) -> Host:
        """Start an endpoint; starting one again under its name is a restart with a new incarnation."""
        incarnation = next(self._tokens).to_bytes(16, "big")
        layout = Layout(block_tokens, [Field("x", "int64")])
        offers = (TransportOffer("memory", name.encode()),)
        options = CoreOptions(incarnation, layout, offers, blocks, managed, self.deadlines)
        self.hosts[name] = Host(name, EndpointCore(options))
        return self.hosts[name]

    # What hosts do

    def open_sender(self, room: int, ranks: int | None = None) -> RoomKey:
        """Open the sender's side of a room."""
        host = self.hosts[SENDER]
        limit = host.core.options.blocks * host.block_tokens
        options = SenderOptions(ranks, Policy.parse("memory"), ("memory",), host.block_tokens, limit)
        key = host.core.open_sender(room, options)
        self.settle(host)
        return key

    def open_receiver(
        self, name: str, room: int, rank: int = 0, ranks: int = 1, blocks: int = 1, resume: str = "drain"
    ) -> RoomKey:
        """Open one receiver rank of a room at endpoint `name`."""
        host = self.hosts[name]
        conn = host.core.connect(SENDER)
        options = ReceiverOptions(conn, ranks, blocks, host.block_tokens, resume)
        key = host.core.open_receiver(room, rank, options)
        self.settle(host)
        return key

    def supply(self, key: RoomKey, total: int, ready: int | None = None) -> None:
        """The sender's host has `ready` of `total` tokens."""
        self.feed(SENDER, key, inputs.Supplied(total, total if ready is None else ready, staged=True))

    def feed(self, name: str, key: RoomKey, event: inputs.Input) -> None:
        """Give one input to a room of endpoint `name`."""
        host = self.hosts[name]
        host.core.feed(key, event)
        self.settle(host)

    # What the world does

    def deliver(self, at: int = 0, *, keep: bool = False, lose: bool = False) -> None:
        """Let packet number `at` arrive (or not), and stay on the wire as a duplicate (or not)."""
        delivery = self.network[at] if keep else self.network.pop(at)
        host = self.hosts.get(delivery.dest)
        if lose or host is None:
            return
        self._arrive(host, delivery)
        self.settle(host)

    def perform(self, at: int = 0, *, ok: bool = True) -> None:
        """Do job number `at`, well or badly."""
        job = self.jobs.pop(at)
        host = self.hosts[job.host]
        if job.key not in host.core.sessions:
            return
        host.core.feed(job.key, self._answer(host, job, ok))
        self.settle(host)

    def fire(self, name: str, key: RoomKey | None, timer: str, *, host_alive: bool = False) -> None:
        """Let a timer of endpoint `name` fire."""
        host = self.hosts[name]
        epoch = host.timers.pop((key, timer))
        host.core.timer(key, timer, epoch, host_alive)
        self.settle(host)

    def tick(self, name: str, *, heartbeat: bool = False, host_alive: bool = True) -> None:
        """Let an endpoint's resend (or heartbeat) tick pass."""
        host = self.hosts[name]
        if heartbeat:
            host.core.heartbeat_tick(host_alive)
        else:
            host.core.resend_tick()
        host.core.flush(ack_now=True)
        self.settle(host)

    def run(self, rounds: int = 10_000) -> None:
        """Let everything pending happen in order, without faults, until nothing is pending."""
        for _ in range(rounds):
            if self.network:
                self.deliver()
            elif self.jobs:
                self.perform()
            elif not self._owed():
                return
        raise AssertionError(f"not at rest after {rounds} steps: {self.network[:3]} {self.jobs[:3]}")

    def received(self, name: str, key: RoomKey) -> list[Any]:
        """The tokens a receiver copied out, in order."""
        out = self.hosts[name].out.get(key, {})
        return [out[token] for token in sorted(out)]

    def settle(self, host: Host) -> None:
        """Carry out an endpoint's effects: immediate ones now, the others become pending."""
        while True:
            host.core.flush()
            effects = host.core.drain()
            if not effects:
                return
            for effect in effects:
                if isinstance(effect, Transmit):
                    self._transmit(host, effect)
                elif isinstance(effect, Do):
                    self._do(host, effect)

    # Inside

    def _owed(self) -> bool:
        owing = [host for host in self.hosts.values() if host.core.owes_ack]
        for host in owing:
            host.core.flush(ack_now=True)
            self.settle(host)
        return bool(owing)

    def _transmit(self, host: Host, effect: Transmit) -> None:
        connection = host.core.connections.get(effect.conn)
        if connection is not None and connection.address is not None:
            self.network.append(Delivery(host.name, connection.address, effect.conn, effect.packet))
        elif effect.conn in host.routes:
            dest, _ = host.routes[effect.conn]
            self.network.append(Delivery(host.name, dest, effect.conn, effect.packet))

    def _arrive(self, host: Host, delivery: Delivery) -> None:
        packet, core = delivery.packet, host.core
        if isinstance(packet, Hello):
            host.routes[core.hello(packet)] = (delivery.source, delivery.conn)
        elif isinstance(packet, Frame):
            conn = core.frame(packet)
            if conn is None:
                stranger = Stranger(core.options.incarnation, packet.target)
                self.network.append(Delivery(host.name, delivery.source, 0, stranger))
        else:
            for connection in list(core.connections.values()):
                if connection.address == delivery.source and isinstance(packet, Welcome):
                    core.welcome(connection.number, packet)
                elif connection.address == delivery.source and isinstance(packet, Stranger):
                    core.stranger(connection.number, packet)

    def _do(self, host: Host, effect: Do) -> None:
        key, command = effect.key, effect.command
        if isinstance(command, SetTimer):
            host.timers[key, command.name] = command.epoch
        elif isinstance(command, CancelTimer):
            host.timers.pop((key, command.name), None)
        elif key is None or isinstance(command, CancelPart):
            return
        elif isinstance(command, Expose):
            self._expose(host, key, command)
        elif isinstance(command, Release):
            self._revoke(host, key, command.part)
        elif isinstance(command, StartPart):
            self.jobs += [Job(host.name, key, command, target) for target in command.targets]
        else:
            self.jobs.append(Job(host.name, key, command))

    def _expose(self, host: Host, key: RoomKey, command: Expose) -> None:
        token = next(self._tokens).to_bytes(8, "big")
        host.exposed[token] = (key, command.part, command.blocks)
        tokens = len(command.blocks) * host.block_tokens
        granted = inputs.Granted(command.part, command.blocks, tokens, (("memory", token),))
        host.core.feed(key, granted)

    def _revoke(self, host: Host, key: RoomKey, part: int) -> None:
        dead = [token for token, (k, p, _) in host.exposed.items() if (k, p) == (key, part)]
        for token in dead:
            del host.exposed[token]

    def _answer(self, host: Host, job: Job, ok: bool) -> inputs.Input:
        command, key = job.command, job.key
        if isinstance(command, Preflight):
            return inputs.Preflighted(command.rank, command.conn, command.transport, ok, "" if ok else "refused")
        if isinstance(command, StartPart) and job.target is not None:
            return self._write(host, key, command, job.target, ok)
        if isinstance(command, Fence):
            self._revoke(host, key, command.part)
            return inputs.Fenced(command.part)
        if isinstance(command, Verify):
            bad = self._bad(host, key, command.held) or not ok
            return inputs.Verified(command.held.part, (FailureCode.ChecksumMismatch, "wrong") if bad else None)
        if isinstance(command, CopyOut):
            return self._copy_out(host, key, command, ok)
        raise AssertionError(f"nothing answers {command!r}")

    def _write(self, host: Host, key: RoomKey, command: StartPart, target: Target, ok: bool) -> inputs.Input:
        route = host.routes.get(target.conn)
        peer = self.hosts.get(route[0]) if route else None
        token = target.grant.token("memory")
        landed = ok and peer is not None and token in peer.exposed
        if landed and peer is not None:
            for at in range(command.tokens):
                peer.memory[peer.slot(target.grant.blocks, at)] = (key.room, command.offset + at)
        detail = "" if landed else "the write failed"
        return inputs.PartWritten(target.rank, command.part, "memory", landed, detail=detail, attempt=command.attempt)

    def _bad(self, host: Host, key: RoomKey, held: HeldPart) -> bool:
        found = [host.memory.get(host.slot(held.blocks, at)) for at in range(held.tokens)]
        return found != [(key.room, held.offset + at) for at in range(held.tokens)]

    def _copy_out(self, host: Host, key: RoomKey, command: CopyOut, ok: bool) -> inputs.Input:
        out = host.out.setdefault(key, {})
        for held in command.parts:
            for at in range(held.tokens):
                out[held.offset + at] = host.memory.get(host.slot(held.blocks, at))
        failure = None if ok else (FailureCode.ChecksumMismatch, "wrong")
        return inputs.CopiedOut(command.parts[-1].part, failure)

    def gates(self) -> list[str]:
        """Where every live room waits, for assertion texts."""
        return [
            f"{host.name}:{key.side}/{key.room}/{key.rank} {session.state} {session.gate}"
            for host in self.hosts.values()
            for key, session in host.core.sessions.items()
            if not session.state.is_terminal or isinstance(session, ReceiverSession)
        ]
