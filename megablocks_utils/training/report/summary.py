"""What a person reads before and after a run: tables on rank 0's standard error."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megablocks_utils.byte_units import GIB, MIB
from megablocks_utils.training.report.mesh_table import build_mesh_table
from megablocks_utils.training.report.metrics import RunTotals
from megablocks_utils.training.report.parameters import ParameterCounts
from megablocks_utils.training.report.progress import format_duration

if TYPE_CHECKING:
    from megablocks_utils.config import ResolvedPrecision

__all__ = [
    "RunFacts",
    "RunResult",
    "build_console",
    "build_end_summary",
    "build_start_summary",
    "describe_evaluation",
    "describe_precision",
    "show_end_summary",
    "show_start_summary",
]


@dataclass(frozen=True)
class RunFacts:
    """Hold what is known when training starts.

    Attributes:
        model: Hub name or folder.
        family: The model's architecture, such as "mixtral".
        parameters: Counts of the whole model.
        precision: In words, see `describe_precision`.
        dp_size: Ranks that hold the same experts.
        ep_size: Ranks the experts are split over; 1 without expert parallelism.
        dp_replicate_size: Groups of ranks that each hold the whole model.
        expert_tp_size: Ranks that each expert is split over.
        num_experts: Experts of one MoE layer.
        top_k: Experts a token passes in one MoE layer; None where the model does not say.
        expert_dp: "shard" or "replicate": what the dp axis does with an expert.
        kernel: The backend the experts run on.
        kernel_reason: Why that one.
        expert_bytes: Expert weights this rank holds.
        dense_bytes: All other weights this rank holds.
        examples_kept: Examples trained on, cut ones included.
        examples_cut: Those of them shortened to `--max_seq_length`.
        examples_dropped: Examples left out because nothing in them is learned.
        dispatch: How tokens travel and why; None where none does.
        plan: The predicted peak, in words.
        steps: Optimizer steps of the run.
        examples_per_step: Examples in one global batch.
        resumed: What the run resumes from, in words; None for one that starts fresh.
        ignored_keys: Keys of the data's records that have no meaning for training.
        data_order: What a user should know of how examples become rows, as the end of a sentence.
        units: What a step holds: "examples" or "rows".
        packed: What is kept in few bits, in words; None for nothing.
    """

    model: str
    family: str
    parameters: ParameterCounts
    precision: str
    dp_size: int
    ep_size: int
    num_experts: int
    top_k: int | None
    expert_dp: str
    kernel: str
    kernel_reason: str
    dispatch: str | None
    expert_bytes: int
    dense_bytes: int
    examples_kept: int
    examples_cut: int
    examples_dropped: int
    plan: str
    steps: int
    examples_per_step: int
    resumed: str | None = None
    ignored_keys: tuple[str, ...] = ()
    dp_replicate_size: int = 1
    expert_tp_size: int = 1
    data_order: str = ""
    units: str = "examples"
    packed: str | None = None


@dataclass(frozen=True)
class RunResult:
    """Hold what is known when a run is over.

    Attributes:
        totals: The run's steps added up.
        first_loss: Loss of the first step.
        final_loss: Loss of the last step.
        train_runtime_s: Wall time of the training loop only.
        memory_source: What the peak measures, from `describe_memory_source`.
        kernel_check: What comparing the kernel with eager found, in words; None if it is not ours.
        adapter_check: What checking the written adapter found, in words; None without LoRA.
        expert_load: What the spread of tokens over experts has cost, in words; None if it was
            not measured.
        evaluation: The losses of held-out examples, in words; None if none were measured.
        output_dir: Where the files are.
        files: (path, what it is) of each file or group of files, in reading order.
    """

    totals: RunTotals
    first_loss: float
    final_loss: float
    train_runtime_s: float
    memory_source: str
    kernel_check: str | None
    adapter_check: str | None
    expert_load: str | None
    output_dir: str
    files: tuple[tuple[str, str], ...]
    evaluation: str | None = None


def build_console(is_main: bool) -> Console:
    """Build the console for everything that people read: standard error, silent unless `is_main`.

    Live bars need a real terminal; colours forced on by the environment do not make one.
    """
    is_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return Console(stderr=True, quiet=not is_main, highlight=False, force_interactive=is_terminal)


def show_start_summary(console: Console, facts: RunFacts) -> None:
    """Print the start-up summary, as wide as the console."""
    console.print(build_start_summary(facts, console.width))


def show_end_summary(console: Console, result: RunResult) -> None:
    """Print the end summary."""
    console.print(build_end_summary(result))


def build_start_summary(facts: RunFacts, width: int) -> Group:
    """Lay out the start-up summary for a console `width` characters wide."""
    rows: dict[str, RenderableType] = {
        "model": f"{facts.model} ({facts.family})",
        "parameters": _describe_parameters(facts.parameters),
        "precision": facts.precision,
        "experts": f"{facts.num_experts} a layer, each token passes {facts.top_k or 'unknown'}",
        "kernel": f"{facts.kernel}: {facts.kernel_reason}",
        "weights": f"{_format_gib(facts.expert_bytes)} of experts and "
        f"{_format_gib(facts.dense_bytes)} of everything else per rank",
        "plan": facts.plan,
        "examples": f"{facts.examples_kept:,} kept ({facts.examples_cut:,} of them cut), "
        f"{facts.examples_dropped:,} dropped{facts.data_order}",
        "steps": f"{facts.steps:,}, {facts.examples_per_step:,} {facts.units} each",
        "mesh": _describe_mesh(facts),
    }
    if facts.packed is not None:
        rows["packed"] = facts.packed
    if facts.dispatch is not None:
        rows["dispatch"] = facts.dispatch
    if facts.ignored_keys:
        rows["ignored"] = f"{', '.join(facts.ignored_keys)}: no meaning for training"
    if facts.resumed is not None:
        rows["resumed"] = facts.resumed
    mesh_table = build_mesh_table(
        facts.dp_replicate_size * facts.dp_size,
        facts.ep_size,
        facts.num_experts,
        width - 2,
        facts.expert_tp_size,
    )
    return Group(_build_rows("Training", rows), Padding(mesh_table, (1, 0, 1, 2)))


def build_end_summary(result: RunResult) -> Group:
    """Lay out the end summary."""
    totals = result.totals
    rate = totals.input_tokens / result.train_runtime_s
    rows: dict[str, RenderableType] = {
        "steps": f"{totals.steps:,}",
        "loss": f"{result.first_loss:.4f} at the first step, {result.final_loss:.4f} at the last",
        "runtime": f"{format_duration(result.train_runtime_s)}, {rate:,.0f} input tokens/s "
        f"({totals.input_tokens:,} in all, loss on {totals.tokens:,})",
        "peak memory": f"{_format_gib(totals.mem_peak_bytes)} on the fullest rank, "
        f"{result.memory_source}",
    }
    if result.evaluation is not None:
        rows["evaluation"] = result.evaluation
    if result.kernel_check is not None:
        rows["kernel"] = result.kernel_check
    if result.adapter_check is not None:
        rows["adapter"] = result.adapter_check
    if result.expert_load is not None:
        rows["expert load"] = result.expert_load
    rows |= {
        "output": Group(Text(result.output_dir), _build_grid(dict(result.files), style="none")),
    }
    return Group(_build_rows("Finished", rows), "")


def describe_evaluation(record: Mapping[str, Any]) -> str:
    """Describe the losses of held-out examples, as `run.json` has them, and what came of them."""
    shown = {name: record[name] for name in ("first", "last", "best") if record[name]}
    parts = [f"{name} {e['eval_loss']:.4f} after step {e['step']}" for name, e in shown.items()]
    if record["stopped_early_at_step"] is not None:
        parts.append(f"ended early after step {record['stopped_early_at_step']}")
    return f"loss {', '.join(parts)}; the final model is that of step {record['final_model_step']}"


def describe_precision(precision: "ResolvedPrecision") -> str:
    """Describe which dtype is used for what."""
    adapters = f", {precision.adapter} adapters" if precision.adapter != precision.weights else ""
    rounding = ", updates rounded stochastically" if precision.stochastic_rounding else ""
    return (
        f"{precision.name}: {precision.weights} weights{adapters}, {precision.compute} compute, "
        f"{precision.optim} optimizer states{rounding}"
    )


def _build_rows(title: str, rows: Mapping[str, RenderableType]) -> RenderableType:
    return Group(Text(title, style="bold"), Padding(_build_grid(rows, style="cyan"), (0, 0, 0, 2)))


def _build_grid(rows: Mapping[str, RenderableType], style: str) -> Table:
    """Lay out name and value side by side; long values wrap under themselves."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style=style, no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows.items():
        grid.add_row(name, Text(value) if isinstance(value, str) else value)
    return grid


def _describe_mesh(facts: RunFacts) -> str:
    shape = f"dp {facts.dp_size} x ep {facts.ep_size}"
    if facts.expert_tp_size > 1:
        shape = f"{shape} x expert_tp {facts.expert_tp_size}"
    if facts.dp_replicate_size > 1:
        shape = f"{facts.dp_replicate_size} groups, each {shape}"
    if facts.dp_size == 1:
        return f"{shape}: every rank holds its experts whole"
    if facts.expert_dp == "shard":
        return f"{shape}: every rank holds 1/{facts.dp_size} of each of its experts"
    return f"{shape}: every rank holds its experts whole, {facts.dp_size} copies of each"


def _describe_parameters(counts: ParameterCounts) -> str:
    share = 100 * counts.trainable / counts.total
    active = "unknown" if counts.active is None else _format_count(counts.active)
    return (
        f"{_format_count(counts.total)} total, {active} active per token, "
        f"{_format_count(counts.trainable)} trainable ({share:.2f}%)"
    )


def _format_count(number: int) -> str:
    """Write a count in thousands, millions or billions, with three significant digits or more."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= unit:
            return f"{number / unit:.{2 if number < 10 * unit else 1}f} {name}"
    return str(number)


def _format_gib(number: int) -> str:
    if number < GIB // 100:
        return f"{number / MIB:.2f} MiB"
    return f"{number / GIB:.2f} GiB"
