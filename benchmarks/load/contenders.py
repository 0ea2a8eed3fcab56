"""Ways to load a checkpoint on several ranks, and what each takes of memory and time.

Every way ends with a bf16 model in memory, ready for its first step. A rank is a process of its
own, forked from one that has imported the libraries and computed nothing.
"""

import gc
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.models.mixtral import modeling_mixtral  # noqa: F401  (part of a bare process)

from benchmarks.harness.workload import Workload
from megablocks_utils.checkpoint.layouts import is_expert_parameter
from megablocks_utils.config import parse_args, parse_known_args
from megablocks_utils.mesh.placement import local_tensor
from megablocks_utils.processes.launch import check_environment
from megablocks_utils.processes.start import start_processes
from megablocks_utils.training.loop import build_training_state
from megablocks_utils.training.setup import Setup, build_setup
from megablocks_utils.training.trainer import MoETrainer
from megablocks_utils.training.trainer_arguments import build_trainer_arguments, parse_trainer_flags

OURS = ("ours, FSDP2", "ours, FSDP1")
BROADCAST = "ours, FSDP2, dense weights by broadcast"
STOCK = "from_pretrained in every rank"
STOCK_SHARDED = "from_pretrained, sharded"
_TIMEOUT = timedelta(minutes=3)
_RESET_PEAK = "5"  # proc(5): the high-water mark begins again at what is resident now


@dataclass(frozen=True)
class Job:
    """A load: by which side, by how many ranks, of what, and where they meet and answer."""

    side: str
    world_size: int
    workload: Workload
    folder: Path
    meeting: Path


def measure_load(job: Job) -> list[dict[str, float]]:
    """Load on fresh processes and return what each rank saw.

    Returns:
        By rank: `bare_bytes` and `peak_bytes` resident before and at most while it loaded,
        `own_bytes` of the weights it holds then, and `seconds` until the last rank was done.

    Raises:
        ProcessRaisedException: a rank has failed.
        ProcessExitedException: a rank has died.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    multiprocessing.start_processes(
        _be_rank, (job,), nprocs=job.world_size, start_method="forkserver"
    )
    return [json.loads(_answer(job, rank).read_text()) for rank in range(job.world_size)]


def _be_rank(rank: int, job: Job) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(job.world_size),
        LOCAL_WORLD_SIZE=str(job.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",  # read, but never opened: the ranks meet in a file
    )
    torch.set_num_threads(1)
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    dist.init_process_group(
        "gloo",
        init_method=(job.meeting / "store").as_uri(),
        rank=rank,
        world_size=job.world_size,
        timeout=_TIMEOUT,
    )
    _answer(job, rank).write_text(json.dumps(_watch(job)))
    dist.barrier()
    dist.destroy_process_group()


def _watch(job: Job) -> dict[str, float]:
    gc.collect()
    dist.barrier()
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    bare, start = _resident("VmRSS"), time.perf_counter()
    model = _SIDES[job.side](job)
    peak = _resident("VmHWM")
    dist.barrier()
    seconds = time.perf_counter() - start
    own = sum(local_tensor(parameter.detach()).nbytes for parameter in model.parameters())
    return {"bare_bytes": bare, "peak_bytes": peak, "own_bytes": own, "seconds": seconds}


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith(field))
    return int(kilobytes) * 1024


def _answer(job: Job, rank: int) -> Path:
    return job.meeting / f"rank-{rank}.json"


def _load_fsdp2(job: Job, change: Callable[[Setup], Setup] = lambda setup: setup) -> nn.Module:
    config = parse_args([*_words(job), "--expert_dp", "shard"], entry_point="fsdp2")
    launch = check_environment(config)
    setup = change(build_setup(config, launch, start_processes(launch)))
    return build_training_state(setup).model


def _load_fsdp1(job: Job) -> nn.Module:
    config, leftovers = parse_known_args(_words(job), entry_point="fsdp1")
    launch = check_environment(config)
    device = start_processes(launch)
    arguments = build_trainer_arguments(parse_trainer_flags(leftovers), config, device.type)
    setup = build_setup(config, launch, device)
    return MoETrainer(setup, arguments, lambda metrics: None).model


def _load_with_broadcast(job: Job) -> nn.Module:
    return _load_fsdp2(job, lambda setup: replace(setup, fill_local=_broadcast_dense(setup)))


def _broadcast_dense(setup: Setup) -> Callable[[str, Tensor, tuple[int, ...]], None]:
    """Let rank 0 read what is not an expert and send it to all, who keep their part."""
    specs = {name: (shape, dtype) for name, shape, dtype in setup.parameter_specs}

    def fill_local(name: str, local: Tensor, offsets: tuple[int, ...]) -> None:
        if is_expert_parameter(name):
            setup.fill_local(name, local, offsets)
            return
        shape, dtype = specs[name]
        whole = torch.empty(shape, dtype=dtype)
        if setup.launch.rank == 0:
            setup.fill_local(name, whole, (0,) * len(shape))
        dist.broadcast(whole, 0)
        for dim, offset in enumerate(offsets):
            whole = whole.narrow(dim, offset, local.shape[dim])
        local.copy_(whole)

    return fill_local


def _load_stock(job: Job) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(job.folder / "model", dtype=torch.bfloat16)


def _load_stock_sharded(job: Job) -> nn.Module:
    size = job.world_size
    return AutoModelForCausalLM.from_pretrained(
        job.folder / "model",
        dtype=torch.bfloat16,
        distributed_config=DistributedConfig(fsdp_size=size, ep_size=size),
    )


_SIDES: dict[str, Callable[[Job], nn.Module]] = {
    OURS[0]: _load_fsdp2,
    OURS[1]: _load_fsdp1,
    BROADCAST: _load_with_broadcast,
    STOCK: _load_stock,
    STOCK_SHARDED: _load_stock_sharded,
}
SIDES = tuple(_SIDES)


def _words(job: Job) -> list[str]:
    options = {
        "model_name_or_path": job.folder / "model",
        "data_path": job.folder / "data.jsonl",
        "output_dir": job.folder / "output",
        "use_megablocks_sharding": True,
        "ep_size": job.world_size,
        "precision": "bf16",
        "max_steps": 1,
        "verify_kernel": False,  # no part of loading, and it takes memory of its own
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]
