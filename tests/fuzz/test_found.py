"""What the target "core" has found in endpoints, each in its shortest form."""

from __future__ import annotations

from msgspec.structs import replace

from kvpoll_fsm.deadlines import Gate
from kvpoll_fsm.messages import Beat, BlockGrant, FieldSpec, Frame, Reserve, Resume, Welcome
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.testing.world import Delivery
from tests.worlds import ROOM, Transfer, messages_of, run_until, say, transfer, world


def test_a_field_that_is_unknown_here_fails_the_rooms_of_that_peer_alone() -> None:
    """It was an exception that ended the driver."""
    one = transfer(100).open()
    run_until(one.world, lambda: isinstance(one.world.network[0].packet, Welcome))
    told = one.world.network.pop(0)
    assert isinstance(told.packet, Welcome)
    newer = replace(told.packet, fields=(FieldSpec("x", "int4", (), False),))
    one.world.network.insert(0, Delivery(told.source, told.dest, told.origin, newer))
    one.world.deliver()
    failure = one.rx().failure
    assert failure is not None
    assert failure.code.value == "LayoutMismatch"
    assert "int4" in failure.detail


def test_a_stranger_cannot_end_a_room_with_a_grant_that_makes_no_sense() -> None:
    """Its blocks were looked at before anybody asked whether it takes part in the room."""
    shared = world(2)
    one, other = Transfer(shared, 2000).open(), Transfer(shared, 100, room=ROOM + 1)
    other.receivers[1] = shared.open_receiver("r1", ROOM + 1, 0)  # so that it is connected
    run_until(shared, lambda: one.tx.state is KVPoll.Transferring)
    life = {"rank": 0, "sender_generation": one.tx.room_key.generation, "receiver_generation": 99}
    grant = BlockGrant(one.tx.part, 1 << 20, (0,), (("memory", b"token"),))
    say(shared, "r1", Resume(room=ROOM, sent_tokens=0, grant=grant, **life))
    assert one.tx.failure is None
    one.assert_success()


def test_a_heartbeat_of_another_life_of_the_senders_room_is_not_heard() -> None:
    """It renewed deadlines, as messages of another life do not."""
    one = transfer(2000).open(supply=False)
    one.world.run()
    receiver = one.rx()
    assert receiver.gate is Gate.queued
    before = receiver.key()
    host = one.world.hosts["r0"]
    (connection,) = host.core.connections.values()
    beat = Beat(False, ROOM, 0, receiver.sender_generation + 1, receiver.room_key.generation, "moving", 5, True)
    host.core.frame(Frame(connection.channel.target or b"", connection.channel.source, False, beats=(beat,)))
    assert receiver.key() == before
    host.core.frame(
        Frame(connection.channel.target or b"", connection.channel.source, False,
              beats=(replace(beat, sender_generation=receiver.sender_generation),))
    )  # fmt: skip
    assert receiver.bytes_done == 5


def test_reservations_that_displace_each_other_leave_no_growing_memory() -> None:
    one = world(1)
    one.open_receiver("r0", ROOM)
    one.run()
    core = one.hosts["sender"].core
    for generation in range(2, 200):
        say(one, "r0", Reserve(room=ROOM, rank=0, ranks=1, receiver_generation=generation))
    parked, dismissed = core.parking.key()
    assert len(parked) <= 1
    assert len(dismissed) <= 1
    assert not messages_of(one, Reserve)
