"""One end of an acquaintance: introduction, names, resends with growing pauses, what a peer overstates."""

from __future__ import annotations

from itertools import pairwise

import pytest

from kvpoll_fsm.channel import Channel
from kvpoll_fsm.connection import MAX_RESEND_TICKS, Connection, introduction, name_of
from kvpoll_fsm.deadlines import Deadlines
from kvpoll_fsm.layout import Field, Layout
from kvpoll_fsm.messages import BlockGrant, Bye, FieldSpec, Frame, Hello, TransportOffer, Welcome

DEADLINES = Deadlines()
OURS, PEER = b"o" * 16, b"p" * 16
LAYOUT = Layout(4, [Field("x", "int8"), Field("aux", "int64", (2,), per_room=True)])
OFFERS = (TransportOffer("tcp", b"there"), TransportOffer("shm", b"here"))


def connection(address: str | None = "peer") -> Connection:
    return Connection(1, Channel(OURS, None, outgoing=address is not None), address)


def welcome(layout: Layout = LAYOUT) -> Welcome:
    return Welcome(answers=OURS, **introduction(PEER, layout, OFFERS))


def test_who_called_whom() -> None:
    assert connection().outgoing
    assert not connection(None).outgoing


def test_an_introduction_tells_layout_and_offers() -> None:
    one = connection()
    assert one.peer is None
    one.silent_ticks = 3
    one.introduce(welcome())
    assert one.peer == PEER
    assert set(one.offers) == {"tcp", "shm"}
    assert (one.block_tokens, one.silent_ticks) == (4, 0)


def test_block_sizes_may_differ_and_fields_may_not() -> None:
    one = connection()
    other = Layout(99, [Field("x", "int16"), Field("aux", "int64", (2,), per_room=True)])
    hello = Hello(**introduction(PEER, other, ()))
    (difference,) = one.differences(LAYOUT, hello)
    assert "x" in difference
    assert one.differences(LAYOUT, welcome(Layout(1, LAYOUT.fields))) == ()


def test_a_dtype_that_is_unknown_here_is_a_difference() -> None:
    hello = Hello(**introduction(PEER, LAYOUT, ()) | {"fields": (FieldSpec("x", "int3", (2,), False),)})
    (difference,) = connection().differences(LAYOUT, hello)
    assert "int3" in difference


def test_each_connection_has_a_name_of_its_own() -> None:
    names = {name_of(incarnation, number) for incarnation in (OURS, PEER) for number in range(1, 100)}
    assert len(names) == 198
    assert not names & {OURS, PEER}
    assert {len(name) for name in names} == {16}


def resends(one: Connection, ticks: int) -> list[int]:
    """The ticks at which something was sent again."""
    return [tick for tick in range(ticks) if one.resend_tick()]


def test_what_is_not_acknowledged_is_sent_again_less_and_less_often() -> None:
    one = connection()
    one.channel.push(Bye())
    assert resends(one, 3) == []  # nobody is known yet
    one.introduce(welcome())
    one.channel.flush()
    at = resends(one, 60)
    pauses = [after - before for before, after in pairwise(at)]
    assert pauses == sorted(pauses)
    assert pauses[:3] == [3, 5, 9]
    assert set(pauses[3:]) == {MAX_RESEND_TICKS + 1}


def test_hello_is_said_again_soon_and_then_less_and_less_often() -> None:
    """In ten minutes without a sender 300 pile up, not 2,400."""
    one = connection()
    at = [tick for tick in range(60) if one.hello_tick()]
    assert at[:4] == [0, 2, 6, 14]
    assert {after - before for before, after in pairwise(at[3:])} == {MAX_RESEND_TICKS}
    one.introduce(welcome())
    one.channel.push(Bye())
    one.channel.flush()
    assert resends(one, 3) == [1], "what is lost then is sent again soon"


def test_progress_makes_resends_prompt_again() -> None:
    one = connection()
    one.introduce(welcome())
    for _ in range(2):
        one.channel.push(Bye())
    one.channel.flush()
    resends(one, 20)
    one.channel.accept(Frame(PEER, OURS, outgoing=False, ack=1))
    assert resends(one, 3) == [2]
    one.channel.accept(Frame(PEER, OURS, outgoing=False, ack=2))
    assert resends(one, 20) == []


def ticks_until(one: Connection, *, busy: bool) -> tuple[int, str]:
    """How many ticks it takes until the connection is to end, and why."""
    for tick in range(1, 100):
        reason = one.tick(DEADLINES, busy=busy)
        if reason:
            return tick, reason
    return 0, ""


def test_a_silent_peer_is_lost_after_its_time() -> None:
    one = connection()
    assert ticks_until(one, busy=True) == (0, "")  # nobody is missed who was never there
    one.introduce(welcome())
    assert ticks_until(one, busy=True) == (6, "the peer was not heard for 5 s")


def test_the_caller_ends_what_is_idle() -> None:
    one = connection()
    assert ticks_until(one, busy=False) == (31, "idle")
    assert one.tick(DEADLINES, busy=True) == ""
    assert ticks_until(one, busy=False) == (31, "idle")
    assert ticks_until(connection(None), busy=False) == (0, "")


@pytest.mark.parametrize("tokens", [8, 9])
def test_a_grant_holds_no_more_than_its_blocks(tokens: int) -> None:
    one = connection(None)
    one.introduce(welcome())
    grant = BlockGrant(3, tokens, (7, 1), (("tcp", b"t"),))
    problem = "" if tokens == 8 else "a grant of 9 tokens in 2 blocks of 4 for part 3"
    assert one.problem_of(grant) == problem
    assert one.problem_of(None) == ""


def test_a_copy_shares_nothing() -> None:
    one = connection()
    one.introduce(welcome())
    one.channel.push(Bye())
    copy, before = one.clone(), one.key()
    assert copy.key() == before
    assert hash(before) == hash(copy.key())
    one.channel.flush()
    one.offers.clear()
    assert copy.key() == before != one.key()
    assert (copy.number, copy.address, copy.block_tokens) == (1, "peer", 4)
    assert resends(copy, 9) != []
