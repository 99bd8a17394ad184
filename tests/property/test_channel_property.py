"""Two channels over a medium that loses, doubles and reorders: in order, once, and all after healing."""

from __future__ import annotations

import random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvpoll_fsm.channel import Channel
from kvpoll_fsm.errors import ChannelOverflow
from kvpoll_fsm.messages import Frame, Message, Quiesced, decode, encode

LIMIT = 6
NAMES = (b"a" * 16, b"b" * 16)

ends = st.sampled_from([0, 1])


class LossyStream(RuleBasedStateMachine):
    """End 0 said Hello to end 1; `wires[end]` holds the packets on their way to it."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = [Channel(NAMES[0], None, True, LIMIT), Channel(NAMES[1], NAMES[0], False, LIMIT)]
        self.pushed: list[list[Message]] = [[], []]
        self.delivered: list[list[Message]] = [[], []]
        self.wires: list[list[bytes]] = [[], []]

    def _post(self, end: int, frames: list[Frame]) -> None:
        self.wires[1 - end] += [encode(frame) for frame in frames]

    def _arrive(self, end: int, packet: bytes) -> None:
        frame = decode(packet)
        assert isinstance(frame, Frame)
        assert (frame.source, frame.target) == (NAMES[1 - end], NAMES[end])
        assert frame.outgoing == (end == 1)
        self.delivered[end] += self.channels[end].accept(frame)

    # What the host does

    @rule()
    def introduce(self) -> None:
        self.channels[0].target = NAMES[1]

    @rule(end=ends, count=st.integers(1, 4))
    def push(self, end: int, count: int) -> None:
        channel = self.channels[end]
        for _ in range(count):
            message = Quiesced(room=len(self.pushed[end]), rank=end)
            if len(channel.unacked) == LIMIT:
                with pytest.raises(ChannelOverflow, match=str(LIMIT)):
                    channel.push(message)
            else:
                channel.push(message)
                self.pushed[end].append(message)

    @rule(end=ends, ack_now=st.booleans())
    def flush(self, end: int, ack_now: bool) -> None:
        self._post(end, self.channels[end].flush(ack_now=ack_now))

    @rule(end=ends)
    def resend(self, end: int) -> None:
        self._post(end, self.channels[end].resend())

    @rule(end=ends)
    def heartbeat(self, end: int) -> None:
        if self.channels[end].target is not None:
            self._post(end, [self.channels[end].heartbeat()])

    @rule(end=ends)
    def go_on_with_a_clone(self, end: int) -> None:
        original = self.channels[end]
        self.channels[end] = original.clone()
        original.unacked.clear()
        original.sent = original.acked = original.received = 1 << 40

    # What the medium does

    @precondition(lambda self: any(self.wires))
    @rule(data=st.data(), kept=st.booleans())
    def deliver_any(self, data: st.DataObject, kept: bool) -> None:
        end = data.draw(st.sampled_from([end for end in (0, 1) if self.wires[end]]))
        at = data.draw(st.integers(0, len(self.wires[end]) - 1))
        packet = self.wires[end][at] if kept else self.wires[end].pop(at)
        self._arrive(end, packet)

    @precondition(lambda self: any(self.wires))
    @rule(end=ends, chance=st.randoms(use_true_random=False))
    def lose_some(self, end: int, chance: random.Random) -> None:
        self.wires[end] = [packet for packet in self.wires[end] if chance.random() < 0.5]

    # What holds

    @invariant()
    def in_order_and_once(self) -> None:
        for end in (0, 1):
            count = len(self.delivered[end])
            assert self.delivered[end] == self.pushed[1 - end][:count]
            assert self.channels[end].received == count

    @invariant()
    def acknowledged_means_delivered(self) -> None:
        for end, channel in enumerate(self.channels):
            assert channel.acked <= len(self.delivered[1 - end])
            assert channel.acked <= channel.sent <= channel.acked + len(channel.unacked)
            assert channel.unacked == self.pushed[end][channel.acked :]
            assert len(channel.unacked) <= LIMIT

    def teardown(self) -> None:
        """Heal: two rounds of resending over a medium that works bring everything across."""
        self.introduce()
        for _ in range(2):
            for end in (0, 1):
                self.resend(end)
                self._post(end, [self.channels[end].heartbeat()])
            for end in (0, 1):
                for packet in self.wires[end]:
                    self._arrive(end, packet)
                self.wires[end] = []
        assert self.delivered == [self.pushed[1], self.pushed[0]]
        assert [channel.unacked for channel in self.channels] == [[], []]


TestLossyStream = pytest.mark.timeout(400)(LossyStream.TestCase)  # for shrinking, should it fail
