"""Decide which examples a rank sees in which micro-step.

Global batch i of an epoch holds examples ``[i*G, (i+1)*G)`` of the epoch's order, where G is batch
size x ranks x accumulation steps; the last one may be smaller and is kept. The order depends on
seed and epoch alone, so runs with equal G see the same global batches on any number of ranks.

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

Each rank computes the whole plan by itself; nothing is communicated.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megablocks_utils.training.data.examples import TokenizedExamples
from megablocks_utils.training.data.text import IGNORED_LABEL

__all__ = ["MicroBatch", "StepPlan", "build_step_plan", "assign_examples", "epoch_order"]
__all__ += ["pack_examples", "steps_per_epoch"]


@dataclass(frozen=True)
class MicroBatch:
    """Hold the packed row of one forward pass.

    Its examples stand one after the other with positions that start again at 0. It must be given to
    the model without an attention mask and with ``use_cache=False``: only then does transformers
    keep the examples of a row apart.

    Attributes:
        input_ids: (1, T) tokens.
        position_ids: (1, T) position of each token in its example.
        labels: (1, T) the tokens themselves, -100 where not learned and at each example's start.
        is_dummy: no example was left for this rank; one token and no label, so that the rank enters
            every collective.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    is_dummy: bool


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


def epoch_order(num_examples: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """Return the order of an epoch's examples: a function of seed and epoch alone.

    numpy promises ``RandomState`` the same numbers in every version, so that a resumed run finds
    its place after an upgrade.
    """
    if not shuffle:
        return list(range(num_examples))
    generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch])))
    return generator.permutation(num_examples).tolist()


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
) -> list[list[list[int]]]:
    """Assign one global batch to ranks and micro-steps (how: see the module's docstring).

    A smaller last batch fills as few micro-steps as it can; the ones after them are empty.

    Args:
        lengths: tokens of each example of the global batch.
        world_size: ranks.
        per_device_train_batch_size: examples a micro-batch can take.
        gradient_accumulation_steps: micro-steps.

    Returns:
        ``assigned[micro_step][rank]``: the examples, as indices into ``lengths``.
    """
    num_used_steps = -(-len(lengths) // (world_size * per_device_train_batch_size))
    bins: list[list[int]] = [[] for _ in range(world_size * num_used_steps)]
    tokens = [0] * len(bins)
    open_bins = [(0, b) for b in range(len(bins))]
    for example in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        _, lightest = heapq.heappop(open_bins)
        bins[lightest].append(example)
        tokens[lightest] += lengths[example]
        if len(bins[lightest]) < per_device_train_batch_size:
            heapq.heappush(open_bins, (tokens[lightest], lightest))
    ordered = [bins[b] for b in sorted(range(len(bins)), key=lambda b: (-tokens[b], b))]
    assigned = [ordered[s * world_size : (s + 1) * world_size] for s in range(num_used_steps)]
    num_empty_steps = gradient_accumulation_steps - num_used_steps
    return assigned + [[[] for _ in range(world_size)] for _ in range(num_empty_steps)]


def build_step_plan(
    examples: TokenizedExamples,
    order: Sequence[int],
    step: int,
    *,
    world_size: int,
    rank: int,
    per_device_train_batch_size: int,
    gradient_accumulation_steps: int,
) -> StepPlan:
    """Build this rank's micro-batches of one optimizer step.

    Args:
        examples: all examples.
        order: the epoch's order, from ``epoch_order``.
        step: the step within the epoch, from 0 to ``steps_per_epoch - 1``.
        world_size: ranks, each with examples of its own.
        rank: the one this plan is for.
        per_device_train_batch_size: examples a micro-batch can take.
        gradient_accumulation_steps: micro-batches of the plan.

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
    assigned = assign_examples([int(examples.lengths[i]) for i in chosen], **sizes)
    rows = [[chosen[i] for i in micro_step[rank]] for micro_step in assigned]
    return StepPlan(
        micro_batches=[pack_examples(examples, row) for row in rows],
        num_label_tokens=int(examples.num_label_tokens[chosen].sum()),
        num_input_tokens=int(examples.lengths[chosen].sum()),
        num_real_micro_batches=sum(bool(row) for micro_step in assigned for row in micro_step),
    )


def pack_examples(examples: TokenizedExamples, indices: Sequence[int]) -> MicroBatch:
    """Return the examples as one packed row, or a dummy row if there are none."""
    if not indices:
        zero = torch.zeros((1, 1), dtype=torch.long)
        return MicroBatch(zero, zero.clone(), zero + IGNORED_LABEL, is_dummy=True)
    rows = [examples[i] for i in indices]
    positions = [np.arange(len(ids)) for ids, _ in rows]
    return MicroBatch(
        input_ids=_as_row([ids for ids, _ in rows]),
        position_ids=_as_row(positions),
        labels=_as_row([labels for _, labels in rows]),
        is_dummy=False,
    )


def _as_row(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts))[None]
