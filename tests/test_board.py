"""The status board: one machine per room, generations, first failure, many threads."""

from __future__ import annotations

import doctest
import itertools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from kvpoll_fsm import board as board_module
from kvpoll_fsm.board import StatusBoard
from kvpoll_fsm.errors import DuplicateRoom, Failure, FailureCode, IllegalTransition, InvalidInput, UnknownRoom
from kvpoll_fsm.events import (
    Aborted,
    Bootstrapped,
    DeadlinePassed,
    LifecycleEvent,
    PartDone,
    PeerLost,
    ProtocolError,
    Resumed,
)
from kvpoll_fsm.lifecycle import EVENTS, TABLE, outcome
from kvpoll_fsm.poll import KVPoll

ROOM = 42
MORE = PartDone(is_last=False, all_ok=True)
LAST = PartDone(is_last=True, all_ok=True)

WAYS: dict[KVPoll, tuple[LifecycleEvent, ...]] = {
    KVPoll.Bootstrapping: (),
    KVPoll.WaitingForInput: (Bootstrapped(),),
    KVPoll.Transferring: (Bootstrapped(), MORE),
    KVPoll.Success: (Bootstrapped(), LAST),
    KVPoll.Failed: (Aborted(),),
}
"""Events that lead to each state."""


def cause(detail: str, code: FailureCode = FailureCode.TransportFailed) -> Failure:
    return Failure.of(code, detail, state=KVPoll.Transferring, rank=1)


def board_in(state: KVPoll) -> tuple[StatusBoard, int]:
    board = StatusBoard()
    generation = board.open(ROOM)
    for event in WAYS[state]:
        board.advance(ROOM, event)
    assert board.poll(ROOM) is state
    return board, generation


def test_the_example_in_its_documentation() -> None:
    failed, attempted = doctest.testmod(board_module)
    assert not failed
    assert attempted


@pytest.mark.parametrize(("state", "event"), list(itertools.product(KVPoll, EVENTS)))
@pytest.mark.parametrize("named", [False, True])
def test_every_event_in_every_state_does_what_the_table_says(state: KVPoll, event: LifecycleEvent, named: bool) -> None:
    board, generation = board_in(state)
    which = generation if named else None
    if (state, event) in TABLE:
        assert board.advance(ROOM, event, generation=which) is TABLE[state, event]
        assert board.late_events == 0
    elif state.is_terminal:
        assert board.advance(ROOM, event, generation=which) is state
        assert board.late_events == 1
    else:
        with pytest.raises(IllegalTransition) as caught:
            board.advance(ROOM, event, generation=which)
        assert (caught.value.state, caught.value.event) == (state, event)
    expected = TABLE.get((state, event), state)
    assert board.poll(ROOM) is expected
    assert (board.failure(ROOM) is not None) == (expected is KVPoll.Failed)


# ------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("state", [KVPoll.WaitingForInput, KVPoll.Transferring])
@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("polls", [polls for n in (1, 2, 3) for polls in itertools.product([True, False], repeat=n)])
def test_part_done_applies_the_rule_over_the_ranks(state: KVPoll, is_last: bool, polls: tuple[bool, ...]) -> None:
    board, generation = board_in(state)
    reached = board.part_done(ROOM, is_last=is_last, polls=iter(polls), generation=generation)
    assert reached is outcome(is_last, polls) is board.poll(ROOM)
    failure = board.failure(ROOM)
    if reached is not KVPoll.Failed:
        assert failure is None
    else:
        missed = [rank for rank, arrived in enumerate(polls) if not arrived]
        assert failure == Failure.of(
            FailureCode.TransportFailed,
            f"the part did not arrive whole on ranks {missed}",
            state=state,
            rank=missed[0],
        )


def test_part_done_of_no_ranks_is_an_error_and_changes_nothing() -> None:
    board, _ = board_in(KVPoll.Transferring)
    with pytest.raises(ValueError, match="at least one rank"):
        board.part_done(ROOM, is_last=True, polls=[])
    assert board.poll(ROOM) is KVPoll.Transferring


def test_part_done_before_bootstrap_is_illegal() -> None:
    board, _ = board_in(KVPoll.Bootstrapping)
    with pytest.raises(IllegalTransition):
        board.part_done(ROOM, is_last=True, polls=[False])
    assert board.poll(ROOM) is KVPoll.Bootstrapping
    assert board.failure(ROOM) is None


def test_part_done_keeps_the_cause_given() -> None:
    board, _ = board_in(KVPoll.Transferring)
    board.part_done(ROOM, is_last=True, polls=[True, False], failure=cause("RDMA error 12"))
    assert board.failure(ROOM) == cause("RDMA error 12")


# ----------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("event", "code"),
    [
        (Aborted(), FailureCode.Aborted),
        (PeerLost(), FailureCode.PeerLost),
        (DeadlinePassed(), FailureCode.DeadlinePassed),
        (ProtocolError(), FailureCode.ProtocolError),
        (PartDone(is_last=True, all_ok=False), FailureCode.TransportFailed),
    ],
)
def test_a_failed_room_always_has_a_cause(event: LifecycleEvent, code: FailureCode) -> None:
    board, _ = board_in(KVPoll.Transferring)
    board.advance(ROOM, event)
    failure = board.failure(ROOM)
    assert failure is not None
    assert (failure.code, failure.state, failure.rank) == (code, KVPoll.Transferring, None)
    assert type(event).__name__ in failure.detail


def test_pain_25_the_first_failure_wins() -> None:
    board, generation = board_in(KVPoll.Transferring)
    board.advance(ROOM, PeerLost(), failure=cause("first"))
    board.advance(ROOM, Aborted(), failure=cause("second"))
    board.part_done(ROOM, is_last=True, polls=[False], generation=generation, failure=cause("third"))
    assert board.failure(ROOM) == cause("first")
    assert board.late_events == 2


def test_a_cause_without_a_failure_is_not_kept() -> None:
    board, _ = board_in(KVPoll.WaitingForInput)
    board.advance(ROOM, MORE, failure=cause("not yet"))
    board.advance(ROOM, LAST, failure=cause("not at all"))
    board.advance(ROOM, Aborted(), failure=cause("too late"))
    assert board.poll(ROOM) is KVPoll.Success
    assert board.failure(ROOM) is None


# ------------------------------------------------------------------------------- rooms and generations


@pytest.mark.parametrize("state", list(KVPoll))
def test_only_a_room_that_has_ended_is_opened_again(state: KVPoll) -> None:
    board, generation = board_in(state)
    failure = board.failure(ROOM)
    if state.is_terminal:
        assert board.open(ROOM) > generation
        assert board.poll(ROOM) is KVPoll.Bootstrapping
        assert board.failure(ROOM) is None
    else:
        with pytest.raises(DuplicateRoom) as caught:
            board.open(ROOM)
        assert caught.value.room == ROOM
        assert board.poll(ROOM) is state
        assert board.failure(ROOM) is failure
        assert board.advance(ROOM, Aborted(), generation=generation) is KVPoll.Failed
    assert len(board) == 1


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("cleared", [False, True])
def test_an_event_of_an_earlier_life_is_counted_and_changes_nothing(event: LifecycleEvent, cleared: bool) -> None:
    board, old = board_in(KVPoll.Failed)
    if cleared:
        board.clear(ROOM)
    new = board.open(ROOM)
    board.advance(ROOM, Bootstrapped(), generation=new)
    assert board.advance(ROOM, event, generation=old, failure=cause("old")) is KVPoll.WaitingForInput
    assert board.poll(ROOM) is KVPoll.WaitingForInput
    assert board.failure(ROOM) is None
    assert board.late_events == 1


def test_a_part_of_an_earlier_life_is_counted_and_changes_nothing() -> None:
    board, old = board_in(KVPoll.Success)
    board.open(ROOM)
    assert board.part_done(ROOM, is_last=True, polls=[True], generation=old) is KVPoll.Bootstrapping
    assert board.late_events == 1


def test_pain_05_a_late_event_does_not_bring_a_cleared_room_back() -> None:
    board, generation = board_in(KVPoll.Transferring)
    board.clear(ROOM)
    with pytest.raises(UnknownRoom):
        board.advance(ROOM, LAST, generation=generation)
    assert len(board) == 0
    assert board.late_events == 1


@pytest.mark.parametrize("wrong", [-1, 0, 2, 3, 1 << 70])
def test_a_generation_the_room_never_had_is_refused(wrong: int) -> None:
    board, generation = board_in(KVPoll.WaitingForInput)
    assert generation == 1
    assert board.open(7) == 2, "generations belong to the board, so room 42 never had this one"
    with pytest.raises(InvalidInput, match=f"no generation {wrong}"):
        board.advance(ROOM, LAST, generation=wrong)
    assert board.poll(ROOM) is KVPoll.WaitingForInput
    assert board.late_events == 0


def test_a_generation_nobody_had_is_refused_for_a_cleared_room_too() -> None:
    board, generation = board_in(KVPoll.Success)
    board.clear(ROOM)
    with pytest.raises(InvalidInput):
        board.advance(ROOM, LAST, generation=generation + 1)


def test_generations_never_go_back_and_only_open_rooms_are_kept() -> None:
    board = StatusBoard()
    generations = []
    for number in range(1000):
        room = number % 3
        generations.append(board.open(room))
        assert len(board) == 1
        board.clear(room)
    assert generations == sorted(set(generations))
    assert len(board) == 0
    assert not board._lives, "nothing is kept of rooms that were cleared"


UNKNOWN: dict[str, Callable[[StatusBoard], object]] = {
    "poll": lambda board: board.poll(ROOM),
    "failure": lambda board: board.failure(ROOM),
    "advance": lambda board: board.advance(ROOM, Aborted()),
    "part_done": lambda board: board.part_done(ROOM, is_last=True, polls=[True]),
}


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("cleared", [False, True])
def test_a_room_that_is_not_open_is_a_key_error_that_says_so(name: str, cleared: bool) -> None:
    board = StatusBoard()
    if cleared:
        board.open(ROOM)
        board.clear(ROOM)
    with pytest.raises(KeyError, match="room 42 is not open here") as caught:
        UNKNOWN[name](board)
    assert isinstance(caught.value, UnknownRoom)
    assert caught.value.room == ROOM
    assert len(board) == 0


def test_clear_may_be_repeated() -> None:
    board, _ = board_in(KVPoll.Transferring)
    board.clear(ROOM)
    board.clear(ROOM)
    board.clear(7)
    assert len(board) == 0


def test_poll_and_failure_change_nothing() -> None:
    board, _ = board_in(KVPoll.Failed)
    before = board.poll(ROOM), board.failure(ROOM), board.late_events, len(board)
    for _ in range(3):
        assert (board.poll(ROOM), board.failure(ROOM), board.late_events, len(board)) == before


def test_an_illegal_event_leaves_the_board_usable() -> None:
    board, _ = board_in(KVPoll.Bootstrapping)
    with pytest.raises(IllegalTransition):
        board.advance(ROOM, Resumed())
    assert board.advance(ROOM, Bootstrapped()) is KVPoll.WaitingForInput


# ------------------------------------------------------------------------------------------------ threads

THREADS = 8


def together(work: Callable[[int], object]) -> None:
    """Run `work(number)` in eight threads that start at the same moment; an error in any is raised."""
    barrier = threading.Barrier(THREADS)
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            barrier.wait()
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns after a few bytecodes, so that what is not locked shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("switching")
def test_one_of_eight_threads_opens_a_room_and_all_events_count() -> None:
    board = StatusBoard()
    rooms = range(500)
    opened: Counter[int] = Counter()
    given: list[int] = []

    def work(number: int) -> None:
        for room in rooms:
            try:
                given.append(board.open(room))
            except DuplicateRoom:
                continue
            opened[room] += 1

    together(work)
    assert len(given) == len(set(given)) == len(rooms) == len(board)
    assert sorted(opened) == list(rooms)


@pytest.mark.usefixtures("switching")
def test_of_eight_failures_the_first_stays_and_the_rest_are_counted() -> None:
    board = StatusBoard()
    rooms = range(100)
    for room in rooms:
        board.open(room)
    seen: list[set[Failure | None]] = [set() for _ in rooms]

    def work(number: int) -> None:
        for room in rooms:
            assert board.advance(room, PeerLost(), failure=cause(f"thread {number}")) is KVPoll.Failed
            seen[room].add(board.failure(room))

    together(work)
    assert board.late_events == (THREADS - 1) * len(rooms)
    assert all(len(failures) == 1 and None not in failures for failures in seen)


@pytest.mark.usefixtures("switching")
def test_eight_threads_live_and_reuse_rooms_side_by_side() -> None:
    """Each thread runs lives of a room of its own, reports late on earlier ones, and reads the others."""
    board = StatusBoard()
    lives = 50
    generations: list[list[int]] = [[] for _ in range(THREADS)]

    def work(number: int) -> None:
        old = None
        for life in range(lives):
            generation = board.open(number)
            generations[number].append(generation)
            board.advance(number, Bootstrapped(), generation=generation)
            if old is not None:
                assert board.advance(number, Aborted(), generation=old) is KVPoll.WaitingForInput
            board.part_done(number, is_last=False, polls=[True, True], generation=generation)
            for other in range(THREADS):
                try:
                    assert board.poll(other) in KVPoll
                except UnknownRoom:
                    assert other != number
            ok = life % 2 == 0
            end = board.part_done(number, is_last=True, polls=[True, ok], generation=generation)
            assert end is (KVPoll.Success if ok else KVPoll.Failed) is board.poll(number)
            assert (board.failure(number) is None) == ok
            board.clear(number)
            old = generation

    together(work)
    assert len(board) == 0
    assert board.late_events == THREADS * (lives - 1)
    assert all(own == sorted(own) for own in generations)
    assert len(set(itertools.chain.from_iterable(generations))) == THREADS * lives
