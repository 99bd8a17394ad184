"""The settings of the transport, checked before anything is opened."""

from __future__ import annotations

from dataclasses import dataclass

from kvpoll_fsm.errors import InvalidInput

__all__ = ["ShmSettings"]


@dataclass(frozen=True, slots=True)
class ShmSettings:
    """How a `ShmTransport` meets its peers and gives up on them.

    Attributes:
        any_uid: Let processes of other users connect too, if they know our secret, and connect to theirs.
        max_connections: Most connections from peers at a time.
        max_strangers: Most connections that have not proved themselves yet; the oldest makes room.
        handshake_s: How long the mutual proof may take, on either side.
        cancel_patience_s: How long a receiver may leave a cancelled ticket unanswered; then the ticket ends without
            its word. Also how long `close` waits for receivers to stop reading.

    Raises:
        InvalidInput: A setting out of its range.
    """

    any_uid: bool = False
    max_connections: int = 256
    max_strangers: int = 32
    handshake_s: float = 5.0
    cancel_patience_s: float = 2.0

    def __post_init__(self) -> None:
        if not isinstance(self.any_uid, bool):
            raise InvalidInput(f"any_uid={self.any_uid!r}: give True or False")
        for name in ("max_connections", "max_strangers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 16:
                raise InvalidInput(f"{name}={value!r}: give an integer from 1 to 65536")
        for name in ("handshake_s", "cancel_patience_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 86_400:
                raise InvalidInput(f"{name}={value!r}: give seconds above 0, up to 86400")
