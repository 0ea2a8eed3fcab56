"""Ways to load a checkpoint on several ranks, and what each takes of memory and time.

Every way ends with a bf16 model in memory, ready for its first step.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.models.mixtral import modeling_mixtral  # noqa: F401  (part of a bare process)

from benchmarks.harness.memory import reset_peak_resident
from benchmarks.harness.processes import as_words
from megablocks_utils.config import parse_args, parse_known_args
from megablocks_utils.mesh.placement import local_tensor
from megablocks_utils.processes.launch import check_environment
from megablocks_utils.processes.start import start_processes
from megablocks_utils.training.loop import build_training_state
from megablocks_utils.training.report.memory import read_memory
from megablocks_utils.training.setup import Setup, build_setup
from megablocks_utils.training.trainer import MoETrainer
from megablocks_utils.training.trainer_arguments import build_trainer_arguments, parse_trainer_flags

OURS = ("ours, FSDP2", "ours, FSDP1")
BROADCAST = "ours, FSDP2, dense weights by broadcast"
STOCK = "from_pretrained in every rank"
STOCK_SHARDED = "from_pretrained, sharded"
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Job:
    """A load: by which contender, by how many ranks, from which folder."""

    name: str
    world_size: int
    folder: Path


def measure_load(job: Job) -> dict[str, float]:
    """Load on one rank and return what it took.

    **Collective:** every rank must call.

    Returns:
        `bare_bytes` and `peak_bytes` resident before and at most while it loaded, `own_bytes` of
        the weights it holds then, and `seconds` until the last rank was done.
    """
    gc.collect()
    dist.barrier()
    reset_peak_resident()
    bare, start = read_memory(_CPU).allocated_bytes, time.perf_counter()
    model = _LOADERS[job.name](job)
    peak = read_memory(_CPU).peak_bytes
    dist.barrier()
    seconds = time.perf_counter() - start
    own = sum(local_tensor(parameter.detach()).nbytes for parameter in model.parameters())
    return {"bare_bytes": bare, "peak_bytes": peak, "own_bytes": own, "seconds": seconds}


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
    model = MoETrainer(setup, arguments, lambda metrics: None).model
    assert model is not None
    return model


def _load_with_broadcast(job: Job) -> nn.Module:
    return _load_fsdp2(job, lambda setup: replace(setup, fill_local=_broadcast_dense(setup)))


def _broadcast_dense(setup: Setup) -> Callable[[str, Tensor, tuple[int, ...]], None]:
    """Let rank 0 read what is not an expert and send it to all, who keep their part."""
    specs = {name: (shape, dtype) for name, shape, dtype in setup.parameter_specs}
    experts = setup.expert_parameters().keys()

    def fill_local(name: str, local: Tensor, offsets: tuple[int, ...]) -> None:
        if name in experts:
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


_LOADERS: dict[str, Callable[[Job], nn.Module]] = {
    OURS[0]: _load_fsdp2,
    OURS[1]: _load_fsdp1,
    BROADCAST: _load_with_broadcast,
    STOCK: _load_stock,
    STOCK_SHARDED: _load_stock_sharded,
}
CONTENDERS = tuple(_LOADERS)


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
    return as_words(options)
