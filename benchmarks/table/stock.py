"""Train with transformers' own expert parallelism: the baseline of the table.

    torchrun --nproc_per_node=8 -m benchmarks.table.stock --use_megablocks_sharding True ...

Takes the options of `train_accelerate_fsdp2.py`, and writes the same two kinds of numbers to
`--output_dir`: `metrics.jsonl` and `run.json`. It saves no model. What is added to transformers is
what its training needs to be one: gradients of adapters are averaged over the ranks, and the norm
is taken over both meshes (`benchmarks.end_to_end.contenders`).
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.end_to_end.contenders import StockStep
from benchmarks.end_to_end.settings import LEARNING_RATE
from benchmarks.harness.provenance import build_provenance
from megablocks_utils.config import parse_args
from megablocks_utils.files import METRICS_NAME, RUN_RECORD_NAME, write_json_atomically
from megablocks_utils.processes.entry_point import run_entry_point
from megablocks_utils.processes.launch import check_environment
from megablocks_utils.processes.start import start_processes
from megablocks_utils.training.data.examples import load_examples
from megablocks_utils.training.data.schedule import Schedule
from megablocks_utils.training.report.metrics import (
    MetricsWriter,
    RunTotals,
    StepMeter,
    StepMetrics,
)


def main(argv: list[str]) -> None:
    """Train, and leave the numbers.

    **Collective:** a process of each rank, with the launcher's environment.
    """
    config = parse_args(argv, entry_point="fsdp2")
    launch = check_environment(config)
    device = start_processes(launch)
    examples = load_examples(config.data, None, launch)
    schedule = Schedule(config, examples, launch.rank, launch.world_size)
    stock = StockStep(schedule, device, padded=False)
    steps = list(_train(stock, schedule, device))
    if launch.rank == 0:
        _write(argv, Path(config.output_dir), schedule, steps)


def _train(stock: StockStep, schedule: Schedule, device: torch.device) -> Iterator[StepMetrics]:
    meter = StepMeter(device)
    for step, (epoch, plan) in enumerate(schedule.plans(), start=1):
        meter.start_step()
        loss = stock.step()
        # Every rank has the loss of all: each adds its share.
        share = loss * plan.num_label_tokens / schedule.world_size
        meter.add_micro_batch(torch.tensor(share, dtype=torch.float64))
        yield meter.finish_step(
            step,
            epoch,
            num_label_tokens=plan.num_label_tokens,
            num_input_tokens=plan.num_input_tokens,
            grad_norm=stock.grad_norm,
            learning_rate=LEARNING_RATE,
        )


def _write(argv: list[str], output_dir: Path, schedule: Schedule, steps: list[StepMetrics]) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    totals = RunTotals()
    with MetricsWriter(output_dir / METRICS_NAME) as metrics:
        for step in steps:
            metrics.write(step)
            totals = totals.plus(step)
    ep_size = schedule.config.parallel.ep_size or schedule.world_size
    record = {"status": "finished"} | build_provenance(
        "benchmarks.table.stock",
        argv,
        mesh={"dp": schedule.world_size // ep_size, "ep": ep_size},
        kernel={"name": "transformers", "reason": "its own experts"},
        totals=asdict(totals),
    )
    write_json_atomically(output_dir / RUN_RECORD_NAME, record)


if __name__ == "__main__":
    run_entry_point(main, sys.argv[1:])
