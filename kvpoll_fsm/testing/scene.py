"""What the explorer explores: a scene, and how many faults one run of it may have."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

__all__ = ["Budget", "Scene"]


@dataclass(frozen=True)
class Budget:
    """How many faults of each kind one run may have.

    Attributes:
        lose: Packets lost.
        repeat: Packets that arrive twice.
        deadline: Deadlines that pass although something else could happen.
        abort: Hosts that give a room up.
        fail: Tickets that fail and can land no more.
        late: Tickets that fail and may land later.
        crash: Endpoints that die and start again.
        reopen: Rooms cleared, live or not, and opened again under their number.
        part: Connections that one side takes for dead although the other lives.
        hang: Tickets that neither land nor fail.
        collateral: Tickets that fail through no fault of their transport, at rest or not.
        port: Data ports that do not answer.
    """

    lose: int = 0
    repeat: int = 0
    deadline: int = 0
    abort: int = 0
    fail: int = 0
    late: int = 0
    crash: int = 0
    reopen: int = 0
    part: int = 0
    hang: int = 0
    collateral: int = 0
    port: int = 0

    @property
    def benign(self) -> bool:
        """Nothing in it may make a room fail: what is lost is sent again, what comes twice is dropped."""
        return replace(self, lose=0, repeat=0) == Budget()


@dataclass(frozen=True)
class Scene:
    """One configuration to explore.

    Attributes:
        name: For reports.
        ranks: Receiver ranks, each an endpoint of its own.
        rooms: Room numbers, opened in this order on the sender and in the reverse order on odd ranks.
        parts: Parts per room; a part is one token in one block.
        pool: Blocks of each receiver.
        source_pool: Blocks of the sender.
        transports: Those both sides have, best first.
        resume: "drain" or "extend".
        windows: Of each rank, how many grants it may have out at a time; 1 for those not named.
        dummies: Ranks that hold no data.
        checksums: Writers report checksums, so receivers compare them before they acknowledge a part.
        faults: How many of which kind.
        ordered: Rooms are opened in one order only, which gives the pools of even and odd ranks to
            different rooms.
        reads: A write that may land late reads its source until then.
        opened: Begin where all rooms are past Bootstrapping; how they came there is for other scenes.
    """

    name: str
    ranks: int = 1
    rooms: tuple[int, ...] = (1,)
    parts: int = 1
    pool: int = 1
    source_pool: int = 1
    transports: tuple[str, ...] = ("a",)
    resume: str = "drain"
    windows: tuple[int, ...] = ()
    dummies: tuple[int, ...] = ()
    faults: Budget = field(default_factory=Budget)
    reads: bool = True
    opened: bool = False
    ordered: bool = False
    checksums: bool = False

    def __post_init__(self) -> None:
        sizes = (self.ranks, len(self.rooms), self.parts, self.pool, self.source_pool, len(self.transports))
        if not all(1 <= size <= 64 for size in sizes):
            raise ValueError(f"{self.name!r}: each of ranks, rooms, parts, blocks and transports is 1 to 64")

    def window(self, rank: int) -> int:
        """How many grants a rank may have out at a time."""
        return self.windows[rank] if rank < len(self.windows) else 1
