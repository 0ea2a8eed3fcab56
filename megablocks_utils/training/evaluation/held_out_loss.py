"""The loss of held-out examples, each counted once, over any number of ranks."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from megablocks_utils.processes.progress_marks import PROGRESS
from megablocks_utils.training.data.batches import (
    MicroBatch,
    Packing,
    assign_examples,
    collate_examples,
)
from megablocks_utils.training.data.examples import TokenizedExamples
from megablocks_utils.training.report.evaluations import Evaluation
from megablocks_utils.training.step.forward import run_loss
from megablocks_utils.training.step.linear_cross_entropy import LogitsMap

__all__ = ["HeldOut", "evaluate_loss"]


@dataclass(frozen=True)
class HeldOut:
    """Hold the examples that are not trained on, and how this rank takes its share of them.

    Attributes:
        examples: all of them, the same on every rank.
        batch_size: examples of a micro-batch at most.
        data_rank: which share is this rank's.
        num_data_ranks: ranks with examples of their own.
        num_copies: ranks that compute the same for each of them.
        packing: how the examples of a micro-batch are laid out.
        take_part: gives a micro-batch of which this rank has its part of every row.
    """

    examples: TokenizedExamples
    batch_size: int
    data_rank: int
    num_data_ranks: int
    packing: Packing
    num_copies: int = 1
    take_part: Callable[[MicroBatch], MicroBatch] = lambda batch: batch

    def micro_batches(self) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches, as many on every rank: dummies where none is left."""
        for group in self._assign():
            batch = collate_examples(self.examples, group[self.data_rank], self.packing)
            yield self.take_part(batch)

    def largest_micro_batch(self) -> int:
        """Return the tokens of the largest micro-batch of any rank, padding counted."""
        lengths, is_padded = self.examples.lengths, self.packing is Packing.PADDED
        rows = [lengths[row] for group in self._assign() for row in group if row]
        sizes = [int(row.max()) * len(row) if is_padded else int(row.sum()) for row in rows]
        return max(sizes, default=0)

    def _assign(self) -> list[list[list[int]]]:
        per_round = self.num_data_ranks * self.batch_size
        return assign_examples(
            self.examples.lengths.tolist(),
            world_size=self.num_data_ranks,
            per_device_train_batch_size=self.batch_size,
            gradient_accumulation_steps=-(-len(self.examples) // per_round),
            is_padded=self.packing is Packing.PADDED,
        )


def evaluate_loss(
    model: nn.Module,
    held_out: HeldOut,
    device: torch.device,
    logits_map: LogitsMap | None,
    *,
    step: int,
) -> Evaluation:
    """Measure the mean loss of all label tokens of the held-out examples.

    Call it within `undisturbed`.

    **Collective:** every rank of the world must call, also one without examples.

    Args:
        model: wrapped, or whole in one process.
        held_out: what to measure.
        device: where the model computes.
        logits_map: see `run_loss`.
        step: optimizer steps done.
    """
    started_s = time.perf_counter()
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in held_out.micro_batches():
        PROGRESS.mark()
        total += run_loss(model, batch, device, logits_map)[1]
    num_label_tokens = int(held_out.examples.num_label_tokens.sum())
    loss = _reduce(total, dist.ReduceOp.SUM) / (num_label_tokens * held_out.num_copies)
    # Reading the loss waited for the device: only now is the time known.
    elapsed = torch.tensor(time.perf_counter() - started_s, dtype=torch.float64, device=device)
    return Evaluation(step, loss, num_label_tokens, _reduce(elapsed, dist.ReduceOp.MAX))


def _reduce(value: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> float:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value, op=operation)
    return float(value.item())
