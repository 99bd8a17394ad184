from __future__ import annotations

import json

import pytest

import kvpoll_fsm
from tests.helpers import run_script

NAMES = """
import json, sys
{imports}
print(json.dumps(sorted(sys.modules)))
"""
HEAVY = ("torch", "zmq", "numpy", "xxhash", "asyncio", "concurrent", "multiprocessing", "subprocess", "socket")
EDGE = ("arena", "arrays", "config", "control", "driver", "endpoint", "handles", "recorder", "security", "staging")
TRANSPORTS = ("kvpoll_memory", "kvpoll_tcp", "kvpoll_shm", "kvpoll_mooncake")


def modules_after(imports: str) -> set[str]:
    """The modules a fresh process has after these statements."""
    done = run_script(NAMES.format(imports=imports), measured=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_the_package_alone_is_light() -> None:
    modules = modules_after("import kvpoll_fsm")
    assert not modules & {*HEAVY, *TRANSPORTS}
    assert not modules & {f"kvpoll_fsm.{name}" for name in EDGE}


def test_the_core_without_tensors_is_light() -> None:
    statements = """
from kvpoll_fsm import Bootstrapped, KVPoll, Lifecycle, PartDone, StatusBoard, outcome, reduce_ranks
board = StatusBoard()
board.open(1)
assert board.advance(1, Bootstrapped()) is KVPoll.WaitingForInput
assert board.part_done(1, is_last=True, polls=[True, True]) is KVPoll.Success
assert outcome(True, [True]) is KVPoll.Success
assert reduce_ranks([KVPoll.Success, KVPoll.Failed]) is KVPoll.Failed
assert Lifecycle().apply(Bootstrapped()) is KVPoll.WaitingForInput
"""
    assert not modules_after(statements) & {"torch", "zmq", "numpy", "socket", *TRANSPORTS}


def test_an_endpoint_imports_the_transports_it_was_told_and_no_torch() -> None:
    statements = """
from kvpoll_fsm import BlockPool, Endpoint, Field, Layout
assert not [name for name in sys.modules if name.startswith("kvpoll_tcp")]
with Endpoint(pool=BlockPool(Layout(4, [Field("ids", "int32")]), blocks=2), transports="memory"):
    pass
"""
    modules = modules_after(statements)
    assert "kvpoll_memory" in modules
    assert not modules & {"torch", "kvpoll_tcp", "multiprocessing"}


def test_all_names_what_is_there() -> None:
    assert len(set(kvpoll_fsm.__all__)) == len(kvpoll_fsm.__all__)
    for name in kvpoll_fsm.__all__:
        assert getattr(kvpoll_fsm, name) is not None
    assert set(kvpoll_fsm.__all__) <= set(dir(kvpoll_fsm))
    star: dict[str, object] = {}
    exec("from kvpoll_fsm import *", star)
    assert set(star) - {"__builtins__"} == set(kvpoll_fsm.__all__)


def test_nothing_public_is_missing_from_all() -> None:
    public = {
        name
        for name, value in vars(kvpoll_fsm).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("kvpoll_fsm")
    }
    assert public <= set(kvpoll_fsm.__all__)


@pytest.mark.parametrize("name", sorted(kvpoll_fsm._LAZY))
def test_lazy_names_resolve_in_a_fresh_process(name: str) -> None:
    script = f"""
import kvpoll_fsm
assert {name!r} not in vars(kvpoll_fsm)
assert {name!r} in dir(kvpoll_fsm) and {name!r} in kvpoll_fsm.__all__
from kvpoll_fsm import {name}
assert kvpoll_fsm.{name} is {name} and {name}.__name__ == {name!r}
assert {name!r} in vars(kvpoll_fsm)
"""
    done = run_script(script)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'kvpoll_fsm' has no attribute 'Sendr'"):
        kvpoll_fsm.Sendr  # noqa: B018


def test_every_error_is_public() -> None:
    errors = {
        name
        for name, value in vars(kvpoll_fsm.errors).items()
        if isinstance(value, type) and issubclass(value, kvpoll_fsm.KvpollError)
    }
    assert errors <= set(kvpoll_fsm.__all__)
