"""Measure a saved model on held-out examples and let it answer.

In one process it loads the model with plain transformers and PEFT: what a run has learned is judged
by code that had no part in it. Under torchrun the model is spread over the ranks as in training.

`python -m megablocks_utils.evaluate --help`. Torch is imported when the options are good, so
`--help` answers at once.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from megablocks_utils.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    resolve_precision,
)
from megablocks_utils.config.command import Command
from megablocks_utils.config.option import Option, list_options, same_option
from megablocks_utils.config.reader import build_section, choose_model, read_command
from megablocks_utils.errors import CheckpointError, ConfigurationError
from megablocks_utils.processes.entry_point import run_entry_point
from megablocks_utils.processes.launch import LaunchEnvironment, check_environment

if TYPE_CHECKING:
    from megablocks_utils.training.model_source import ModelSource

__all__ = [
    "COMMAND",
    "EvaluateOptions",
    "evaluate",
    "main",
    "parse_options",
]

EXAMPLES_PER_BATCH = 4
"""Of a rank's micro-batch under torchrun."""

_ALONE = LaunchEnvironment()
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
    ep_size: Annotated[
        int | None,
        Option(
            "under torchrun: ranks the experts are split over",
            minimum=1,
            shown_default="the number of processes",
        ),
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
        "plain transformers and PEFT; or in several under torchrun, its experts split and the rest "
        "sharded by FSDP2. The result is one JSON object: loss, label_tokens, examples, answers. A "
        "checkpoint of a run is exported to a temporary folder first; an adapter under torchrun is "
        "merged there.",
    ),
    options=_options(),
    positional="MODEL",
    positional_help="Hub name, local folder or checkpoint-<step> of a run",
)


def evaluate(
    model_path: str, options: EvaluateOptions, launch: LaunchEnvironment = _ALONE
) -> dict[str, Any]:
    """Return `loss`, `label_tokens`, `examples` and `answers` of a model.

    **Collective:** every rank of `launch` must call.

    Model, adapter and data pass the checks that a training run would make of them.

    Raises:
        CheckpointError: a model or adapter that is not there or damaged, or without a loss.
        ConfigurationError: a model of a kind that is not supported; questions for a model without a
            tokenizer.
        DataError: examples that cannot be used.
    """
    from megablocks_utils.training.saved_evaluation import evaluate_sharded, unpacked

    if launch.world_size > 1:
        result = evaluate_sharded(
            _sharded_run(model_path, options),
            launch,
            options.adapter,
            options.ask,
            options.max_new_tokens,
        )
    else:
        with unpacked(model_path, options.adapter) as (model, adapter):
            result = _evaluate_alone(model, replace(options, adapter=adapter))
    if not math.isfinite(result["loss"]):
        raise CheckpointError(
            f"the loss of {model_path} on {' '.join(options.data.data_path)} is {result['loss']}: "
            "the model, or the adapter over it, holds values that are not finite or too large"
        )
    return result


def _sharded_run(model_path: str, options: EvaluateOptions) -> RunConfig:
    """Return the run whose first half of a step computes the loss."""
    return RunConfig(
        model=ModelConfig(model_path),
        data=options.data,
        parallel=ParallelConfig(
            use_megablocks_sharding=True, ep_size=options.ep_size, expert_dp="shard"
        ),
        precision=PrecisionConfig("fp32"),
        optim=OptimConfig(per_device_train_batch_size=EXAMPLES_PER_BATCH),
        ignore_plan=True,
    )


def _evaluate_alone(model_path: str, options: EvaluateOptions) -> dict[str, Any]:
    from megablocks_utils.checkpoint.index import resolve_checkpoint_folder
    from megablocks_utils.checkpoint.tokenizer import load_tokenizer
    from megablocks_utils.lora.adapter_reader import open_adapter
    from megablocks_utils.training.data.examples import load_examples
    from megablocks_utils.training.plain_model import greedy_answer, held_out_loss, load_model

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
    values, line = read_command(argv, COMMAND)
    values["data"] = build_section(DataConfig, values)
    options = build_section(EvaluateOptions, values)
    return choose_model(line), options


def main(argv: Sequence[str]) -> None:
    """Evaluate as the options say, and write the result.

    Raises:
        HelpRequested: for `--help` or `-h`.
        UserError: for options or files that cannot be used.
    """
    model_path, options = parse_options(argv)
    launch = check_environment()
    if options.ep_size is not None and launch.world_size == 1:
        raise ConfigurationError(
            f"--ep_size is {options.ep_size}, but this is one process: start several with torchrun."
        )
    result = evaluate(model_path, options, launch)
    if launch.rank == 0:
        sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    run_entry_point(main, sys.argv[1:])
