"""An endpoint as a process of its own, as in the fault tests, whose blocks are watched and whose reader can be slow."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from kvpoll_common.grants import Grants
from kvpoll_fsm import registry
from kvpoll_fsm.handles import Sender
from kvpoll_fsm.receiver_session import ReceiverSession
from kvpoll_fsm.sender_session import SenderSession
from kvpoll_fsm.spi import Fenced, FenceKind
from kvpoll_tcp import TcpTransport
from kvpoll_tcp.receiver import Reader
from tests.faults.processes import be_mother
from tests.faults.worker import LOOK_S, Host, make_data, serve
from tests.fences.watch import PAINT, SCORCH, Watch
from tests.transports.certificates import contexts

TLS = contexts()
"""Made in the mother, so that all of her children trust each other."""
_receive = Reader._receive


class Brake:
    """Lets the threads that read data connections get no more than so many bytes at a time, with a pause before.

    Attributes:
        goes: Not set: they stand still before they get any more.
        standing: How many do.
    """

    nbytes = 0
    pause_s = 0.0
    goes = threading.Event()
    standing = 0


Brake.goes.set()


def _braked(self: Reader, views: list[memoryview]) -> int:
    nbytes, pause_s = Brake.nbytes, Brake.pause_s
    if not nbytes:
        return _receive(self, views)
    time.sleep(pause_s)
    if not Brake.goes.is_set():
        Brake.standing += 1
        Brake.goes.wait()
        Brake.standing -= 1
    return _receive(self, [views[0][:nbytes]])


Reader._receive = _braked  # type: ignore[method-assign]


class CostlyTcp(TcpTransport):
    """Tcp that can fence in one way only: it ends every connection. A revoked token is as good as before until then."""

    capabilities = replace(TcpTransport.capabilities, fence=FenceKind.process)

    def revoke(self, token: bytes) -> None:
        """Do nothing, as RDMA would about what is on its way."""

    def fence(self, token: bytes) -> int:
        assert self._listener is not None
        for reader in list(self._listener._known):
            reader.cut()
        return super().fence(token)


class FenceHost(Host):
    """What can be ordered besides."""

    def __init__(self) -> None:
        super().__init__()
        self.watches: dict[str, Watch] = {}
        self.overwritten: set[int] = set()
        self._sampling: tuple[threading.Thread, threading.Event, list[str], list[int]] | None = None

    def open(
        self, name: str = "main", role: str = "receiver", costly: bool = False, tls: bool = False, **settings: Any
    ) -> dict[str, Any]:
        """Open an endpoint that is watched."""
        load = registry.load
        if tls:
            settings["tcp"] = {**settings.get("tcp", {}), "tls": TLS}
        if costly:
            registry.load = lambda name: CostlyTcp  # type: ignore[assignment, misc, return-value]
        try:
            opened = super().open(name=name, **settings)
        finally:
            registry.load = load
        self.watches[name] = Watch(self.endpoints[name], SCORCH if role == "sender" else PAINT)
        return opened

    def brake(self, nbytes: int = 0, pause_s: float = 0.0) -> None:
        """Read slowly from now on, or no longer."""
        Brake.nbytes, Brake.pause_s = nbytes, pause_s

    def hold(self, timeout: float = 10.0) -> bool:
        """Let a reader stand still that knows where its next bytes go, and wait until one does; `let_go` ends it."""
        Brake.goes.clear()
        return _await(lambda: Brake.standing > 0, timeout)

    def let_go(self) -> None:
        """Let it go on with what it was about to do."""
        Brake.goes.set()

    def sabotage(self, how: str) -> None:
        """Break what keeps blocks safe, to show that the tests would notice."""
        if how == "early":  # the fence holds before the reader has left
            fence = Grants.fence

            def early(self: Grants, token: bytes) -> int:
                grant = self._grants.get(token)
                number = fence(self, token)
                if grant is not None and number in grant.fences:
                    grant.fences.remove(number)
                    self._outbox.put(Fenced(number))
                return number

            Grants.fence = early  # type: ignore[method-assign]
        elif how == "no fence":  # the end of the room is the end of the lease
            ReceiverSession._on_failed = lambda self: self._settle()  # type: ignore[method-assign]
        else:  # sources are given back although they are read
            SenderSession._on_failed = lambda self: self._release_source()  # type: ignore[method-assign]

    def until_landing(self, room: int, name: str = "main", timeout: float = 10.0) -> bool:
        """Wait until the first bytes of a room are in its blocks."""
        watch = self.watches[name]
        return _await(lambda: not watch.painted(watch.blocks_of(room)), timeout)

    def untouched(self, room: int, name: str = "main") -> bool:
        """Whether nothing has been written to the blocks a room was leased last."""
        watch = self.watches[name]
        return watch.painted(watch.blocks_of(room))

    def until_touched(self, room: int, name: str = "main", timeout: float = 10.0) -> bool:
        """Wait until something is written to the blocks a room was leased last."""
        return _await(lambda: not self.untouched(room, name), timeout)

    def problems(self, name: str = "main") -> list[str]:
        return self.watches[name].problems

    def moves(self, room: int, rank: int = 0, name: str = "main") -> list[str]:
        """What happened to the blocks of a rank of a room, in order."""
        return [move[0] for move in self.watches[name].moves if move[1:3] == (room, rank)]

    def until_moved(self, room: int, what: str, rank: int = 0, name: str = "main", timeout: float = 10.0) -> bool:
        return _await(lambda: what in self.moves(room, rank, name), timeout)

    def until_readers(self, count: int, timeout: float = 10.0) -> bool:
        """Wait until so many threads of this process read data connections."""
        return _await(lambda: sum("tcp-read" in t.name for t in threading.enumerate()) == count, timeout)

    def shares_blocks(self, first: int, second: int, name: str = "main") -> bool:
        """Whether the second room was leased blocks that the first had."""
        moves = self.watches[name].moves
        held = {room: {block for move in moves if move[1] == room for block in move[4]} for room in (first, second)}
        return bool(held[first] & held[second])

    # A thread that looks all the time

    def sample(self, name: str = "main") -> None:
        """Ask for the load again and again, and note what does not add up."""
        endpoint, over = self.endpoints[name], threading.Event()
        wrong: list[str] = []
        looks: list[int] = []

        def look() -> None:
            while not over.is_set():
                load = endpoint.load()
                looks.append(load.quarantined)
                if load.free + load.leased + load.quarantined != load.total:
                    wrong.append(str(load))

        thread = threading.Thread(target=look, name="samples", daemon=True)
        self._sampling = thread, over, wrong, looks
        thread.start()

    def sampled(self) -> dict[str, Any]:
        """Stop looking: how often it did, what was wrong, most blocks seen in quarantine."""
        assert self._sampling is not None
        thread, over, wrong, looks = self._sampling
        over.set()
        thread.join()
        return {"looks": len(looks), "wrong": wrong, "most_quarantined": max(looks)}

    # Sources

    def lend(self, room: int, tokens: int, blocks: int = 0, copy: bool = False) -> None:
        """Send arrays (or, adopted, the first blocks) that are overwritten once `wait_quiescent()` allows it.

        With `copy` that is at once.
        """
        handle = self.rooms["main", "sender", room, 0]
        assert isinstance(handle, Sender)
        data = make_data(self.hidden, room, tokens)
        targets: Iterable[np.ndarray[Any, Any]] = data.values()
        if blocks:
            pool = self.endpoints["main"].pool
            arrays = [np.frombuffer(region.buffer, np.uint8) for region in pool.regions()]
            for array, values in zip(arrays, data.values(), strict=True):
                array[: values.nbytes] = np.frombuffer(values.tobytes(), np.uint8)
            targets = arrays
            handle.open(tokens)
            handle.send_blocks(range(blocks), tokens)
        else:
            handle.send(data, copy=copy)

        def overwrite() -> None:
            assert copy or handle.wait_quiescent(30)
            for array in targets:
                array.view(np.uint8)[...] = SCORCH[0]
            self.overwritten.add(room)

        if copy:
            overwrite()
        else:
            threading.Thread(target=overwrite, name="overwrites", daemon=True).start()

    def until_tickets(self, count: int, name: str = "main", timeout: float = 10.0) -> bool:
        """Wait until so many writes of this sender are under way."""
        outgoing = self.endpoints[name].driver.outgoing
        return _await(lambda: len(outgoing._by_ticket) == count, timeout)

    def until_overwritten(self, room: int, timeout: float = 10.0) -> bool:
        return _await(lambda: room in self.overwritten, timeout)

    def close_links(self, name: str = "main") -> None:
        """End all data links from this side."""
        driver = self.endpoints[name].driver
        driver.call(lambda: [entry.link.close() for entry in driver._links._links.values()]).result(10)

    def scorched(self, name: str = "main") -> list[int]:
        """Blocks that hold what a source held after it was given back."""
        watch = self.watches[name]
        return [block for block in range(self.endpoints[name].pool.blocks) if watch.scorched(block)]


def _await(condition: Callable[[], bool], timeout_s: float) -> bool:
    ends_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > ends_s:
            return False
        time.sleep(LOOK_S)
    return True


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)  # a room that fails is a warning; a traceback is an error
    if be_mother(int(sys.argv[1])):
        serve(FenceHost())
