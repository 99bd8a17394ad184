"""Settings shared by all tests, and where endpoints run their drivers: in a thread, or in a process of their own."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import settings

from kvpoll_fsm import InvalidInput
from tests.helpers import ISOLATION

# The default: the same examples on every run, so that a red run is red again.
settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
# A deeper search with fresh examples, by hand or nightly: pytest --hypothesis-profile=long
settings.register_profile("long", max_examples=5_000, derandomize=False, deadline=None, print_blob=True)
settings.load_profile("ci")

INSIDE = "looks inside the driver, which is in another process"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--isolation", choices=["thread", "process"], default="thread", help="where endpoints run")
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too; --isolation process does")


def pytest_configure(config: pytest.Config) -> None:
    os.environ[ISOLATION] = str(config.getoption("--isolation"))  # for processes that tests start, too
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells leave it for what they start with &
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests marked `both` run in both isolations; first of all fixtures, for others may make endpoints."""
    if metafunc.definition.get_closest_marker("both") and metafunc.config.getoption("--isolation") == "thread":
        metafunc.fixturenames.insert(0, "isolation")
        metafunc.parametrize("isolation", ["thread", "process"], indirect=True)


@pytest.fixture
def isolation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where this test's endpoints run."""
    before, os.environ[ISOLATION] = os.environ[ISOLATION], getattr(request, "param", os.environ[ISOLATION])
    yield os.environ[ISOLATION]
    os.environ[ISOLATION] = before


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes long, and what is for a thread alone where drivers are to run in processes."""
    isolation = config.getoption("--isolation")
    slow = config.getoption("--slow") or isolation == "process"
    left_out = {
        item
        for item in items
        if _of_a_thread(item, isolation) or (item.get_closest_marker("slow") is not None and not slow)
    }
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def _of_a_thread(item: pytest.Item, isolation: str | None) -> bool:
    given = getattr(getattr(item, "callspec", None), "params", {})
    if given.get("isolation", isolation) != "process":
        return False
    return given.get("transport") == "memory" or item.get_closest_marker("inside") is not None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, None, None]:
    with _outside():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    with _outside():
        yield


@contextmanager
def _outside() -> Iterator[None]:
    """What asks for a driver that is in another process is skipped, and says so."""
    try:
        yield
    except (InvalidInput, AssertionError) as error:
        if os.environ[ISOLATION] == "process" and "the driver runs in a process of its own" in str(error):
            pytest.skip(INSIDE)
        raise
