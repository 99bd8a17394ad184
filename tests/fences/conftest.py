"""Fixtures of the tests of fences: processes as in the fault tests, whose blocks are watched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.harness import Cluster
from tests.faults.processes import Mother
from tests.faults.proxy import Proxy


@pytest.fixture(scope="session")
def fence_mother() -> Iterator[Mother]:
    made = Mother("tests.fences.worker")
    yield made
    made.close()


@pytest.fixture
def cluster(fence_mother: Mother) -> Iterator[Cluster]:
    """Processes that are ended with the test; none may have written a traceback or a warning."""
    made = Cluster(fence_mother)
    try:
        yield made
    finally:
        made.end()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy() as made:
        yield made


@pytest.fixture
def control() -> Iterator[Proxy]:
    with Proxy() as made:
        yield made
