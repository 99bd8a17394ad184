from __future__ import annotations

from kvpoll_fsm.timers import Timers


class Clock:
    """Time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make() -> tuple[Timers, Clock]:
    clock = Clock()
    return Timers(clock), clock


def test_without_timers_nothing_is_due() -> None:
    timers, _ = make()
    assert timers.next_in_s() is None
    assert timers.due() == []
    assert len(timers) == 0


def test_fire_once_and_in_order() -> None:
    timers, clock = make()
    timers.set("late", 3.0, epoch=1)
    timers.set("early", 1.0, epoch=2)
    timers.set("far", 9.0)
    assert timers.next_in_s() == 1.0
    clock.now += 3.0
    assert timers.next_in_s() == 0.0
    assert timers.due() == [(None, "early", 2), (None, "late", 1)]
    assert timers.due() == []
    assert timers.next_in_s() == 6.0
    assert len(timers) == 1


def test_equal_times_fire_in_the_order_they_were_set() -> None:
    timers, clock = make()
    for name in "cab":
        timers.set(name, 1.0)
    clock.now += 1.0
    assert [name for _, name, _ in timers.due()] == ["c", "a", "b"]


def test_setting_again_replaces() -> None:
    timers, clock = make()
    timers.set("x", 1.0, epoch=1)
    timers.set("x", 5.0, epoch=2)
    assert len(timers) == 1
    assert timers.next_in_s() == 5.0
    clock.now += 1.0
    assert timers.due() == []
    clock.now += 4.0
    assert timers.due() == [(None, "x", 2)]


def test_a_cancelled_timer_neither_fires_nor_wakes() -> None:
    timers, clock = make()
    timers.set("x", 1.0)
    timers.set("y", 2.0)
    timers.cancel("x")
    timers.cancel("never set")
    assert timers.next_in_s() == 2.0
    clock.now += 2.0
    assert timers.due() == [(None, "y", 0)]


def test_may_be_set_again_while_those_due_are_handled() -> None:
    timers, clock = make()
    timers.set("tick", 1.0)
    clock.now += 1.0
    for _, name, _ in timers.due():
        timers.set(name, 1.0)
    assert timers.next_in_s() == 1.0


def test_a_timer_renewed_for_ever_takes_no_more_room() -> None:
    timers, _ = make()
    timers.set("other", 50.0)
    for n in range(10_000):
        timers.set("gate", 10.0, epoch=n)
    assert len(timers) == 2
    assert len(timers._heap) <= 65
    assert timers.next_in_s() == 10.0


def test_cancelled_timers_take_no_room_for_long() -> None:
    timers, clock = make()
    for n in range(10_000):
        timers.set("gate", 10.0, owner=n)
        timers.cancel("gate", owner=n)
        assert len(timers._heap) <= 65
    clock.now += 10.0
    assert timers.due() == []
    assert (len(timers), timers._heap) == (0, [])


def test_timers_without_an_owner_are_not_searched_for_among_each_other() -> None:
    """There may be one for each peer, all due at once: some thousands would keep the driver busy for seconds."""
    timers, clock = make()
    for n in range(1_000):
        timers.set(f"breaker {n}", 1.0)
    assert all(timer.other is None for timer in timers._heap)
    timers.cancel("breaker 5")
    assert len(timers._heap) == 1_000, "one that was cancelled is no reason to go through all"
    clock.now += 1.0
    assert len(timers.due()) == 999


def test_each_owner_has_timers_of_its_own() -> None:
    timers, clock = make()
    for owner in ("a", "b"):
        timers.set("gate", 1.0, epoch=1, owner=owner)
        timers.set("room", 3.0, epoch=2, owner=owner)
    timers.set("gate", 2.0, epoch=3, owner="a")
    timers.cancel("room", owner="b")
    assert len(timers) == 3
    assert [timers.left_s("room", owner=owner) for owner in ("a", "b", None)] == [3.0, None, None]
    clock.now += 3.0
    assert timers.due() == [("b", "gate", 1), ("a", "gate", 3), ("a", "room", 2)]
    assert len(timers) == 0
    assert not timers._of
