"""What both sides share: the first failure, timers with epochs, one armed gate, keys."""

from __future__ import annotations

import pytest

from kvpoll_fsm.commands import CancelTimer, Command, SetTimer
from kvpoll_fsm.deadlines import Deadlines, Gate
from kvpoll_fsm.errors import Failure, FailureCode
from kvpoll_fsm.events import Bootstrapped, LifecycleEvent
from kvpoll_fsm.inputs import AbortRoom, ClearRoom, Crashed, RevokeGrant, Start, TimerFired
from kvpoll_fsm.poll import KVPoll
from kvpoll_fsm.session import RoomKey, Session

DEADLINES = Deadlines(bootstrap_s=1, input_s=2, room_timeout_s=5)
KEY = RoomKey("receiver", 7, 3, 1)


class Plain(Session):
    """The least a session can be."""

    told: list[Failure]

    def _present_gate(self) -> Gate:
        if self.state.is_terminal:
            return Gate.closed
        return Gate.waiting_ranks if self.state is KVPoll.Bootstrapping else Gate.queued

    def _nothing_lands(self) -> bool:
        return True

    def awaited(self) -> str:
        return "nothing in particular"

    def _start(self, event: Start) -> None:
        self.told = []
        self._arm("room", self.deadlines.room_timeout_s)

    def _go(self, event: RevokeGrant) -> None:
        self._apply(Bootstrapped())

    def _tell_failure(self, failure: Failure, event: LifecycleEvent) -> None:
        self.told.append(failure)

    def _on_failed(self) -> None:
        pass

    _handlers = {  # noqa: RUF012
        Start: _start,
        RevokeGrant: _go,
        AbortRoom: Session._abort,
        ClearRoom: Session._clear,
        Crashed: Session._crashed,
        TimerFired: Session._timer_fired,
    }


@pytest.fixture
def session() -> Plain:
    one = Plain(KEY, DEADLINES)
    one.started = one.feed(Start())  # type: ignore[attr-defined]
    return one


def test_a_room_starts_with_two_clocks(session: Plain) -> None:
    assert session.started == [SetTimer("room", 5, 1), SetTimer("gate", 1, 2)]  # type: ignore[attr-defined]
    assert session.timed
    assert session.history == (KVPoll.Bootstrapping,)
    assert session.told_gate is Gate.waiting_ranks


def test_a_new_gate_starts_its_clock_anew(session: Plain) -> None:
    assert session.feed(RevokeGrant()) == [SetTimer("gate", 2, 3)]
    assert session.feed(TimerFired("gate", 2)) == []
    assert session.state is KVPoll.WaitingForInput


def test_the_end_stops_all_clocks(session: Plain) -> None:
    stopped: list[Command] = [CancelTimer("gate"), CancelTimer("room")]
    assert session.feed(AbortRoom("enough")) == stopped
    assert session.feed(AbortRoom("again")) == []
    assert not session.timed


@pytest.mark.parametrize(
    ("timer", "detail"),
    [("gate", "waiting_ranks for 1 s: nothing in particular"), ("room", "the room outlived 5 s")],
)
def test_each_clock_ends_the_room(session: Plain, timer: str, detail: str) -> None:
    session.feed(TimerFired(timer, {"room": 1, "gate": 2}[timer]))
    assert session.failure == Failure(FailureCode.DeadlinePassed, 3, KVPoll.Bootstrapping, True, detail)
    assert session.told == [session.failure]


def test_a_failure_is_told_once(session: Plain) -> None:
    session.feed(AbortRoom("first", FailureCode.LayoutMismatch))
    session.feed(Crashed("second"))
    session.feed(ClearRoom())
    assert session.told == [session.failure]
    assert session.failure is not None
    assert (session.failure.code, session.failure.detail) == (FailureCode.LayoutMismatch, "first")
    assert session.late_events == 1
    assert session.finished


@pytest.mark.parametrize("code", list(FailureCode))
def test_every_cause_is_an_event_of_the_machine(session: Plain, code: FailureCode) -> None:
    session.feed(AbortRoom("enough", code))
    assert session.state is KVPoll.Failed


def test_an_unknown_input_changes_nothing(session: Plain) -> None:
    before = session.key()
    assert session.feed("what is this") == []  # type: ignore[arg-type]
    assert session.key() == before


def test_clear_of_a_live_room_is_an_abort(session: Plain) -> None:
    assert not session.finished
    session.feed(ClearRoom())
    assert session.failure is not None
    assert session.failure.detail == "the handle was cleared while the room was live"
    assert session.finished


def test_a_key_names_the_state(session: Plain) -> None:
    keys = {session.key()}
    for event in (RevokeGrant(), AbortRoom("enough"), ClearRoom()):
        session.feed(event)
        keys.add(session.key())
    assert len(keys) == 4


def test_a_bare_session_does_nothing_by_itself() -> None:
    bare = Session(KEY, DEADLINES)
    for ask in (
        bare._present_gate,
        bare._nothing_lands,
        lambda: bare.binds(1, 2, 3),
        lambda: bare.beats(1, True, False),
        bare.clone,
        bare.awaited,
        bare._on_failed,
        lambda: bare.feed(Start()),
    ):
        with pytest.raises(NotImplementedError):
            ask()
