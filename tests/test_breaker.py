"""Breakers: when they open and close, who may pass, and what does not count."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from kvpoll_fsm import inputs
from kvpoll_fsm.breaker import Breakers
from kvpoll_fsm.commands import Preflight, StartPart, Target
from kvpoll_fsm.deadlines import Deadlines
from kvpoll_fsm.effects import BreakerMoved, Do, Outbox
from kvpoll_fsm.errors import Failure, FailureCode
from kvpoll_fsm.messages import BlockGrant
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.rooms import Rooms
from kvpoll_fsm.sender_session import SenderSession
from kvpoll_fsm.session import RoomKey
from tests.test_sender_session import Tx

CONN = 10
GRANT = BlockGrant(0, 8, (1, 2), (("a", b"a"), ("b", b"b")))


class Bench:
    """The breakers of one endpoint, whose rooms 1, 2, ... all go to the peer of one connection."""

    def __init__(self) -> None:
        self.rooms, self.out = Rooms(), Outbox()
        self.rooms.by_conn[CONN] = {}
        self._moves: list[str] = []
        self.breakers = Breakers(self.rooms, Deadlines(breaker_s=1.0, breaker_max_s=3.0), self.out)

    def room(self, number: int = 1) -> tuple[RoomKey, SenderSession]:
        """A room whose rank 0 is reached through both transports."""
        key = RoomKey("sender", number, 0, number)
        tx = Tx(transports=("a", "b"))
        tx.reserve(granted=GRANT)
        self.rooms.by_conn[CONN][key] = None
        return key, tx.session

    def fail(self, number: int = 1, *, attempt: int = 0, **more: bool) -> tuple[RoomKey, SenderSession]:
        """A part of a room fails on transport a."""
        key, session = self.room(number)
        failed = inputs.PartWritten(0, 0, "a", ok=False, detail="reset", attempt=attempt)
        self.breakers.heard(key, session, msgspec.structs.replace(failed, **more))
        return key, session

    def succeed(self, number: int = 1, transport: str = "a", attempt: int = 0) -> None:
        key, session = self.room(number)
        self.breakers.heard(key, session, inputs.PartWritten(0, 0, transport, ok=True, attempt=attempt))

    def start(self, number: int = 1, *, attempt: int = 0, insist: bool = False, transport: str = "a") -> Target:
        """A part of a room wants to be written; returns what its target has become."""
        key, _ = self.room(number)
        self.asked()
        target = Target(0, CONN, transport, GRANT, insist)
        self.breakers.asked(key, StartPart(0, 0, 8, (), (target,), attempt))
        (done,) = self.asked()
        assert isinstance(done.command, StartPart)
        return done.command.targets[0]

    def reach(self, number: int = 1, *, insist: bool = False) -> inputs.Preflighted | None:
        """A room asks for the port; returns the refusal, if it is one."""
        self.out.inputs.clear()
        self.asked()
        self.breakers.asked(self.room(number)[0], Preflight(0, CONN, "a", insist))
        asked = self.asked()
        answers = [event for _, event in self.out.inputs if isinstance(event, inputs.Preflighted)]
        assert len(asked) + len(answers) == 1
        return answers[0] if answers else None

    def asked(self) -> list[Do]:
        """What rooms have asked for since."""
        asked = []
        while effects := self.out.drain():
            self._moves += [effect.state for effect in effects if isinstance(effect, BreakerMoved)]
            asked += [effect for effect in effects if isinstance(effect, Do) and effect.key is not None]
        return asked

    def moves(self) -> list[str]:
        self.asked()
        return self._moves

    def time_over(self) -> None:
        """The breaker of transport a has been open long enough."""
        breaker = self.breakers.of(CONN)["a"]
        self.breakers.timer(self.breakers.timer_of(CONN, "a"), breaker.epoch)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_failure_opens_and_refuses_with_its_cause(bench: Bench) -> None:
    bench.fail()
    assert bench.moves() == ["open"]
    refusal = bench.reach(2)
    assert refusal is not None
    assert (refusal.ok, refusal.shut) == (False, True)
    assert refusal.detail == "not tried, as it failed lately: reset"
    assert bench.start(2).shut == refusal.detail


def test_an_attempt_that_took_too_long_counts_though_its_room_is_over(bench: Bench) -> None:
    key, session = bench.room()
    session.slots[0].hurried = True
    session.feed(inputs.AbortRoom("enough"))
    bench.breakers.heard(key, session, inputs.PartWritten(0, 0, "a", ok=False, detail="no bytes landed for 4 s"))
    assert bench.moves() == ["open"]


def test_who_has_nothing_else_left_is_let_in(bench: Bench) -> None:
    bench.fail()
    assert bench.reach(2, insist=True) is None
    assert bench.start(2, insist=True).shut == ""
    assert bench.start(2, transport="b").shut == ""


@pytest.mark.parametrize("why", ["collateral", "ours", "shut", "over", "forgotten"])
def test_what_says_nothing_against_the_transport_does_not_count(bench: Bench, why: str) -> None:
    if why in ("collateral", "ours", "shut"):
        bench.fail(**{why: True})
    else:
        key, session = bench.room()
        session.feed(inputs.AbortRoom("enough"))
        failed = inputs.PartWritten(0, 0, "a", ok=False, detail="cancelled")
        bench.breakers.heard(key, None if why == "forgotten" else session, failed)
    assert not bench.breakers


def test_when_its_time_is_over_one_part_may_try(bench: Bench) -> None:
    bench.fail()
    bench.time_over()
    assert bench.moves() == ["open", "half-open"]
    assert bench.reach(2) is None
    assert bench.start(2).shut == ""
    assert inputs.Probing(0, 0, 0) in [event for _, event in bench.out.inputs]
    assert bench.start(3).shut == "not tried before another part got through: reset"
    assert bench.reach(3) is not None
    assert bench.start(4, insist=True).shut == ""


def test_when_its_time_is_over_one_room_reaches_for_the_port(bench: Bench) -> None:
    """If it does not answer, the others have not waited for it."""
    bench.fail()
    bench.time_over()
    assert bench.reach(2) is None
    refused = bench.reach(3)
    assert refused is not None
    assert refused.shut
    assert bench.reach(4, insist=True) is None
    answer = inputs.Preflighted(0, CONN, "a", ok=True)
    bench.breakers.heard(bench.room(4)[0], None, answer)
    assert bench.reach(3) is not None
    bench.breakers.heard(bench.room(2)[0], None, answer)
    assert bench.reach(3) is None
    bench.breakers.heard(bench.room(3)[0], None, inputs.Preflighted(0, CONN, "a", ok=False, detail="refused"))
    assert bench.breakers.of(CONN)["a"].wait_s == 2.0


def test_its_success_closes_and_rooms_under_way_may_come_back(bench: Bench) -> None:
    bench.fail()
    bench.time_over()
    bench.start(2)
    bench.succeed(3)  # begun before
    assert bench.breakers
    bench.out.inputs.clear()
    bench.succeed(2)
    assert not bench.breakers
    assert bench.moves()[-1] == "closed"
    assert {key.room for key, event in bench.out.inputs if event == inputs.Reconsider(CONN)} == {1, 2, 3}
    assert bench.start(4).shut == ""


def test_its_failure_opens_for_twice_as_long_up_to_a_limit(bench: Bench) -> None:
    bench.fail()
    for number, wait_s in enumerate((2.0, 3.0, 3.0), 2):
        bench.time_over()
        bench.start(number)
        bench.fail(9)  # begun before
        assert bench.breakers.of(CONN)["a"].half_open
        bench.fail(number)
        assert not bench.breakers.of(CONN)["a"].half_open
        assert bench.breakers.of(CONN)["a"].wait_s == wait_s


@pytest.mark.parametrize("why", ["collateral", "over"])
def test_a_probe_that_ends_for_another_s_sake_makes_place_for_the_next(bench: Bench, why: str) -> None:
    bench.fail()
    bench.time_over()
    bench.start(2)
    if why == "collateral":
        bench.fail(2, collateral=True)
    else:
        key, session = bench.room(2)
        session.feed(inputs.AbortRoom("enough"))
        bench.breakers.heard(key, session, inputs.PartWritten(0, 0, "a", ok=False, detail="cancelled"))
    assert bench.breakers.of(CONN)["a"].half_open
    assert bench.start(3).shut == ""


def test_a_port_that_does_not_answer_opens_and_keeps_open(bench: Bench) -> None:
    key, session = bench.room()
    refused = inputs.Preflighted(0, CONN, "a", ok=False, detail="refused")
    bench.breakers.heard(key, session, refused)
    bench.breakers.heard(key, session, refused)
    assert bench.breakers.of(CONN)["a"].wait_s == 1.0
    bench.time_over()
    bench.breakers.heard(key, session, replace_ok(refused))
    assert bench.breakers.of(CONN)["a"].half_open
    bench.breakers.heard(key, session, refused)
    assert bench.breakers.of(CONN)["a"].wait_s == 2.0


def replace_ok(event: inputs.Preflighted) -> inputs.Preflighted:
    return inputs.Preflighted(event.rank, event.conn, event.transport, ok=True)


@pytest.mark.parametrize("code", [FailureCode.Aborted, FailureCode.PeerLost, FailureCode.TransportFailed])
def test_a_room_that_its_receiver_gave_up_says_nothing_against_the_transport(bench: Bench, code: FailureCode) -> None:
    """The writes fail first, and the reason comes later."""
    key, session = bench.fail()
    bench.breakers.ended(key, session)
    assert bench.breakers
    session._fail(Failure.of(code, "", state=KVPoll.Bootstrapping))
    bench.breakers.ended(key, session)
    assert bool(bench.breakers) is (code is FailureCode.TransportFailed)


def test_once_the_part_got_through_elsewhere_the_transport_is_to_blame(bench: Bench) -> None:
    key, session = bench.fail()
    bench.succeed(1, "b", attempt=1)
    session._fail(Failure.of(FailureCode.Aborted, "", state=KVPoll.Bootstrapping))
    bench.breakers.ended(key, session)
    assert bench.breakers


def test_another_incarnation_begins_anew(bench: Bench) -> None:
    bench.fail()
    epoch = bench.breakers.of(CONN)["a"].epoch
    bench.breakers.forget(CONN)
    del bench.rooms.by_conn[CONN]
    assert not bench.breakers
    bench.breakers.timer(bench.breakers.timer_of(CONN, "a"), epoch)
    failed = inputs.Preflighted(0, CONN, "a", ok=False, detail="the peer is gone")
    bench.breakers.heard(RoomKey("sender", 1, 0, 1), None, failed)
    assert not bench.breakers


def test_a_timer_of_an_earlier_opening_does_nothing(bench: Bench) -> None:
    bench.fail()
    bench.breakers.timer(bench.breakers.timer_of(CONN, "a"), 0)
    assert not bench.breakers.of(CONN)["a"].half_open


def test_a_copy_shares_nothing(bench: Bench) -> None:
    bench.fail()
    copy = bench.breakers.clone(Rooms(), Outbox())
    assert copy.key() == bench.breakers.key()
    bench.time_over()
    assert copy.key() != bench.breakers.key()
    assert replace(copy.of(CONN)["a"], half_open=True) == bench.breakers.of(CONN)["a"]
