"""An ordered, loss-proof stream of messages between two incarnations, over packets that may be lost.

One sequence each way, cumulative acknowledgements piggybacked on whatever is sent, resend on a timer and on
reconnect. A message is delivered once and in order; duplicates and gaps are dropped, a gap being mended by
the resend. A new incarnation is a new channel, so sessions see a stream that may end but never lies.

The channel has no clock. The driver calls `resend()` when `RESEND_AFTER_S` has passed without progress.
"""

from __future__ import annotations

from typing import Any

from kvpoll_fsm.errors import ChannelOverflow
from kvpoll_fsm.messages import (
    MAX_HEARD_PER_FRAME,
    MAX_MESSAGES_PER_FRAME,
    MAX_SENT_NBYTES,
    Beat,
    Frame,
    Message,
    Reserve,
    Resume,
)

__all__ = ["Channel"]

RESEND_AFTER_S = 0.25
ACK_AFTER_S = 0.02
MAX_UNACKED = 1 << 17


class Channel:
    """One end of the stream.

    Attributes:
        source: Our incarnation.
        target: The peer's, or None until it is known; messages may be pushed before.
        outgoing: We said Hello.
        acked: The peer has every message up to this number.
        received: We have every message up to this number.
        owes_ack: Something arrived that no frame has acknowledged yet.
    """

    __slots__ = (
        "_beat_serial",
        "_heard",
        "acked",
        "limit",
        "outgoing",
        "owes_ack",
        "received",
        "sent",
        "source",
        "target",
        "unacked",
    )

    def __init__(self, source: bytes, target: bytes | None, outgoing: bool, limit: int = MAX_UNACKED) -> None:
        self.source = source
        self.target = target
        self.outgoing = outgoing
        self.limit = limit
        self.unacked: list[Message] = []
        self.sent = 0
        self.acked = 0
        self.received = 0
        self.owes_ack = False
        self._beat_serial = 0
        self._heard: list[int] = []

    def push(self, message: Message) -> None:
        """Queue a message; the next `flush()` sends it.

        Raises:
            ChannelOverflow: `limit` messages are unacknowledged. The message is not taken.
        """
        if len(self.unacked) >= self.limit:
            raise ChannelOverflow(self.limit)
        self.unacked.append(message)

    def flush(self, *, ack_now: bool = False) -> list[Frame]:
        """The frames to send now: messages not sent yet, and the acknowledgement owed.

        Args:
            ack_now: Send an acknowledgement that is owed even if there is nothing else to say.
        """
        if self.target is None:
            return []
        frames = self._frames(self.sent)
        self.sent = self.acked + len(self.unacked)
        if not frames and ack_now and self.owes_ack:
            frames = [self._frame(0, ())]
        if frames:
            self.owes_ack = False
        return frames

    def heartbeat(self, beats: tuple[Beat, ...] = (), serial: int = 0) -> Frame:
        """A frame without messages: we live, this is what has arrived, and where our rooms stand.

        Args:
            beats: At most `MAX_BEATS_PER_FRAME`.
            serial: What the peer is to confirm them by, higher than any before; 0 if it need not.
        """
        self.owes_ack = False
        return self._frame(0, (), beats, serial)

    def resend(self) -> list[Frame]:
        """Every message not acknowledged yet, again. For the resend timer and after a reconnect."""
        self.sent = self.acked
        return self.flush()

    def accept(self, frame: Frame) -> list[Message]:
        """Take a frame of the peer and return the messages it delivers, in order, each once.

        An acknowledgement of what was never sent is ignored: it cannot come from our peer.
        """
        if self.acked < frame.ack <= self.sent:
            del self.unacked[: frame.ack - self.acked]
            self.acked = frame.ack
        if not frame.messages:
            return []
        self.owes_ack = True
        skip = self.received + 1 - frame.first_seq
        if skip < 0:
            return []
        fresh = list(frame.messages[skip:])
        self.received += len(fresh)
        return fresh

    def beats(self, frame: Frame) -> tuple[Beat, ...]:
        """The beats of a frame that `accept` took; none if later ones came before it, which it would replace."""
        if frame.beats and frame.beat_serial:
            if frame.beat_serial <= self._beat_serial:
                return ()
            self._beat_serial = frame.beat_serial
            self._heard.append(frame.beat_serial)
            del self._heard[:-MAX_HEARD_PER_FRAME]
            self.owes_ack = True
        return frame.beats

    def clone(self) -> Channel:
        """A copy that shares nothing mutable."""
        copy = Channel(self.source, self.target, self.outgoing, self.limit)
        copy.unacked = list(self.unacked)
        copy.sent, copy.acked, copy.received = self.sent, self.acked, self.received
        copy.owes_ack, copy._beat_serial, copy._heard = self.owes_ack, self._beat_serial, list(self._heard)
        return copy

    def key(self) -> tuple[Any, ...]:
        """Canonical plain value of the state, heartbeats apart."""
        return (self.target, self.sent, self.acked, self.received, self.owes_ack, tuple(self.unacked))

    def _frames(self, after: int) -> list[Frame]:
        frames: list[Frame] = []
        batch: list[Message] = []
        weight = 0
        for message in self.unacked[after - self.acked :]:
            cost = _nbytes_at_most(message)
            if batch and (len(batch) == MAX_MESSAGES_PER_FRAME or weight + cost > MAX_SENT_NBYTES // 2):
                frames.append(self._frame(after + 1, tuple(batch)))
                after, batch, weight = after + len(batch), [], 0
            batch.append(message)
            weight += cost
        if batch:
            frames.append(self._frame(after + 1, tuple(batch)))
        return frames

    def _frame(
        self, first_seq: int, messages: tuple[Message, ...], beats: tuple[Beat, ...] = (), serial: int = 0
    ) -> Frame:
        if self.target is None:
            raise AssertionError("no frame before the peer is known")
        heard = tuple(self._heard)
        self._heard.clear()
        return Frame(self.source, self.target, self.outgoing, first_seq, self.received, messages, beats, serial, heard)


def _nbytes_at_most(message: Message) -> int:
    """An upper bound of a message's encoded size; only failures and grants are ever large."""
    if getattr(message, "failure", None) is not None:
        return 8192
    grant = message.grant if isinstance(message, (Reserve, Resume)) else None
    if grant is None:
        return 1024
    return 8192 + 5 * len(grant.blocks) + sum(4 * len(name) + len(token) for name, token in grant.tokens_by_transport)
