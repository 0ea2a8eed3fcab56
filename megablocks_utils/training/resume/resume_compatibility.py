"""What must be the same when a run goes on, and what may have changed."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megablocks_utils.config import ResolvedPrecision, RunConfig
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.lora.settings import LoraSettings
from megablocks_utils.training.data.examples import TokenizedExamples
from megablocks_utils.training.data.schedule import Schedule

__all__ = [
    "ResumeCompatibility",
    "changed_options",
    "check_compatibility",
    "describe_compatibility",
]

# Options that say where or how a run is done, not what it learns.
_FREE_OPTIONS = (
    *("output_dir", "overwrite_output_dir", "logging_steps", "report_to", "debug", "saving"),
    *("parallel", "entry_point", "verify_adapter", "resume_adapter"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "sync_each_batch"),
)


@dataclass(frozen=True)
class ResumeCompatibility:
    """Hold the facts of a run that a resumed one must share, so that its steps mean the same.

    Attributes:
        model_type: family of the model.
        global_batch: examples of a step.
        seed: of the order of the data.
        shuffle: whether it is shuffled.
        num_examples: of the data.
        data_sha256: of its tokens and labels.
        dtypes: of trained weights and of Adam's states.
        lora: rank, strength and places of the adapters; None without.
    """

    model_type: str
    global_batch: int
    seed: int
    shuffle: bool
    num_examples: int
    data_sha256: str
    dtypes: dict[str, str]
    lora: dict[str, Any] | None

    def as_record(self) -> dict[str, Any]:
        """Return the facts as they stand in the manifest."""
        return asdict(self)


def describe_compatibility(
    config: RunConfig,
    precision: ResolvedPrecision,
    lora: LoraSettings | None,
    examples: TokenizedExamples,
    *,
    model_type: str,
    world_size: int,
) -> ResumeCompatibility:
    """Collect the facts of this run."""
    optim = config.optim
    return ResumeCompatibility(
        model_type=model_type,
        global_batch=world_size
        * optim.per_device_train_batch_size
        * optim.gradient_accumulation_steps,
        seed=config.seed,
        shuffle=config.data.shuffle,
        num_examples=len(examples),
        data_sha256=examples.checksum(),
        dtypes={"weights": precision.adapter, "optim": precision.optim},
        lora=lora and _describe_lora(lora),
    )


def check_compatibility(
    manifest: Mapping[str, Any], own: ResumeCompatibility, config: RunConfig, schedule: Schedule
) -> None:
    """Refuse to go on from a checkpoint whose steps meant something else.

    Args:
        manifest: of the checkpoint.
        own: the facts of this run.
        config: its options.
        schedule: its steps.

    Raises:
        ConfigurationError: naming the option, what it says and what the checkpoint says.
    """
    stored, step = manifest["compatibility"], manifest["step"]
    _check_global_batch(stored["global_batch"], own.global_batch, config, schedule.world_size)
    kinds = {
        "model_type": "--model_name_or_path is a model of type",
        "lora": "--use_lora, --lora_r and --lora_alpha make the adapters",
        "dtypes": "--precision makes the dtypes",
        "seed": "--seed is",
        "shuffle": "--shuffle is",
        "num_examples": "the number of examples in --data_path is",
        "data_sha256": "--data_path or --max_seq_length has changed: the checksum of its tokens is",
    }
    for name, words in kinds.items():
        found, wanted = getattr(own, name), stored[name]
        if found != wanted:
            raise ConfigurationError(
                f"{words} {_words(found)}, but the checkpoint to resume has {_words(wanted)}."
            )
    if step > schedule.num_steps:
        raise ConfigurationError(
            f"--max_steps or --num_train_epochs make {schedule.num_steps} steps, but the "
            f"checkpoint to resume has {step} done."
        )


def _check_global_batch(wanted: int, found: int, config: RunConfig, world_size: int) -> None:
    if found == wanted:
        return
    optim = config.optim
    advice = ""
    if wanted % world_size == 0:
        share = wanted // world_size
        advice = (
            f"; with {world_size} processes their product must be {share}, for example "
            f"--per_device_train_batch_size {share} --gradient_accumulation_steps 1"
        )
    else:
        advice = f"; {world_size} processes cannot share it evenly"
    raise ConfigurationError(
        f"{world_size} processes x --per_device_train_batch_size "
        f"{optim.per_device_train_batch_size} x --gradient_accumulation_steps "
        f"{optim.gradient_accumulation_steps} make steps of {found} examples, but the checkpoint "
        f"to resume has steps of {wanted}{advice}."
    )


def changed_options(stored: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Describe every option that changes what is learned and differs from the checkpoint's."""
    before, now = dict(_flatten(stored)), dict(_flatten(own))
    return [
        f"--{name} {_words(before[name])} -> {_words(value)}"
        for name, value in now.items()
        if name in before and before[name] != value
    ]


def _flatten(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if name in _FREE_OPTIONS:
            continue
        if isinstance(value, Mapping):
            yield from _flatten(value)
        else:
            yield name, value


def _describe_lora(lora: LoraSettings) -> dict[str, Any]:
    return {
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "target_modules": sorted(lora.target_modules),
        "expert_ranks": dict(lora.expert_ranks),
    }


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return str(value)[:40]
