"""Measure a saved model on held-out examples and let it answer, in one process.

It loads the model with plain transformers and PEFT: what a run has learned is judged by code that
had no part in it.

`python -m megablocks_utils.evaluate --help`. Torch is imported when the options are good, so
`--help` answers at once.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from megablocks_utils.config import (
    DataConfig,
    ModelConfig,
    PrecisionConfig,
    RunConfig,
    resolve_precision,
)
from megablocks_utils.config.command import Command
from megablocks_utils.config.option import Option, list_options, same_option
from megablocks_utils.config.reader import build_section, choose_model, read_command
from megablocks_utils.errors import CheckpointError, ConfigurationError
from megablocks_utils.processes.entry_point import run_entry_point

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from megablocks_utils.training.data.batches import MicroBatch, Packing
    from megablocks_utils.training.data.examples import TokenizedExamples
    from megablocks_utils.training.model_source import ModelSource

__all__ = [
    "COMMAND",
    "EvaluateOptions",
    "evaluate",
    "greedy_answer",
    "held_out_loss",
    "load_model",
    "main",
    "parse_options",
]

TOKENS_PER_BATCH = 1024
"""Of a packed row or a padded batch: attention over a row is dense, so longer ones waste work."""

_OF_TRAINING = ("shuffle", "data_weights", "streaming", "shuffle_buffer_size", "packing_length")
"""Options of data about the order of a training run."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Hold the options; `data` has those that training shares."""

    data: DataConfig
    model_name_or_path: Annotated[
        str | None, Option("MODEL, as the scripts name it", metavar="MODEL")
    ] = None
    adapter: Annotated[
        str | None, Option("folder of a PEFT adapter to put over the model", metavar="DIR")
    ] = None
    max_new_tokens: Annotated[int, Option("tokens of each answer at most", minimum=1)] = 48
    ask: Annotated[
        tuple[str, ...],
        Option(
            "instructions that the model answers; may be repeated",
            metavar="INSTRUCTION",
            may_repeat=True,
        ),
    ] = ()


def _options() -> tuple[Option, ...]:
    """Return the options: those of data but for a run's order, and more."""
    data_path = same_option(
        DataConfig,
        "data_path",
        help="held-out examples, as the scripts read them",
        default=None,
        is_required=True,
    )
    others = [
        option
        for option in list_options(EvaluateOptions)
        if option.name not in (data_path.name, *_OF_TRAINING)
    ]
    return (data_path, *others)


COMMAND = Command(
    usage=("python -m megablocks_utils.evaluate MODEL --data_path DATA [--option value] ...",),
    about=(
        "Measures a saved model on held-out examples and lets it answer, in one process, with "
        "plain transformers and PEFT. The result is one JSON object: loss, label_tokens, examples, "
        "answers.",
    ),
    options=_options(),
    positional="MODEL",
    positional_help="Hub name or local folder",
)


def load_model(model_path: str, adapter_path: str | None = None) -> "PreTrainedModel":
    """Load a model, and a PEFT adapter over it, in fp32 for evaluation.

    Raises:
        CheckpointError: a file that cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from megablocks_utils.checkpoint.foreign_code import ForeignCode
    from megablocks_utils.checkpoint.library_output import (
        filter_peft_warnings,
        without_transformers_bars,
    )
    from megablocks_utils.checkpoint.quantization_config import load_dequantized

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
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter_path).merge_and_unload()
    return model.eval()


def held_out_loss(model: "PreTrainedModel", examples: "TokenizedExamples") -> float:
    """Return the mean loss of all label tokens, each counted once.

    The examples are batched as training would; the result does not depend on how.

    Raises:
        ConfigurationError: no way of batching is right for this model, and that cannot be tried.
    """
    import torch

    from megablocks_utils.training.step.forward import run_loss
    from megablocks_utils.training.step.learn_logits_map import find_logits_map
    from megablocks_utils.training.step.packing_probe import choose_packing
    from megablocks_utils.training.step.small_model import build_small_model

    device = next(model.parameters()).device
    small = partial(build_small_model, model, device)
    choice = choose_packing(small, packing="auto", batch_size=len(examples), device=device)
    logits_map, _ = find_logits_map(model)
    total = 0.0
    with torch.no_grad():
        for batch in _batches(examples, choice.packing):
            total += run_loss(model, batch, device, logits_map)[1].item()
    return total / int(examples.num_label_tokens.sum())


def _batches(examples: "TokenizedExamples", packing: "Packing") -> "Iterator[MicroBatch]":
    """Yield all examples in batches of at most so many tokens, padding counted."""
    from megablocks_utils.training.data.batches import Packing, collate_examples

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
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    instruction: str,
    *,
    max_new_tokens: int = 48,
) -> str:
    """Return the model's answer to an instruction in Alpaca's prompt, decoded greedily."""
    import torch
    from transformers import GenerationMixin

    from megablocks_utils.training.data.alpaca import alpaca_prompt

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


def evaluate(model_path: str, options: EvaluateOptions) -> dict[str, Any]:
    """Return `loss`, `label_tokens`, `examples` and `answers` of a model.

    Model, adapter and data pass the checks that a training run would make of them.

    Raises:
        CheckpointError: a model or adapter that is not there or damaged, or without a loss.
        ConfigurationError: a model of a kind that is not supported; questions for a model without a
            tokenizer.
        DataError: examples that cannot be used.
    """
    from megablocks_utils.checkpoint.index import resolve_checkpoint_folder
    from megablocks_utils.checkpoint.tokenizer import load_tokenizer
    from megablocks_utils.lora.adapter_reader import open_adapter
    from megablocks_utils.training.data.examples import load_examples

    folder = resolve_checkpoint_folder(model_path)
    bare = _build_source(model_path, folder).model
    adapter = None
    if options.adapter is not None:
        adapter = str(open_adapter(options.adapter, bare).index.folder)
    tokenizer = load_tokenizer(folder)
    if options.ask and tokenizer is None:
        raise ConfigurationError(f"--ask is given, but {folder} has no tokenizer.")
    examples = load_examples(options.data, tokenizer)
    notes = list(examples.notes)
    if examples.ignored_keys:
        notes.append(f"ignored: {', '.join(examples.ignored_keys)}: no meaning for training")
    sys.stderr.writelines(f"{note}\n" for note in notes)
    examples.check_vocabulary(bare.config.vocab_size)
    model = load_model(str(folder), adapter)
    loss = held_out_loss(model, examples)
    if not math.isfinite(loss):
        raise CheckpointError(
            f"the loss of {folder} on {' '.join(options.data.data_path)} is {loss}: the model, or "
            "the adapter over it, holds values that are not finite or too large"
        )
    answers = {
        text: greedy_answer(model, tokenizer, text, max_new_tokens=options.max_new_tokens)
        for text in options.ask
        if tokenizer is not None
    }
    label_tokens = int(examples.num_label_tokens.sum())
    counts = {"label_tokens": label_tokens, "examples": len(examples)}
    return {"loss": loss, **counts, "answers": answers}


def _build_source(model_path: str, folder: "Path") -> "ModelSource":
    """Check a model as training does, and build it without weights."""
    from megablocks_utils.training.model_source import ModelSource

    config = RunConfig(model=ModelConfig(model_path), precision=PrecisionConfig("fp32"))
    return ModelSource(folder, config, resolve_precision(config, "cpu"))


def parse_options(argv: Sequence[str]) -> tuple[str, EvaluateOptions]:
    """Read MODEL and the options.

    Raises:
        HelpRequested: for `--help` or `-h`.
        ConfigurationError: for a word, name or value that cannot be used.
    """
    values, positional = read_command(argv, COMMAND)
    values["data"] = build_section(DataConfig, values)
    options = build_section(EvaluateOptions, values)
    return choose_model(positional, options.model_name_or_path), options


def main(argv: Sequence[str]) -> None:
    """Evaluate as the options say, and write the result.

    Raises:
        HelpRequested: for `--help` or `-h`.
        UserError: for options or files that cannot be used.
    """
    result = evaluate(*parse_options(argv))
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    run_entry_point(main, sys.argv[1:])
