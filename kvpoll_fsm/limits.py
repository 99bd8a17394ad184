"""How much an endpoint lets its peers take, and how many it goes to itself."""

from __future__ import annotations

from dataclasses import dataclass

from kvpoll_fsm.errors import InvalidInput
from kvpoll_fsm.messages import MAX_PACKET_NBYTES, MAX_SENT_NBYTES

__all__ = ["DEFAULT", "RANGES", "Limits"]

RANGES: dict[str, tuple[float, float]] = {
    "message_nbytes": (MAX_SENT_NBYTES, MAX_PACKET_NBYTES),
    "callers": (1, 60_000),
    "callers_per_peer": (1, 60_000),
    "callees": (1, 60_000),
    "rooms_per_peer": (1, 1 << 24),
    "orphans": (1, 1 << 24),
    "orphans_per_peer": (1, 1 << 24),
    "orphan_s": (0.001, 86_400),
    "handshake_s": (0.001, 3_600),
}
"""The least and the most that each limit may be."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What is refused beyond these is counted (`Endpoint.refused`) and harms nobody else.

    A peer is, with keys, the holder of one CURVE key, whatever the number of its connections. Without keys it is a
    network address where connections are counted, and a connection where reservations are.

    Attributes:
        message_nbytes: Longest control packet that is read. No packet of ours is longer than the least value.
        callers: Connections that peers have opened to us. If all are taken, the oldest that has said nothing but
            Hello makes place.
        callers_per_peer: The same for one peer.
        callees: Endpoints we connect to, which is one for each sender that our receivers have.
        rooms_per_peer: Rooms that one connection takes part in.
        orphans: Reservations, of all peers, for rooms that no sender has opened. If all places are taken, the peer
            that has most loses its oldest.
        orphans_per_peer: The same of one peer; what is more is refused.
        orphan_s: How long such a reservation is kept. Then the receiver is told.
        handshake_s: How long a peer may take to begin to speak ZeroMQ, and to prove its key.
    """

    message_nbytes: int = MAX_PACKET_NBYTES
    callers: int = 4096
    callers_per_peer: int = 1024
    callees: int = 4096
    rooms_per_peer: int = 1 << 17
    orphans: int = 1 << 16
    orphans_per_peer: int = 1 << 14
    orphan_s: float = 300.0
    handshake_s: float = 5.0

    def __post_init__(self) -> None:
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            kinds = (int, float) if name.endswith("_s") else int
            if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
                raise InvalidInput(f"{name}={value!r}: give a number from {least:g} to {most:g}")


DEFAULT = Limits()
"""What holds unless something else is asked for."""
