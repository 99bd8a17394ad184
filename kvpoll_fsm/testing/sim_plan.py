"""The plan of a simulation: who there is, which rooms they open, and what goes wrong when.

A plan is data. It is drawn first, from one seed, and run afterwards, so that a run that breaks a law can be made
smaller by leaving things out, kept in a file, and run again.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from kvpoll_fsm.deadlines import Deadlines
from kvpoll_fsm.errors import InvalidInput

__all__ = [
    "MODES",
    "Abort",
    "Break",
    "Clear",
    "Crash",
    "Disturb",
    "Event",
    "Fault",
    "Freeze",
    "Machine",
    "Open",
    "Part",
    "Plan",
    "Quiet",
    "Rank",
    "Slow",
]

MODES = ("safety", "liveness")


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One endpoint.

    Attributes:
        blocks: Of its pool.
        managed: It chooses blocks; otherwise its engine names them.
        latency_s: Its share of the way of a packet.
        work_s: What a copy, or the write of a part, takes on average.
    """

    name: str
    blocks: int
    block_tokens: int
    managed: bool = True
    latency_s: float = 0.001
    work_s: float = 0.005


class Rank(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One receiver of a room.

    Attributes:
        after_s: When it opens, counted from the room's time.
        blocks: Of each grant; 0 for a dummy.
        resume: "drain", "extend" or "manual".
        think_s: How long its engine takes to call resume() or to be done with a part (`manual`).
        window: Grants it may have out at a time ("drain": 1 or 2).
    """

    host: str
    blocks: int
    resume: str = "drain"
    after_s: float = 0.0
    think_s: float = 0.0
    window: int = 1


class _Timed(msgspec.Struct, frozen=True, tag=str.lower, tag_field="event", forbid_unknown_fields=True):
    at_s: float

    @property
    def hosts(self) -> tuple[str, ...]:
        """The machines it names."""
        names = [getattr(self, name, None) for name in ("host", "sender", "source", "dest")]
        ranks: tuple[Rank, ...] = getattr(self, "ranks", ())
        return (*filter(None, names), *(rank.host for rank in ranks))


class Open(_Timed, frozen=True):
    """A room is opened on both sides and supplied with data.

    Attributes:
        after_s: When the sender opens, counted from the room's time.
        supply: How many tokens are ready, how long after the sender opened.
        staged: The data is in tensors of the sender's host, not in blocks of its engine.
        told: The sender is told how many ranks there are.
        clear_s: How long after its end each side is cleared.
        must_succeed: It comes after the last fault.
    """

    room: int
    sender: str
    tokens: int
    ranks: tuple[Rank, ...]
    supply: tuple[tuple[float, int], ...]
    after_s: float = 0.0
    staged: bool = True
    told: bool = True
    clear_s: float = 0.0
    must_succeed: bool = False


class Abort(_Timed, frozen=True):
    """A host gives up what it has open of a room."""

    host: str
    room: int


class Clear(_Timed, frozen=True):
    """A host drops what it has open of a room, over or not."""

    host: str
    room: int


class _Lasting(_Timed, frozen=True):
    for_s: float


class Disturb(_Lasting, frozen=True):
    """Packets from one host to another are lost, repeated, or late by up to `late_s` and so out of order."""

    source: str
    dest: str
    lose: float = 0.0
    repeat: float = 0.0
    late_s: float = 0.0


class Part(_Lasting, frozen=True):
    """Nothing gets from one host to the other, or either way.

    Attributes:
        plane: "control", "data" or "both".
    """

    source: str
    dest: str
    both_ways: bool = True
    plane: str = "both"


class Break(_Lasting, frozen=True):
    """Writes from one host to another through a transport fail.

    Attributes:
        late: The share of them that may land later.
        port: The data port does not answer either.
        reads: Those that may land later read their source until then.
        hang: They do not fail, but stand still until they are asked to end.
        collateral: They fail for another's sake.
    """

    source: str
    dest: str
    transport: str
    late: float = 0.0
    port: bool = False
    reads: bool = False
    hang: bool = False
    collateral: bool = False


class Crash(_Lasting, frozen=True):
    """An endpoint dies, and starts again after a while as a new incarnation.

    Attributes:
        bye: It closes in order.
    """

    host: str
    bye: bool = False


class Freeze(_Lasting, frozen=True):
    """A whole endpoint stands still, as after SIGSTOP."""

    host: str


class Slow(_Lasting, frozen=True):
    """Everything a host does takes many times as long."""

    host: str
    factor: float


class Quiet(_Lasting, frozen=True):
    """A host does not call its endpoint, which runs."""

    host: str


Fault = Disturb | Part | Break | Crash | Freeze | Slow | Quiet | Abort | Clear
Event = Open | Fault


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole simulation.

    Attributes:
        hours: Of virtual time in which rooms are opened.
        heal_s: When the last fault is over, or 0 if they never stop.
        noise: Seeds what is drawn while the plan runs: delays, and which packets are hit.
        costly_fence: A fence would cost other rooms: it is made by force only, when a quarantine has lasted too long.
        one_way: Each machine sends or receives, none does both.
        deadlines: Of every endpoint.
    """

    seed: int
    mode: str
    hours: float
    noise: int
    machines: tuple[Machine, ...]
    events: tuple[Event, ...]
    transports: tuple[str, ...] = ("a",)
    checksums: bool = False
    costly_fence: bool = False
    one_way: bool = False
    heal_s: float = 0.0
    deadlines: Deadlines = Deadlines()

    @property
    def rooms(self) -> int:
        """How many rooms are opened."""
        return sum(isinstance(event, Open) for event in self.events)

    def with_events(self, events: tuple[Event, ...]) -> Plan:
        """The same with other events."""
        return msgspec.structs.replace(self, events=events)

    def write(self, path: Path) -> None:
        """Keep it in a file."""
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")

    @classmethod
    def read(cls, path: Path) -> Plan:
        """The plan in a file.

        Raises:
            InvalidInput: It is no plan.
        """
        try:
            plan = msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError, InvalidInput) as error:
            raise InvalidInput(f"{path}: {error}") from None
        names = {machine.name for machine in plan.machines}
        unknown = {name for event in plan.events for name in event.hosts} - names
        if unknown or plan.mode not in MODES:
            raise InvalidInput(f"{path}: mode {plan.mode}, unknown machines {sorted(unknown)}")
        return plan
