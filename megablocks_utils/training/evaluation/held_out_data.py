"""Where a run's held-out examples come from, and how its ranks share them."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from megablocks_utils.config import RunConfig
from megablocks_utils.errors import ConfigurationError, UserError
from megablocks_utils.processes.agreement import raise_on_all_ranks
from megablocks_utils.training.data.batches import Packing
from megablocks_utils.training.data.examples import TokenizedExamples
from megablocks_utils.training.data.held_out import hold_out
from megablocks_utils.training.data.schedule import Schedule
from megablocks_utils.training.evaluation.held_out_loss import HeldOut

__all__ = ["choose_held_out", "share_held_out"]


def choose_held_out(
    config: RunConfig, load: Callable[[RunConfig], TokenizedExamples]
) -> tuple[TokenizedExamples, TokenizedExamples | None]:
    """Load the examples to train on, and those held out; None for a run without evaluation.

    **Collective:** every rank must call, as `load`.

    Args:
        config: the run.
        load: loads what `data_path` holds, of this run or of another.

    Raises:
        UserError: on every rank, for held-out data that cannot be used.
    """
    evaluation, examples = config.evaluation, load(config)
    if not evaluation.is_on:
        return examples, None
    path = evaluation.eval_data_path
    if path is None:
        share, seed = evaluation.eval_fraction, config.seed
        return raise_on_all_ranks(lambda: hold_out(examples, share, seed))
    data = replace(
        config.data, data_path=(path,), data_weights=None, streaming=False, packing_length=None
    )
    if Path(path).is_file():  # which has no configuration and no split
        data = replace(data, dataset_config=None, dataset_split="train")
    if evaluation.eval_dataset_split is not None:
        data = replace(data, dataset_split=evaluation.eval_dataset_split)
    try:
        return examples, load(replace(config, data=data))
    except UserError as error:
        own = ["data_path"]
        if evaluation.eval_dataset_split is not None:
            own.append("dataset_split")
        message = re.sub(rf"(?<!\w)({'|'.join(own)})\b", r"eval_\1", str(error))
        parameters = (*error.parameters, *(f"eval_{name}" for name in own))
        raise type(error)(message, parameters=parameters) from error


def share_held_out(
    schedule: Schedule,
    examples: TokenizedExamples | None,
    console: Console,
    tokenizer: PreTrainedTokenizerBase | None,
) -> HeldOut | None:
    """Say how the ranks share the held-out examples.

    Args:
        schedule: how they share those that are trained on.
        examples: those held out; None: none are.
        console: told what is not as asked for, or not in the plan of memory.
        tokenizer: of the model.

    Raises:
        ConfigurationError: answers are asked for that nobody could read.
    """
    if examples is None:
        return None
    config = schedule.config
    if config.evaluation.predict_samples and tokenizer is None:
        raise ConfigurationError(
            f"predict_samples is {config.evaluation.predict_samples}, but the model has no "
            "tokenizer to write answers with: it must be 0.",
            parameters=("predict_samples",),
        )
    given, trained = (
        config.evaluation.per_device_eval_batch_size,
        config.optim.per_device_train_batch_size,
    )
    batch_size = given or trained
    if schedule.packing is Packing.ALONE and batch_size > 1:
        batch_size = 1
        line = "evaluation takes one example a micro-batch, as training does"
        console.print(line, markup=False, soft_wrap=True)
    held_out = HeldOut(
        examples,
        batch_size,
        schedule.data_rank,
        schedule.num_data_ranks,
        schedule.packing,
        num_copies=config.parallel.tp_size,
        take_part=schedule.take_part,
    )
    num_tokens, num_trained = held_out.largest_micro_batch(), schedule.largest_micro_batch()[0]
    if num_tokens > num_trained:
        console.print(
            f"evaluation has micro-batches of up to {num_tokens:,} tokens, training of "
            f"{num_trained:,}: the plan of memory does not count them",
            markup=False,
            soft_wrap=True,
        )
    return held_out
