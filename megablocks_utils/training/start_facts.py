"""What is known of a run when it starts, for its summary and its record."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megablocks_utils.config.secrets import redact_record, redact_text
from megablocks_utils.fsdp.placement_plan import describe_plan
from megablocks_utils.processes.output_folder import find_incomplete
from megablocks_utils.training.report.parameters import count_local_bytes, describe_packed
from megablocks_utils.training.report.summary import RunFacts, describe_precision
from megablocks_utils.training.setup import Setup
from megablocks_utils.training.step.debug import describe_placements

__all__ = ["collect_facts", "describe_kernel", "describe_resolved", "list_start_lines"]


def collect_facts(setup: Setup) -> RunFacts:
    """Return what is known when training starts."""
    config, base = setup.config, setup.model
    experts = setup.expert_parameters()
    expert_bytes = count_local_bytes(experts.values())
    mesh = setup.placement.axis_sizes
    kernel, reason = describe_kernel(setup)
    examples = setup.schedule.examples
    return RunFacts(
        model=redact_text(config.model.model_name_or_path),
        family=base.config.model_type,
        parameters=setup.counts,
        precision=describe_precision(setup.precision),
        dp_size=mesh["dp"],
        ep_size=mesh["ep"],
        dp_replicate_size=config.parallel.dp_replicate_size,
        expert_tp_size=mesh.get("expert_tp", 1),
        num_experts=setup.num_experts,
        top_k=setup.top_k,
        expert_dp=str(config.parallel.expert_dp),
        kernel=kernel,
        kernel_reason=reason,
        dispatch=_describe_dispatch(setup),
        expert_bytes=expert_bytes,
        dense_bytes=count_local_bytes(setup.model.parameters()) - expert_bytes,
        examples_kept=len(examples),
        examples_cut=examples.num_cut,
        examples_dropped=examples.num_dropped,
        plan=setup.plan.describe(),
        steps=setup.schedule.num_steps,
        examples_per_step=config.count_global_batch(setup.launch.world_size),
        resumed=_describe_resume(setup),
        ignored_keys=examples.ignored_keys,
        data_order=setup.schedule.describe_order(),
        units="examples" if setup.schedule.rows is None else "rows",
        packed=describe_packed(experts.values()),
    )


def _describe_resume(setup: Setup) -> str | None:
    if setup.resume is None:
        return None
    return setup.resume.describe(redact_record(asdict(setup.config)))


def describe_kernel(setup: Setup) -> tuple[str, str]:
    """Return what the experts run on, and why."""
    if setup.sharded is None:
        return "transformers", "no expert parallelism: transformers runs its own experts"
    kernel = setup.sharded.kernel
    if not setup.config.parallel.use_megablocks_sharding:
        return kernel.name, f"{kernel.reason}; experts with adapters are this project's at ep 1"
    return kernel.name, kernel.reason


def _describe_dispatch(setup: Setup) -> str | None:
    """Say how tokens travel, and why; None where none does."""
    sizes = setup.placement.axis_sizes
    if setup.sharded is None or sizes["ep"] * sizes.get("expert_tp", 1) == 1:
        return None
    return setup.sharded.describe_dispatch()


def describe_resolved(setup: Setup) -> dict[str, Any]:
    """Return what the options have come to on this machine, for `run.json`."""
    return {
        "world_size": setup.launch.world_size,
        "data_ranks": setup.schedule.num_data_ranks,
        "device_type": setup.device.type,
        "precision": setup.precision.name,
        "weights_dtype": setup.precision.weights,
        "compute_dtype": setup.precision.compute,
        "optim_dtype": setup.precision.optim,
        "ep_size": setup.placement.axis_sizes["ep"],
        "dense_mesh": setup.placement.dense_axis_sizes or None,
        "token_dispatch": _describe_dispatch(setup),
        "num_steps": setup.schedule.num_steps,
        "examples": None if setup.config.data.streaming else len(setup.schedule.examples),
        "packing": setup.probe.packing.as_record(),
    }


def list_start_lines(setup: Setup, output_dir: Path) -> Iterator[str]:
    """Yield what else a person should know before the first step, line by line."""
    if setup.lora is not None:
        yield setup.lora.describe()
    for path in find_incomplete(output_dir):
        yield f"{path.name} was never finished; it is left alone"
    if setup.answer_end is not None and setup.answer_end.warning is not None:
        yield f"warning: {setup.answer_end.warning}"
    if setup.config.debug:
        yield from describe_plan(setup.placement)
        yield from describe_placements(setup.model)
