"""The public front: an endpoint, from which rooms are opened."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsIndex

from kvpoll_fsm.address import Address
from kvpoll_fsm.arena import BlockPool
from kvpoll_fsm.arguments import grant_size, peer_address, plain_integer
from kvpoll_fsm.blocks import BlockLoad
from kvpoll_fsm.configuration import settle
from kvpoll_fsm.deadlines import Deadlines
from kvpoll_fsm.driver import Driver
from kvpoll_fsm.engine import Engine, Question, ThreadEngine
from kvpoll_fsm.errors import DuplicateRoom, EndpointClosed, ForkedError, InvalidInput
from kvpoll_fsm.handles import Receiver, Room, Sender
from kvpoll_fsm.isolation import new_engine
from kvpoll_fsm.limits import Limits
from kvpoll_fsm.local.places import new_socket
from kvpoll_fsm.messages import MAX_RANKS, MAX_ROOM
from kvpoll_fsm.requests import ReceiverOrder
from kvpoll_fsm.security import check_peer
from kvpoll_fsm.selection import Policy
from kvpoll_fsm.switching import TransportStatus, read_share
from kvpoll_fsm.trace import Record
from kvpoll_fsm.view import RoomView

__all__ = ["Endpoint"]

_endpoints: weakref.WeakSet[Endpoint] = weakref.WeakSet()


class Endpoint:
    """One process's end of its transfers: a pool, transports, and a driver.

    Use it as a context manager, or call `start()` and `close()`.
    """

    def __init__(
        self,
        *,
        pool: BlockPool,
        transports: str | None = None,
        standby: Iterable[str] | None = None,
        listen: str | None = None,
        advertise: str | None = None,
        deadlines: Deadlines | None = None,
        checksum: bool | str | None = None,
        arrays: str | None = None,
        isolation: str | None = None,
        mover_nice: int | None = None,
        mover_cpus: Iterable[int] | None = None,
        transport_options: Mapping[str, Mapping[str, Any]] | None = None,
        workers: int | None = None,
        keys: str | Path | None = None,
        authorized: str | Path | None = None,
        insecure: bool | None = None,
        trace: str | Path | None = None,
        limits: Limits | None = None,
        control_socket: str | Path | None = None,
        config: str | Path | None = None,
    ) -> None:
        """Store the settings; nothing is opened before `start()`.

        What is None here is taken from the file `config`, else from the environment variable `KVPOLL_` and the
        setting's name, else from the default that stands in brackets.

        Args:
            pool: Blocks to receive into and to stage from.
            transports: `require:x` (or `x`) or `prefer:a,b`: which may carry parts, best first ("prefer:shm,tcp").
            standby: Further transports to load and offer to peers, which no policy uses before `switch_transport`
                names them (none).
            listen: Control address, `tcp://host:port`; port 0 takes any free one ("tcp://127.0.0.1:0").
            advertise: The control address peers are told, if it differs.
            deadlines: How long rooms may wait at each gate (`Deadlines()`).
            checksum: "auto" (on unless the transport detects flipped bits itself), True or False ("auto").
            arrays: What results are made of: "auto" (torch if imported), "numpy", "torch" ("auto").
            isolation: Where the driver and the transports run: "process" (a process of their own, the mover, so that
                a busy engine does not slow them down), "thread" (of this process), or "auto": a process, unless the
                engine owns the memory or something cannot be given to another process ("auto").
            mover_nice: How far the mover stands back behind other processes, 0 to 19 (0).
            mover_cpus: Processors the mover may use (all).
            transport_options: Keyword settings by transport name.
            workers: Threads that copy and hash (2).
            keys: This endpoint's NAME.key_secret (`kvpoll keygen`): the control plane is then encrypted, and
                peers without a trusted key are refused.
            authorized: Folder of the NAME.key files of trusted peers; goes with `keys`.
            insecure: Listen beyond this machine without keys all the same (False).
            trace: Append the whole trace to this file (`kvpoll check-trace` reads it).
            limits: How much peers may take of the endpoint (`Limits()`).
            control_socket: Where `kvpoll switch` and `kvpoll report` reach the endpoint: a path, or "auto" for one
                in this user's own folder (nowhere).
            config: A TOML file of settings; else the environment variable KVPOLL_CONFIG names one (none).

        Raises:
            InvalidInput: A setting that cannot work; names it and what it may be.
            ConfigError: The same, of the file or the environment; names the place, too.
        """
        given = {name: value for name, value in locals().items() if name not in ("self", "pool", "config")}
        if not isinstance(pool, BlockPool):
            raise InvalidInput(f"pool={pool!r}: give a BlockPool(layout, blocks=...)")
        self.pool = pool
        self.config = settle(given, config)
        self._open: dict[int | tuple[int, int], Room] = {}
        self._lock = threading.RLock()  # reentrant: a signal handler may call us in the middle of our own call
        self._draining = False
        self._engine: Engine | None = None
        self._address: Address | None = None

    # Start and end

    def start(self) -> Endpoint:
        """Load the transports, take ports, start the driver. Returns itself.

        Raises:
            TransportUnavailable: No transport of the policy can be used (`require`: the one named); says why.
            AddressError: The listen address cannot be bound.
            InvalidInput: It has been started before, or nothing can listen at `control_socket`.
        """
        if self._engine is not None:
            raise InvalidInput("the endpoint has been started before; make a new one")
        if self.config.control_socket == "auto":
            self.config = replace(self.config, control_socket=new_socket())
        engine = new_engine(self.pool, self.config)
        self._address = engine.start()
        self._engine = engine
        _endpoints.add(self)
        atexit.unregister(_close_all)
        atexit.register(_close_all)  # anew: before whatever the transports have registered to close themselves
        return self

    def close(self) -> None:
        """End all rooms, tell peers, wait briefly for their acknowledgement, give everything back."""
        engine = self._engine
        if engine is None or engine.forked:
            return
        engine.close()
        _endpoints.discard(self)

    def __enter__(self) -> Endpoint:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def address(self) -> Address:
        """Where peers reach this endpoint; `str(address)` is what they pass as `peer`."""
        if self._address is None:
            raise EndpointClosed("not started: use `with Endpoint(...)` or call start()")
        return self._address

    @property
    def control_socket(self) -> Path | None:
        """Where `kvpoll switch` and `kvpoll report` reach this endpoint while it runs, or None."""
        return None if self.config.control_socket is None else Path(self.config.control_socket)

    @property
    def engine(self) -> Engine:
        """What runs the rooms, in a thread or in a process of its own.

        Raises:
            EndpointClosed: Not started, or ended.
            ForkedError: In a forked child.
        """
        engine = self._engine
        if engine is None:
            raise EndpointClosed("not started: use `with Endpoint(...)` or call start()")
        if engine.forked:
            raise ForkedError(engine.pid, os.getpid())
        if engine.ended is not None:
            raise EndpointClosed(engine.ended)
        return engine

    @property
    def driver(self) -> Driver:
        """The driver, for tools and tests of isolation="thread".

        Raises:
            InvalidInput: It runs in a process of its own.
        """
        engine = self.engine
        if not isinstance(engine, ThreadEngine):
            raise InvalidInput('the driver runs in a process of its own; isolation="thread" has it here')
        return engine.driver

    # Rooms

    def sender(
        self, room: int, *, required_ranks: int | None = None, tag: str = "", transports: str | None = None
    ) -> Sender:
        """Open the sender's side of a room. Never waits; receivers may come before or after.

        Args:
            room: 0 to 2**63 - 1, agreed on with the receivers.
            required_ranks: Receiver ranks there must be, or None to take it from their messages.
            tag: The host's own name for the room, for logs.
            transports: A policy for this room instead of the endpoint's, whatever that is switched to.

        Raises:
            DuplicateRoom: It is open here and was not cleared; the open one is not affected.
            InvalidInput: A number outside its range.
        """
        room = plain_integer("room", room, 0, MAX_ROOM)
        if required_ranks is not None:
            required_ranks = plain_integer("required_ranks", required_ranks, 1, MAX_RANKS)
        engine = self.engine
        policy = None if transports is None else Policy.parse(transports)
        handle = Sender(self, engine, engine.view(room, 0, tag))
        self._enter(handle)
        engine.open_sender(handle.view, required_ranks, policy)
        return handle

    def receiver(
        self,
        room: int,
        *,
        peer: str | Address,
        tokens: int | None = None,
        rank: int = 0,
        ranks: int = 1,
        resume: str = "drain",
        blocks: Iterable[SupportsIndex] | None = None,
        dummy: bool = False,
        window: int = 1,
        tag: str = "",
    ) -> Receiver:
        """Open one receiver rank of a room: grants blocks and, by default, resumes by itself.

        Args:
            room: As the sender's.
            peer: The sender's `str(endpoint.address)`.
            tokens: Size of one grant; larger data comes in several parts. Default 8 blocks, or what the pool
                holds, if that is less.
            rank: This receiver's rank, 0 to `ranks - 1`.
            ranks: How many receiver ranks the room has.
            resume: What makes room for the next part: "drain" copies the part out and uses the same blocks
                again; "extend" takes as many fresh ones (or drains if none are free); "manual" waits for
                `resume(blocks)`.
            blocks: Blocks of the engine's own for part 0 (`BlockPool.adopt`, with resume="manual").
            dummy: A rank that counts but holds no data.
            window: 2, with "drain": while a part is copied out, the next is received into as many blocks again,
                if so many are free.
            tag: The host's own name for the room, for logs.

        Raises:
            DuplicateRoom: This rank is open here and was not cleared; the open one is not affected.
            RequestTooLarge: More tokens than the pool holds in all, or with window=2 than half of it holds.
            ForeignBlock: Blocks that the pool does not have, or that are in use.
            AddressError: A peer address that cannot be read or reached.
            InvalidInput: Anything else that cannot work.
        """
        room = plain_integer("room", room, 0, MAX_ROOM)
        ranks = plain_integer("ranks", ranks, 1, MAX_RANKS)
        rank = plain_integer("rank", rank, 0, ranks - 1)
        address = peer_address(peer)
        window = plain_integer("window", window, 1, 2)
        if window == 2 and (resume != "drain" or dummy):
            raise InvalidInput("window=2 goes with resume='drain', and a dummy rank has no use for it")
        chosen, count = grant_size(self.pool, tokens, resume, blocks, dummy, window)
        order = ReceiverOrder(address, ranks, count, resume, chosen, window)
        engine = self.engine
        check_peer(self.config.keys, address)
        handle = Receiver(self, engine, engine.view(room, rank, tag), manual=resume == "manual")
        self._enter(handle)
        if not chosen:
            engine.open_receiver(handle.view, order)
            return handle
        try:
            engine.admit_receiver(handle.view, order)
        except BaseException:
            handle.clear()  # it may be opened yet, if it was the waiting that ended
            raise
        return handle

    # The whole endpoint

    def load(self) -> BlockLoad:
        """How the pool's blocks are used: free, leased, quarantined, and requests queued.

        Raises:
            EndpointClosed: The endpoint has ended.
        """
        load: BlockLoad = self._ask("load")
        return load

    def is_idle(self) -> bool:
        """No room is live, and no write can land any more."""
        return bool(self._ask("is_idle"))

    def drain(self, deadline_s: float) -> bool:
        """Take no new rooms and wait until those open have ended; False if the deadline came first."""
        self._draining = True
        ends_s = time.monotonic() + deadline_s
        while not self.is_idle():
            live = self._live()
            left_s = ends_s - time.monotonic()
            if left_s <= 0:
                return False
            _await_quiet(live[0] if live else None, left_s)
        return True

    def dump(self) -> list[dict[str, Any]]:
        """Every room that is not over: the gate that holds it, since when, and what would open it.

        Each is a dict of side, room, rank, tag, state, gate, waits_for (a sentence), waited_s (seconds at this
        gate), limit_s (how long it may wait there without a sign of progress, None once it is terminal), bytes_done
        and breakers: at a sender, a dict of transport, state ("open" or "half-open"), cause and left_s (seconds until
        it is tried again) for each transport to the room's peers that has failed lately. A room that is terminal is
        listed until no write of it can land and it was cleared.
        """
        rooms: list[dict[str, Any]] = self._ask("dump")
        return rooms

    def refused(self) -> dict[str, dict[str, int]]:
        """How often something was refused: by plane ("control", or a transport's name) and reason.

        The log has the first of each, with what is known of the peer.
        """
        counts: dict[str, dict[str, int]] = self._ask("refused")
        return counts

    def transports(self) -> TransportStatus:
        """How rooms are carried that are opened from now on: the policy, the canary, and which transports work."""
        status: TransportStatus = self._ask("transports")
        return status

    def switch_transport(self, policy: str, canary: float | None = None) -> TransportStatus:
        """Give rooms that are opened from now on other transports; those that are open end as they began.

        It concerns rooms that this endpoint sends, for the sender picks. Rooms with `transports=` of their own keep
        to that. `kvpoll switch` does the same from outside (setting `control_socket`).

        Args:
            policy: As `transports` of the endpoint. All it names must be loaded: named by the endpoint's
                `transports`, or on `standby`.
            canary: Only for this share of the rooms, above 0 and below 1, by a hash of their numbers that is the same
                on every endpoint; the others keep the present policy. A later switch without it is for all rooms.

        Returns:
            What holds now.

        Raises:
            PolicyError: The policy cannot be read.
            TransportUnavailable: A transport of it is not loaded, or does not work; says how to have it.
            InvalidInput: `canary` is no share.
        """
        engine = self.engine
        engine.sign.seen = True
        return engine.switch(Policy.parse(policy), read_share(canary))

    def report(self) -> dict[str, Any]:
        """How rooms have fared by transport since the start, as `kvpoll report --json` prints it."""
        counts: dict[str, Any] = self._ask("report")
        return counts

    def trace(self) -> list[Record]:
        """The newest records of the trace: states, parts and messages, oldest first."""
        records: list[Record] = self._ask("trace")
        return records

    # Inside

    def dropped(self, handle: Room) -> None:
        """A handle was cleared: its room may be opened again."""
        place = _place(handle)
        with self._lock:
            if self._open.get(place) is handle:
                del self._open[place]

    def _enter(self, handle: Room) -> None:
        place = _place(handle)
        with self._lock:
            if self._draining:
                raise EndpointClosed("draining: no new rooms are taken")
            if place in self._open:
                raise DuplicateRoom(handle.side, handle.room, handle.rank)
            self._open[place] = handle

    def _live(self) -> list[RoomView]:
        with self._lock:
            views = [handle.view for handle in self._open.values()]
        return [view for view in views if not view.quiescent]

    def _ask(self, question: Question) -> Any:
        engine = self.engine
        engine.sign.seen = True
        return engine.ask(question)


def _place(handle: Room) -> int | tuple[int, int]:
    """What of one endpoint's rooms is open once: a sender's number; a receiver's, with its rank."""
    return handle.room if handle.side == "sender" else (handle.room, handle.rank)


def _await_quiet(view: RoomView | None, left_s: float) -> None:
    """Wait a moment for a room that is live; rooms that were cleared have no view to wait on."""
    if view is None:
        time.sleep(min(left_s, 0.01))
    else:
        view.wait_until(lambda: view.quiescent, min(left_s, 1.0))


def _after_fork_in_child() -> None:
    for endpoint in list(_endpoints):
        if endpoint._engine is not None:
            endpoint._engine.after_fork()


def _close_all() -> None:
    for endpoint in list(_endpoints):
        endpoint.close()


os.register_at_fork(after_in_child=_after_fork_in_child)
