"""One endpoint, or several, as a process of its own. Orders come as JSON lines on stdin, answers go to stdout.

Started by `processes.Mother`; run by nothing else. Every order names a method of `Host` below.
"""

from __future__ import annotations

import atexit
import json
import linecache
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

import kvpoll_tcp  # noqa: F401 - imported once, in the mother, and not in every child
from kvpoll_fsm import BlockPool, Deadlines, Endpoint, Field, Layout
from kvpoll_fsm.handles import Receiver, Room, Sender
from tests.faults.counts import count_everything
from tests.faults.loss import Loss, losses
from tests.faults.namespaces import enter
from tests.faults.processes import be_mother

LOOK_S = 0.002


def say(**line: Any) -> None:
    """One line to the harness. Written with one call, so that a signal handler may speak in between."""
    os.write(1, json.dumps(line).encode() + b"\n")


def make_layout(hidden: int, block_tokens: int) -> Layout:
    fields = [Field("embeddings", "bfloat16", (hidden,)), Field("ids", "int32"), Field("aux", "int64", (16,), True)]
    return Layout(block_tokens=block_tokens, fields=fields)


def make_data(hidden: int, room: int, tokens: int) -> dict[str, np.ndarray[Any, Any]]:
    """What a room carries: the same on both sides, different for every room."""
    rng = np.random.default_rng([room, tokens])
    return {
        "embeddings": rng.integers(0, 1 << 16, (tokens, hidden), dtype=np.uint16),
        "ids": np.arange(room, room + tokens, dtype=np.int32),
        "aux": rng.integers(0, 1 << 40, 16, dtype=np.int64),
    }


class Host:
    """Carries out orders."""

    def __init__(self) -> None:
        self.endpoints: dict[str, Endpoint] = {}
        self.rooms: dict[tuple[str, str, int, int], Room] = {}
        self.losses: dict[str, Loss] = {}
        self.hidden = 0

    def enter(self, namespace: str) -> None:
        """Be in this network namespace from now on; before the first endpoint, while there is one thread."""
        enter(namespace)

    # Endpoints

    def open(
        self,
        name: str = "main",
        hidden: int = 64,
        block_tokens: int = 16,
        blocks: int = 64,
        adopt: bool = False,
        tcp: dict[str, Any] | None = None,
        deadlines: dict[str, float] | None = None,
        loss: dict[str, Any] | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        layout = make_layout(hidden, block_tokens)
        self.hidden = hidden
        pool = BlockPool(layout, blocks=blocks) if not adopt else _adopted(layout, blocks)
        plan = self.losses[name] = Loss()
        for key, value in (loss or {}).items():
            setattr(plan, key, value)
        mover = os.environ.get("KVPOLL_TEST_ISOLATION") == "process" and not adopt
        before = _listening(os.getpid())
        endpoint = Endpoint(
            pool=pool,
            transports="require:tcp",
            deadlines=Deadlines(**(deadlines or {})),
            transport_options={"tcp": tcp or {}},
            isolation="process" if mover else "thread",
            **settings,
        ).start()
        if not mover or loss:
            losses[endpoint.driver._control] = plan
        self.endpoints[name] = endpoint
        pid = endpoint.engine.mover.pid if mover else os.getpid()  # type: ignore[attr-defined]
        data_port = (_listening(pid) - before - {endpoint.address.port}).pop()
        return {"address": str(endpoint.address), "data_port": data_port, "mover": pid if mover else 0}

    def close(self, name: str = "main") -> None:
        self.endpoints.pop(name).close()
        for key in [key for key in self.rooms if key[0] == name]:
            del self.rooms[key]
        self.losses.pop(name)

    def lose(self, name: str = "main", **plan: Any) -> None:
        losses[self.endpoints[name].driver._control] = self.losses[name]
        for key, value in plan.items():
            setattr(self.losses[name], key, value)

    def lose_no_more(self, name: str = "main") -> None:
        self.losses[name].stop_holding()

    def lost(self, name: str = "main") -> list[str]:
        return self.losses[name].lost

    def until_lost(self, count: int, name: str = "main", timeout: float = 10.0) -> bool:
        """Wait until so many packets have been lost on purpose."""
        return _await(lambda: len(self.lost(name)) >= count, timeout)

    def recorded(self, name: str = "main") -> list[str]:
        return [data.hex() for data in self.losses[name].kept]

    # Rooms

    def sender(self, room: int, ranks: int | None = 1, tokens: int = 0, name: str = "main", **more: Any) -> None:
        handle = self.endpoints[name].sender(room, required_ranks=ranks, **more)
        self.rooms[name, "sender", room, 0] = handle
        if tokens:
            handle.send(make_data(self.hidden, room, tokens))

    def send(self, room: int, tokens: int, name: str = "main") -> None:
        handle = self.rooms[name, "sender", room, 0]
        assert isinstance(handle, Sender)
        handle.send(make_data(self.hidden, room, tokens))

    def receiver(self, room: int, peer: str, rank: int = 0, name: str = "main", **more: Any) -> None:
        handle = self.endpoints[name].receiver(room, peer=peer, rank=rank, **more)
        self.rooms[name, "receiver", room, rank] = handle

    def resume(self, room: int, blocks: list[int], rank: int = 0, name: str = "main") -> None:
        """The engine has copied the newest part and grants these blocks for the next."""
        handle = self.rooms[name, "receiver", room, rank]
        assert isinstance(handle, Receiver)
        assert handle.part is not None
        handle.release(handle.part.part)
        handle.resume(blocks)

    def state(self, side: str, room: int, rank: int = 0, name: str = "main") -> dict[str, Any]:
        return _describe(self.rooms[name, side, room, rank])

    def states(self) -> list[dict[str, Any]]:
        return [_describe(handle) for handle in self.rooms.values()]

    def until(
        self,
        side: str,
        room: int,
        rank: int = 0,
        name: str = "main",
        timeout: float = 10.0,
        gate: str = "",
        state: str = "",
        ended: bool = False,
        quiescent: bool = False,
        parts: int = 0,
        nbytes: int = 0,
    ) -> dict[str, Any]:
        """Wait until a room is where it is wanted, or has ended elsewhere."""
        handle = self.rooms[name, side, room, rank]

        def there() -> bool:
            seen = _describe(handle)
            here = seen["gate"] == (gate or seen["gate"]) and seen["state"] == (state or seen["state"])
            far = len(handle.parts) >= parts and handle.bytes_done >= nbytes
            over = not (ended or quiescent) or (seen["ended"] and (seen["quiescent"] or not quiescent))
            return here and far and over

        reached = _await(there, timeout)
        return {**_describe(handle), "reached": reached}

    def data(self, room: int, tokens: int, rank: int = 0, name: str = "main", timeout: float = 10.0) -> bool:
        """Whether a receiver's result is, to the byte, what the sender had."""
        handle = self.rooms[name, "receiver", room, rank]
        assert isinstance(handle, Receiver)
        got, wanted = handle.result(timeout), make_data(self.hidden, room, tokens)
        return got.keys() == wanted.keys() and all((got[key] == wanted[key]).all() for key in wanted)

    def clear(self, side: str = "", room: int = -1, rank: int = 0, name: str = "main") -> None:
        keys = [(name, side, room, rank)] if side else list(self.rooms)
        for key in keys:
            self.rooms.pop(key).clear()

    def abort(self, side: str, room: int, rank: int = 0, name: str = "main") -> None:
        self.rooms[name, side, room, rank].abort("the test said so")

    # What is there

    def load(self, name: str = "main") -> dict[str, int]:
        load = self.endpoints[name].load()
        return {field: getattr(load, field) for field in load.__slots__}

    def until_free(self, name: str = "main", timeout: float = 10.0) -> dict[str, int]:
        """Wait until every block is free."""
        _await(lambda: self.load(name)["free"] == self.load(name)["total"], timeout)
        return self.load(name)

    def is_idle(self, name: str = "main") -> bool:
        return self.endpoints[name].is_idle()

    def dump(self, name: str = "main") -> list[dict[str, Any]]:
        return self.endpoints[name].dump()

    def counts(self, name: str = "main") -> dict[str, int]:
        """Everything that could leak."""
        return count_everything(self.endpoints[name])

    def until_counts(self, wanted: dict[str, int], name: str = "main", timeout: float = 10.0) -> dict[str, Any]:
        """Wait until the counts are as wanted; returns those that are not, as [wanted, found]."""

        def differences() -> dict[str, Any]:
            found = self.counts(name)
            keys = wanted.keys() | found.keys()
            return {key: [wanted.get(key, 0), found.get(key, 0)] for key in keys if wanted.get(key) != found.get(key)}

        _await(lambda: not differences(), timeout)
        return differences()

    def silent_ticks(self, name: str = "main") -> int:
        """Heartbeats since any peer was heard, the most silent one counting."""
        endpoint = self.endpoints[name]
        ask = lambda: max((c.silent_ticks for c in endpoint.driver.core.connections.values()), default=0)  # noqa: E731
        return endpoint.driver.call(ask).result(10)

    def until_silent(self, ticks: int, name: str = "main", timeout: float = 10.0) -> bool:
        return _await(lambda: self.silent_ticks(name) >= ticks, timeout)

    def until_connections(self, count: int, name: str = "main", timeout: float = 10.0) -> bool:
        endpoint = self.endpoints[name]
        return _await(lambda: len(endpoint.driver.core.connections) == count, timeout)

    def until_links(self, count: int, name: str = "main", timeout: float = 10.0) -> bool:
        """Wait until so many data links of this sender stand."""
        endpoint = self.endpoints[name]
        return _await(lambda: len(endpoint.driver._links._links) == count, timeout)

    def malformed(self, name: str = "main") -> int:
        return self.endpoints[name].driver._control.malformed

    def until_refused(self, count: int, name: str = "main", timeout: float = 10.0) -> bool:
        """Wait until so many peers have been refused for their keys."""
        control = self.endpoints[name].driver._control
        return _await(lambda: control.refused >= count, timeout)

    def until_malformed(self, count: int, name: str = "main", timeout: float = 10.0) -> bool:
        """Wait until so many control packets have been refused."""
        return _await(lambda: self.malformed(name) >= count, timeout)

    def until_strangers(self, count: int, name: str = "main", timeout: float = 10.0) -> bool:
        """Wait until so many connections to the data port have not proved themselves."""
        listener: Any = self.endpoints[name].driver.transports["tcp"]._listener  # type: ignore[attr-defined]
        return _await(lambda: len(listener._strangers) == count, timeout)

    # Canaries: bytes that nobody may touch

    def canary(self, name: str = "main") -> None:
        """Fill every block."""
        for region in self.endpoints[name].pool.regions():
            region.buffer[:] = b"\xc5" * region.buffer.nbytes

    def canary_lives(self, name: str = "main") -> bool:
        regions = self.endpoints[name].pool.regions()
        return all(region.buffer == b"\xc5" * region.buffer.nbytes for region in regions)

    def until_unread(self, timeout: float = 10.0) -> bool:
        """Wait until no thread of this process reads a data connection any more."""
        return _await(lambda: not any("tcp-read" in t.name for t in threading.enumerate()), timeout)

    # The end

    def drain_on_sigterm(self, deadline_s: float, name: str = "main") -> None:
        endpoint = self.endpoints[name]

        def drain(number: int, frame: FrameType | None) -> None:
            self._drain_aloud(endpoint, deadline_s)

        signal.signal(signal.SIGTERM, drain)

    def drain_at_exit(self, deadline_s: float, name: str = "main") -> None:
        atexit.register(self._drain_aloud, self.endpoints[name], deadline_s)

    def _drain_aloud(self, endpoint: Endpoint, deadline_s: float) -> None:
        say(event="draining", value=None)
        drained = endpoint.drain(deadline_s)
        say(event="drained", value={"drained": drained, "states": self.states()})

    def load_in_handler_of_every_lock(self, name: str = "main") -> int:
        """Make calls that are interrupted, wherever they hold a lock, by a handler that calls the endpoint.

        Returns how often that happened.
        """
        endpoint, done = self.endpoints[name], 0

        def handler(number: int, frame: FrameType | None) -> None:
            nonlocal done
            done += 1
            endpoint.load()

        def trace(frame: FrameType, event: str, arg: object) -> Any:
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
            if event == "line" and inside.get(frame) and frame.f_lineno != inside[frame]:
                inside.pop(frame)
                signal.raise_signal(signal.SIGUSR1)
            if "with self." in line and "lock" in line:
                inside[frame] = frame.f_lineno
            return trace

        inside: dict[FrameType, int] = {}
        signal.signal(signal.SIGUSR1, handler)
        for room in range(2):
            sys.settrace(trace)
            try:
                handle = endpoint.sender(room)
                handle.clear()
                endpoint.load()
            finally:
                sys.settrace(None)
        return done

    def drain(self, deadline_s: float, name: str = "main") -> bool:
        return self.endpoints[name].drain(deadline_s)

    def result_for_ever(self, room: int, rank: int = 0, name: str = "main") -> None:
        """Wait for a result that does not come; a signal ends it."""
        handle = self.rooms[name, "receiver", room, rank]
        assert isinstance(handle, Receiver)
        say(event="waiting", value=room)
        handle.result()


def _describe(handle: Room) -> dict[str, Any]:
    failure = handle.failure
    return {
        "side": handle.side,
        "room": handle.room,
        "rank": handle.rank,
        "state": str(handle.poll()),
        "ended": handle.poll().is_terminal,
        "gate": str(handle.gate),
        "history": [str(state) for state in handle.history],
        "parts": [part.tokens for part in handle.parts],
        "transports": sorted({part.transport for part in handle.parts}),
        "nbytes": handle.bytes_done,
        "quiescent": handle.view.quiescent,
        "code": failure and str(failure.code),
        "cause_rank": failure and failure.rank,
        "retryable": failure and failure.retryable,
        "detail": failure and failure.detail,
    }


def _await(condition: Callable[[], bool], timeout_s: float) -> bool:
    ends = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > ends:
            return False
        time.sleep(LOOK_S)
    return True


def _adopted(layout: Layout, blocks: int) -> BlockPool:
    hidden = layout.fields[0].shape_per_token[0]
    arrays = {
        "embeddings": np.zeros((blocks, layout.block_tokens, hidden), np.uint16),
        "ids": np.zeros((blocks, layout.block_tokens), np.int32),
        "aux": np.zeros((blocks, 16), np.int64),
    }
    return BlockPool.adopt(layout, arrays)


def _listening(pid: int) -> set[int]:
    """The ports a process listens on."""
    proc = Path(f"/proc/{pid}")
    own = {os.readlink(path) for path in (proc / "fd").iterdir() if path.is_symlink() and path.is_socket()}
    lines = [line.split() for line in (proc / "net/tcp").read_text().splitlines()[1:]]
    return {int(line[1][-4:], 16) for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in own}


def serve(host: Host) -> None:
    for line in sys.stdin:
        order = json.loads(line)
        number, do = order.pop("id"), order.pop("do")
        if do == "exit":
            return
        try:
            say(id=number, value=getattr(host, do)(**order))
        except Exception as error:  # told to the harness, which raises it
            say(id=number, error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)  # a room that fails is a warning; a traceback is an error
    if be_mother(int(sys.argv[1])):
        serve(Host())
