"""Share the tokens of a micro-batch's rows between ranks (sequence parallelism)."""

from dataclasses import replace

import torch
from torch.nn.functional import pad

from megablocks_utils.mesh.sequence_exchange import part_columns
from megablocks_utils.training.data.batches import MicroBatch, Packing
from megablocks_utils.training.data.text import IGNORED_LABEL

__all__ = ["take_part"]


def take_part(batch: MicroBatch, num_parts: int, part: int) -> MicroBatch:
    """Return a micro-batch of which a rank has one part of every row, contiguous tokens.

    The parts differ by a token at most, and none is empty: shorter rows are padded.

    Args:
        batch: whole rows.
        num_parts: ranks that share them.
        part: which of them, from 0.
    """
    num_tokens = batch.input_ids.shape[1]
    if num_tokens < num_parts:
        batch = _pad(batch, num_parts - num_tokens)
    return replace(batch, columns=part_columns(batch.input_ids.shape[1], num_parts, part))


def _pad(batch: MicroBatch, num_added: int) -> MicroBatch:
    """Return a micro-batch with tokens at the end of its rows that count for nothing.

    In a row of several examples each is one more example, so that no real one sees it.
    """
    mask = batch.attention_mask
    if mask is None:
        mask = torch.ones_like(batch.input_ids)
    has_rows = batch.packing is Packing.PADDED
    return replace(
        batch,
        input_ids=pad(batch.input_ids, (0, num_added)),
        position_ids=pad(batch.position_ids, (0, num_added)),
        labels=pad(batch.labels, (0, num_added), value=IGNORED_LABEL),
        attention_mask=pad(mask, (0, num_added)),
        lengths=batch.lengths if has_rows else (*batch.lengths, *[1] * num_added),
    )
