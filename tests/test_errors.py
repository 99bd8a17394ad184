"""The tree of errors, their fields and texts."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from typing import Any

import pytest

from kvpoll_fsm import errors
from kvpoll_fsm.errors import Failure, FailureCode, KvpollError
from kvpoll_fsm.events import Resumed
from kvpoll_fsm.poll import KVPoll

FAILURE = Failure.of(FailureCode.PeerLost, "silence for 5 s", state=KVPoll.Transferring, rank=3)

FIELDS: dict[type[KvpollError], dict[str, Any]] = {
    errors.IllegalTransition: {"state": KVPoll.Bootstrapping, "event": Resumed()},
    errors.LayoutError: {"field": "ids", "problem": "unknown dtype 'int7'"},
    errors.LayoutMismatch: {"differences": ("ids: int32 here, int64 there", "aux: missing there")},
    errors.DoubleFree: {"lease": ("room", 7)},
    errors.ForeignBlock: {"blocks": (7, 8), "problem": "an id is named twice"},
    errors.RequestTooLarge: {"wanted_blocks": 65, "pool_blocks": 64},
    errors.AddressError: {"address": "tcp://0.0.0.0:1", "problem": "wildcard"},
    errors.PolicyError: {"policy": "fastest", "problem": "unknown mode"},
    errors.ConfigError: {"source": "environment", "key": "KVPOLL_WORKERS", "value": "x", "problem": "give an integer"},
    errors.DuplicateRoom: {"side": "receiver", "room": 42, "rank": 1},
    errors.UnknownRoom: {"room": 42},
    errors.TransportUnavailable: {"name": "mooncake", "problem": "not installed", "hint": "pip install it"},
    errors.MalformedMessage: {"problem": "not a packet"},
    errors.UnsupportedVersion: {"ours": (1, 2), "theirs": (3, 4)},
    errors.LimitReached: {"name": "callees", "limit": 9},
    errors.ChannelOverflow: {"limit": 8},
    errors.TransferFailed: {"room": 42, "failure": FAILURE},
    errors.EndpointClosed: {"cause": "the driver ended"},
    errors.ForkedError: {"owner_pid": 100, "pid": 101},
    errors.MoverUnavailable: {"problem": "python cannot be started"},
}
"""The arguments of each error that has fields; they are its fields."""

SAMPLES: list[KvpollError] = [
    KvpollError("root"),
    errors.InvalidInput("tokens=0"),
    errors.BlockError("a lease is given once"),
    *(kind(**given) for kind, given in FIELDS.items()),
]


def real_tree(root: type[KvpollError]) -> dict[str, str]:
    """Name of each error of the module to the name of its parent."""
    tree: dict[str, str] = {}
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            tree[child.__name__] = root.__name__
            tree |= real_tree(child)
    return tree


def drawn_tree(text: str) -> dict[str, str]:
    tree: dict[str, str] = {}
    parents = ["KvpollError"]
    for branch, name in re.findall(r"^([│├└─ ]+)(\w+) ", text, re.MULTILINE):
        depth = len(branch) // 4
        tree[name] = parents[depth - 1]
        parents[depth:] = [name]
    return tree


def test_drawn_tree_is_the_real_tree() -> None:
    assert drawn_tree(errors.__doc__ or "") == real_tree(KvpollError)


def test_every_error_is_public_and_sampled_here() -> None:
    names = {*real_tree(KvpollError), "KvpollError"}
    assert names | {"Failure", "FailureCode"} == set(errors.__all__)
    assert names == {type(sample).__name__ for sample in SAMPLES}


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("again", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_survives_pickle_and_copy_with_fields(error: KvpollError, again: object) -> None:
    twin = again(error)  # type: ignore[operator]
    assert type(twin) is type(error)
    assert vars(twin) == vars(error)
    assert str(twin) == str(error)
    assert twin.args == error.args


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
def test_fields_are_what_was_given_and_the_text_is_a_sentence_that_shows_them(error: KvpollError) -> None:
    (text,) = error.args
    assert str(error) == text, "not the repr, as KeyError has it"
    for name, value in FIELDS.get(type(error), {}).items():
        assert getattr(error, name) == value
        for part in value if isinstance(value, tuple) else (value,):
            assert str(part) in text


def test_wrong_arguments_are_value_errors_and_unknown_rooms_key_errors() -> None:
    for error in SAMPLES:
        assert isinstance(error, ValueError) == isinstance(error, errors.InvalidInput)
        assert isinstance(error, KeyError) == isinstance(error, errors.UnknownRoom)


def test_transport_unavailable_without_hint() -> None:
    assert str(errors.TransportUnavailable("x", "unknown")) == "transport 'x': unknown"


def test_layout_mismatch_without_differences_has_a_field() -> None:
    assert errors.LayoutMismatch(()).field == "?"
    assert errors.LayoutMismatch(("ids: int32 here", "aux: missing")).field == "ids"


RETRYABLE = {
    FailureCode.Displaced,
    FailureCode.PeerLost,
    FailureCode.MoverLost,
    FailureCode.OutcomeUnknown,
    FailureCode.DeadlinePassed,
    FailureCode.TransportFailed,
    FailureCode.ChecksumMismatch,
    FailureCode.PoolExhausted,
    FailureCode.LimitReached,
}


def test_codes_travel_and_never_change() -> None:
    others = ["Aborted", "ProtocolError", "TransportUnavailable", "LayoutMismatch", "UnsupportedVersion"]
    others += ["RequestTooLarge", "InternalError", "Unknown"]
    assert {code.value for code in FailureCode} == {code.value for code in RETRYABLE} | set(others)


@pytest.mark.parametrize("code", list(FailureCode))
def test_failure_knows_whether_to_retry(code: FailureCode) -> None:
    failure = Failure.of(code, "why", state=KVPoll.WaitingForInput)
    assert failure.retryable == (code in RETRYABLE)
    assert code.value == code.name == str(code)
    assert str(failure).startswith(f"{code} on sender in WaitingForInput ")


def test_failure_names_its_rank() -> None:
    assert str(FAILURE) == "PeerLost on rank 3 in Transferring (retryable): silence for 5 s"


def test_failure_is_a_frozen_value() -> None:
    assert pickle.loads(pickle.dumps(FAILURE)) == FAILURE
    assert hash(copy.deepcopy(FAILURE)) == hash(FAILURE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        FAILURE.detail = "another"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("x" * 1000, "x" * 1000),
        ("x" * 1001, "x" * 1000),
        ("ü" * 5000, "ü" * 1000),
        ("no such file: \udc80", "no such file: ?"),
        ("x" * 999 + "\ud800\udc00", "x" * 999 + "?"),
    ],
)
def test_failure_detail_is_bounded_and_can_be_sent(given: str, kept: str) -> None:
    direct = Failure(FailureCode.Aborted, None, KVPoll.Failed, False, given)
    assert direct == Failure.of(FailureCode.Aborted, given, state=KVPoll.Failed)
    assert direct.detail == kept
    assert direct.detail.encode()
    assert dataclasses.replace(direct, detail=given) == direct
