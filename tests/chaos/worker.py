"""A program of the chaos run: endpoints in one process, told what to do by JSON lines, reporting how rooms ended.

Started by `processes.Mother`; run by nothing else.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import select
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import kvpoll_tcp  # noqa: F401 - imported once, in the mother, and not in every child
from kvpoll_fsm import BlockPool, Deadlines, Endpoint, Field, KVPoll, Layout
from kvpoll_fsm.deadlines import Gate
from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.handles import Receiver, Room, Sender
from tests.chaos.data import digest, make_arrays, numpy_dtype
from tests.faults.counts import count_everything
from tests.faults.namespaces import enter
from tests.faults.processes import be_mother

LOOK_S = 0.005
MOVER = os.environ.get("KVPOLL_TEST_ISOLATION") == "process"
AUDIT_S = 0.5
"""How often the pools are counted."""


def say(**line: Any) -> None:
    os.write(1, json.dumps(line).encode() + b"\n")


class Engine:
    """An engine with memory of its own, which plans its blocks itself."""

    def __init__(self, spec: dict[str, Any], layout: Layout) -> None:
        self.fields = spec["fields"]
        lead = (spec["blocks"], spec["block_tokens"])
        self.arrays = {
            f["name"]: np.zeros((*(lead[:1] if f["per_room"] else lead), *f["shape"]), numpy_dtype(f))
            for f in self.fields
        }
        self.pool = BlockPool.adopt(layout, self.arrays)
        self.free = list(range(spec["blocks"]))

    def copy(self, blocks: tuple[int, ...], tokens: int) -> dict[str, Any]:
        """The rows of one part, copied."""
        chosen = list(blocks)
        return {
            f["name"]: self.arrays[f["name"]][chosen].reshape(-1, *f["shape"])[:tokens]
            for f in self.fields
            if not f["per_room"]
        }


@dataclass
class Watched:
    """One side of a room, until it is over."""

    endpoint: str
    handle: Room
    tokens: int
    engine: Engine | None = None
    blocks: list[int] = field(default_factory=list)
    copied: list[dict[str, Any]] = field(default_factory=list)
    once: dict[str, Any] = field(default_factory=dict)
    resumed: int = 0
    cleared: bool = False
    touched: bool = False


class Program:
    """Carries out orders and watches rooms."""

    def __init__(self) -> None:
        self.endpoints: dict[str, Endpoint] = {}
        self.engines: dict[str, Engine] = {}
        self.fields: dict[str, list[dict[str, Any]]] = {}
        self.rooms: dict[tuple[str, int, int], Watched] = {}
        self.seed = 0
        self._audited_s = 0.0

    # Orders

    def open(self, namespace: str, seed: int, endpoints: list[dict[str, Any]], **settings: Any) -> None:
        enter(namespace)
        self.seed = seed
        for spec in endpoints:
            self._open_endpoint(spec, **settings)

    def _open_endpoint(self, spec: dict[str, Any], deadlines: dict[str, float], tcp: dict[str, Any]) -> None:
        fields = [Field(f["name"], f["dtype"], tuple(f["shape"]), f["per_room"]) for f in spec["fields"]]
        layout = Layout(block_tokens=spec["block_tokens"], fields=fields)
        name = spec["name"]
        self.fields[name] = spec["fields"]
        if spec["adopt"]:
            self.engines[name] = Engine(spec, layout)
        self.endpoints[name] = Endpoint(
            pool=self.engines[name].pool if spec["adopt"] else BlockPool(layout, blocks=spec["blocks"]),
            transports="require:tcp",
            listen=f"tcp://{spec['host']}:{spec['port']}",
            insecure=True,
            isolation="process" if MOVER and not spec["adopt"] else "thread",
            deadlines=Deadlines(**deadlines),
            transport_options={"tcp": {**tcp, "data_ports": (spec["data_port"], spec["data_port"])}},
        ).start()

    def sender(self, endpoint: str, room: int, ranks: int | None, tokens: int) -> None:
        handle = self.endpoints[endpoint].sender(room, required_ranks=ranks)
        self.rooms["sender", room, 0] = Watched(endpoint, handle, tokens)

    def supply(self, side: str, room: int, rank: int) -> None:
        watched = self.rooms.get((side, room, rank))
        if watched is not None and not watched.cleared:
            assert isinstance(watched.handle, Sender)
            watched.handle.send(make_arrays(self.fields[watched.endpoint], self.seed, room, watched.tokens))

    def receiver(self, endpoint: str, room: int, peer: str, rank: int, ranks: int, grant: int, resume: str) -> None:
        opening: dict[str, Any] = {"peer": peer, "rank": rank, "ranks": ranks, "resume": resume}
        watched = Watched(endpoint, None, 0)  # type: ignore[arg-type]
        if resume == "manual":
            watched.endpoint = f"engine{endpoint}"
            engine = watched.engine = self.engines[watched.endpoint]
            watched.blocks = [engine.free.pop() for _ in range(-(-grant // engine.pool.layout.block_tokens))]
            opening["blocks"] = watched.blocks
        else:
            opening["tokens"] = grant
        watched.handle = self.endpoints[watched.endpoint].receiver(room, **opening)
        self.rooms["receiver", room, rank] = watched

    def abort(self, side: str, room: int, rank: int) -> None:
        watched = self.rooms.get((side, room, rank))
        if watched is not None:
            watched.touched = watched.touched or not watched.handle.poll().is_terminal
            watched.handle.abort("the host gave it up")

    def clear(self, side: str, room: int, rank: int) -> None:
        watched = self.rooms.get((side, room, rank))
        if watched is not None and not watched.cleared:
            watched.cleared, watched.touched = True, watched.touched or not watched.handle.poll().is_terminal
            watched.handle.clear()

    def counts(self) -> dict[str, int]:
        """Everything that could leak."""
        found = {"rooms": len(self.rooms)}
        for name, endpoint in self.endpoints.items():
            load = endpoint.load()
            found[f"{name}: blocks in use"] = load.total - load.free
            found |= {f"{name}: {what}": number for what, number in count_everything(endpoint).items()}
        return found

    def rss(self) -> int:
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    def complain(self, room: int) -> None:
        """Say what is known of a room that does not end."""
        lines = [line for endpoint in self.endpoints.values() for line in endpoint.dump() if line["room"] == room]
        watched = {key: repr(value) for key, value in self.rooms.items() if key[1] == room}
        say(violation=f"room {room} hangs: {lines}, {watched}")

    # Watching

    def look(self) -> None:
        for key, watched in list(self.rooms.items()):
            handle = watched.handle
            if watched.engine is not None and not watched.cleared:
                self._engine_takes(watched)
            if handle.poll().is_terminal and handle.view.quiescent:
                self._over(key, watched)
        now_s = time.monotonic()
        if now_s - self._audited_s > AUDIT_S:
            self._audited_s = now_s
            self._audit()

    def _engine_takes(self, watched: Watched) -> None:
        """Copy what has come, give the blocks back, and grant them again if there is more to come."""
        handle, engine = watched.handle, watched.engine
        assert isinstance(handle, Receiver)
        assert engine is not None
        waits = handle.gate is Gate.waiting_resume  # looked at first: then the part it waits after is seen as well
        for part in handle.parts[len(watched.copied) :]:
            watched.copied.append(engine.copy(part.blocks, part.tokens))
            if part.part == 0:
                once = [f["name"] for f in engine.fields if f["per_room"]]
                watched.once = {name: engine.arrays[name][part.blocks[0]].copy() for name in once}
            handle.release(part.part)
        if waits and watched.resumed < len(watched.copied):
            watched.resumed = len(watched.copied)
            try:
                handle.resume(watched.blocks)
            except InvalidInput:  # it has just ended
                if not handle.poll().is_terminal:
                    raise

    def _over(self, key: tuple[str, int, int], watched: Watched) -> None:
        del self.rooms[key]
        handle, failure = watched.handle, watched.handle.failure
        if watched.engine is not None:
            if not watched.cleared:
                self._engine_takes(watched)
            watched.engine.free += watched.blocks
        say(
            side=key[0],
            room=key[1],
            rank=key[2],
            state=str(handle.poll()),
            history=[str(state) for state in handle.history],
            parts=[[part.offset, part.tokens, part.is_last] for part in handle.parts],
            digest=self._digest(watched) if handle.poll() is KVPoll.Success and key[0] == "receiver" else "",
            touched=watched.touched,
            cleared=watched.cleared,
            code=failure and str(failure.code),
            cause_rank=failure and failure.rank,
            detail=failure and failure.detail,
        )
        if not watched.cleared:
            handle.clear()

    def _digest(self, watched: Watched) -> str:
        assert isinstance(watched.handle, Receiver)
        if watched.cleared:  # nobody takes the data of a room that was dropped
            return ""
        fields = self.fields[watched.endpoint]
        if watched.engine is None:
            return digest(fields, watched.handle.result(timeout=0))
        rows = {
            f["name"]: np.concatenate([part[f["name"]] for part in watched.copied]) for f in fields if not f["per_room"]
        }
        return digest(fields, {**watched.once, **rows})

    def _audit(self) -> None:
        for name, endpoint in self.endpoints.items():
            load = endpoint.load()
            if load.free + load.leased + load.quarantined != load.total:
                say(violation=f"blocks of {name} do not add up: {load}")


def _serve(program: Program) -> None:
    orders = b""
    poller = select.poll()
    poller.register(0, select.POLLIN)
    while True:
        if poller.poll(LOOK_S * 1000):
            read = os.read(0, 1 << 16)
            if not read:
                return
            *lines, orders = (orders + read).split(b"\n")
            for line in lines:
                _carry_out(program, json.loads(line))
        program.look()


def _carry_out(program: Program, order: dict[str, Any]) -> None:
    number, do = order.pop("id"), order.pop("do")
    try:
        say(id=number, value=getattr(program, do)(**order))
    except Exception as error:  # told to the conductor, which takes it for a violation
        say(id=number, error=f"{do} {order}: {type(error).__name__}: {error}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)  # a room that fails is a warning; a traceback is an error
    if be_mother(int(sys.argv[1])):
        _serve(Program())
