"""Decide which examples a rank sees in which micro-step.

Global batch i of an epoch holds examples ``[i*G, (i+1)*G)`` of the epoch's order, where G is batch
size x data ranks x accumulation steps (all ranks, but one of each tp and sp group); the last one
may be smaller and is kept. The order depends on seed and epoch alone, so runs with equal G see the
same global batches on any number of ranks.

Who sees what *within* a global batch changes nothing in the result (loss and gradient are sums over
it), so it is chosen for speed. All ranks meet in every layer's all-to-all, and each waits for the
one with the most tokens; so micro-batches that run at the same time get nearly the same number of
tokens:

1. the examples, longest first, each go to the micro-batch with the fewest tokens among those that
   still have room (every micro-batch takes ``per_device_train_batch_size``);
2. the finished micro-batches are sorted by their tokens, and neighbours run at the same time.

With that, a full batch waits (summed over its micro-steps: largest minus smallest micro-batch) for
less than its longest example, as 20,000 random batches of all shapes did, and the largest
micro-batch, which sets the memory peak, is about as small as it can be. With one example per
micro-batch all this is sorting by length.

In padded micro-batches every example takes the room of the longest, so they are filled with
neighbours in the order of length instead of by the first rule.

With ``packing_length``, all of this is about rows of examples in place of examples.

Each rank computes the whole plan by itself; nothing is communicated.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch

from megablocks_utils.training.data.examples import TokenizedExamples
from megablocks_utils.training.data.packed_rows import PackedRows
from megablocks_utils.training.data.text import IGNORED_LABEL

__all__ = ["MicroBatch", "Packing", "StepPlan", "build_step_plan", "assign_examples"]
__all__ += ["collate_encoded", "collate_examples", "steps_per_epoch"]


class Packing(StrEnum):
    """How the examples of a micro-batch are laid out, and kept apart in the model."""

    POSITIONS = "positions"
    """One after the other in one row, by positions that start again at 0."""
    MASKS = "masks"
    """The same row, with attention masks made from these positions."""
    SEQUENCES = "sequences"
    """The same row, with cumulated lengths and the number of each token's example."""
    PADDED = "padded"
    """A row for each, padded on the right to the longest, with an attention mask."""
    ALONE = "alone"
    """One example, as plain transformers takes it."""

    @property
    def is_one_row(self) -> bool:
        """Whether several examples are in one row."""
        return self in (Packing.POSITIONS, Packing.MASKS, Packing.SEQUENCES)


@dataclass(frozen=True)
class MicroBatch:
    """Hold the tokens of one forward pass: B rows of T tokens; B is 1 unless they are padded.

    Attributes:
        input_ids: (B, T) tokens, 0 where padded.
        position_ids: (B, T) position of each token in its example.
        labels: (B, T) the tokens themselves, -100 where not learned and at each example's start.
        is_dummy: no example was left for this rank; one token and no label, so that the rank enters
            every collective.
        packing: how its examples are kept apart.
        attention_mask: (B, T) 1 for tokens, 0 for padding; None where there is no padding.
        lengths: tokens of its examples in their order, padding not counted; empty: not told.
        columns: tokens of each row that are this rank's; None: all.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    is_dummy: bool
    packing: Packing = Packing.POSITIONS
    attention_mask: torch.Tensor | None = None
    lengths: tuple[int, ...] = ()
    columns: slice | None = None

    def take_own(self, values: torch.Tensor) -> torch.Tensor:
        """Return of values (B, T) those of this rank's tokens."""
        return values if self.columns is None else values[:, self.columns]

    @property
    def row_lengths(self) -> list[tuple[int, ...]]:
        """Tokens of the examples of each row, padding as one more; empty where not told."""
        if self.packing is not Packing.PADDED:
            return [self.lengths] if self.lengths else []
        width = self.input_ids.shape[1]
        return [(n, width - n) if n < width else (n,) for n in self.lengths]


@dataclass(frozen=True)
class StepPlan:
    """Hold what one rank does in one optimizer step, and the sizes of the whole global batch.

    Attributes:
        micro_batches: this rank's, always as many as accumulation steps.
        num_label_tokens: labels to learn in the global batch, all ranks.
        num_input_tokens: tokens in the global batch, all ranks, dummies not counted.
        num_real_micro_batches: micro-batches with examples, all ranks.
    """

    micro_batches: list[MicroBatch]
    num_label_tokens: int
    num_input_tokens: int
    num_real_micro_batches: int


def steps_per_epoch(
    num_examples: int,
    *,
    world_size: int,
    per_device_train_batch_size: int,
    gradient_accumulation_steps: int,
) -> int:
    """Return the number of global batches of an epoch, the last and smaller one included."""
    batch = world_size * per_device_train_batch_size * gradient_accumulation_steps
    return -(-num_examples // batch)


def assign_examples(
    lengths: Sequence[int],
    *,
    world_size: int,
    per_device_train_batch_size: int,
    gradient_accumulation_steps: int,
    is_padded: bool = False,
) -> list[list[list[int]]]:
    """Assign one global batch to ranks and micro-steps (how: see the module's docstring).

    A smaller last batch fills as few micro-steps as it can; the ones after them are empty.

    Args:
        lengths: tokens of each example of the global batch.
        world_size: data ranks.
        per_device_train_batch_size: examples a micro-batch can take.
        gradient_accumulation_steps: micro-steps.
        is_padded: whether an example takes the room of the longest of its micro-batch.

    Returns:
        ``assigned[micro_step][rank]``: the examples, as indices into ``lengths``.
    """
    num_used_steps = -(-len(lengths) // (world_size * per_device_train_batch_size))
    num_bins = world_size * num_used_steps
    if is_padded:
        ordered = _fill_by_length(lengths, num_bins)
    else:
        ordered = _fill_by_tokens(lengths, num_bins, per_device_train_batch_size)
    assigned = [ordered[s * world_size : (s + 1) * world_size] for s in range(num_used_steps)]
    num_empty_steps = gradient_accumulation_steps - num_used_steps
    return assigned + [[[] for _ in range(world_size)] for _ in range(num_empty_steps)]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def _fill_by_tokens(lengths: Sequence[int], num_bins: int, room: int) -> list[list[int]]:
    """Fill micro-batches with nearly the same number of tokens; return them, largest first."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    tokens = [0] * num_bins
    open_bins = [(0, b) for b in range(num_bins)]
    for example in _longest_first(lengths):
        _, lightest = heapq.heappop(open_bins)
        bins[lightest].append(example)
        tokens[lightest] += lengths[example]
        if len(bins[lightest]) < room:
            heapq.heappush(open_bins, (tokens[lightest], lightest))
    return [bins[b] for b in sorted(range(num_bins), key=lambda b: (-tokens[b], b))]


def _fill_by_length(lengths: Sequence[int], num_bins: int) -> list[list[int]]:
    """Fill micro-batches with examples of similar length; return them, largest padded first.

    Where they are not all full, those with the shorter examples have one more.
    """
    longest_first = _longest_first(lengths)
    small, num_larger = divmod(len(lengths), max(1, num_bins))
    counts = [small] * (num_bins - num_larger) + [small + 1] * num_larger
    starts = np.cumsum([0, *counts])
    bins = [longest_first[start:stop] for start, stop in zip(starts[:-1], starts[1:], strict=True)]
    return sorted(bins, key=lambda b: -len(b) * max((lengths[i] for i in b), default=0))


def build_step_plan(
    examples: TokenizedExamples,
    order: Sequence[int],
    step: int,
    *,
    world_size: int,
    rank: int,
    per_device_train_batch_size: int,
    gradient_accumulation_steps: int,
    packing: Packing = Packing.POSITIONS,
    rows: PackedRows | None = None,
) -> StepPlan:
    """Build this rank's micro-batches of one optimizer step.

    Args:
        examples: all examples.
        order: the epoch's order of examples, or of ``rows``.
        step: the step within the epoch, from 0 to ``steps_per_epoch - 1``.
        world_size: data ranks: those with examples of their own.
        rank: the one this plan is for.
        per_device_train_batch_size: examples a micro-batch can take.
        gradient_accumulation_steps: micro-batches of the plan.
        packing: how the examples of a micro-batch are laid out.
        rows: of examples, where rows are assigned; None: each example by itself.

    Raises:
        IndexError: the epoch has no such step.
    """
    sizes = {
        "world_size": world_size,
        "per_device_train_batch_size": per_device_train_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
    }
    num_steps = steps_per_epoch(len(order), **sizes)
    if not 0 <= step < num_steps:
        raise IndexError(f"step {step} is not one of the epoch's {num_steps}")
    batch = world_size * per_device_train_batch_size * gradient_accumulation_steps
    chosen = order[step * batch : (step + 1) * batch]
    units = examples if rows is None else rows
    lengths = [int(units.lengths[i]) for i in chosen]
    assigned = assign_examples(lengths, **sizes, is_padded=packing is Packing.PADDED)
    own = [[chosen[i] for i in micro_step[rank]] for micro_step in assigned]
    if rows is not None:
        own = [rows.expand(micro_batch) for micro_batch in own]
    return StepPlan(
        micro_batches=[collate_examples(examples, one, packing) for one in own],
        num_label_tokens=int(units.num_label_tokens[chosen].sum()),
        num_input_tokens=int(units.lengths[chosen].sum()),
        num_real_micro_batches=sum(bool(row) for micro_step in assigned for row in micro_step),
    )


def collate_examples(
    examples: TokenizedExamples, indices: Sequence[int], packing: Packing = Packing.POSITIONS
) -> MicroBatch:
    """Return the examples as a micro-batch, or a dummy if there are none."""
    if not indices:
        zero = torch.zeros((1, 1), dtype=torch.long)
        labels = zero + IGNORED_LABEL
        return MicroBatch(zero, zero.clone(), labels, True, packing=packing, lengths=(1,))
    return collate_encoded([examples[i] for i in indices], packing)


def collate_encoded(
    encoded: Sequence[tuple[np.ndarray, np.ndarray]], packing: Packing
) -> MicroBatch:
    """Return examples, (tokens, labels) of each, as a micro-batch."""
    lengths = [len(ids) for ids, _ in encoded]
    is_padded = packing is Packing.PADDED
    join = _as_rows if is_padded else _as_row
    mask = _as_rows([np.ones(length, dtype=np.int64) for length in lengths]) if is_padded else None
    return MicroBatch(
        input_ids=join([ids for ids, _ in encoded]),
        position_ids=join([np.arange(length) for length in lengths]),
        labels=join([labels for _, labels in encoded], IGNORED_LABEL),
        is_dummy=False,
        packing=packing,
        attention_mask=None if mask is None or bool(mask.all()) else mask,
        lengths=tuple(lengths),
    )


def _as_row(parts: Sequence[np.ndarray], _fill: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts))[None]


def _as_rows(parts: Sequence[np.ndarray], fill: int = 0) -> torch.Tensor:
    longest = max(len(part) for part in parts)
    padded = [np.pad(part, (0, longest - len(part)), constant_values=fill) for part in parts]
    return torch.from_numpy(np.stack(padded))
