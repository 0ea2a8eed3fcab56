"""Hugging Face's TrainingArguments for the FSDP1 script: all pass, except contradictions."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import DataClassType
from transformers.trainer_pt_utils import AcceleratorConfig

from megablocks_utils.config import RunConfig, check_leftovers
from megablocks_utils.config.given import GivenOption
from megablocks_utils.config.option import Kind, Option
from megablocks_utils.config.values import join_words, read_value
from megablocks_utils.errors import ConfigurationError

__all__ = ["build_trainer_arguments", "parse_trainer_flags"]

_OWN_OPTIMIZER = "the optimizer is AdamW with betas 0.9 and 0.999 and eps 1e-8"
_OWN_CHECKPOINTING = "--gradient_checkpointing True, False or selective says all there is to say"
_OWN_COMPILE = "--compile True compiles what can be compiled here, the dense parts of the layers"
_OWN_EVALUATION = "evaluation computes as training does, when --eval_strategy says"
_OWN_BEST = "the best checkpoint is the one with the lowest eval_loss"
_OWN_LOSS = "the loss is the mean over the label tokens of the global batch"
_OWN_ORDER = "the order of the examples follows from --seed and --shuffle alone"
_OWN_SPACE = "trackio takes it from TRACKIO_SPACE_ID and TRACKIO_BUCKET_ID in the environment"
_OWN_LAUNCH = "FSDP is set up from accelerate.yaml and the options of this script"

_FIXED = {
    "optim_args": _OWN_OPTIMIZER,
    "optim_target_modules": _OWN_OPTIMIZER,
    "adam_beta1": _OWN_OPTIMIZER,
    "adam_beta2": _OWN_OPTIMIZER,
    "adam_epsilon": _OWN_OPTIMIZER,
    "lr_scheduler_kwargs": "schedules take --warmup_steps only",
    "activation_checkpointing_kwargs": _OWN_CHECKPOINTING,
    "gradient_checkpointing_kwargs": _OWN_CHECKPOINTING,
    "auto_find_batch_size": "the batch size is part of what a step means",
    "average_tokens_across_devices": _OWN_LOSS,
    "label_smoothing_factor": _OWN_LOSS,
    "neftune_noise_alpha": _OWN_LOSS,
    "data_seed": _OWN_ORDER,
    "dataloader_drop_last": "the last, smaller batch of an epoch is kept",
    "train_sampling_strategy": _OWN_ORDER,
    "deepspeed": _OWN_LAUNCH,
    "fsdp": _OWN_LAUNCH,
    "fsdp_config": _OWN_LAUNCH,
    "parallelism_config": _OWN_LAUNCH,
    "torch_compile": _OWN_COMPILE,
    "torch_compile_backend": _OWN_COMPILE,
    "torch_compile_mode": _OWN_COMPILE,
    "use_liger_kernel": "experts run on --kernel",
    "use_cache": "packed rows are only kept apart without a cache",
    "bf16_full_eval": _OWN_EVALUATION,
    "fp16_full_eval": _OWN_EVALUATION,
    "eval_on_start": "evaluation begins before the first step already",
    "eval_delay": _OWN_EVALUATION,
    "eval_accumulation_steps": _OWN_EVALUATION,
    "eval_use_gather_object": _OWN_EVALUATION,
    "batch_eval_metrics": _OWN_EVALUATION,
    "include_for_metrics": "only the loss is measured",
    "metric_for_best_model": _OWN_BEST,
    "greater_is_better": _OWN_BEST,
    "enable_jit_checkpoint": "SIGTERM and SIGINT save a checkpoint already",
    "save_only_model": "a checkpoint holds all that a run needs to resume; the final model is "
    "written by itself",
    "save_on_each_node": "all machines write their parts of one checkpoint into one --output_dir",
    "ignore_data_skip": "a run resumes at its place in the data",
    "restore_callback_states_from_checkpoint": "callbacks of this script keep nothing",
    "push_to_hub": "this script does not upload",
    "include_num_input_tokens_seen": "metrics.jsonl has input_tokens of every step",
    "disable_tqdm": "progress is shown in this script's own way",
    "trackio_space_id": _OWN_SPACE,
    "trackio_bucket_id": _OWN_SPACE,
    "trackio_static_space_id": _OWN_SPACE,
}
"""Options of TrainingArguments that must keep their default, and why."""

_AS_HERE = {"metric_for_best_model": ("loss", "eval_loss"), "greater_is_better": (False,)}
"""Values of some that say what is done here anyway."""

_ACCELERATOR_SETTINGS = {
    "split_batches": ((False,), "--per_device_train_batch_size is that of one process"),
    "dispatch_batches": ((None, False), "every process reads its own examples"),
    # No example is repeated to fill a batch: true and false come to the same.
    "even_batches": ((True, False), "the last batch of an epoch may be smaller"),
    "use_seedable_sampler": ((True,), _OWN_ORDER),
    "non_blocking": ((False,), "micro-batches are moved when they are needed"),
    "gradient_accumulation_kwargs": (
        (None,),
        "accumulation follows --gradient_accumulation_steps and --sync_each_batch",
    ),
    "use_configured_state": ((False, None), "this script makes Accelerate's state"),
}
"""Settings of `--accelerator_config`: what they may be, and why nothing else."""


def parse_trainer_flags(leftovers: Sequence[GivenOption]) -> dict[str, Any]:
    """Read the options that `config.parse_known_args` left, without touching any device.

    Returns:
        Values of TrainingArguments' fields, defaults included.

    Raises:
        ConfigurationError: for an unknown option, a value of the wrong kind, or an option that
            contradicts the way this script trains.
    """
    parser = _Parser(DataClassType(TrainingArguments), allow_abbrev=False)
    defaults = vars(parser.parse_args([]))
    check_leftovers(leftovers, defaults)
    _check_numbers(parser, leftovers)
    words = [word for given in leftovers for word in given.words()]
    values = vars(parser.parse_args(words))
    for name, reason in _FIXED.items():
        if values[name] != defaults[name] and values[name] not in _AS_HERE.get(name, ()):
            raise ConfigurationError(f"--{name} is {values[name]}, but {reason}.")
    return values


def build_trainer_arguments(
    flags: dict[str, Any], config: RunConfig, device_type: str
) -> TrainingArguments:
    """Build TrainingArguments from Hugging Face's own flags and from this run's options.

    Call it when the processes are connected: TrainingArguments would otherwise connect them.

    Args:
        flags: from `parse_trainer_flags`.
        config: the run; its options take the place of the fields with the same meaning.
        device_type: `cpu` or `cuda`.

    Raises:
        ConfigurationError: for what TrainingArguments itself refuses, and for a setting of
            `--accelerator_config` that contradicts the way this script trains.
    """
    if flags["use_cpu"] and device_type != "cpu":
        raise ConfigurationError(
            "--use_cpu is True, but a GPU is used where one is visible; hide it with "
            "CUDA_VISIBLE_DEVICES="
        )
    # Without it Accelerate takes CPU processes that torchrun started for lone ones.
    own = _own_values(config) | {"use_cpu": device_type == "cpu"}
    try:
        arguments = TrainingArguments(**flags | own)
    except (ValueError, TypeError, KeyError, ImportError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ConfigurationError(
            f"transformers.TrainingArguments refuses these options: {first_line}"
        ) from error
    accelerator_config = arguments.accelerator_config
    assert isinstance(accelerator_config, AcceleratorConfig)  # as TrainingArguments leaves it
    _check_accelerator_config(accelerator_config)
    accelerator_config.gradient_accumulation_kwargs = {
        "sync_each_batch": bool(config.optim.sync_each_batch)
    }
    # One process uses one GPU: Trainer would spread it over all that are visible.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _check_numbers(parser: HfArgumentParser, leftovers: Sequence[GivenOption]) -> None:
    """Refuse numbers that Python reads and this project's own options do not take.

    Such as 1_000, digits of other scripts, inf, or more digits than anything holds.
    """
    types = {action.dest: action.type for action in parser._actions}
    for given in leftovers:
        type_ = types.get(given.name)
        if type_ not in (int, float) or given.is_null or len(given.values) != 1:
            continue
        kind: Kind = "integer" if type_ is int else "number"
        try:
            read_value(Option("", kind=kind), given.flag, given.values)
        except ConfigurationError as error:
            raise given.located(error) from None


def _check_accelerator_config(settings: AcceleratorConfig) -> None:
    """Refuse what `--accelerator_config` asks of a data loader that this script does not have."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        allowed, reason = _ACCELERATOR_SETTINGS.get(field.name, ((field.default,), _OWN_LAUNCH))
        # Not by `in`: 1 equals True, but it is no value for a switch.
        if not any(value is word for word in allowed):
            wanted = join_words([str(word).lower() for word in allowed]).replace("none", "null")
            raise ConfigurationError(
                f"{field.name} is {str(value).lower()} in --accelerator_config, but it must be "
                f"{wanted}, since {reason}."
            )


class _Parser(HfArgumentParser):
    """Hugging Face's parser, with errors as one sentence instead of usage text and exit."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would have ended the process with."""
        raise ConfigurationError(f"{message}.")


def _own_values(config: RunConfig) -> dict[str, Any]:
    optim = config.optim
    return {
        "output_dir": config.output_dir,
        "learning_rate": optim.learning_rate,
        "lr_scheduler_type": optim.lr_scheduler_type,
        "warmup_steps": optim.warmup_steps,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
        "num_train_epochs": optim.num_train_epochs,
        "max_steps": optim.max_steps,
        "per_device_train_batch_size": optim.per_device_train_batch_size,
        "per_device_eval_batch_size": config.evaluation.per_device_eval_batch_size
        or optim.per_device_train_batch_size,
        "gradient_accumulation_steps": optim.gradient_accumulation_steps,
        "seed": config.seed,
        "logging_steps": config.logging_steps,
        "report_to": "none",  # the recorder of both scripts reports
        "run_name": config.run_name,
        "save_strategy": "no",
        "eval_strategy": "no",
        "activation_checkpointing": False,  # the model already has ours
        "gradient_checkpointing": None,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # it would wait for the device in every micro-step
        "remove_unused_columns": False,
        "debug": "",
    }
