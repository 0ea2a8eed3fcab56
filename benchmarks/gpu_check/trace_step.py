"""Train a few steps as the script does, trace some of them, and say what the trace holds.

python -m benchmarks.gpu_check.trace_step TRACE.json.gz --model_name_or_path ... (a run's options)
"""

import gzip
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.gpu_check.trace_figures import ATTENTION, EXPERTS, Units, summarise
from benchmarks.harness.report import show
from benchmarks.harness.timing import wait_for
from megablocks_utils.config import parse_args
from megablocks_utils.moe.dropless_experts import DroplessExperts
from megablocks_utils.processes.entry_point import run_entry_point
from megablocks_utils.processes.launch import check_environment
from megablocks_utils.processes.start import start_processes
from megablocks_utils.training.loop import build_training_state, fit
from megablocks_utils.training.setup import build_setup

_WARMUPS, _TRACED = 3, 2
_ATTENTION_NAMES = ("self_attn", "attention", "attn")


def main(argv: Sequence[str]) -> None:
    """Trace, and write the figures to standard output as JSON.

    Raises:
        UserError: options that cannot work.
    """
    path, words = Path(argv[0]), list(argv[1:])
    config = parse_args(words, entry_point="fsdp2")
    launch = check_environment(config)
    device = start_processes(launch)
    setup = build_setup(config, launch, device)
    state = build_training_state(setup)
    steps = fit(state, setup)
    untraced = [next(steps) for _ in range(2 * _WARMUPS)][_WARMUPS:]
    num_layers = annotate(state.model)
    kinds = [ProfilerActivity.CPU]
    kinds += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    wait_for(device)
    with profile(activities=kinds) as traced:
        for _ in range(_TRACED):
            next(steps)
        wait_for(device)
    traced.export_chrome_trace(str(path))
    with gzip.open(path, "rt", encoding="utf-8") as trace:
        events = json.load(trace)["traceEvents"]
    accumulation = config.optim.gradient_accumulation_steps
    units = Units(_TRACED, _TRACED * accumulation, num_layers)
    figures = {
        "untraced_step_s": median(step.step_time_s for step in untraced),
        "tokens_per_s": median(step.tokens_per_s for step in untraced),
        "peak_bytes": max(step.mem_peak_bytes for step in untraced),
    }
    show(json.dumps(figures | summarise(events, units)))


def annotate(model: nn.Module) -> int:
    """Mark experts and attention in the trace, and return the number of layers with experts."""
    num_layers = 0
    for name, module in model.named_modules():
        if isinstance(module, DroplessExperts):
            _mark(module, EXPERTS)
            num_layers += 1
        elif name.rpartition(".")[2] in _ATTENTION_NAMES:
            _mark(module, ATTENTION)
    return num_layers


def _mark(module: nn.Module, label: str) -> None:
    opened: list[record_function] = []

    def begin(*_: object) -> None:
        opened.append(record_function(label))
        opened[-1].__enter__()

    def end(*_: object) -> None:
        opened.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(begin)
    module.register_forward_hook(end, always_call=True)  # recomputation may end inside


if __name__ == "__main__":
    run_entry_point(main, sys.argv[1:])
