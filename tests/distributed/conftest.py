"""Fixtures of the tests that run whole training runs on the pools."""

import pytest

from tests.support.parity import ParityFolder
from tests.support.rank_pool import RankPool


@pytest.fixture(scope="session")
def pools(ranks1: RankPool, ranks2: RankPool, ranks4: RankPool) -> dict[int, RankPool]:
    """The pools by their number of ranks."""
    return {1: ranks1, 2: ranks2, 4: ranks4}


@pytest.fixture(scope="session")
def parity_folder(tmp_path_factory: pytest.TempPathFactory) -> ParityFolder:
    """Tiny models, data and reference runs, each made once."""
    return ParityFolder(tmp_path_factory.mktemp("parity"))
