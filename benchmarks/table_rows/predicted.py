"""Rows as the formulas of `plan` see them. Imports no torch."""

from statistics import mean
from typing import Any

from benchmarks.table_rows.bench import Bench
from benchmarks.table_rows.rows import TRANSFORMERS, Row
from megablocks_utils.planning.formula import predict

__all__ = ["CARD_BYTES", "compare_published", "predict_row", "summarise_errors"]

CARD_BYTES = 80 * 2**30
"""The most that a card sold as 80 GB can hold."""


def predict_row(bench: Bench, row: Row) -> dict[str, Any] | None:
    """Predict what a rank holds; None for transformers' own expert parallelism, which no plan knows.

    Returns:
        `peak_bytes`, `allocated_bytes` (after zero_grad), `gradients_bytes`, `components`,
        `moment` and `is_oom` (of an 80 GB card).
    """
    if row.side == TRANSFORMERS:
        return None
    prediction = predict(bench.shape, bench.layout(row), bench.planned_run(row))
    return {
        "peak_bytes": prediction.peak_bytes,
        "allocated_bytes": prediction.allocated_bytes,
        "gradients_bytes": prediction.components["gradients"],
        "components": dict(prediction.components),
        "moment": prediction.moment,
        "is_oom": prediction.peak_bytes > CARD_BYTES,
    }


def compare_published(row: Row, predicted: dict[str, Any]) -> dict[str, float] | None:
    """Return predicted over published, less 1, of peak and allocated; None without figures.

    Where the published `allocated` was read before zero_grad, gradients are added to ours.
    """
    published = row.published
    if published is None or published.is_oom:
        return None
    allocated_bytes = predicted["allocated_bytes"]
    if published.is_before_zero_grad:
        allocated_bytes += predicted["gradients_bytes"]
    return {
        "peak": predicted["peak_bytes"] / published.peak_bytes - 1,
        "allocated": allocated_bytes / published.allocated_bytes - 1,
    }


def summarise_errors(errors: list[float]) -> dict[str, float]:
    """Return n, the mean of the absolute errors and the worst error with its sign."""
    return {
        "n": len(errors),
        "mean": mean(abs(error) for error in errors),
        "worst": max(errors, key=abs),
    }
