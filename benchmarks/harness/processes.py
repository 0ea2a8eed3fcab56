"""Ranks on this machine: a process group of this process alone, or connected fresh processes."""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

_TIMEOUT = timedelta(minutes=5)
_UNUSED_PORT = 29500  # read from the environment, but never opened: the ranks meet in a file


def as_words(options: Mapping[str, Any]) -> list[str]:
    """Return options as words of a command line."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@contextmanager
def single_process(device: torch.device) -> Iterator[None]:
    """Be a process group of one rank, which `shard_moe` needs."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank_environment(rank: int, world_size: int, port: int = _UNUSED_PORT) -> dict[str, str]:
    """Return the variables that torchrun would set for a rank on this machine."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank}
    sizes = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_PORT": port}
    numbers = {name: str(value) for name, value in (ranks | sizes).items()}
    return numbers | {"MASTER_ADDR": "127.0.0.1"}


def run_ranks(work: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Call `work(*arguments)` on connected gloo ranks, each a fresh process with one thread.

    Args:
        work: importable from its module; returns what JSON can hold. Ranks are forked from a
            process that has imported that module and computed nothing.
        world_size: number of ranks.
        arguments: can be pickled.

    Returns:
        What `work` returned, by rank.

    Raises:
        ProcessRaisedException: a rank has failed.
        ProcessExitedException: a rank has died.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([work.__module__])
    with tempfile.TemporaryDirectory() as name:
        multiprocessing.start_processes(
            _be_rank,
            (Path(name), work, world_size, arguments),
            nprocs=world_size,
            start_method="forkserver",
        )
        return [json.loads(_answer(Path(name), rank).read_text()) for rank in range(world_size)]


def _be_rank(
    rank: int,
    folder: Path,
    work: Callable[..., Any],
    world_size: int,
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(rank_environment(rank, world_size))
    torch.set_num_threads(1)
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    dist.init_process_group(
        "gloo",
        init_method=(folder / "store").as_uri(),
        rank=rank,
        world_size=world_size,
        timeout=_TIMEOUT,
    )
    _answer(folder, rank).write_text(json.dumps(work(*arguments)))
    dist.barrier()
    dist.destroy_process_group()


def _answer(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"
