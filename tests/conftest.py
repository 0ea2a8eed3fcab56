"""Fixtures every test can use."""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides once, when it is imported; what imports it must come after this.
    os.environ["TRITON_INTERPRET"] = "1"
    assert "triton" not in sys.modules
    import tests.support.triton_interpreter  # noqa: F401

from tests.support.rank_pool import RankPool


def pytest_configure(config: pytest.Config) -> None:
    """Compute on one thread, here and in the processes that tests start.

    Threads of one small operator wait for each other by spinning. Beside ranks and a second
    worker, which want the same cores, references took up to ten times as long with two.
    """
    hide_gpus_from_processes(config)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    # Tokens that tests leave there are not for this machine's user.
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-cache-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
    gc.disable()  # until all is imported: going through it again and again takes seconds


def hide_gpus_from_processes(config: pytest.Config) -> None:
    """Let processes that tests start compute on the CPU: a machine may have fewer GPUs than ranks.

    This process has looked at its own by then, which `tests/gpu` uses; workers of xdist look too.
    """
    if torch.cuda.is_available() and not getattr(config.option, "numprocesses", None):
        torch.cuda.init()
        torch.cuda.device_count()  # torch remembers it
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish() -> None:
    """Spare the garbage collector what collecting the tests has imported."""
    gc.collect()
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)  # see `tests.support.frozen_imports`


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
