"""Rehearsals in a process of a pool, which leaves its own group for a while."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from megablocks_utils.config.precision import PrecisionConfig, resolve_preset
from megablocks_utils.planning.model.prediction import ParallelLayout, PlannedRun
from megablocks_utils.rehearsal import assumptions
from megablocks_utils.rehearsal import rehearse as rehearse_module
from megablocks_utils.rehearsal.fewer_layers import rehearse_few_layers
from megablocks_utils.rehearsal.rehearse import rehearse
from megablocks_utils.training.model_source import build_bare_model

CPU = torch.device("cpu")


def plan(tokens=256, precision="fp32", **changes):
    """Return a run on 8 ranks, every label learned, experts evenly chosen."""
    lora = changes.get("use_lora", "none")
    run = PlannedRun(
        world_size=8,
        entry_point="fsdp2",
        precision=resolve_preset(
            PrecisionConfig(precision), has_lora=lora != "none", device_type="cpu"
        ),
        use_lora="none",
        lora_r=16,
        gradient_checkpointing="full",
        accumulation=2,
        sync_each_batch=True,
        tokens=tokens,
        label_tokens=tokens,
        kernel="grouped_mm",
        imbalance=1.0,
        has_aux_loss=False,
        device_type="cpu",
    )
    return replace(run, **changes)


def rehearse_alone(rank: int, folder: Path, layout: ParallelLayout, run: PlannedRun):
    """Rehearse on fake tensors; a prediction."""
    with _without_group():
        return rehearse(folder, layout, run, device=CPU).as_prediction()


def rehearse_slowly(rank: int, folder: Path, layout: ParallelLayout, run: PlannedRun):
    """Rehearse as `rehearse_alone`, with torch's own fake tensors and both micro-steps."""
    with (
        patch.object(assumptions, "RememberedFakes", FakeTensorMode),
        patch.object(rehearse_module, "_begins_with_gradients", lambda run: False),
    ):
        return rehearse_alone(rank, folder, layout, run)


def rehearse_few_alone(rank: int, folder: Path, layout: ParallelLayout, run: PlannedRun):
    """Rehearse with few of the layers; a prediction for all of them."""
    dtypes = getattr(torch, run.precision.weights), getattr(torch, run.precision.compute)
    model = build_bare_model(folder, *dtypes)
    with _without_group():
        return rehearse_few_layers(model, layout, run, device=CPU).as_prediction()


def measure_alone(rank: int, folder: Path, layout: ParallelLayout, run: PlannedRun) -> int:
    """Take the same step with real tensors; the most that torch's allocator held at once.

    By the profiler's record of allocations and releases from the first micro-step on; what was
    there before is the sum of the tensors' sizes.
    """
    recorder = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    with _without_group():
        done = rehearse(folder, layout, run, device=CPU, is_real=True, on_ready=recorder.start)
        recorder.stop()
    events = recorder.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, size in changes:
        held += size
        peak = max(peak, held)
    # What is allocated at the end was there at the start, but for what the step added to it.
    return done.allocated_bytes - held + peak


class _without_group:
    """Leave the pool's group, and make another of this process alone afterwards."""

    def __enter__(self) -> None:
        dist.destroy_process_group()

    def __exit__(self, *_: object) -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
