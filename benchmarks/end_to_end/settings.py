"""What all systems of a comparison have in common."""

from dataclasses import dataclass
from pathlib import Path

from transformers.distributed import DistributedConfig

from benchmarks.harness.processes import as_words
from benchmarks.harness.workload import Workload
from megablocks_utils.config import RunConfig

LEARNING_RATE = 1e-4
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Case:
    """One comparison: all but the number of processes as the options of the same names."""

    world_size: int
    ep_size: int
    use_lora: str = "none"
    gradient_checkpointing: str = "False"
    precision: str = "fp32"

    def label(self) -> str:
        """Name the case in a line, for selection and logs."""
        return (
            f"{self.world_size} ranks, ep {self.ep_size}, lora {self.use_lora}, "
            f"checkpointing {self.gradient_checkpointing}, {self.precision}"
        )


def build_arguments(
    case: Case, workload: Workload, folder: Path, *, output: str, max_steps: int
) -> list[str]:
    """Return the command line of our step, which every revision of the script understands.

    Args:
        case: which.
        workload: what is trained.
        folder: that holds its model and data.
        output: name of a folder in it, of this system alone.
        max_steps: of the run.
    """
    accumulation = max(1, workload.global_batch // (workload.per_device_batch * case.world_size))
    options = {
        "model_name_or_path": folder / "model",
        "data_path": folder / "data.jsonl",
        "output_dir": folder / output,
        "use_megablocks_sharding": True,
        "ep_size": case.ep_size,
        "use_lora": case.use_lora,
        "gradient_checkpointing": case.gradient_checkpointing,
        "precision": case.precision,
        "per_device_train_batch_size": workload.per_device_batch,
        "gradient_accumulation_steps": accumulation,
        "max_steps": max_steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": MAX_GRAD_NORM,
        "router_aux_loss_coef": 0,
    }
    return as_words(options)


def shard_config(config: RunConfig, world_size: int) -> DistributedConfig | None:
    """Return how transformers shards the model; None in one process."""
    if world_size == 1:
        return None
    return DistributedConfig(fsdp_size=world_size, ep_size=config.parallel.ep_size)
