"""Held-out prompts answered greedily by a model whose weights are spread over the ranks."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from megablocks_utils.processes.agreement import gather_from_all_ranks, max_over_ranks
from megablocks_utils.processes.progress_marks import PROGRESS
from megablocks_utils.training.data.batches import MicroBatch, collate_encoded, collate_examples
from megablocks_utils.training.data.examples import TokenizedExamples
from megablocks_utils.training.data.text import IGNORED_LABEL
from megablocks_utils.training.evaluation.held_out_loss import HeldOut
from megablocks_utils.training.step.forward import run_forward

__all__ = ["Prompt", "answer_prompts", "take_prompts"]


@dataclass(frozen=True)
class Prompt:
    """Hold the start of a held-out example, and how it goes on.

    Attributes:
        tokens: up to the first label.
        expected: the tokens of the first run of labels.
    """

    tokens: list[int]
    expected: list[int]


def take_prompts(examples: TokenizedExamples, number: int) -> list[Prompt]:
    """Return the prompts of the first examples, as many as there are."""
    return [_take_prompt(*examples[index]) for index in range(min(number, len(examples)))]


def _take_prompt(ids: np.ndarray, labels: np.ndarray) -> Prompt:
    is_learned = labels != IGNORED_LABEL
    start = int(is_learned.argmax())
    unlearned = np.flatnonzero(~is_learned[start:])
    stop = start + int(unlearned[0]) if len(unlearned) else len(ids)
    return Prompt(ids[:start].tolist(), ids[start:stop].tolist())


@dataclass
class _Answer:
    prompt: Prompt
    tokens: list[int] = field(default_factory=list)
    is_done: bool = False


def answer_prompts(
    model: nn.Module,
    prompts: Sequence[Prompt],
    held_out: HeldOut,
    device: torch.device,
    *,
    ends: Collection[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """Return the most likely continuation of each prompt, token by token.

    Each token takes a whole forward pass, without a cache: so it is the one of training. Call it
    within `undisturbed`.

    **Collective:** every rank of the world must call, also one without prompts.

    Args:
        model: wrapped, or whole in one process.
        prompts: the same on every rank.
        held_out: how ranks share examples.
        device: where the model computes.
        ends: tokens that end an answer; the answer does not hold them.
        max_new_tokens: of each answer at most.
    """
    num_ranks, room = held_out.num_data_ranks, held_out.batch_size
    own = [_Answer(prompt) for prompt in prompts[held_out.data_rank :: num_ranks]]
    num_rounds = -(-len(prompts) // (num_ranks * room))
    for _ in range(max_new_tokens):
        for start in range(0, num_rounds * room, room):
            PROGRESS.mark()
            open_ = [answer for answer in own[start : start + room] if not answer.is_done]
            _extend(model, open_, held_out, device, ends)
        if not max_over_ranks(sum(not answer.is_done for answer in own)):
            break
    shares = gather_from_all_ranks(lambda: (held_out.data_rank, [a.tokens for a in own]))
    by_rank = dict(shares)
    return [by_rank[number % num_ranks][number // num_ranks] for number in range(len(prompts))]


def _extend(
    model: nn.Module,
    answers: Sequence[_Answer],
    held_out: HeldOut,
    device: torch.device,
    ends: Collection[int],
) -> None:
    """Append a token to each answer, by one forward pass; by a dummy's where there is none."""
    _, logits, _ = run_forward(model, _batch(answers, held_out), device)
    for answer, token in zip(answers, logits[0].argmax(-1).tolist(), strict=True):
        answer.is_done = token in ends
        if not answer.is_done:
            answer.tokens.append(token)


def _batch(answers: Sequence[_Answer], held_out: HeldOut) -> MicroBatch:
    """Return the texts so far, each with one more token as the only label: any, never seen."""
    if not answers:
        return collate_examples(held_out.examples, [], held_out.packing)
    rows = []
    for answer in answers:
        ids = np.array([*answer.prompt.tokens, *answer.tokens, 0], dtype=np.int64)
        labels = np.full_like(ids, IGNORED_LABEL)
        labels[-1] = ids[-1]
        rows.append((ids, labels))
    return collate_encoded(rows, held_out.packing)
