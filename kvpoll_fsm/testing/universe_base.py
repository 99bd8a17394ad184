"""The endpoints of a universe: production cores, the memory and timers of each, and what is on its way between them."""

from __future__ import annotations

from typing import Any, TypeVar

from kvpoll_fsm import inputs
from kvpoll_fsm.commands import (
    CancelPart,
    CancelTimer,
    CancelWrites,
    Expose,
    Preflight,
    Release,
    SetTimer,
    StartPart,
    Target,
)
from kvpoll_fsm.connection import Connection
from kvpoll_fsm.core import CoreOptions, EndpointCore
from kvpoll_fsm.deadlines import Deadlines
from kvpoll_fsm.effects import Changed, Do, Transmit
from kvpoll_fsm.layout import Field, Layout
from kvpoll_fsm.messages import Frame, Hello, Packet, Stranger, TransportOffer, Welcome
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.session import RoomKey
from kvpoll_fsm.testing.props import Cell, Job, Node, Ticket
from kvpoll_fsm.testing.scene import Scene

__all__ = ["SENDER", "Action", "Endpoints", "knows"]

Action = tuple[Any, ...]
U = TypeVar("U", bound="Endpoints")
SENDER = "s"
DEADLINES = Deadlines()


class Endpoints:
    """What a universe consists of, and how it carries out what cores ask for.

    Attributes:
        scene: What is explored.
        nodes: Endpoints by name; the sending one is "s", receivers are "r0", "r1", ...
        lanes: Packets on their way, in order, by (incarnation that sent them, name they go to).
        ends: How each life of a room ended: (incarnation, key) -> state, and coverage for a sender.
        leases: Who was granted what: token -> (incarnation, key, part, blocks).
        peers: Who was at the other end: (incarnation, connection) -> incarnation.
        fresh: Rooms that ended Success in the last step: (node, key).
        violation: The first broken law, or nothing.
    """

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.nodes: dict[str, Node] = {}
        self.lanes: dict[tuple[int, str], tuple[Packet, ...]] = {}
        self.jobs: tuple[Job, ...] = ()
        self.tickets: tuple[Ticket, ...] = ()
        self.opens: tuple[Action, ...] = ()
        self.budget = scene.faults
        self.ends: dict[tuple[int, RoomKey], str] = {}
        self.leases: dict[bytes, tuple[int, RoomKey, int, tuple[int, ...]]] = {}
        self.peers: dict[tuple[int, int], int] = {}
        self.fresh: tuple[tuple[str, RoomKey], ...] = ()
        self.serial = 0
        self.violation = ""

    def clone(self: U) -> U:
        """A copy; nodes are shared until one is changed."""
        copy = self.__class__.__new__(self.__class__)
        copy.__dict__.update(self.__dict__)
        copy.nodes = dict(self.nodes)
        copy.lanes = dict(self.lanes)
        copy.ends = dict(self.ends)
        copy.leases = dict(self.leases)
        copy.peers = dict(self.peers)
        copy.fresh = ()
        return copy

    def key(self) -> tuple[Any, ...]:
        """Canonical plain value of the state."""
        return (
            tuple(node.key() for node in self.nodes.values()),
            tuple(sorted(self.lanes.items(), key=lambda item: item[0])),
            frozenset(self.jobs),
            frozenset(self.tickets),
            self.opens,
            self.budget,
            frozenset(self.ends.items()),
        )

    # Packets

    def _arrive(self, source: int, dest: str, packet: Packet) -> None:
        node = self._touch(dest)
        if isinstance(packet, Hello):
            node.core.hello(packet)
        elif isinstance(packet, Frame):
            if node.core.frame(packet) is None and packet.outgoing:
                stranger = Stranger(node.core.options.incarnation, packet.target)
                self._put(node.incarnation, packet.source, stranger)
        else:
            self._answered(node, packet)
        self._settle(node)

    def _answered(self, node: Node, packet: Packet) -> None:
        for connection in list(node.core.connections.values()):
            if connection.outgoing and isinstance(packet, Welcome):
                node.core.welcome(connection.number, packet)
            elif connection.outgoing and isinstance(packet, Stranger):
                node.core.stranger(connection.number, packet)

    def _put(self, source: int, name: bytes, packet: Packet) -> None:
        """Send to the end of a connection that goes by this name, if it is still there."""
        for node in self.nodes.values():
            if any(c.channel.source == name for c in node.core.connections.values()):
                return self._enqueue(source, node.name, packet)

    def _enqueue(self, source: int, dest: str, packet: Packet) -> None:
        lane = (source, dest)
        acks_only = isinstance(packet, Frame) and not packet.messages
        if acks_only and lane not in self.lanes:
            self._arrive(source, dest, packet)
        elif not acks_only:
            self.lanes[lane] = (*self.lanes.get(lane, ()), packet)

    # Effects of a core

    def _settle(self, node: Node) -> None:
        for connection in node.core.connections.values():
            ends = [n for n in self.nodes.values() if knows(n, connection)]
            if connection.peer is not None and ends:
                self.peers[node.incarnation, connection.number] = ends[0].incarnation
        while True:
            node.core.flush(ack_now=True)
            effects = node.core.drain()
            if not effects:
                break
            for effect in effects:
                if isinstance(effect, Transmit):
                    self._transmit(node, effect)
                elif isinstance(effect, Do):
                    self._command(node, effect.key, effect.command)
                elif isinstance(effect, Changed):
                    self._look(node, effect.key)

    def _transmit(self, node: Node, effect: Transmit) -> None:
        connection = node.core.connections.get(effect.conn)
        packet = effect.packet
        if isinstance(packet, Hello) or (isinstance(packet, Frame) and packet.outgoing):
            self._enqueue(node.incarnation, SENDER, packet)
        elif isinstance(packet, Frame):
            self._put(node.incarnation, packet.target, packet)
        elif connection is not None and connection.peer is not None:
            self._put(node.incarnation, connection.peer, packet)

    def _command(self, node: Node, key: RoomKey | None, command: Any) -> None:
        if isinstance(command, SetTimer):
            node.timers[key, command.name] = command.epoch
        elif isinstance(command, CancelTimer):
            node.timers.pop((key, command.name), None)
        elif isinstance(command, Expose) and key is not None:
            self._expose(node, key, command)
        elif isinstance(command, StartPart) and key is not None:
            self._start(node, key, command)
        elif isinstance(command, Release) and key is not None:
            pass  # revoking the tokens would stop nothing that is in flight
        elif isinstance(command, CancelWrites) and key is not None:
            self.tickets = tuple(_asked_to_end(ticket, key, command) for ticket in self.tickets)
        elif not isinstance(command, CancelPart) and key is not None:
            self.violation = self.violation or _together(node, key, command)
            self.jobs = (*self.jobs, Job(node.name, key, command))

    def _expose(self, node: Node, key: RoomKey, command: Expose) -> None:
        tokens = [
            (name, self._new_token(node, key, command.part, command.blocks, name)) for name in self.scene.transports
        ]
        node.core.feed(key, inputs.Granted(command.part, command.blocks, len(command.blocks), tuple(tokens)))

    def _new_token(self, node: Node, key: RoomKey, part: int, blocks: tuple[int, ...], transport: str) -> bytes:
        """Named after what it is for, so that the order in which rooms were granted theirs makes no other state."""
        place = f"{node.incarnation} {key.room} {key.rank} {key.generation} {part} {transport}"
        times = sum(token.startswith(f"{place} ".encode()) for token in self.leases)
        token = f"{place} {times}".encode()
        node.exposed[token] = (key, part, transport)
        self.leases[token] = (node.incarnation, key, part, blocks)
        return token

    def _start(self, node: Node, key: RoomKey, command: StartPart) -> None:
        if command.attempt == 0:
            for at, block in enumerate(command.blocks):
                node.memory[block] = Cell(key.room, key.generation, command.part, command.offset + at)
        for target in command.targets:
            self.violation = self.violation or _unasked(node, key, command, target)
            token = target.grant.token(target.transport)
            self.tickets = (*self.tickets, Ticket(key, command, target, node.incarnation, token))

    def _look(self, node: Node, key: RoomKey) -> None:
        session = node.core.sessions.get(key)
        if session is None or not session.state.is_terminal or (node.incarnation, key) in self.ends:
            return
        self.ends[node.incarnation, key] = session.state.name
        if session.state is KVPoll.Success:
            self.fresh = (*self.fresh, (node.name, key))

    # Nodes

    def _boot(self, name: str) -> None:
        self.serial += 1
        scene = self.scene
        incarnation = self.serial
        layout = Layout(1, [Field("x", "int8")])
        offers = tuple(TransportOffer(transport, b"") for transport in scene.transports)
        blocks = scene.source_pool if name == SENDER else scene.pool
        options = CoreOptions(incarnation.to_bytes(16, "big"), layout, offers, blocks, True, DEADLINES)
        self.nodes[name] = Node(name, incarnation, EndpointCore(options))

    def _touch(self, name: str) -> Node:
        node = self.nodes[name] = self.nodes[name].clone()
        return node


def _asked_to_end(ticket: Ticket, key: RoomKey, command: CancelWrites) -> Ticket:
    """What becomes of a ticket if this attempt is to end."""
    attempt = (ticket.key, ticket.target.rank, ticket.command.part, ticket.command.attempt)
    meant = attempt == (key, command.rank, command.part, command.attempt) and not ticket.loose
    return ticket._replace(cancelled=True) if meant else ticket


def _unasked(node: Node, key: RoomKey, command: StartPart, target: Target) -> str:
    """A breaker that is not closed lets in nobody but its probe, and those who have nothing else left."""
    breaker = node.core.breakers.of(target.conn).get(target.transport)
    if breaker is None or target.shut or target.insist:
        return ""
    if breaker.half_open and breaker.probe == (key, target.rank, command.part, command.attempt):
        return ""
    return f"{key}: writes through {target.transport}, whose breaker is not closed, and is not the one that may"


def _together(node: Node, key: RoomKey, command: Any) -> str:
    """No two rooms reach for a port that failed lately, unless they have nothing else left."""
    if not isinstance(command, Preflight) or command.insist:
        return ""
    breaker = node.core.breakers.of(command.conn).get(command.transport)
    if breaker is None or breaker.caller == (key, command.rank):
        return ""
    return (
        f"{key}: reaches for the port of {command.transport}, whose breaker is not closed, and is not the one that may"
    )


def knows(node: Node, connection: Connection) -> bool:
    """Whether this node has the other end of a connection."""
    ours, theirs = connection.channel.source, connection.channel.target
    ends = (c.channel for c in node.core.connections.values() if c.outgoing is not connection.outgoing)
    return any(end.source == theirs and end.target in (None, ours) for end in ends)
