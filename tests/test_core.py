"""The endpoint core: rooms that are opened, parked, cleared; old words, wrong words, bugs, and copies."""

from __future__ import annotations

import itertools
import random
import typing
from typing import Any

import msgspec
import pytest

from kvpoll_fsm import messages
from kvpoll_fsm.commands import Command, Expose, Grant, SetTimer, StartPart
from kvpoll_fsm.core import Do, EndpointCore, Transmit
from kvpoll_fsm.deadlines import Gate
from kvpoll_fsm.errors import DuplicateRoom, Failure, FailureCode, ForeignBlock, RequestTooLarge
from kvpoll_fsm.inputs import AbortRoom, Crashed, Granted, GrantRefused, PartWritten, RevokeGrant
from kvpoll_fsm.limits import Limits
from kvpoll_fsm.messages import Abort, Beat, Bye, Frame, Opened, Quiesced, Reserve, Withdraw
from kvpoll_fsm.parking import Parking
from kvpoll_fsm.peers import Peers
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.receiver_session import ReceiverOptions
from kvpoll_fsm.sender_session import SenderSession
from kvpoll_fsm.session import RoomKey
from kvpoll_fsm.testing.invariants import check_nothing_left
from kvpoll_fsm.testing.world import SENDER, World
from tests.worlds import BLOCK, Transfer, beat, end, messages_of, rest, run_until, say, step, transfer, withdraw, world

B, W, T, S, F = KVPoll.Bootstrapping, KVPoll.WaitingForInput, KVPoll.Transferring, KVPoll.Success, KVPoll.Failed


def drained(core: EndpointCore) -> list[Any]:
    """All that a core wants done."""
    return list(itertools.chain.from_iterable(iter(core.drain, [])))


def test_every_command_of_a_session_has_a_way() -> None:
    ways = world().hosts["r0"].core._ways
    assert set(ways) == set(typing.get_args(Command)) - {Expose}  # which the core itself asks for


# Openings


def test_pain_12_a_room_that_is_open_is_not_opened_twice() -> None:
    one = transfer(2000).open()
    run_until(one.world, lambda: one.tx.state is T)
    with pytest.raises(DuplicateRoom, match="sender of room 7, rank 0 is open already"):
        one.world.open_sender(7)
    with pytest.raises(DuplicateRoom, match="receiver of room 7, rank 0"):
        one.world.open_receiver("r0", 7)
    one.world.run()
    one.assert_success()
    with pytest.raises(DuplicateRoom):  # a room that ended is open until it is cleared
        one.world.open_sender(7)
    end(one.world, one)


def test_what_never_fits_is_refused_at_once() -> None:
    one = world()
    with pytest.raises(RequestTooLarge, match="9 blocks wanted but the pool has 8"):
        one.open_receiver("r0", 7, blocks=9)
    one.run()
    assert one.hosts["r0"].core.load().queued == 0
    ok = Transfer(one, 100).open()
    one.run()
    ok.assert_success()
    end(one, ok)


@pytest.mark.parametrize("exact", [(8,), (1, 1), (-1,)])
def test_blocks_that_are_not_there_are_refused(exact: tuple[int, ...]) -> None:
    one = world()
    with pytest.raises(ForeignBlock):
        one.open_receiver("r0", 7, exact=exact)
    assert one.hosts["r0"].core.load().free == 8
    assert not one.hosts["r0"].core.sessions


def test_blocks_in_use_are_refused() -> None:
    one = transfer(100, blocks=2).open()
    busy = one.rx()
    held = one.world.hosts["r0"].core.accounts.blocks_of(next(iter(one.world.hosts["r0"].core.accounts.leases())))
    with pytest.raises(ForeignBlock, match="held by a room"):
        one.world.open_receiver("r0", 8, exact=held[:1])
    assert busy.state is B
    one.world.run()
    end(one.world, one)


def test_a_cleared_room_is_open_for_the_next_life_at_once() -> None:
    one = transfer(2000).open()
    run_until(one.world, lambda: one.tx.state is T)
    core = one.world.hosts[SENDER].core
    assert one.sender is not None
    assert core.is_open(one.sender)
    one.world.clear(SENDER, one.sender)
    assert not core.is_open(one.sender)
    old = one.tx
    again = one.world.open_sender(7)
    assert (old.room_key.generation, again.generation) == (1, 2)
    one.sender = again
    one.clear()
    rest(one.world)
    check_nothing_left(one.world)


# Parked reservations


def test_a_receiver_that_comes_first_waits_for_the_sender() -> None:
    one = transfer(500)
    one.open_receiver()
    one.world.run()
    core = one.world.hosts[SENDER].core
    assert len(core.parking) == 1
    one.open_sender()
    assert len(core.parking) == 0
    one.world.run()
    one.assert_success()
    end(one.world, one)


@pytest.mark.parametrize("ended", [S, F])
def test_a_newer_reservation_waits_until_the_old_life_is_cleared(ended: KVPoll) -> None:
    one = transfer(500).open()
    if ended is F:
        run_until(one.world, lambda: one.tx.state is W)
        one.abort("r0")
    one.world.run()
    assert one.tx.state is ended
    one.world.clear("r0", one.receivers[0])
    one.open_receiver()
    one.world.run()
    assert len(one.world.hosts[SENDER].core.parking) == 1
    assert one.tx.state is ended
    assert one.rx().state is B
    assert one.sender is not None
    one.world.clear(SENDER, one.sender)
    one.open_sender()
    one.world.run()
    one.assert_success()
    end(one.world, one)


@pytest.mark.parametrize("how", ["abort", "clear", "gone", "restart"])
def test_a_parked_reservation_goes_with_its_receiver(how: str) -> None:
    one = transfer(500, 2)
    one.open_receivers()
    one.world.run()
    parking = one.world.hosts[SENDER].core.parking
    assert len(parking) == 2
    if how == "abort":
        one.abort("r0")
    elif how == "clear":
        one.world.clear("r0", one.receivers[0])
    elif how == "gone":
        one.world.drop_host("r0")
        beat(one.world, 7)
    else:
        one.world.add_host("r0", 8, BLOCK)
        beat(one.world, 7)
    one.world.run()
    assert len(parking) == 1
    one.abort("r1")
    one.world.run()
    assert len(parking) == 0
    assert parking.key() == ((), ())


@pytest.mark.parametrize("opened", [False, True])
def test_the_later_of_two_receivers_takes_the_place_and_the_other_is_told(opened: bool) -> None:
    """Whether the room is open, waiting for another rank, or the first reservation is parked."""
    one = transfer(500, 2)
    if opened:
        one.open_sender()
    loser = one.world.session("r0", one.world.open_receiver("r0", 7, 0, 2, blocks=2))
    one.world.run()
    one.world.add_host("r2", 8, BLOCK)
    one.receivers[0] = one.world.open_receiver("r2", 7, 0, 2, blocks=2)
    one.world.run()
    assert loser.failure is not None
    assert loser.failure.code is FailureCode.Displaced
    assert "another life of rank 0" in loser.failure.detail
    if not opened:
        one.open_sender()
    one.open_receiver(1)
    one.world.run()
    assert one.tx.state is S
    assert one.world.session("r2", one.receivers[0]).state is S


def test_a_stale_reservation_that_displaced_a_live_one_does_not_end_the_room_when_it_gives_up() -> None:
    """The rank was tried at r0, whose words were held up, and again at r2: what arrives last need not be the later."""
    one = transfer(500, 2)
    one.open_sender()
    one.world.add_host("r2", 8, BLOCK)
    live = one.world.session("r2", one.world.open_receiver("r2", 7, 0, 2, blocks=2))
    one.world.run()
    stale = one.world.open_receiver("r0", 7, 0, 2, blocks=2)
    one.world.run()
    assert live.failure is not None
    assert (live.failure.code, live.failure.retryable) == (FailureCode.Displaced, True)
    one.world.feed("r0", stale, AbortRoom("given up long ago"))
    one.world.run()
    assert one.tx.state is KVPoll.Bootstrapping
    assert one.world.session("r0", stale).quiescent
    one.world.clear("r2", live.room_key)
    one.receivers[0] = one.world.open_receiver("r2", 7, 0, 2, blocks=2)
    one.open_receiver(1)
    one.world.run()
    assert one.tx.state is S
    assert one.world.session("r2", one.receivers[0]).state is S


def test_a_reservation_made_before_the_end_was_heard_is_void() -> None:
    """Its blocks go back when the end is heard: the next life of the room must not write to them."""
    one = world()
    other, late = Transfer(one, 500, room=1), Transfer(one, 500, room=2)
    other.open(supply=False)
    one.run()
    late.open()
    one.run()
    assert late.rx().gate is Gate.waiting_blocks  # reserved without blocks, and bound by the sender
    late.abort(SENDER)
    told, one.network = one.network, []
    other.abort("r0")
    one.run()  # the other room ends, late gets its blocks and reserves with them
    assert late.rx().gate is Gate.waiting_ranks
    assert late.sender is not None
    one.clear(SENDER, late.sender)
    again = one.open_sender(2)
    assert not one.session(SENDER, again).slots  # type: ignore[attr-defined]
    one.network += told
    rest(one)
    assert late.rx().state is F
    late.receivers.clear()
    late.sender = again
    one.clear("r0", RoomKey("receiver", 2, 0, 2))
    late.open_receiver()
    one.supply(again, 500)
    rest(one)
    late.assert_success()
    end(one, other, late)


def test_a_rank_of_another_room_size_is_told_why_it_is_refused() -> None:
    """It has no place in the room and would hear nothing of its end. The room goes on waiting for those that have."""
    one = transfer(500, 2, required=1).open()
    one.world.run()
    assert one.tx.state is KVPoll.Bootstrapping
    assert one.tx.awaited().endswith("turned away: rank 1 of 2 where 1 ranks are required")
    told = one.rx(0).failure
    assert told is not None
    assert told.code is FailureCode.ProtocolError
    assert "rank 0 of 2 where 1 ranks are required" in told.detail
    one.abort(SENDER)
    end(one.world, one)


def test_no_more_rooms_are_parked_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    one = world(blocks=8)
    monkeypatch.setattr(one.hosts[SENDER].core._router, "parking", Parking(Limits(orphans=3)))
    keys = [one.open_receiver("r0", room, blocks=1) for room in range(5)]
    one.run()
    parking = one.hosts[SENDER].core.parking
    assert len(parking) == 3
    for key in keys:
        one.clear("r0", key)
    rest(one)
    check_nothing_left(one)


def test_pain_14_orphans_leave_nothing() -> None:
    """Receivers whose sender never opens: each gives up, and nobody keeps anything of it."""
    one = world(blocks=4)
    for room in range(100):
        key = one.open_receiver("r0", room, blocks=1)
        one.run()
        one.fire("r0", key, "gate")
        one.clear("r0", key)
        one.run()
    check_nothing_left(one)
    assert one.hosts["r0"].core.ignored + one.hosts[SENDER].core.ignored > 0


# Old packets, old lives


def test_pain_05_old_packets_never_change_a_new_life() -> None:
    """Everything ever said in the first life is said again at every step of the second."""
    one = transfer(20, block_tokens=4, blocks=2).open()
    world, said = one.world, []
    while step(world):
        said += [packet for packet in world.network if packet not in said]
    one.assert_success()
    one.clear()
    world.run()
    again = Transfer(world, 15, blocks=2).open()
    assert len(said) > 12
    while True:
        fresh, before = list(world.network), (again.tx.key(), again.rx().key())
        world.network[:] = said
        while world.network:
            world.deliver()
        assert (again.tx.key(), again.rx().key()) == before
        world.network[:] = fresh
        if set(again.states()) == {S}:
            break
        step(world)
    again.assert_success()
    end(world, again)


def test_a_sender_that_was_cleared_while_it_writes_does_not_say_that_nothing_lands() -> None:
    """The receiver gives up before it heard Opened, so its Abort cannot name the life that writes to it."""
    one = transfer(500).open()
    world = one.world
    run_until(world, lambda: any(isinstance(job.command, StartPart) for job in world.jobs))
    assert one.rx().state is B  # Opened is on its way
    assert one.sender is not None
    world.clear(SENDER, one.sender)
    to_rx, world.network = world.network, []
    one.abort("r0")
    while world.network and world.network[0].dest == SENDER:
        world.deliver()
    assert not messages_of(world, Quiesced)
    world.network[:0] = to_rx
    while world.network:
        world.deliver()
    world.jobs = [job for job in world.jobs if job.host == SENDER]  # the fence takes its time
    assert world.hosts["r0"].core.load().quarantined == 8
    world.perform()  # lands in quarantined blocks, and nobody else has them
    rest(world)
    one.clear()
    rest(world)
    check_nothing_left(world)


def test_words_of_a_room_that_is_not_here_are_counted_and_answered() -> None:
    one = transfer(500).open()
    one.world.run()
    ids: dict[str, Any] = {"room": 99, "rank": 0, "sender_generation": 0, "receiver_generation": 5}
    failure = Failure.of(FailureCode.Aborted, "no", state=B, rank=0)
    core, peer = one.world.hosts[SENDER].core, one.world.hosts["r0"].core
    before = core.ignored, peer.ignored
    say(one.world, "r0", Abort(failure=failure, **ids))
    say(one.world, "r0", Withdraw(part=0, **ids))
    say(one.world, "r0", messages.PartAck(part=0, **ids))
    assert core.ignored == before[0] + 3
    assert peer.ignored == before[1] + 2  # Quiesced and Withdrawn, for a room that is not there either
    end(one.world, one)


def test_nobody_reserves_at_the_end_that_said_hello() -> None:
    one = transfer(500).open()
    one.world.run()
    core = one.world.hosts["r0"].core
    say(one.world, SENDER, Reserve(room=3, rank=0, ranks=1, receiver_generation=1))
    assert core.ignored == 1
    assert len(core.parking) == 0
    end(one.world, one)


def test_beats_of_another_life_are_not_heard() -> None:
    one = transfer(500, 2).open()
    run_until(one.world, lambda: one.tx.state is W)
    slot = one.tx.slots[0]
    generations: dict[str, Any] = {"sender_generation": 1, "receiver_generation": slot.generation + 5}
    told = Beat(to_sender=True, room=7, rank=0, **generations, gate="waiting_blocks", bytes_done=0, host_alive=True)
    connection = one.world.hosts["r0"].core.connections[1]
    packet = connection.channel.heartbeat((told, told))
    one.world.hosts[SENDER].core.frame(packet)
    assert not slot.waits_for_blocks
    unknown = messages.Beat(True, 7, 0, 1, slot.generation, "no such gate", 0, True)
    one.world.hosts[SENDER].core.frame(connection.channel.heartbeat((unknown,)))
    one.world.run()
    one.assert_success()


def test_a_heartbeat_tells_of_work_that_moves_on() -> None:
    """Both sides renew their stall clock: who works, and who waits for it."""
    one = transfer(500).open(supply=False)
    one.world.run()
    assert one.sender is not None
    one.world.supply(one.sender, 500)
    run_until(one.world, lambda: one.tx.gate is Gate.moving)
    core, receiver = one.world.hosts[SENDER].core, one.world.hosts["r0"].core
    drained(core)
    core.heartbeat_tick(True, frozenset([one.tx.room_key]))
    effects = drained(core)
    renewed = [e.command for e in effects if isinstance(e, Do) and isinstance(e.command, SetTimer)]
    assert [timer.name for timer in renewed] == ["gate"]
    (frame,) = [e.packet for e in effects if isinstance(e, Transmit) and isinstance(e.packet, messages.Frame)]
    assert [beat.working for beat in frame.beats] == [True]
    receiver.frame(frame)
    drained(receiver)
    receiver.frame(msgspec.structs.replace(frame, beat_serial=frame.beat_serial + 1))
    assert one.rx().gate is Gate.moving
    renewed = [e.command for e in drained(receiver) if isinstance(e, Do) and isinstance(e.command, SetTimer)]
    assert [timer.name for timer in renewed] == ["gate"]


# Blocks and work that go wrong


def test_blocks_that_cannot_be_exposed_go_back() -> None:
    one = world()
    core = one.hosts["r0"].core
    conn = core.connect(SENDER)
    key = core.open_receiver(5, 0, ReceiverOptions(conn, 1, 2, BLOCK, "drain"))
    assert core.load().leased == 2
    failure = Failure.of(FailureCode.InternalError, "grant: no", state=B, rank=0)
    core.feed(key, GrantRefused(0, failure))
    assert core.sessions[key].failure is failure
    assert core.load().free == 8


def test_a_crash_while_blocks_are_exposed_gives_them_back_and_the_grant_comes_to_nothing() -> None:
    one = world()
    core = one.hosts["r0"].core
    conn = core.connect(SENDER)
    key = core.open_receiver(5, 0, ReceiverOptions(conn, 1, 2, BLOCK, "drain"))
    exposes = [e.command for e in core.drain() if isinstance(e, Do) and isinstance(e.command, Expose)]
    core.feed(key, Crashed("RuntimeError: no"))
    failure = core.sessions[key].failure
    assert failure is not None
    assert failure.code is FailureCode.InternalError
    assert core.load().free == 8
    before = core.key()
    core.feed(key, granted(exposes[0]))
    assert core.key() == before
    core.clear(key)
    assert not core.sessions


def granted(expose: Expose) -> Any:
    return Granted(expose.part, expose.blocks, len(expose.blocks) * BLOCK, (("memory", b"token"),))


def test_pain_13_a_bug_in_a_session_stays_in_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    one = world()
    bad, good = Transfer(one, 2000, room=1, blocks=4), Transfer(one, 2000, room=2, blocks=4)
    bad.open()
    good.open()
    run_until(one, lambda: bad.tx.state is W)

    def poisoned(self: SenderSession, event: PartWritten) -> None:
        if self.room_key.room == 1:
            raise RuntimeError("bug")
        original(self, event)

    original = SenderSession._handlers[PartWritten]
    monkeypatch.setitem(SenderSession._handlers, PartWritten, poisoned)
    monkeypatch.setattr("kvpoll_fsm.testing.invariants.check_history", lambda key, session: None)
    one.run()
    bad.assert_failed("InternalError", "RuntimeError at PartWritten: bug")
    good.assert_success()


def test_what_a_session_asked_for_before_it_raised_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    one = world()
    monkeypatch.setattr("kvpoll_fsm.testing.invariants.check_history", lambda key, session: None)
    waiting = Transfer(one, 100, room=1)
    waiting.open_receiver()
    session = waiting.rx()

    def poisoned(self: Any, event: RevokeGrant) -> None:
        self._do(Grant(5, 1))
        raise RuntimeError("bug")

    monkeypatch.setitem(type(session)._handlers, RevokeGrant, poisoned)
    with pytest.raises(RuntimeError):
        session.feed(RevokeGrant())
    commands = session.feed(Crashed("bug"))
    assert commands[0] == Grant(5, 1)
    assert session.state is F


def test_a_crash_inside_a_crash_is_nobodys_room(monkeypatch: pytest.MonkeyPatch) -> None:
    one = transfer(100).open()

    def poisoned(self: Any, event: Any) -> None:
        raise RuntimeError("bug")

    monkeypatch.setitem(SenderSession._handlers, Crashed, poisoned)
    assert one.sender is not None
    with pytest.raises(RuntimeError):
        one.world.hosts[SENDER].core.feed(one.sender, Crashed("x"))


def test_a_grant_of_more_tokens_than_its_blocks_hold_is_a_protocol_error() -> None:
    one = transfer(500, 2, block_tokens=16, blocks=2).open(supply=False)
    victim = Transfer(one.world, 100, room=8, blocks=2).open()
    world = one.world
    run_until(world, lambda: any(isinstance(m, Reserve) and m.rank == 1 for m in messages_of(world, Reserve)))
    for at, delivery in enumerate(world.network):
        packet = delivery.packet
        if isinstance(packet, Frame) and delivery.source == "r1":
            lies = tuple(lie(message) for message in packet.messages)
            forged = Frame(packet.source, packet.target, packet.outgoing, packet.first_seq, packet.ack, lies)
            world.network[at] = type(delivery)(delivery.source, delivery.dest, delivery.origin, forged)
    world.run()
    assert one.tx.failure is not None
    assert one.tx.failure.code is FailureCode.ProtocolError
    assert one.tx.failure.detail == "a grant of 1000 tokens in 2 blocks of 16 for part 0"
    victim.assert_success()
    one.clear()
    rest(world)
    end(world, victim)


def ids_of(one: Transfer) -> dict[str, int]:
    slot = one.tx.slots[0]
    generation = {"sender_generation": one.tx.room_key.generation, "receiver_generation": slot.generation}
    return {"room": one.room, "rank": 0} | generation


FORGED_GRANT = messages.BlockGrant(1, 8, (0, 1), (("memory", b"t"),))
FORGED: dict[str, tuple[str, Any]] = {
    "an ack of another part": ("r0", lambda ids: messages.PartAck(part=9, **ids)),
    "an ack nobody asked for": ("r0", lambda ids: messages.PartAck(part=1, **ids)),
    "a resume at another token": ("r0", lambda ids: messages.Resume(sent_tokens=3, grant=FORGED_GRANT, **ids)),
    "opened again": (SENDER, lambda ids: Opened(required=2, **ids)),
    "opened for other ranks": (SENDER, lambda ids: Opened(required=1, **ids)),
    "a part at another token": (SENDER, lambda ids: forged_report(offset=3, **ids)),
    "a part of another number": (SENDER, lambda ids: forged_report(part=7, **ids)),
    "a last part that is not": (SENDER, lambda ids: forged_report(is_last=True, **ids)),
    "another total": (SENDER, lambda ids: forged_report(total_tokens=60, **ids)),
    "an outcome of nothing": (SENDER, lambda ids: messages.PartOutcome(part=1, is_last=False, state=T, **ids)),
}


def forged_report(**fields: Any) -> messages.PartReport:
    right: dict[str, Any] = {
        "part": 1,
        "offset": 8,
        "tokens": 8,
        "total_tokens": 20,
        "is_last": False,
        "transport": "memory",
    }
    return messages.PartReport(**(right | fields))


@pytest.mark.parametrize("what", FORGED)
def test_what_a_peer_must_not_say_ends_that_room_and_no_other(what: str) -> None:
    name, make = FORGED[what]
    one = transfer(20, 2, block_tokens=4, blocks=2).open()
    world = one.world
    other = Transfer(world, 20, 2, room=8, blocks=2).open()
    run_until(world, lambda: one.tx.state is T)
    say(world, name, make(ids_of(one)))
    rest(world)
    one.assert_failed("ProtocolError", rank=0)
    other.assert_success()
    end(world, one, other)


def lie(message: Any) -> Any:
    grant = getattr(message, "grant", None)
    if grant is None:
        return message
    more = messages.BlockGrant(grant.part, 1000, grant.blocks, grant.tokens_by_transport)
    ids = {name: getattr(message, name) for name in ("room", "rank", "sender_generation", "receiver_generation")}
    return Reserve(**ids, ranks=message.ranks, dummy=message.dummy, grant=more)


# Copies


class Twins(EndpointCore):
    """Does everything twice: on itself, and on a copy made just before; compares what comes of it."""

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        return value if name not in ACTS or object.__getattribute__(self, "busy") else self.both(name)

    busy = False

    def both(self, name: str) -> Any:
        def act(*args: Any, **kwargs: Any) -> Any:
            self.busy = True
            copy, idle = EndpointCore.clone(self), EndpointCore.clone(self)
            before = self.key()
            assert idle.key() == copy.key() == before
            assert hash(before) == hash(copy.key())
            result = getattr(self, name)(*args, **kwargs)
            assert getattr(copy, name)(*args, **kwargs) == result
            assert copy.key() == self.key()
            assert list(copy._out.effects) == list(self._out.effects)
            assert idle.key() == before
            self.busy = False
            return result

        return act


ACTS = {
    "open_sender",
    "open_receiver",
    "feed",
    "clear",
    "drain",
    "connect",
    "hello",
    "welcome",
    "frame",
    "stranger",
    "end",
    "say_bye",
    "timer",
    "heartbeat_tick",
    "resend_tick",
    "flush",
}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("resume", ["drain", "extend"])
def test_a_copy_fed_the_same_does_the_same_and_shares_nothing(seed: int, resume: str) -> None:
    one, chance = World(checksums=True), random.Random(seed)
    for name in (SENDER, "r0", "r1"):
        host = one.add_host(name, 3, 4)
        host.core = Twins(host.core.options)
    rooms = [Transfer(one, 22, 2, room=room, blocks=2, resume=resume).open() for room in (2, 1)]
    for _ in range(150):
        roll = chance.random()
        if one.network and roll < 0.5:
            one.deliver(chance.randrange(len(one.network)), keep=roll < 0.05, lose=roll > 0.45)
        elif one.jobs and roll < 0.9:
            one.perform(chance.randrange(len(one.jobs)), ok=roll < 0.88)
        elif roll < 0.97:
            one.tick(chance.choice(list(one.hosts)), heartbeat=roll < 0.93)
        else:
            withdraw(one)
    rooms[0].abort("r0")
    if not rooms[1].tx.state.is_terminal:
        rooms[1].fire(SENDER)
    for each in rooms:
        each.clear()
    rest(one)
    one.hosts[SENDER].core.say_bye()


def test_keys_tell_states_apart() -> None:
    one = transfer(2000, 2).open()
    seen = {}
    for at in itertools.count():
        key = tuple(host.core.key() for host in one.world.hosts.values())
        assert hash(key) == hash(key)
        seen[key] = at
        if not step(one.world):
            break
    assert len(seen) > 30


# Small things


def test_the_counters_of_a_core() -> None:
    one = transfer(500).open()
    core = one.world.hosts["r0"].core
    assert core.unacked == 0  # the peer is not known yet
    while not core.connections[1].peer:
        one.world.deliver()
    assert core.unacked == 1
    one.world.run()
    assert (core.unacked, core.owes_ack) == (0, False)
    assert core.load().total == 8


def test_peers_forget_what_is_not_there() -> None:
    one = world()
    peers = one.hosts["r0"].core._peers
    assert isinstance(peers, Peers)
    peers.push(42, Bye())
    assert peers.owes_ack is False


def test_an_abort_of_a_key_that_is_gone_is_ignored() -> None:
    one = transfer(500).open()
    one.world.run()
    end(one.world, one)
    assert one.sender is not None
    one.world.feed(SENDER, one.sender, AbortRoom("late"))
    one.world.clear(SENDER, one.sender)
    check_nothing_left(one.world)
