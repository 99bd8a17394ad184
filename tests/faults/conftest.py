"""Fixtures of the fault tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.harness import Cluster
from tests.faults.processes import Mother
from tests.faults.proxy import Proxy
from tests.faults.relay import Relay, missing


@pytest.fixture(scope="session")
def mother() -> Iterator[Mother]:
    made = Mother()
    yield made
    made.close()


@pytest.fixture
def cluster(mother: Mother) -> Iterator[Cluster]:
    """Processes that are ended with the test; none may have written a traceback or a warning."""
    made = Cluster(mother)
    try:
        yield made
    finally:
        made.end()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy() as made:
        yield made


@pytest.fixture
def relay() -> Iterator[Relay]:
    """Three hosts on a network of our own, in fine weather."""
    problem = missing()
    if problem:
        pytest.skip(problem)
    with Relay(hosts=3) as made:
        yield made
