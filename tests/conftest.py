"""Fixtures every test can use."""

from collections.abc import Iterator

import pytest

from tests.support.rank_pool import RankPool


@pytest.fixture(scope="session")
def ranks1() -> Iterator[RankPool]:
    """One gloo rank: a process of its own, so that a run leaves nothing in pytest's."""
    with RankPool(1) as pool:
        yield pool


@pytest.fixture(scope="session")
def ranks2() -> Iterator[RankPool]:
    """Two connected gloo ranks, started by the first case that uses them."""
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def ranks4() -> Iterator[RankPool]:
    """Four connected gloo ranks, started by the first case that uses them."""
    with RankPool(4) as pool:
        yield pool
