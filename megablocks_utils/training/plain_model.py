"""A saved model in plain transformers and PEFT: its loss and its answers, in one process."""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from megablocks_utils.attention.implementation import own_implementation, set_implementation
from megablocks_utils.checkpoint.foreign_code import ForeignCode
from megablocks_utils.checkpoint.library_output import (
    filter_peft_warnings,
    without_transformers_bars,
)
from megablocks_utils.checkpoint.quantization_config import load_dequantized
from megablocks_utils.errors import CheckpointError
from megablocks_utils.training.data.alpaca import alpaca_prompt
from megablocks_utils.training.data.batches import MicroBatch, Packing, collate_examples
from megablocks_utils.training.data.examples import TokenizedExamples
from megablocks_utils.training.step.forward import run_loss
from megablocks_utils.training.step.learn_logits_map import find_logits_map
from megablocks_utils.training.step.packing_probe import OWN, choose_packing
from megablocks_utils.training.step.small_model import build_small_model

__all__ = ["TOKENS_PER_BATCH", "greedy_answer", "held_out_loss", "load_model"]

TOKENS_PER_BATCH = 1024
"""Of a packed row or a padded batch: attention over a row is dense, so longer ones waste work."""


def load_model(model_path: str, adapter_path: str | None = None) -> PreTrainedModel:
    """Load a model, and a PEFT adapter over it, in fp32 for evaluation.

    Raises:
        CheckpointError: a file that cannot be read.
    """
    found = model_path if adapter_path is None else f"{model_path} or {adapter_path}"
    with (
        ForeignCode(lambda reason: CheckpointError(f"{found} cannot be loaded: {reason}")),
        without_transformers_bars(),
        filter_peft_warnings(),
    ):
        model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=torch.float32, **load_dequantized(Path(model_path))
        )
        if adapter_path is not None:
            model = PeftModel.from_pretrained(model, adapter_path).merge_and_unload()
    return model.eval()


def held_out_loss(model: PreTrainedModel, examples: TokenizedExamples) -> float:
    """Return the mean loss of all label tokens, each counted once.

    The examples are batched, and attention computed, as training would; the result does not depend
    on how.

    Raises:
        ConfigurationError: no way of batching is right for this model, and that cannot be tried.
    """
    device = next(model.parameters()).device
    small = partial(build_small_model, model, device)
    choice = choose_packing(
        small, packing="auto", batch_size=len(examples), device=device, attention="auto"
    )
    if choice.packing is not Packing.ALONE:
        sys.stderr.write(f"batches are {choice.describe()}\n")
    logits_map, _ = find_logits_map(model)
    own, total = own_implementation(model), 0.0
    set_implementation(model, own if choice.attention == OWN else choice.attention)
    with torch.no_grad():
        for batch in _batches(examples, choice.packing):
            total += run_loss(model, batch, device, logits_map)[1].item()
    set_implementation(model, own)
    return total / int(examples.num_label_tokens.sum())


def _batches(examples: TokenizedExamples, packing: Packing) -> Iterator[MicroBatch]:
    """Yield all examples in batches of at most so many tokens, padding counted."""
    is_padded = packing is Packing.PADDED
    order = sorted(range(len(examples)), key=lambda i: examples.lengths[i] if is_padded else i)
    batch: list[int] = []
    for index in order:
        lengths = [int(examples.lengths[i]) for i in (*batch, index)]
        tokens = max(lengths) * len(lengths) if is_padded else sum(lengths)
        if batch and tokens > TOKENS_PER_BATCH:
            yield collate_examples(examples, batch, packing)
            batch = []
        batch.append(index)
    yield collate_examples(examples, batch, packing)


def greedy_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instruction: str,
    *,
    max_new_tokens: int = 48,
) -> str:
    """Return the model's answer to an instruction in Alpaca's prompt, decoded greedily."""
    assert isinstance(model, GenerationMixin)
    inputs = tokenizer(alpaca_prompt(instruction), return_tensors="pt").to(model.device)
    with torch.no_grad():
        output = model.generate(  # type: ignore[misc]  # its annotated self is for another checker
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    answer = output[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
