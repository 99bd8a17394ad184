"""What must hold in every state of a universe, and in the last one."""

from __future__ import annotations

from collections import Counter

from kvpoll_fsm.breaker import BREAKER_TIMER
from kvpoll_fsm.deadlines import Gate
from kvpoll_fsm.errors import FailureCode
from kvpoll_fsm.lifecycle import TABLE
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.receiver_session import ReceiverSession
from kvpoll_fsm.sender_session import SenderSession
from kvpoll_fsm.session import GATE_TIMER, RoomKey, Session
from kvpoll_fsm.testing.props import Cell, Node, Ticket
from kvpoll_fsm.testing.universe import Universe

__all__ = ["broken_law", "is_end"]

BENIGN = "nothing was lost for good and nobody gave up, yet a room ended Failed or waits for a deadline"
_MOVES = {(source, dest) for (source, _), dest in TABLE.items()}


def broken_law(universe: Universe) -> str:
    """The first law this state breaks, as a sentence, or nothing."""
    if universe.violation:
        return universe.violation
    if universe.scene.faults.benign and KVPoll.Failed.name in universe.ends.values():
        return BENIGN
    for name, key in universe.fresh:
        problem = _success(universe, universe.nodes[name], key)
        if problem:
            return problem
    for node in universe.nodes.values():
        problem = _blocks(node) or _windows(node)
        for key, session in node.core.sessions.items():
            problem = problem or _session(key, session)
        if problem:
            return f"{node.name}: {problem}"
    return _two_writers(universe) or _breakers(universe) or _standstill(universe)


def _two_writers(universe: Universe) -> str:
    """Of all that was ever written to one rank of a room no two may land; every attempt at a part has its range."""
    landing: dict[tuple[int, RoomKey, int], Ticket] = {}
    exposed = {token for node in universe.nodes.values() for token in node.exposed}
    for ticket in universe.tickets:
        command, target = ticket.command, ticket.target
        if (command.offset, command.tokens) != (command.part, 1):
            return f"{ticket.key}: part {command.part} is written with another range"
        if target.shut or ticket.token not in exposed:
            continue
        other = landing.setdefault((ticket.source, ticket.key, target.rank), ticket)
        if other is not ticket:
            first = f"part {other.command.part} through {other.target.transport}"
            both = f"{first} and part {command.part} through {target.transport}"
            return f"{ticket.key}: {both} are both on their way to rank {target.rank}"
    return ""


def _breakers(universe: Universe) -> str:
    """What is open will be tried again."""
    for node in universe.nodes.values():
        for connection in node.core.connections.values():
            for name, breaker in node.core.breakers.of(connection.number).items():
                if not breaker.half_open and (None, f"{BREAKER_TIMER} {connection.number} {name}") not in node.timers:
                    return f"{node.name}: the breaker of {name} is open for ever"
    return ""


def _standstill(universe: Universe) -> str:
    """What is wrong if only the passing of time can bring this state on."""
    progress = universe.progress()
    if not progress:
        return "" if is_end(universe) else "nothing can happen any more, and rooms are live"
    if any(action[0] != "deadline" or action[3] != GATE_TIMER for action in progress):
        return ""
    if universe.scene.faults.benign:
        return BENIGN
    for node in universe.nodes.values():
        for key, session in node.core.sessions.items():
            if not session.state.is_terminal and _other_side_ended(universe, node, key, session):
                return f"{key}: waits for a deadline, though the other side has ended and could have said so"
    return ""


def _other_side_ended(universe: Universe, node: Node, key: RoomKey, session: Session) -> bool:
    """Some life of the room that this one is bound to, over a connection that works, has ended."""
    others: list[tuple[int, RoomKey]] = []
    if isinstance(session, ReceiverSession) and session.sender_generation:
        others = [(session.options.conn, RoomKey("sender", key.room, 0, session.sender_generation))]
    elif isinstance(session, SenderSession):
        slots = session.slots.items()
        others = [(slot.conn, RoomKey("receiver", key.room, rank, slot.generation)) for rank, slot in slots]
    return any((universe.peers.get((node.incarnation, conn)), other) in universe.ends for conn, other in others)


def is_end(universe: Universe) -> bool:
    """Every room is over everywhere, nothing is on its way, and no block is held."""
    quiet = not (universe.opens or universe.lanes or universe.jobs or universe.tickets)
    return quiet and all(_at_rest(node) for node in universe.nodes.values())


def _at_rest(node: Node) -> bool:
    load = node.core.load()
    return load.free == load.total and all(session.quiescent for session in node.core.sessions.values())


def _blocks(node: Node) -> str:
    load = node.core.load()
    if load.free + load.leased + load.quarantined != load.total:
        return f"blocks lost or doubled: {load}"
    return ""


def _windows(node: Node) -> str:
    """A receiver that drains holds blocks for as many parts as its window allows."""
    leases = node.core.accounts.leases()
    lots = Counter(RoomKey(lease.side, lease.room, lease.rank, lease.generation) for lease in leases)
    receivers = {key: s.options for key, s in node.core.sessions.items() if isinstance(s, ReceiverSession)}
    for key, options in receivers.items():
        if options.resume == "drain" and lots[key] > options.window:
            return f"{key}: holds blocks for {lots[key]} parts, its window is {options.window}"
    return ""


def _session(key: RoomKey, session: Session) -> str:
    for before, after in zip(session.history, session.history[1:], strict=False):
        if (before, after) not in _MOVES:
            return f"{key}: moved from {before} to {after}"
    if session.failure is not None and session.failure.code is FailureCode.InternalError:
        return f"{key}: {session.failure}"
    if session.gate is not Gate.closed and not session.timed:
        return f"{key}: waits at {session.gate} without a deadline"
    return ""


def _success(universe: Universe, node: Node, key: RoomKey) -> str:
    session = node.core.sessions.get(key)
    if isinstance(session, SenderSession):
        return _sender_success(universe, node, key, session)
    if isinstance(session, ReceiverSession):
        return _receiver_success(universe, node, key, session)
    return ""


def _sender_success(universe: Universe, node: Node, key: RoomKey, session: SenderSession) -> str:
    """Every required rank that still lives holds every part, whole."""
    for rank, slot in session.slots.items():
        receiver = universe.nodes[f"r{rank}"]
        here = RoomKey("receiver", key.room, rank, slot.generation)
        if slot.dummy or universe.peers[node.incarnation, slot.conn] != receiver.incarnation:
            continue
        if receiver.out.get(here) != _wanted(universe, key):
            return f"{key}: Success, but rank {rank} holds {receiver.out.get(here)}"
    return ""


def _receiver_success(universe: Universe, node: Node, key: RoomKey, session: ReceiverSession) -> str:
    peer = universe.peers[node.incarnation, session.options.conn]
    sender = RoomKey("sender", key.room, 0, session.sender_generation)
    ended = universe.ends.get((peer, sender))
    if ended != KVPoll.Success.name:
        return f"{key}: Success, but its sender is {ended or 'live'}"
    if not session.options.dummy and node.out.get(key) != _wanted(universe, sender):
        return f"{key}: Success with wrong bytes: {node.out.get(key)}"
    return ""


def _wanted(universe: Universe, sender: RoomKey) -> tuple[Cell, ...]:
    parts = universe.scene.parts
    return tuple(Cell(sender.room, sender.generation, part, part) for part in range(parts))
