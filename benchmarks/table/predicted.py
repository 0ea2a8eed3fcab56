"""Rows as the formulas of `plan` see them. Imports no torch."""

from typing import Any

from benchmarks.table.bench import Bench
from benchmarks.table.rows import TRANSFORMERS, Row
from megablocks_utils.planning.model.gpus import GPUS

__all__ = ["CARD_BYTES", "predict_row"]

CARD_BYTES = GPUS["a100-80g"].memory_bytes
"""Of the cards that the published table was measured on."""


def predict_row(bench: Bench, row: Row) -> dict[str, Any] | None:
    """Predict what a rank holds; None for transformers' own way, which no plan knows.

    Returns:
        `peak_bytes`, `allocated_bytes` (after zero_grad), `gradients_bytes`, `components`,
        `moment`, and `is_oom`: whether the tensors alone are more than `CARD_BYTES`.
    """
    if row.side == TRANSFORMERS:
        return None
    scenario = bench.scenario(row)
    prediction = scenario.predict(scenario.own_layout())
    return {
        "peak_bytes": prediction.peak_bytes,
        "allocated_bytes": prediction.allocated_bytes,
        "gradients_bytes": prediction.components["gradients"],
        "components": dict(prediction.components),
        "moment": prediction.moment,
        "is_oom": prediction.peak_bytes > CARD_BYTES,
    }
