"""Numbers of the table from its runs: spreads, ratios, errors."""

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

from benchmarks.harness.timing import spread
from benchmarks.table.rows import OURS, PUBLISHED, TRANSFORMERS, Row

Runs = Sequence[Mapping[str, Any]]


def summarise_runs(runs: Runs) -> dict[str, Any]:
    """Combine the measured steps of all runs of a row.

    Returns:
        Spreads of `micro_step_s` and `tokens_per_s` over steps, the largest bytes of any run, and
        what is the same in all runs.
    """
    times = {
        key: spread([value for run in runs for value in run[key]])
        for key in ("micro_step_s", "tokens_per_s")
    }
    bytes_of = {key: max(run[key] for run in runs) for key in ("peak_bytes", "allocated_bytes")}
    constant = {key: runs[0][key] for key in ("tokens_per_rank", "first_loss", "mesh", "kernel")}
    return times | bytes_of | constant


def take_ratio(runs: Runs, others: Runs) -> dict[str, float] | None:
    """Return other time / own time, round by round: above 1, this row is faster than the other."""
    pairs = list(zip(runs, others, strict=False))
    if not pairs:
        return None
    return spread(
        [median(other["micro_step_s"]) / median(own["micro_step_s"]) for own, other in pairs]
    )


def ratio_rows(row: Row, rows: Sequence[Row]) -> dict[str, Row]:
    """Return what a row's time is compared with: the same training, by the name of the ratio.

    `no_ep`: no expert parallelism; `transformers`: its own, in the same layout.
    """
    wanted: dict[str, tuple[tuple[str, ...], int]] = {}
    if row.ep_share:
        wanted["no_ep"] = ((PUBLISHED, OURS), 0)
    if row.ep_share and row.group != TRANSFORMERS:
        wanted["transformers"] = ((TRANSFORMERS,), row.ep_share)
    return {
        name: other
        for name, (groups, ep_share) in wanted.items()
        for other in rows
        if other.group in groups and (other.use_lora, other.ep_share) == (row.use_lora, ep_share)
    }


def published_ratio(row: Row, other: Row) -> float | None:
    """Return how many times faster a row was than another, as published."""
    own, others = (one.published.runtime_s if one.published else None for one in (row, other))
    return others / own if own and others else None


def compare_published(row: Row, predicted: Mapping[str, Any]) -> dict[str, float] | None:
    """Return predicted over published, less 1, of peak and allocated; None without figures.

    Where the published `allocated` was read before zero_grad, gradients are added to ours.
    """
    published = row.published
    if published is None or published.peak_bytes is None or published.allocated_bytes is None:
        return None
    allocated_bytes = predicted["allocated_bytes"]
    if published.is_before_zero_grad:
        allocated_bytes += predicted["gradients_bytes"]
    return {
        "peak": predicted["peak_bytes"] / published.peak_bytes - 1,
        "allocated": allocated_bytes / published.allocated_bytes - 1,
    }


def compare_memory(
    predicted: Mapping[str, Any], measured: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Return by `peak` and `allocated` the predicted bytes, base included, and their error.

    The base of a process (`base_peak_bytes`, `base_allocated_bytes`; 0 on a GPU, where tensors
    alone are counted) is on both sides: errors are shares of what was measured above it.
    """
    found = {}
    for name in ("peak", "allocated"):
        base = measured.get(f"base_{name}_bytes", 0)
        tensors = measured[f"{name}_bytes"] - base
        error = predicted[f"{name}_bytes"] / tensors - 1
        found[name] = {"predicted_bytes": predicted[f"{name}_bytes"] + base, "error": error}
    return found


def summarise_errors(errors: Sequence[float]) -> dict[str, float] | None:
    """Return n, the mean absolute error and the worst with its sign; None without errors."""
    if not errors:
        return None
    return {
        "n": len(errors),
        "mean": mean(abs(error) for error in errors),
        "worst": max(errors, key=abs),
    }
