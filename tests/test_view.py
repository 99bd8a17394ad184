from __future__ import annotations

import threading

from kvpoll_fsm import Deadlines, Failure, FailureCode, Gate, KVPoll
from kvpoll_fsm.inputs import AbortRoom, Start
from kvpoll_fsm.selection import Policy
from kvpoll_fsm.sender_session import SenderOptions, SenderSession
from kvpoll_fsm.session import RoomKey
from kvpoll_fsm.status import Places, StatusTable
from kvpoll_fsm.view import RoomView
from tests.helpers import SOON_S

CAUSE = Failure.of(FailureCode.Aborted, "because", state=KVPoll.Bootstrapping)


def view() -> RoomView:
    return RoomView(StatusTable(None), Places(), 7, 0, "tag")


def session() -> SenderSession:
    options = SenderOptions(1, Policy.parse("memory"), ("memory",), 16)
    session = SenderSession(RoomKey("sender", 7, 0, 1), Deadlines(), options)
    session.feed(Start())
    return session


def test_starts_where_every_room_starts() -> None:
    seen = view()
    assert (seen.state, seen.gate, seen.history) == (KVPoll.Bootstrapping, Gate.waiting_ranks, (KVPoll.Bootstrapping,))
    assert (seen.failure, seen.parts, seen.data, seen.quiescent) == (None, (), None, False)


def test_shows_what_the_session_says() -> None:
    seen, told = view(), session()
    seen.update(told)
    assert (seen.state, seen.gate) == (KVPoll.Bootstrapping, Gate.waiting_ranks)
    told.feed(AbortRoom("because"))
    seen.update(told)
    assert seen.state is KVPoll.Failed
    assert seen.gate is Gate.closed
    assert seen.history == (KVPoll.Bootstrapping, KVPoll.Failed)
    assert seen.failure == CAUSE
    assert seen.quiescent


def test_whoever_sees_the_end_sees_all_that_belongs_to_it() -> None:
    """`state` is written last: everything else is in place when the callback comes."""
    seen, told = view(), session()
    found: list[object] = []
    seen.call_when_ended(lambda: found.extend([seen.failure, seen.history[-1], seen.quiescent]))
    told.feed(AbortRoom("because"))
    seen.update(told)
    assert found == [CAUSE, KVPoll.Failed, True]


def test_fails_once() -> None:
    seen = view()
    seen.fail(CAUSE)
    seen.fail(Failure.of(FailureCode.PeerLost, "later", state=KVPoll.Failed))
    assert seen.failure is CAUSE
    assert seen.history == (KVPoll.Bootstrapping, KVPoll.Failed)
    assert not seen.quiescent
    seen.settle()
    assert seen.quiescent


def test_wakes_those_who_wait() -> None:
    seen = view()
    ended: list[bool] = []
    waiting = threading.Thread(
        target=lambda: ended.append(seen.wait_until(lambda: seen.state.is_terminal, SOON_S)), daemon=True
    )
    waiting.start()
    seen.fail(CAUSE)
    waiting.join(SOON_S)
    assert ended == [True]


def test_wakes_those_who_wait_for_quiescence_only() -> None:
    seen, told = view(), session()
    told.feed(AbortRoom("because"))
    seen._state = KVPoll.Failed  # as seen before, when a write could land still
    ended: list[bool] = []
    waiting = threading.Thread(
        target=lambda: ended.append(seen.wait_until(lambda: seen.quiescent, SOON_S)), daemon=True
    )
    waiting.start()
    seen.update(told)
    waiting.join(SOON_S)
    assert ended == [True]


def test_pain_26_what_changes_between_a_look_and_the_wait_is_not_missed() -> None:
    """A signal handler that waits for the room as well may run there, and the end come meanwhile."""
    seen, asked = view(), threading.Event()
    looks: list[bool] = []

    def end() -> None:
        asked.wait(SOON_S)
        seen.fail(CAUSE)

    def ask() -> bool:
        asked.set()
        return seen.state.is_terminal

    def look() -> bool:
        looks.append(seen.state.is_terminal)
        if len(looks) == 2:
            ending = threading.Thread(target=end, daemon=True)
            asks = iter((False,))
            ending.start()
            assert seen.wait_until(lambda: next(asks, None) is None and ask(), SOON_S)
            ending.join(SOON_S)
        return looks[-1]

    waiting = threading.Thread(target=lambda: seen.wait_until(look, None), daemon=True)
    waiting.start()
    waiting.join(SOON_S)
    assert not waiting.is_alive()
    assert looks == [False, False, True]


def test_gives_up_waiting_in_time() -> None:
    seen = view()
    assert not seen.wait_until(lambda: seen.state.is_terminal, 0.001)
    assert seen.wait_until(lambda: True, 0.0)


def test_calls_back_once_and_at_once_if_it_is_over() -> None:
    seen = view()
    calls: list[int] = []
    seen.call_when_ended(lambda: calls.append(1))
    seen.show(KVPoll.WaitingForInput)
    assert calls == []
    seen.fail(CAUSE)
    seen.show(KVPoll.Failed, wake=True)
    assert calls == [1]
    seen.call_when_ended(lambda: calls.append(2))
    assert calls == [1, 2]


def test_calls_back_only_who_still_wants_it() -> None:
    seen = view()
    calls: list[int] = []
    callbacks = [lambda: calls.append(1), lambda: calls.append(2)]
    for callback in callbacks:
        seen.call_when_ended(callback)
    seen.call_no_more(callbacks[0])
    seen.call_no_more(callbacks[0])
    seen.fail(CAUSE)
    assert calls == [2]
