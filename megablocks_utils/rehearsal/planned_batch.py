"""The micro-batch of a rehearsal: the largest that is planned."""

import torch

from megablocks_utils.planning.model.prediction import PlannedRun
from megablocks_utils.training.data.batches import MicroBatch, Packing
from megablocks_utils.training.data.row_parts import take_part
from megablocks_utils.training.data.text import IGNORED_LABEL

__all__ = ["build_planned_batch"]


def build_planned_batch(run: PlannedRun) -> MicroBatch:
    """Return it; where ranks share rows, of the first of them, with its labels at the front."""
    row = run.row_tokens
    tokens = torch.zeros(-(-run.tokens * run.sp_size // row), row, dtype=torch.int64)
    labels = tokens.clone()
    first = 1 if run.sp_size > 1 else labels.numel() - run.label_tokens
    labels.view(-1)[:first] = IGNORED_LABEL
    labels.view(-1)[first + run.label_tokens :] = IGNORED_LABEL
    positions = torch.arange(row)[None] % max(run.example_lengths)
    batch = MicroBatch(
        tokens,
        positions.expand(tokens.shape),
        labels,
        is_dummy=False,
        packing=Packing(run.packing),
        attention_mask=torch.ones_like(tokens) if run.is_padded else None,
        lengths=run.example_lengths,
    )
    return batch if run.sp_size == 1 else take_part(batch, run.sp_size, 0)
