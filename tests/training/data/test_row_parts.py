"""Ranks that share rows have every token and every label once."""

import numpy as np
import pytest
import torch

from megablocks_utils.training.data.batches import MicroBatch, Packing, collate_encoded
from megablocks_utils.training.data.row_parts import take_part
from megablocks_utils.training.step.objective import label_positions


def encode(*lengths):
    generator = np.random.default_rng(0)
    rows = [generator.integers(3, 90, n) for n in lengths]
    return [(ids, np.concatenate(([-100], ids[1:]))) for ids in rows]


def labels_of(batch: MicroBatch) -> list[tuple[int, int, int]]:
    """List row, position and token of every label, as counted in whole rows."""
    found = label_positions(batch.labels, batch.columns)
    first = 0 if batch.columns is None else batch.columns.start
    columns = (found.columns + first).tolist()
    return list(zip(found.rows.tolist(), columns, found.targets.tolist(), strict=True))


@pytest.mark.parametrize(
    ("packing", "lengths"),
    [(Packing.POSITIONS, (5, 4, 2)), (Packing.PADDED, (7, 5)), (Packing.ALONE, (3,))],
)
def test_parts_have_every_token_and_label_once(packing, lengths):
    batch = collate_encoded(encode(*lengths), packing)
    parts = [take_part(batch, 4, part) for part in range(4)]
    tokens = torch.cat([part.take_own(part.input_ids) for part in parts], dim=1)
    num_tokens = batch.input_ids.shape[1]
    assert torch.equal(tokens[:, :num_tokens], batch.input_ids)
    sizes = [part.take_own(part.input_ids).shape[1] for part in parts]
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
    together = sorted(label for part in parts for label in labels_of(part))
    assert together == sorted(labels_of(batch))
    # Padding to one token a rank is real nowhere.
    mask = parts[0].attention_mask
    real = num_tokens * len(batch.input_ids) if mask is None else int(mask.sum())
    assert real == sum(lengths)
