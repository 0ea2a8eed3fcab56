"""Losses of held-out examples: their lines in `metrics.jsonl`, and which one is the best."""

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Evaluation", "count_without_lower", "find_best", "is_evaluation", "read_evaluations"]


@dataclass(frozen=True)
class Evaluation:
    """Hold one measurement of the held-out examples, the same on every rank.

    Attributes:
        step: Optimizer steps done; 0 before the first.
        eval_loss: Sum of the token losses over the number of label tokens, of all ranks.
        eval_tokens: Label tokens.
        eval_time_s: Wall time of the slowest rank.
    """

    step: int
    eval_loss: float
    eval_tokens: int
    eval_time_s: float

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        try:
            return math.exp(self.eval_loss)
        except OverflowError:
            return math.inf

    def as_record(self) -> dict[str, Any]:
        """Return it as it stands in `metrics.jsonl`."""
        return dict(vars(self))

    def describe(self) -> str:
        """Return a line for the log."""
        return (
            f"evaluation after step {self.step}: loss {self.eval_loss:.4f}, perplexity "
            f"{self.perplexity:.4g} on {self.eval_tokens:,} tokens in {self.eval_time_s:.1f} s"
        )


def is_evaluation(record: Any) -> bool:
    """Return whether a line of `metrics.jsonl` is an evaluation, not a step."""
    return isinstance(record, dict) and "eval_loss" in record


def read_evaluations(path: str | Path) -> list[Evaluation]:
    """Read the evaluations of `metrics.jsonl`, with NaN where a loss was not finite."""
    with Path(path).open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return [_parse(record) for record in records if is_evaluation(record)]


def _parse(record: dict[str, Any]) -> Evaluation:
    loss = record["eval_loss"]
    return Evaluation(
        record["step"],
        math.nan if loss is None else loss,
        record["eval_tokens"],
        record["eval_time_s"],
    )


def find_best(
    evaluations: Sequence[Evaluation], steps: Collection[int] | None = None
) -> Evaluation | None:
    """Return the earliest one with the lowest finite loss; None where there is none.

    What was measured before the first step does not count, as in Hugging Face's Trainer.

    Args:
        evaluations: Of a run, in their order.
        steps: Only of these; None: of all.
    """
    candidates = [
        e
        for e in evaluations
        if e.step > 0 and math.isfinite(e.eval_loss) and (steps is None or e.step in steps)
    ]
    return min(candidates, key=lambda e: e.eval_loss, default=None)


def count_without_lower(evaluations: Sequence[Evaluation]) -> int:
    """Return how many evaluations in a row, the last ones, were not lower than all before."""
    best = find_best(evaluations)
    return sum(e.step > (0 if best is None else best.step) for e in evaluations)
