"""When a run is evaluated while it trains, on what, and what follows from it. Torch-free."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any

from megablocks_utils.config.option import Option
from megablocks_utils.errors import ConfigurationError

__all__ = ["EvaluationConfig", "check_evaluation"]


@dataclass(frozen=True)
class EvaluationConfig:
    """Say which examples are held out, when their loss is measured, and what depends on it.

    Attributes:
        eval_data_path: Held-out data; None: a share of the training data, or none.
        eval_fraction: That share; 0: none.
        eval_strategy: "no", "steps" or "epoch".
        eval_steps: Whole steps between two evaluations, or below 1 the share of all steps; None:
            `logging_steps`.
        per_device_eval_batch_size: Examples of a micro-batch; None: as in training.
        load_best_model_at_end: Whether the final model is the saved one with the lowest loss.
        early_stopping_patience: Evaluations without a lower loss that end the run; None: none do.
        predict_samples: Held-out prompts that each evaluation answers.
        eval_dataset_split: Of `eval_data_path`; None: `dataset_split`.
    """

    eval_data_path: Annotated[
        str | None,
        Option("held-out examples that --eval_strategy measures the loss of", metavar="DATA"),
    ] = None
    eval_fraction: Annotated[
        float,
        Option(
            "hold out this share of the training data instead, chosen by --seed", minimum=0, limit=1
        ),
    ] = 0
    eval_strategy: Annotated[
        str,
        Option(
            "when the held-out loss is measured, before the first step and: every --eval_steps and "
            "after the last step, or at each epoch's end",
            choices=("no", "steps", "epoch"),
            aliases=("evaluation_strategy",),
        ),
    ] = "no"
    eval_steps: Annotated[
        float | None,
        Option(
            "optimizer steps between two evaluations with --eval_strategy steps; below 1: that "
            "share of all steps",
            above=0,
            limit=10**9,
            shown_default="--logging_steps",
        ),
    ] = None
    per_device_eval_batch_size: Annotated[
        int | None,
        Option(
            "examples of a rank's micro-batch in an evaluation; no result depends on it",
            minimum=1,
            shown_default="--per_device_train_batch_size",
        ),
    ] = None
    load_best_model_at_end: Annotated[
        bool,
        Option(
            "let the final model be the checkpoint with the lowest eval_loss, which "
            "--save_total_limit then keeps"
        ),
    ] = False
    early_stopping_patience: Annotated[
        int | None,
        Option(
            "end the run after so many evaluations in a row without a lower eval_loss",
            metavar="N",
            minimum=1,
            shown_default="off",
        ),
    ] = None
    predict_samples: Annotated[
        int,
        Option(
            "held-out prompts that each evaluation answers, greedily: samples.jsonl and samples.md",
            metavar="N",
            minimum=0,
        ),
    ] = 0
    eval_dataset_split: Annotated[
        str | None,
        Option(
            "split of a dataset that --eval_data_path names (no file), such as validation",
            metavar="SPLIT",
            shown_default="--dataset_split",
        ),
    ] = None

    @property
    def is_on(self) -> bool:
        """Whether the run is evaluated."""
        return self.eval_strategy != "no"

    @property
    def needs_best(self) -> bool:
        """Whether the best checkpoint is kept."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None

    def is_due(
        self, step: int, *, num_steps: int, steps_per_epoch: int, logging_steps: int
    ) -> bool:
        """Return whether the run is evaluated after `step`, as Hugging Face's Trainer would.

        Args:
            step: Optimizer steps done; 0 is before the first.
            num_steps: Of the whole run; an evaluation is due after the last one too.
            steps_per_epoch: Of one pass over the data.
            logging_steps: Of the run, for `eval_steps` that are not given.
        """
        if not self.is_on:
            return False
        if step in (0, num_steps):
            return True
        if self.eval_strategy == "epoch":
            return step % steps_per_epoch == 0
        every = self.eval_steps or logging_steps
        return step % math.ceil(every * (num_steps if every < 1 else 1)) == 0


def check_evaluation(values: Mapping[str, Any]) -> None:
    """Refuse options of evaluation that contradict each other.

    Args:
        values: every option by name, defaults where not given.

    Raises:
        ConfigurationError: naming an option, its value and what it contradicts.
    """
    strategy, sources = values["eval_strategy"], _list_sources(values)
    if values["eval_fraction"] >= 1:
        raise ConfigurationError(
            f"--eval_fraction is {values['eval_fraction']:g}, but it must be below 1: no examples "
            "would be left to train on."
        )
    if len(sources) == 2:
        raise ConfigurationError(
            f"--eval_data_path is {values['eval_data_path']} and --eval_fraction is "
            f"{values['eval_fraction']}, but the held-out examples come from one of them: leave "
            "the other out."
        )
    if strategy == "no":
        _refuse_idle(values)
        return
    _check_sources(values, strategy, sources)
    every = values["eval_steps"]
    if every is not None and strategy != "steps":
        raise ConfigurationError(
            f"--eval_steps is {every:g}, but --eval_strategy is {strategy}: it must be steps."
        )
    if every is not None and every >= 1 and every != int(every):
        raise ConfigurationError(
            f"--eval_steps is {every:g}, but it must be a whole number, or below 1 a share."
        )
    if values["load_best_model_at_end"]:
        _check_best(values, strategy)


def _check_sources(values: Mapping[str, Any], strategy: str, sources: list[str]) -> None:
    """Refuse an evaluation without examples, or of some that cannot be used."""
    if not sources:
        raise ConfigurationError(
            f"--eval_strategy is {strategy}, but no examples are held out: give --eval_data_path "
            "or --eval_fraction."
        )
    if values["eval_dataset_split"] and not values["eval_data_path"]:
        raise ConfigurationError(
            f"--eval_dataset_split is {values['eval_dataset_split']}, but there is no "
            "--eval_data_path that it could be of."
        )
    if values["eval_fraction"] and values.get("streaming"):
        raise ConfigurationError(
            f"--eval_fraction is {values['eval_fraction']}, but --streaming True never knows all "
            "examples: give --eval_data_path."
        )
    if values["predict_samples"] and values["sp_size"] > 1:
        raise ConfigurationError(
            f"--predict_samples is {values['predict_samples']}, but with --sp_size "
            f"{values['sp_size']} it must be 0: ranks share rows, and one of them alone has the "
            "next token."
        )


def _list_sources(values: Mapping[str, Any]) -> list[str]:
    return [name for name in ("eval_data_path", "eval_fraction") if values[name]]


def _refuse_idle(values: Mapping[str, Any]) -> None:
    """Refuse what means nothing in a run that is not evaluated."""
    idle = ("eval_steps", "load_best_model_at_end", "early_stopping_patience", "predict_samples")
    for name in (*_list_sources(values), *idle, "eval_dataset_split"):
        if values[name]:
            raise ConfigurationError(
                f"--{name} is {values[name]}, but --eval_strategy is no: it must be steps or epoch."
            )


def _check_best(values: Mapping[str, Any], strategy: str) -> None:
    """Refuse checkpoints that are not written when their loss is known, as Trainer does."""
    if values["save_strategy"] != strategy:
        raise ConfigurationError(
            f"--load_best_model_at_end is True, but --save_strategy is {values['save_strategy']} "
            f"and --eval_strategy is {strategy}: they must be the same."
        )
    if strategy != "steps":
        return
    save, every = values["save_steps"], values["eval_steps"] or values["logging_steps"]
    is_multiple = Fraction(str(save)) % Fraction(str(every)) == 0
    if (save < 1) != (every < 1) or not is_multiple:
        raise ConfigurationError(
            f"--load_best_model_at_end is True, but --save_steps is {save:g}: it must be a "
            f"multiple of --eval_steps, {every:g}, so that every checkpoint has an eval_loss."
        )
