"""Measure a saved model on held-out examples and let it answer, in one process.

It loads the model with plain transformers and PEFT: what a run has learned is judged by code that
had no part in it.

Run it as ``python -m megablocks_utils.evaluate MODEL --data_path FILE``.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from megablocks_utils.checkpoint.library_output import (
    filter_peft_warnings,
    without_transformers_bars,
)
from megablocks_utils.errors import UserError
from megablocks_utils.training.data.batches import MicroBatch, pack_examples
from megablocks_utils.training.data.examples import TokenizedExamples, load_examples
from megablocks_utils.training.data.formats import alpaca_prompt
from megablocks_utils.training.step.objective import label_positions, token_loss_sum

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["greedy_answer", "held_out_loss", "load_model", "main"]

TOKENS_PER_ROW = 1024
"""Longest packed row: attention over a row is dense, so longer ones waste work."""


def load_model(model_path: str, adapter_path: str | None = None) -> "PreTrainedModel":
    """Load a model, and a PEFT adapter over it, in fp32 for evaluation."""
    from transformers import AutoModelForCausalLM

    with without_transformers_bars(), filter_peft_warnings():
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        if adapter_path is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter_path).merge_and_unload()
    return model.eval()


def held_out_loss(model: torch.nn.Module, examples: TokenizedExamples) -> float:
    """Return the mean loss of all label tokens, each counted once.

    The examples are packed in rows of similar length; the result does not depend on how.
    """
    device = next(model.parameters()).device
    total = 0.0
    with torch.no_grad():
        for row in _rows(examples):
            positions, targets = label_positions(row.labels)
            logits = model(
                input_ids=row.input_ids.to(device),
                position_ids=row.position_ids.to(device),
                logits_to_keep=positions.to(device),
                use_cache=False,
            ).logits
            total += token_loss_sum(logits, targets.to(device)).item()
    return total / int(examples.num_label_tokens.sum())


def _rows(examples: TokenizedExamples) -> Iterator[MicroBatch]:
    row, tokens = [], 0
    for index in range(len(examples)):
        length = int(examples.lengths[index])
        if row and tokens + length > TOKENS_PER_ROW:
            yield pack_examples(examples, row)
            row, tokens = [], 0
        row.append(index)
        tokens += length
    yield pack_examples(examples, row)


def greedy_answer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    instruction: str,
    *,
    max_new_tokens: int = 48,
) -> str:
    """Return the model's answer to an instruction in Alpaca's prompt, decoded greedily."""
    inputs = tokenizer(alpaca_prompt(instruction), return_tensors="pt").to(model.device)
    with torch.no_grad():
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    answer = output[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True).strip()


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Return ``loss``, ``label_tokens``, ``examples`` and ``answers`` of what the options name."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    examples = load_examples(options, tokenizer)
    model = load_model(options.model, options.adapter)
    result = {
        "loss": held_out_loss(model, examples),
        "label_tokens": int(examples.num_label_tokens.sum()),
        "examples": len(examples),
    }
    answers = {
        text: greedy_answer(model, tokenizer, text, max_new_tokens=options.max_new_tokens)
        for text in options.ask
    }
    return result | {"answers": answers}


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m megablocks_utils.evaluate",
        description="Measure a saved model on held-out examples; the result is one JSON object.",
    )
    parser.add_argument("model", help="Hub name or folder")
    parser.add_argument("--adapter", help="folder of a PEFT adapter to put over the model")
    parser.add_argument("--data_path", required=True, help="held-out examples")
    parser.add_argument("--max_seq_length", type=int, default=4096)
    parser.add_argument("--max_new_tokens", type=int, default=48, help="of each answer")
    parser.add_argument(
        "--ask", action="append", default=[], metavar="INSTRUCTION", help="may be repeated"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    try:
        result = evaluate(build_parser().parse_args(argv))
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
