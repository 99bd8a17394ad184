"""A universe of endpoints for the explorer: production cores, and an environment that may do anything.

The cores, with their sessions, channels, selection and block accounts, are the production code. Around them
everything that can happen is an action: a packet arrives or is lost, a ticket lands, fails, or lands later, a
copy ends, a deadline passes, a host gives up, crashes, comes back. An action is a plain tuple, so a run is a list
of tuples that can be printed, kept and replayed.

Memory is modelled per block. A block holds the `Cell` that was last written into it. Writes copy what the source
block holds when they land, so a source that was used again too early shows in the bytes that arrive.
Revoking a token stops nothing that is in flight, as with RDMA; only a fence does.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvpoll_fsm import inputs
from kvpoll_fsm.commands import (
    CopyOut,
    Fence,
    Preflight,
    Verify,
)
from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.messages import Packet
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.receiver_session import ReceiverOptions
from kvpoll_fsm.selection import Policy
from kvpoll_fsm.sender_session import SenderOptions
from kvpoll_fsm.session import RoomKey
from kvpoll_fsm.testing.props import Job, Node
from kvpoll_fsm.testing.scene import Scene
from kvpoll_fsm.testing.universe_base import SENDER, Action, knows
from kvpoll_fsm.testing.universe_writes import Writes

__all__ = ["Action", "Universe"]

OPENING_STEPS = 1_000
"""More than any scene takes whose rooms can open."""


class Universe(Writes):
    """All endpoints of one scene, and everything that may happen to them."""

    @classmethod
    def begin(cls, scene: Scene) -> Universe:
        """The first state: endpoints are up, no room is open.

        Raises:
            InvalidInput: The scene wants rooms that are past Bootstrapping, and they never come there.
        """
        universe = cls(scene)
        for name in (SENDER, *(f"r{rank}" for rank in range(scene.ranks))):
            universe._boot(name)
        universe.opens = tuple(_openings(scene))
        for _ in range(OPENING_STEPS):
            if not scene.opened or universe._all_open():
                return universe
            universe = universe.step(universe.progress()[0])
        raise InvalidInput(f"scene {scene.name!r}: its rooms do not open")

    def _all_open(self) -> bool:
        sessions = [s for node in self.nodes.values() for s in node.core.sessions.values()]
        return not self.opens and all(session.state is not KVPoll.Bootstrapping for session in sessions)

    # What may happen

    def actions(self) -> list[Action]:
        """Everything that may happen now."""
        return [*self.progress(), *self._faults()]

    def progress(self) -> list[Action]:
        """What happens without any fault; where nothing but time can bring the state on, a deadline passes."""
        found = list(self._progress())
        timers = [("deadline", *timer) for timer in self._timers("withdraw", "quarantine", "breaker")]
        if not found:  # those that repeat in vain put off no deadline
            timers = [timer for timer in timers if self.step(timer).key() != self.key()]
        return [*found, *timers] or [("deadline", *timer) for timer in self._timers("gate")]

    def _progress(self) -> Iterator[Action]:
        yield from self.opens[:1] if self.scene.ordered else self.opens
        yield from (("deliver", *lane) for lane in self.lanes)
        yield from (("do", job) for job in self.jobs)
        yield from self._ticket_progress()
        for node in self.nodes.values():
            yield from (("lost", node.name, conn) for conn in self._dead_connections(node))
            if self._must_resend(node):
                yield ("resend", node.name)

    def _faults(self) -> Iterator[Action]:
        budget = self.budget
        for lane in self.lanes:
            if budget.lose:
                yield ("lose", *lane)
            if budget.repeat:
                yield ("repeat", *lane)
        if budget.port:
            yield from (("refuse", job) for job in self.jobs if isinstance(job.command, Preflight))
        for ticket in self.tickets:
            yield from self._ticket_faults(ticket)
        if budget.deadline:
            yield from (("early", *timer) for timer in self._timers("gate"))
        for node in self.nodes.values():
            yield from self._host_faults(node)

    def _host_faults(self, node: Node) -> Iterator[Action]:
        if self.budget.crash:
            yield ("crash", node.name)
        if self.budget.part:
            yield from (("part", node.name, conn) for conn in node.core.connections)
        for key, session in node.core.sessions.items():
            if self.budget.abort and not session.state.is_terminal:
                yield ("abort", node.name, key)
            if self.budget.reopen and node.core.is_open(key):
                yield ("reopen", node.name, key)

    def _timers(self, *names: str) -> Iterator[Action]:
        for node in self.nodes.values():
            yield from ((node.name, key, name) for key, name in node.timers if name.split(" ")[0] in names)

    def _dead_connections(self, node: Node) -> Iterator[int]:
        for connection in node.core.connections.values():
            if connection.peer is not None and not any(knows(n, connection) for n in self.nodes.values()):
                yield connection.number

    def _must_resend(self, node: Node) -> bool:
        if any(source == node.incarnation or dest == node.name for source, dest in self.lanes):
            return False  # the answer may be on its way
        return any(c.peer is None or c.channel.unacked for c in node.core.connections.values())

    # Making it happen

    def step(self, action: Action) -> Universe:
        """The state after `action`. This one is unchanged."""
        after = self.clone()
        try:
            getattr(after, f"_{action[0]}")(*action[1:])
        except Exception as error:  # an exception that leaves a core is a finding, not a crash of the explorer
            after.violation = f"{type(error).__name__} escaped: {error}"
        return after

    def _open_sender(self, room: int) -> None:
        self._opened(("open_sender", room))
        node, scene = self._touch(SENDER), self.scene
        ranks = scene.ranks
        options = SenderOptions(ranks, Policy("prefer", scene.transports), scene.transports, 1, 0)
        key = node.core.open_sender(room, options)
        self._settle(node)
        node.core.feed(key, inputs.Supplied(scene.parts, scene.parts, staged=True))
        self._settle(node)

    def _open_receiver(self, room: int, rank: int) -> None:
        self._opened(("open_receiver", room, rank))
        node = self._touch(f"r{rank}")
        conn = node.core.connect(SENDER)
        blocks = 0 if rank in self.scene.dummies else 1
        ranks, resume, window = self.scene.ranks, self.scene.resume, self.scene.window(rank)
        node.core.open_receiver(room, rank, ReceiverOptions(conn, ranks, blocks, 1, resume, window=window))
        self._settle(node)

    def _opened(self, action: Action) -> None:
        at = self.opens.index(action)
        self.opens = self.opens[:at] + self.opens[at + 1 :]

    def _reopen(self, name: str, key: RoomKey) -> None:
        self._spend("reopen")
        node = self._touch(name)
        node.core.clear(key)
        self._settle(node)
        again = ("open_sender", key.room) if key.side == "sender" else ("open_receiver", key.room, key.rank)
        self.opens = (*self.opens, again)

    def _abort(self, name: str, key: RoomKey) -> None:
        self._spend("abort")
        node = self._touch(name)
        node.core.feed(key, inputs.AbortRoom("aborted"))
        self._settle(node)

    def _crash(self, name: str) -> None:
        """The process is gone: its memory, its jobs. What its kernel holds still goes out."""
        self._spend("crash")
        old = self.nodes[name].incarnation
        self.jobs = tuple(job for job in self.jobs if job.node != name)
        kept = []
        for ticket in self.tickets:
            gone = self.leases[ticket.token][0] == old
            if not gone and ticket.source == old:
                ticket = ticket._replace(loose=True, bytes=self._read(ticket))
            if not gone or ticket.source != old:
                kept.append(ticket)
        self.tickets = tuple(kept)
        self._boot(name)

    def _deadline(self, name: str, key: RoomKey | None, timer: str) -> None:
        node = self._touch(name)
        epoch = node.timers.pop((key, timer))
        node.core.timer(key, timer, epoch, host_alive=False)
        self._settle(node)

    def _early(self, name: str, key: RoomKey, timer: str) -> None:
        self._spend("deadline")
        self._deadline(name, key, timer)

    def _part(self, name: str, conn: int) -> None:
        """This side takes the other for lost, though it lives."""
        self._spend("part")
        self._lost(name, conn)

    def _lost(self, name: str, conn: int) -> None:
        node = self._touch(name)
        node.core.end(conn, "not heard")
        self._settle(node)

    # Packets

    def _deliver(self, source: int, dest: str) -> None:
        packet = self._take(source, dest)
        self._arrive(source, dest, packet)

    def _lose(self, source: int, dest: str) -> None:
        self._spend("lose")
        self._take(source, dest)

    def _repeat(self, source: int, dest: str) -> None:
        self._spend("repeat")
        self._arrive(source, dest, self.lanes[source, dest][0])

    def _take(self, source: int, dest: str) -> Packet:
        first, *rest = self.lanes[source, dest]
        if rest:
            self.lanes[source, dest] = tuple(rest)
        else:
            del self.lanes[source, dest]
        return first

    def _resend(self, name: str) -> None:
        node = self._touch(name)
        for _ in range(64):
            node.core.resend_tick()
            if any(lane[0] == node.incarnation for lane in self.lanes):
                return
            self._settle(node)

    # Work

    def _do(self, job: Job) -> None:
        self.jobs = tuple(other for other in self.jobs if other is not job)
        node = self._touch(job.node)
        command = job.command
        if isinstance(command, Preflight):
            node.core.feed(job.key, inputs.Preflighted(command.rank, command.conn, command.transport, ok=True))
        elif isinstance(command, Fence):
            node.core.feed(job.key, self._fence(node, job.key, command))
        elif isinstance(command, CopyOut):
            self._copy_out(node, job.key, command)
            node.core.feed(job.key, inputs.CopiedOut(command.parts[-1].part))
        elif isinstance(command, Verify):
            node.core.feed(job.key, inputs.Verified(command.held.part))
        self._settle(node)

    def _refuse(self, job: Job) -> None:
        """A data port does not answer."""
        self._spend("port")
        self.jobs = tuple(other for other in self.jobs if other is not job)
        node, command = self._touch(job.node), job.command
        refused = inputs.Preflighted(command.rank, command.conn, command.transport, ok=False, detail="refused")
        node.core.feed(job.key, refused)
        self._settle(node)

    def _fence(self, node: Node, key: RoomKey, command: Fence) -> inputs.Fenced:
        """Nothing lands any more under the tokens of a part, or under that of one transport, which gets a new one."""
        part, name = command.part, command.transport
        ours = [token for token, (*place, at) in node.exposed.items() if place == [key, part] and name in ("", at)]
        for token in ours:
            del node.exposed[token]
        if not name or not ours:
            return inputs.Fenced(part, name)
        return inputs.Fenced(part, name, self._new_token(node, key, part, self.leases[ours[0]][3], name))

    def _copy_out(self, node: Node, key: RoomKey, command: CopyOut) -> None:
        out = list(node.out.get(key, (None,) * command.total_tokens))
        for held in command.parts:
            for at in range(held.tokens):
                out[held.offset + at] = node.memory.get(held.blocks[at])
        node.out[key] = tuple(out)


def _openings(scene: Scene) -> Iterator[Action]:
    yield from (("open_sender", room) for room in scene.rooms)
    for rank in range(scene.ranks):
        rooms = reversed(scene.rooms) if rank % 2 else scene.rooms
        yield from (("open_receiver", room, rank) for room in rooms)
