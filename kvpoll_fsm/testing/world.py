"""A world of endpoints without I/O: production cores, a network, memory and clocks that a test commands.

Nothing happens by itself. Every packet, write, copy and timer is pending until the test performs it, in any order
it likes; packets may be lost or repeated, writes may end unknown and land later, hosts may be gone. The methods
named `on_...` say what became pending: `kvpoll_fsm.testing.sim_world` overrides them to give each its time.

Memory is modelled token by token: each slot holds the `Cell` last written into it, so a wrong byte shows. Writes are
one-sided, as with RDMA: a token that was merely revoked stops nothing, only a fence does. A write that lands in
blocks that are not leased to its part any more, or that reads a source that is not, is an AssertionError.
After every step `kvpoll_fsm.testing.invariants` are checked.
"""

from __future__ import annotations

from typing import Any

from kvpoll_fsm import inputs
from kvpoll_fsm.commands import CancelPart, CancelTimer, CancelWrites, Expose, Release, SetTimer, StartPart
from kvpoll_fsm.core import Changed, CoreOptions, Do, Effect, EndpointCore, Transmit
from kvpoll_fsm.deadlines import Deadlines
from kvpoll_fsm.layout import Field, Layout
from kvpoll_fsm.messages import Frame, Hello, Packet, Stranger, TransportOffer, Welcome
from kvpoll_fsm.receiver_session import ReceiverOptions
from kvpoll_fsm.selection import Policy
from kvpoll_fsm.sender_session import SenderOptions
from kvpoll_fsm.session import RoomKey, Session
from kvpoll_fsm.testing import invariants, work
from kvpoll_fsm.testing.hosts import Delivery, Host, Job, LateWrite, token_of

__all__ = ["SENDER", "Delivery", "Host", "Job", "LateWrite", "World"]

SENDER = "sender"


class World:
    """Endpoints that send, receive or do both, and everything between them.

    Attributes:
        deadlines: Of every endpoint.
        checksums: Writers report checksums, so receivers verify every part.
        transports: Those every endpoint has, in the sender's order of preference.
        hosts: The endpoints that run, by name; tests call the one that sends "sender".
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
        for job in mine:
            work.loosen(self, host, job)

    # What hosts do

    def open_sender(self, room: int, ranks: int | None = None, *, name: str = SENDER) -> RoomKey:
        """Open the sender's side of a room."""
        host = self.hosts[name]
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
        *,
        window: int = 1,
        peer: str = SENDER,
    ) -> RoomKey:
        """Open one receiver rank of a room at endpoint `name`; 0 blocks make it a dummy."""
        host = self.hosts[name]
        conn = host.core.connect(peer)
        host.addresses[conn] = peer
        options = ReceiverOptions(conn, ranks, len(exact) or blocks, host.block_tokens, resume, exact, window)
        return self._opened(host, host.core.open_receiver(room, rank, options))

    def supply(
        self, key: RoomKey, total: int, ready: int | None = None, *, staged: bool = True, name: str = SENDER
    ) -> None:
        """The sender's host has `ready` of `total` tokens."""
        self.feed(name, key, inputs.Supplied(total, total if ready is None else ready, staged))

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
        if not lose:
            self.arrive(delivery)

    def arrive(self, delivery: Delivery) -> None:
        """A packet arrives where it was sent to, if anybody is there."""
        host = self.hosts.get(delivery.dest)
        if host is not None:
            self._arrive(host, delivery)
            self.settle(host)

    def perform(self, at: int = 0, *, ok: bool = True, loose: bool = False, collateral: bool = False) -> None:
        """Do job number `at`, well or badly.

        Args:
            at: Place in `jobs`.
            ok: It succeeds. A fence that does not is one that would cost other rooms: it stays unanswered, as long
                as it is not forced.
            loose: A write that fails may land later: it moves to `late`.
            collateral: It fails through no fault of the transport.
        """
        job = self.jobs.pop(at)
        host = self.hosts[job.host]
        answer = work.answer(self, host, job, ok=ok, loose=loose, collateral=collateral)
        if answer is not None:
            host.core.feed(job.key, answer)
        self.settle(host)

    def land(self, at: int = 0) -> None:
        """The bytes of a late write arrive, unless they were fenced or the machine is gone. They may come again."""
        self.land_late(self.late[at])

    def land_late(self, late: LateWrite) -> None:
        """As `land`."""
        host = self.host_of(late.dest)
        if host is not None and late.job.target is not None:
            command = late.job.command
            values = [("late", command.offset + at) for at in range(command.tokens)]
            host.store(token_of(late.job.target), values)

    def quiesce(self, at: int = 0) -> None:
        """A late write can land no more, and its writer, if it lives, learns that."""
        late = self.late.pop(at)
        host = self.host_of(late.origin)
        if host is not None and late.job.target is not None:
            self.feed(host.name, late.job.key, late.quiesced())

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
        """The tokens a receiver copied out, in order: (room, token)."""
        out = self.hosts[name].out.get(key, {})
        return [(out[token].room, out[token].token) for token in sorted(out)]

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
        address = host.address(conn)
        return None if address is None else Delivery(host.name, address, host.incarnation, packet)

    def host_of(self, incarnation: bytes | None) -> Host | None:
        """The host that runs under this incarnation, if one does."""
        return next((host for host in self.hosts.values() if host.incarnation == incarnation), None)

    def settle(self, host: Host) -> None:
        """Carry out an endpoint's effects: immediate ones now, the others become pending. Check everything."""
        for number, connection in host.core.connections.items():
            peer = self._peer_of(host, number, connection.peer)
            if peer is not None:
                self.peers.setdefault((host.incarnation, number), peer)
        changed: dict[RoomKey, None] = {}
        while effects := self._effects(host):
            for effect in effects:
                if isinstance(effect, Transmit):
                    self._transmit(host, effect)
                elif isinstance(effect, Do):
                    self._do(host, effect)
                elif isinstance(effect, Changed):
                    changed[effect.key] = None
        invariants.check(self, host, changed)
        for key in changed:
            self.on_changed(host, key)

    # What became pending

    def on_packet(self, delivery: Delivery) -> None:
        """A packet is on its way."""
        self.network.append(delivery)

    def on_part(self, host: Host, key: RoomKey, command: StartPart) -> None:
        """A part is to be staged and written to its targets."""
        host.stage(key, command)
        for target in command.targets:
            self.on_job(host, Job(host.name, key, command, target))

    def on_job(self, host: Host, job: Job) -> None:
        """A host was asked to do something that takes time."""
        self.jobs.append(job)

    def on_cancel(self, host: Host, key: RoomKey, command: CancelPart) -> None:
        """A host wants no more of the writes of a part; that only asks."""

    def on_hurry(self, host: Host, key: RoomKey, command: CancelWrites) -> None:
        """A host wants no more of one attempt; that only asks."""

    def on_late(self, late: LateWrite) -> None:
        """Bytes may land though nobody waits for them."""
        self.late.append(late)

    def on_timer(self, host: Host, key: RoomKey | None, command: SetTimer) -> None:
        """A timer is set."""
        host.timers[key, command.name] = command.epoch

    def on_changed(self, host: Host, key: RoomKey) -> None:
        """A room of a host may have changed."""

    def new_token(self) -> bytes:
        """One that no transport of this world has given yet."""
        return self._next().to_bytes(8, "big")

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

    def _peer_of(self, host: Host, conn: int, peer: bytes | None) -> bytes | None:
        """The incarnation at the other end; one that came to us goes by a name of its own there."""
        return host.routes[conn][1] if conn in host.routes else peer

    def _transmit(self, host: Host, effect: Transmit) -> None:
        delivery = self.delivery(host, effect.conn, effect.packet)
        if delivery is not None:
            self.on_packet(delivery)

    def _arrive(self, host: Host, delivery: Delivery) -> None:
        packet, core = delivery.packet, host.core
        if isinstance(packet, Hello):
            number = core.hello(packet)
            if number is not None:
                host.routes[number] = (delivery.source, delivery.origin)
        elif isinstance(packet, Frame):
            if core.frame(packet) is None and packet.outgoing:
                stranger = Stranger(core.options.incarnation, packet.target)
                self.on_packet(Delivery(host.name, delivery.source, host.incarnation, stranger, packet.source))
        else:
            for connection in list(core.connections.values()):
                if connection.address == delivery.source and isinstance(packet, Welcome):
                    core.welcome(connection.number, packet)
                elif connection.channel.source == delivery.answers and isinstance(packet, Stranger):
                    core.stranger(connection.number, packet)

    def _do(self, host: Host, effect: Do) -> None:
        key, command = effect.key, effect.command
        if isinstance(command, SetTimer):
            self.on_timer(host, key, command)
        elif isinstance(command, CancelTimer):
            host.timers.pop((key, command.name), None)
        elif key is None:
            return
        elif isinstance(command, CancelPart):
            self.on_cancel(host, key, command)
        elif isinstance(command, CancelWrites):
            self.on_hurry(host, key, command)
        elif isinstance(command, Expose):
            tokens = {name: self.new_token() for name in self.transports}
            host.core.feed(key, host.expose(key, command, tokens))
        elif isinstance(command, Release):
            host.end_tokens(key, command.part, fence=False)
        elif isinstance(command, StartPart):
            self.on_part(host, key, command)
        else:
            self.on_job(host, Job(host.name, key, command))
