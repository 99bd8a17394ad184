"""A world of endpoints without I/O: production cores, a network, memory and clocks that a test commands.

Nothing happens by itself. Every packet, write, copy and timer is pending until the test performs it, in any order
it likes; packets may be lost or repeated, writes may end unknown and land later, hosts may be gone.

Memory is modelled token by token: the value of token t of a room is (room, t), so a wrong byte shows. Writes are
one-sided, as with RDMA: a token that was merely revoked stops nothing, only a fence does. A write that lands in
blocks that are not leased to its part any more, or that reads a source that is not, is an AssertionError.
After every step `kvpoll_fsm.testing.invariants` are checked.
"""

from __future__ import annotations

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
from kvpoll_fsm.core import CoreOptions, Do, Effect, EndpointCore, Transmit
from kvpoll_fsm.deadlines import Deadlines
from kvpoll_fsm.errors import FailureCode
from kvpoll_fsm.layout import Field, Layout
from kvpoll_fsm.lessor import lease_of
from kvpoll_fsm.messages import Frame, Hello, Packet, Stranger, TransportOffer, Welcome
from kvpoll_fsm.receiver_session import ReceiverOptions
from kvpoll_fsm.selection import Policy
from kvpoll_fsm.sender_session import SenderOptions
from kvpoll_fsm.session import RoomKey, Session
from kvpoll_fsm.testing import invariants
from kvpoll_fsm.testing.hosts import Delivery, Host, Job, LateWrite, token_of

__all__ = ["SENDER", "Delivery", "Host", "Job", "LateWrite", "World"]

SENDER = "sender"
CHECKSUM = bytes(16)
"""Stands for the checksum of the right bytes, whatever they are."""


class World:
    """One sending endpoint, any number of receiving ones, and everything between them.

    Attributes:
        deadlines: Of every endpoint.
        checksums: Writers report checksums, so receivers verify every part.
        transports: Those every endpoint has, in the sender's order of preference.
        hosts: The endpoints that run, by name; the sending one is "sender".
        network: Packets on their way, oldest first.
        jobs: Work asked for and not done, oldest first.
        late: Writes that may land though nobody waits for them.
        lives: Every life of a room there ever was, by incarnation and key.
        peers: Who was at the other end of each connection: (incarnation, connection) to incarnation.
        delivered: What each receiver's life copied out, also of hosts that are gone.
        proven: Lives that ended Success, rightly.
    """

    def __init__(
        self,
        deadlines: Deadlines | None = None,
        *,
        checksums: bool = False,
        transports: tuple[str, ...] = ("memory",),
    ) -> None:
        self.deadlines = deadlines or Deadlines()
        self.checksums = checksums
        self.transports = transports
        self.hosts: dict[str, Host] = {}
        self.network: list[Delivery] = []
        self.jobs: list[Job] = []
        self.late: list[LateWrite] = []
        self.lives: dict[tuple[bytes, RoomKey], Session] = {}
        self.peers: dict[tuple[bytes, int], bytes] = {}
        self.delivered: dict[tuple[bytes, RoomKey], dict[int, Any]] = {}
        self.proven: set[tuple[bytes, RoomKey]] = set()
        self._serial = 0

    # Hosts come and go

    def add_host(self, name: str, blocks: int, block_tokens: int, managed: bool = True) -> Host:
        """Start an endpoint; starting one again under its name is a restart with a new incarnation."""
        self.drop_host(name)
        layout = Layout(block_tokens, [Field("x", "int64")])
        offers = tuple(TransportOffer(transport, name.encode()) for transport in self.transports)
        options = CoreOptions(self._next().to_bytes(16, "big"), layout, offers, blocks, managed, self.deadlines)
        self.hosts[name] = Host(name, EndpointCore(options))
        return self.hosts[name]

    def drop_host(self, name: str) -> None:
        """Kill an endpoint. Its packets still travel, and what it was writing may land still."""
        host = self.hosts.pop(name, None)
        if host is None:
            return
        mine = [job for job in self.jobs if job.host == name]
        self.jobs = [job for job in self.jobs if job.host != name]
        writes = [job for job in mine if job.target is not None]
        self.late += [late for job in writes if (late := self._late(host, job)) is not None]

    # What hosts do

    def open_sender(self, room: int, ranks: int | None = None) -> RoomKey:
        """Open the sender's side of a room."""
        host = self.hosts[SENDER]
        limit = host.core.options.blocks * host.block_tokens
        policy = Policy("prefer", self.transports)
        options = SenderOptions(ranks, policy, self.transports, host.block_tokens, limit)
        return self._opened(host, host.core.open_sender(room, options))

    def open_receiver(
        self,
        name: str,
        room: int,
        rank: int = 0,
        ranks: int = 1,
        blocks: int = 1,
        resume: str = "drain",
        exact: tuple[int, ...] = (),
    ) -> RoomKey:
        """Open one receiver rank of a room at endpoint `name`; 0 blocks make it a dummy."""
        host = self.hosts[name]
        conn = host.core.connect(SENDER)
        options = ReceiverOptions(conn, ranks, len(exact) or blocks, host.block_tokens, resume, exact)
        return self._opened(host, host.core.open_receiver(room, rank, options))

    def supply(self, key: RoomKey, total: int, ready: int | None = None, *, staged: bool = True) -> None:
        """The sender's host has `ready` of `total` tokens."""
        self.feed(SENDER, key, inputs.Supplied(total, total if ready is None else ready, staged))

    def feed(self, name: str, key: RoomKey, event: inputs.Input) -> None:
        """Give one input to a room of endpoint `name`."""
        host = self.hosts[name]
        host.core.feed(key, event)
        self.settle(host)

    def clear(self, name: str, key: RoomKey) -> None:
        """The host drops its handle of a room."""
        host = self.hosts[name]
        host.core.clear(key)
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

    def perform(self, at: int = 0, *, ok: bool = True, loose: bool = False) -> None:
        """Do job number `at`, well or badly.

        Args:
            at: Place in `jobs`.
            ok: It succeeds. A fence that does not is one that would cost other rooms: it stays unanswered, as long
                as it is not forced.
            loose: A write that fails may land later: it moves to `late`.
        """
        job = self.jobs.pop(at)
        host = self.hosts[job.host]
        answer = self._answer(host, job, ok, loose)
        if answer is not None:
            host.core.feed(job.key, answer)
        self.settle(host)

    def land(self, at: int = 0) -> None:
        """The bytes of a late write arrive, unless they were fenced or the machine is gone. They may come again."""
        late = self.late[at]
        host = self._host_of(late.dest)
        if host is not None and late.job.target is not None:
            command = late.job.command
            values = [("late", command.offset + at) for at in range(command.tokens)]
            host.store(token_of(late.job.target), values)

    def quiesce(self, at: int = 0) -> None:
        """A late write can land no more, and its writer, if it lives, learns that."""
        late = self.late.pop(at)
        host = self._host_of(late.origin)
        if host is not None and late.job.target is not None:
            self.feed(host.name, late.job.key, inputs.RankQuiesced(late.job.target.rank, late.job.command.part))

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

    # What a test looks at

    def session(self, name: str, key: RoomKey) -> Session:
        """A life of a room, over or not."""
        return self.lives[self.hosts[name].incarnation, key]

    def received(self, name: str, key: RoomKey) -> list[Any]:
        """The tokens a receiver copied out, in order."""
        out = self.hosts[name].out.get(key, {})
        return [out[token] for token in sorted(out)]

    def gates(self) -> list[str]:
        """Where every room stands, for assertion texts."""
        return [
            f"{host.name}:{key.side}/{key.room}/{key.rank} {session.state} {session.gate}"
            + (f" {session.failure}" if session.failure else "")
            for host in self.hosts.values()
            for key, session in host.core.sessions.items()
        ]

    def delivery(self, host: Host, conn: int, packet: Packet) -> Delivery | None:
        """A packet addressed to the other end of a connection, or None if that is not known."""
        connection = host.core.connections.get(conn)
        address = connection.address if connection is not None else None
        if address is None and conn in host.routes:
            address, _ = host.routes[conn]
        if address is None and isinstance(packet, Frame) and packet.outgoing:
            address = SENDER  # the last words of a connection that has ended
        return None if address is None else Delivery(host.name, address, host.incarnation, packet)

    def settle(self, host: Host) -> None:
        """Carry out an endpoint's effects: immediate ones now, the others become pending. Check everything."""
        while effects := self._effects(host):
            for effect in effects:
                if isinstance(effect, Transmit):
                    self._transmit(host, effect)
                elif isinstance(effect, Do):
                    self._do(host, effect)
        for connection in host.core.connections.values():
            peer = self._peer_of(host, connection.number, connection.peer)
            if peer is not None:
                self.peers[host.incarnation, connection.number] = peer
        invariants.check(self, host)

    # Inside

    def _next(self) -> int:
        self._serial += 1
        return self._serial

    def _opened(self, host: Host, key: RoomKey) -> RoomKey:
        self.lives[host.incarnation, key] = host.core.sessions[key]
        self.delivered[host.incarnation, key] = host.out.setdefault(key, {})
        self.settle(host)
        return key

    def _effects(self, host: Host) -> list[Effect]:
        host.core.flush()
        return host.core.drain()

    def _owed(self) -> bool:
        owing = [host for host in self.hosts.values() if host.core.owes_ack]
        for host in owing:
            host.core.flush(ack_now=True)
            self.settle(host)
        return bool(owing)

    def _host_of(self, incarnation: bytes | None) -> Host | None:
        return next((host for host in self.hosts.values() if host.incarnation == incarnation), None)

    def _peer_of(self, host: Host, conn: int, peer: bytes | None) -> bytes | None:
        """The incarnation at the other end; one that came to us goes by a name of its own there."""
        return host.routes[conn][1] if conn in host.routes else peer

    def _transmit(self, host: Host, effect: Transmit) -> None:
        delivery = self.delivery(host, effect.conn, effect.packet)
        if delivery is not None:
            self.network.append(delivery)

    def _arrive(self, host: Host, delivery: Delivery) -> None:
        packet, core = delivery.packet, host.core
        if isinstance(packet, Hello):
            host.routes[core.hello(packet)] = (delivery.source, delivery.origin)
        elif isinstance(packet, Frame):
            if core.frame(packet) is None and packet.outgoing:
                stranger = Stranger(core.options.incarnation, packet.target)
                self.network.append(Delivery(host.name, delivery.source, host.incarnation, stranger, packet.source))
        else:
            for connection in list(core.connections.values()):
                if connection.address == delivery.source and isinstance(packet, Welcome):
                    core.welcome(connection.number, packet)
                elif connection.channel.source == delivery.answers and isinstance(packet, Stranger):
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
            host.end_tokens(key, command.part, fence=False)
        elif isinstance(command, StartPart):
            self._stage(host, key, command)
            self.jobs += [Job(host.name, key, command, target) for target in command.targets]
        else:
            self.jobs.append(Job(host.name, key, command))

    def _expose(self, host: Host, key: RoomKey, command: Expose) -> None:
        tokens = {name: self._next().to_bytes(8, "big") for name in self.transports}
        for token in tokens.values():
            host.granted[token] = (key, command.part, command.blocks)
            host.exposed.add(token)
        capacity = len(command.blocks) * host.block_tokens
        host.core.feed(key, inputs.Granted(command.part, command.blocks, capacity, tuple(tokens.items())))

    def _answer(self, host: Host, job: Job, ok: bool, loose: bool) -> inputs.Input | None:
        command, key = job.command, job.key
        if isinstance(command, Preflight):
            return inputs.Preflighted(command.rank, command.conn, command.transport, ok, "" if ok else "refused")
        if isinstance(command, StartPart) and job.target is not None:
            return self._write(host, job, job.target, ok, loose)
        if isinstance(command, Fence):
            return self._fence(host, key, command, ok)
        if isinstance(command, Verify):
            return inputs.Verified(command.held.part, self._problem(host, key, command.held, ok))
        if isinstance(command, CopyOut):
            return self._copy_out(host, key, command, ok)
        raise AssertionError(f"nothing answers {command!r}")

    # Bytes

    def _stage(self, host: Host, key: RoomKey, command: StartPart) -> None:
        if command.blocks and command.attempt == 0:
            for at, slot in enumerate(host.slots(command.blocks, command.tokens)):
                host.memory[slot] = (key.room, command.offset + at)

    def _source(self, host: Host, key: RoomKey, command: StartPart) -> list[Any]:
        """The tokens of a part as they are read when its write lands."""
        if not command.blocks:
            return [(key.room, command.offset + at) for at in range(command.tokens)]
        lease = lease_of(key, command.part)
        assert host.core.accounts.blocks_of(lease) == command.blocks, f"{lease} is read, but holds its blocks no more"
        return [host.memory[slot] for slot in host.slots(command.blocks, command.tokens)]

    def _write(self, host: Host, job: Job, target: Target, ok: bool, loose: bool) -> inputs.PartWritten:
        peer = self._host_of(self.peers.get((host.incarnation, target.conn)))
        late = self._late(host, job) if loose and not ok else None
        landed = ok and peer is not None and peer.store(token_of(target), self._source(host, job.key, job.command))
        if late is not None:
            self.late.append(late)
        return inputs.PartWritten(
            target.rank,
            job.command.part,
            target.transport,
            landed,
            quiescent=late is None,
            source_free=late is None,
            detail="" if landed else "the write failed",
            checksum=CHECKSUM if landed and self.checksums else None,
            attempt=job.command.attempt,
        )

    def _late(self, host: Host, job: Job) -> LateWrite | None:
        dest = self.peers.get((host.incarnation, job.target.conn)) if job.target else None
        return LateWrite(job, host.incarnation, dest) if dest is not None else None

    def _fence(self, host: Host, key: RoomKey, command: Fence, ok: bool) -> inputs.Input | None:
        host.end_tokens(key, command.part, fence=ok or command.force)
        return inputs.Fenced(command.part) if ok or command.force else None

    def _problem(self, host: Host, key: RoomKey, held: HeldPart, ok: bool) -> tuple[FailureCode, str] | None:
        right = host.read(held) == [(key.room, held.offset + at) for at in range(held.tokens)]
        return None if ok and right else (FailureCode.ChecksumMismatch, "the bytes differ")

    def _copy_out(self, host: Host, key: RoomKey, command: CopyOut, ok: bool) -> inputs.CopiedOut:
        last = command.parts[-1]
        failure = None if ok else (FailureCode.ChecksumMismatch, "the bytes differ")
        if command.checksum is not None:
            failure = self._problem(host, key, last, ok)
        for held in command.parts:
            host.out[key].update(enumerate(host.read(held), held.offset))
        return inputs.CopiedOut(last.part, failure)
