"""A real process stands still in the middle of a part, and the part goes on by another transport."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvpoll_fsm import KVPoll
from kvpoll_fsm.messages import FencePart
from kvpoll_fsm.trace import MessageRecord
from tests.helpers import SOON_S, deadlines, endpoint, make_data, open_pair, same, until
from tests.mover.movers import frozen, pid

OPTIONS = {"shm": {"cancel_patience_s": 0.2}}
CALM = deadlines(fallback_s=0.3, stall_s=60.0, peer_lost_s=60.0)


def asked(sending: Any) -> list[str]:
    """The transports that the receiver was asked to fence."""
    said = [record.message for record in sending.trace() if isinstance(record, MessageRecord) and record.way == "out"]
    plain = [msgspec.to_builtins(message) for message in said]
    return [message["transport"] for message in plain if message["kind"] == FencePart.__name__]


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_a_receiver_that_stood_still_gets_the_part_by_tcp(isolation: str) -> None:
    """What it had not copied by then it does not copy any more: it has fenced that, and says so when it goes on.

    The sender stages in its host's process or in its mover, and only the second transport wants a checksum.
    """
    data = make_data(512)
    here: dict[str, Any] = {"deadlines": CALM, "transport_options": OPTIONS}
    with (
        endpoint("prefer:shm,tcp", isolation=isolation, **here) as tx,
        endpoint("prefer:shm,tcp", isolation="process", **here) as rx,
    ):
        sender, receiver = open_pair(tx, rx, 1, tokens=1024)
        until(lambda: sender.poll() is KVPoll.WaitingForInput, "the room is open")
        with frozen(pid(rx)):
            sender.send(data)
            until(lambda: "shm" in asked(tx), "the receiver is asked to fence")
        assert same(receiver.result(SOON_S), data)
        assert sender.wait(SOON_S) is KVPoll.Success
        assert [part.transport for part in sender.parts] == ["tcp"]
        assert "no bytes landed for 0.3 s" in sender.parts[0].passed_over
