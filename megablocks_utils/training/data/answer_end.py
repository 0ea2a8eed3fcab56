"""See what the data teaches as the end of an answer, and whether generation will stop there."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megablocks_utils.training.data.text import IGNORED_LABEL

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from megablocks_utils.training.data.examples import TokenizedExamples

__all__ = ["AnswerEnd", "find_answer_end", "let_generation_stop"]

MAX_EXAMPLES = 1000
"""Examples that are looked at, evenly spread: what ends an answer is the template's."""


@dataclass(frozen=True)
class AnswerEnd:
    """Hold what ends answers, by everyone who has a say.

    Attributes:
        learned: tokens that end the answers of the data, the most frequent first.
        tokens: all of these tokens' texts, by id.
        tokenizer_end: the tokenizer's `eos_token_id`.
        generation_ends: the generation config's `eos_token_id`, as a list.
        num_examples: how many examples were looked at.
        num_endless: those of them whose answer ends with a token of its text.
    """

    learned: tuple[int, ...]
    tokens: dict[int, str]
    tokenizer_end: int | None
    generation_ends: tuple[int, ...]
    num_examples: int
    num_endless: int

    @property
    def saved_ends(self) -> tuple[int, ...]:
        """What generation has to stop at: as it did, and at what is learned."""
        added = tuple(token for token in self.learned if token not in self.generation_ends)
        return self.generation_ends + added

    @property
    def warning(self) -> str | None:
        """A sentence if generation would not stop, or not for everyone; None if all agree."""
        if 2 * self.num_endless > self.num_examples:
            return (
                f"{self.num_endless:,} of {self.num_examples:,} answers end with a token of their "
                "text and none that ends a turn, so the model does not learn to stop; the chat "
                "template must write one (--chat_template)"
            )
        agree = set(self.learned) <= set(self.generation_ends)
        if not self.learned or (agree and self.tokenizer_end in self.learned):
            return None
        saved = "right as it is" if agree else f"saved as {self._name(self.saved_ends)}"
        return (
            f"answers end with {self._name(self.learned)}, but the tokenizer's eos_token is "
            f"{self._name([self.tokenizer_end])} and the generation config's eos_token_id is "
            f"{self._name(self.generation_ends)}; the generation config is {saved}"
        )

    def _name(self, tokens: Sequence[int | None]) -> str:
        named = [f"{self.tokens.get(t, '?')} ({t})" for t in tokens if t is not None]
        return " or ".join(named) or "not set"

    def apply_to(self, generation_config: "GenerationConfig | None") -> None:
        """Let generation stop at what is learned, in the configuration that is saved."""
        if generation_config is None or self.saved_ends == self.generation_ends:
            return
        first, *others = self.saved_ends
        generation_config.eos_token_id = [first, *others] if others else first

    def as_record(self) -> dict[str, Any]:
        """Return it for `run.json`."""
        return {
            "learned": list(self.learned),
            "tokenizer": self.tokenizer_end,
            "generation_config": list(self.saved_ends),
            "warning": self.warning,
        }


def let_generation_stop(
    examples: "TokenizedExamples",
    tokenizer: "PreTrainedTokenizerBase | None",
    model: "PreTrainedModel",
    *,
    max_seq_length: int,
) -> AnswerEnd | None:
    """Let the generation config, which is saved with the model, stop at what is learned."""
    generation_config = getattr(model, "generation_config", None)
    end = find_answer_end(examples, tokenizer, generation_config, max_seq_length=max_seq_length)
    if end is not None:
        end.apply_to(generation_config)
    return end


def find_answer_end(
    examples: "TokenizedExamples",
    tokenizer: "PreTrainedTokenizerBase | None",
    generation_config: "GenerationConfig | None",
    *,
    max_seq_length: int,
) -> AnswerEnd | None:
    """Return what ends the answers of the data; None without a tokenizer, which knows the tokens.

    Args:
        examples: of the run.
        tokenizer: of the model.
        generation_config: of the model.
        max_seq_length: examples of this length may have lost their end.
    """
    if tokenizer is None:
        return None
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    counts: Counter[int] = Counter()
    for index in _spread(np.flatnonzero(examples.lengths < max_seq_length)):
        labels = examples[int(index)][1]
        counts[int(labels[labels != IGNORED_LABEL][-1])] += 1
    frequent = [token for token, count in counts.most_common() if count >= counts.total() / 100]
    learned = tuple(token for token in frequent if token in special)
    ends = None if generation_config is None else generation_config.eos_token_id
    generation_ends = tuple(ends) if isinstance(ends, list | tuple) else (ends,)
    known = tuple(token for token in generation_ends if isinstance(token, int))
    named = {*learned, *known} | {tokenizer.eos_token_id} - {None}
    return AnswerEnd(
        learned=learned,
        tokens={
            token: str(tokenizer.convert_ids_to_tokens(token))
            for token in named
            if 0 <= token < len(tokenizer)
        },
        tokenizer_end=tokenizer.eos_token_id,
        generation_ends=known,
        num_examples=counts.total(),
        num_endless=sum(count for token, count in counts.items() if token not in special),
    )


def _spread(indices: np.ndarray) -> np.ndarray:
    if len(indices) <= MAX_EXAMPLES:
        return indices
    return indices[np.linspace(0, len(indices) - 1, MAX_EXAMPLES).astype(np.int64)]
