"""Chosen control packets are lost on their way out of an endpoint. Imported by `worker.py` alone."""

from __future__ import annotations

from kvpoll_fsm.control import Control
from kvpoll_fsm.messages import Frame, Packet, encode

__all__ = ["Loss", "losses"]

_real_send = Control.send


class Loss:
    """Loses chosen packets on their way out of one endpoint.

    Attributes:
        message: Lose the packet that carries the message of that number; 0 is Hello or Welcome.
        bare: Lose the packet of that number (0 upwards) among those that carry no message.
        spread: The k-th connection loses what has that number plus k.
        every: Lose every so-many-th packet.
        hold: From the first frame with this kind of message on, lose every frame of that connection that carries
            messages.
        lost: The kinds of what was lost by number.
        record: Whether to keep a copy of every packet.
    """

    def __init__(self) -> None:
        self.message = self.bare = -1
        self.spread = False
        self.every = 0
        self.hold = ""
        self.lost: list[str] = []
        self.record = False
        self.kept: list[bytes] = []
        self._holding: set[int] = set()
        self._hit: set[int] = set()
        self._sent = 0
        self._bare_sent: dict[int, int] = {}
        self._order: dict[int, int] = {}

    def loses(self, conn: int, packet: Packet) -> bool:
        if self.record:
            self.kept.append(encode(packet))
        messages = packet.messages if isinstance(packet, Frame) else ()
        kinds = [type(message).__name__ for message in messages]
        if self.hold in kinds:
            self._holding.add(conn)
        self._sent += 1
        by_order = self.every and self._sent % self.every == 0
        return bool(by_order or (conn in self._holding and kinds) or self._loses_once(conn, packet, kinds))

    def stop_holding(self) -> None:
        """Let all connections speak again."""
        self.hold = ""
        self._holding.clear()

    def _loses_once(self, conn: int, packet: Packet, kinds: list[str]) -> bool:
        shift = self._order.setdefault(conn, len(self._order)) if self.spread else 0
        message = self.message + shift if self.message >= 0 else -1
        if not isinstance(packet, Frame):
            found = message == 0
        elif kinds:
            found = packet.first_seq <= message < packet.first_seq + len(kinds)
        else:
            number = self._bare_sent[conn] = self._bare_sent.get(conn, -1) + 1
            found = number == self.bare + shift and self.bare >= 0
        if not found or conn in self._hit:
            return False
        self._hit.add(conn)
        self.lost.append("+".join(kinds) or type(packet).__name__)
        return True


losses: dict[Control, Loss] = {}
"""Which endpoint loses what, by its control plane."""


def _lossy_send(self: Control, conn: int, packet: Packet) -> bool:
    loss = losses.get(self)
    return False if loss is not None and loss.loses(conn, packet) else _real_send(self, conn, packet)


Control.send = _lossy_send  # type: ignore[method-assign]
