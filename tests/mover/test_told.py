from __future__ import annotations

import msgspec
import pytest

from kvpoll_fsm import InvalidInput, KvpollError, MoverUnavailable, PolicyError, TransportUnavailable
from kvpoll_fsm.mover.frames import Refused
from kvpoll_fsm.mover.told import error_of, refusal


@pytest.mark.parametrize(
    "error",
    [
        TransportUnavailable("mooncake", "is not installed", "pip install it"),
        PolicyError("fastest:tcp", "unknown mode 'fastest'"),
        InvalidInput("workers=0: give 1 to 64 threads"),
        MoverUnavailable("it has ended"),
    ],
)
def test_an_error_is_raised_as_what_it_is(error: KvpollError) -> None:
    frame = msgspec.msgpack.decode(msgspec.msgpack.encode(refusal(error)), type=Refused)
    told = error_of(frame)
    assert type(told) is type(error)
    assert str(told) == str(error)
    assert vars(told) == vars(error)


def test_what_is_none_of_our_errors_is_told_by_name() -> None:
    told = error_of(refusal(ZeroDivisionError("division by zero")))
    assert isinstance(told, MoverUnavailable)
    assert "ZeroDivisionError: division by zero" in str(told)


def test_an_error_that_only_the_mover_knows_is_one_of_ours_all_the_same() -> None:
    told = error_of(Refused("Invented", ["what went wrong"], {}))
    assert type(told) is KvpollError
    assert str(told) == "what went wrong"
