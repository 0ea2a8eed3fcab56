"""What a dry run trains in the place of real models: the smallest model that has every part."""

from pathlib import Path

from benchmarks.harness.workload import Workload

DRY_WORKLOAD = Workload(
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_experts=4,
    vocab_size=64,
    num_examples=32,
    longest_tokens=24,
    global_batch=4,
    per_device_batch=2,
)


def save_dry_config(folder: Path) -> Path:
    """Write the model's `config.json` to a folder, and return the folder."""
    DRY_WORKLOAD.build_config().save_pretrained(folder)
    return folder
