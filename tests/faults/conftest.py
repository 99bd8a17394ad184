"""Fixtures of the fault tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.harness import Cluster
from tests.faults.processes import Mother
from tests.faults.proxy import Proxy


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
