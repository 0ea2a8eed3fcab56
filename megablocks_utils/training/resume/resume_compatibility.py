"""What must be the same when a run is resumed, and what may have changed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megablocks_utils.checkpoint.run_manifest import BASE_KEY, COMPATIBILITY_KEY, DATE_KEY
from megablocks_utils.config import ResolvedPrecision, RunConfig
from megablocks_utils.config.record import flatten_learned
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.lora.settings import LoraSettings
from megablocks_utils.training.data.batches import Packing
from megablocks_utils.training.data.examples import TokenizedExamples
from megablocks_utils.training.data.schedule import Schedule

__all__ = [
    "ResumeCompatibility",
    "changed_options",
    "check_compatibility",
    "describe_compatibility",
]

# Fact -> how a message begins, and the parameters in it.
_CLAUSES = {
    "model_type": ("model_name_or_path is a model of type", ("model_name_or_path",)),
    BASE_KEY: (
        "model_name_or_path is not the model that the adapters were trained on: its fingerprint is",
        ("model_name_or_path",),
    ),
    "lora": (
        "use_lora, lora_r and lora_alpha give the adapters",
        ("use_lora", "lora_target", "lora_r", "lora_alpha", "lora_dropout"),
    ),
    "optim": ("optim is", ("optim",)),
    "dtypes": ("precision gives the dtypes", ("precision",)),
    "seed": ("seed is", ("seed",)),
    "shuffle": ("shuffle is", ("shuffle",)),
    "packing": ("packing gives micro-batches of kind", ("packing",)),
    "streaming": ("streaming is", ("streaming",)),
    "shuffle_buffer_size": ("shuffle_buffer_size is", ("shuffle_buffer_size",)),
    "eval_sha256": (
        "eval_data_path or eval_fraction gives other held-out examples: their checksum is",
        ("eval_data_path", "eval_fraction"),
    ),
    "data_weights": ("data_weights is", ("data_weights",)),
    "packing_length": ("packing_length is", ("packing_length",)),
    "expert_quantization": (
        "expert_quantization, which the adapters were trained on, is",
        ("expert_quantization",),
    ),
    "num_examples": ("the number of examples in data_path is", ("data_path",)),
    "data_sha256": (
        "data_path or max_seq_length has changed: the checksum of its tokens is",
        ("data_path", "max_seq_length"),
    ),
}


@dataclass(frozen=True)
class ResumeCompatibility:
    """Hold what a resumed run must share with the run that wrote the checkpoint.

    Its steps would mean something else otherwise.

    Attributes:
        model_type: family of the model.
        global_batch: examples of a step.
        seed: of the order of the data.
        shuffle: whether it is shuffled.
        num_examples: of the data.
        data_sha256: of its tokens and labels.
        dtypes: of trained weights and of the optimizer's states.
        lora: rank, strength and places of the adapters; None without.
        base_sha256: fingerprint of the frozen model under them; None without.
        template_date: the day that the chat template was told; None where it does not ask for it.
        packing: how the examples of a micro-batch are laid out.
        eval_sha256: checksum of the held-out examples; None without.
        data_weights: shares in which an epoch draws from the sources; None: all of them.
        packing_length: tokens of rows that examples share; None: a row for each.
        streaming: whether the data is read while training; the examples are then the first ones.
        shuffle_buffer_size: records that a stream shuffles among each other; None: none.
        optim: the optimizer.
        expert_quantization: the format that experts are packed in; None: they are not.
    """

    model_type: str
    global_batch: int
    seed: int
    shuffle: bool
    num_examples: int
    data_sha256: str
    dtypes: dict[str, str]
    lora: dict[str, Any] | None
    base_sha256: str | None
    template_date: str | None
    packing: str = Packing.ALONE.value
    eval_sha256: str | None = None
    data_weights: list[float] | None = None
    packing_length: int | None = None
    streaming: bool = False
    shuffle_buffer_size: int | None = None
    optim: str = "adamw"
    expert_quantization: str | None = None

    def as_record(self) -> dict[str, Any]:
        """Return the facts as the manifest holds them."""
        return asdict(self)


def describe_compatibility(
    config: RunConfig,
    precision: ResolvedPrecision,
    lora: LoraSettings | None,
    examples: TokenizedExamples,
    *,
    model_type: str,
    world_size: int,
    base_sha256: str | None,
    packing: Packing = Packing.ALONE,
) -> ResumeCompatibility:
    """Collect the facts of this run."""
    data = config.data
    return ResumeCompatibility(
        model_type=model_type,
        global_batch=config.count_global_batch(world_size),
        seed=config.seed,
        shuffle=data.shuffle,
        num_examples=len(examples),
        data_sha256=examples.checksum(),
        dtypes={"weights": precision.adapter, "optim": precision.optim},
        lora=None if lora is None else _describe_lora(lora),
        base_sha256=base_sha256,
        template_date=examples.template_date,
        packing=packing.value,
        data_weights=None if data.data_weights is None else list(data.data_weights),
        packing_length=data.packing_length,
        streaming=data.streaming,
        shuffle_buffer_size=data.shuffle_buffer_size if data.streaming and data.shuffle else None,
        optim=config.optim.optim,
        expert_quantization=config.adapter.packed_format,
    )


def check_compatibility(
    manifest: Mapping[str, Any], own: ResumeCompatibility, config: RunConfig, schedule: Schedule
) -> None:
    """Refuse to resume from a checkpoint whose steps meant something else.

    Args:
        manifest: of the checkpoint.
        own: of this run.
        config: its options.
        schedule: its steps.

    Raises:
        ConfigurationError: naming the parameter, its value and that of the checkpoint.
    """
    # Earlier versions had one optimizer, and did not say so.
    stored, step = {"optim": "adamw", **manifest[COMPATIBILITY_KEY]}, manifest["step"]
    _check_global_batch(stored["global_batch"], own.global_batch, config, schedule.num_data_ranks)
    if own.template_date and not stored.get(DATE_KEY):
        _check_undated(stored, own)
    for name, (clause, parameters) in _CLAUSES.items():
        found, wanted = getattr(own, name), stored.get(name)
        if found != wanted and not _is_free(name, found, wanted):
            raise ConfigurationError(
                f"{clause} {_describe(found)}, but the checkpoint to resume from has "
                f"{_describe(wanted)}.",
                parameters=parameters,
            )
    if step > schedule.num_steps:
        raise ConfigurationError(
            f"max_steps or num_train_epochs give {schedule.num_steps} steps, but the checkpoint to "
            f"resume from has done {step}.",
            parameters=("max_steps", "num_train_epochs"),
        )


def _is_free(name: str, found: object, wanted: object) -> bool:
    """Say whether a fact may differ: one that is not stored, or micro-batches of the same rows."""
    if name == "packing":
        in_one_row = {kind.value for kind in Packing if kind.is_one_row}
        kinds = {found, wanted}
        return wanted is None or Packing.ALONE.value in kinds or kinds <= in_one_row
    if name == "eval_sha256":
        return found is None or wanted is None
    # Earlier versions had no streams, and did not say so.
    return wanted is None and (name == BASE_KEY or (name == "streaming" and not found))


def _check_undated(stored: Mapping[str, Any], own: ResumeCompatibility) -> None:
    """Name the date as what has changed in the data, where a checkpoint does not say its own."""
    if own.data_sha256 != stored["data_sha256"] and own.num_examples == stored["num_examples"]:
        raise ConfigurationError(
            f"the chat template writes the date ({own.template_date}) into the examples, and the "
            "checkpoint to resume from does not say which date it had; give a template with that "
            "date written out as chat_template.",
            parameters=("chat_template",),
        )


def _check_global_batch(wanted: int, found: int, config: RunConfig, num_data_ranks: int) -> None:
    if found == wanted:
        return
    optim = config.optim
    is_grouped = config.parallel.tp_size * config.parallel.sp_size > 1
    ranks = f"{num_data_ranks} " + ("groups of processes" if is_grouped else "processes")
    if wanted % num_data_ranks == 0:
        share = wanted // num_data_ranks
        advice = (
            f"; with {ranks} their product must be {share}, for example "
            f"per_device_train_batch_size {share} and gradient_accumulation_steps 1"
        )
    else:
        advice = f"; {ranks} cannot share it evenly"
    raise ConfigurationError(
        f"{ranks} x per_device_train_batch_size "
        f"{optim.per_device_train_batch_size} x gradient_accumulation_steps "
        f"{optim.gradient_accumulation_steps} give steps of {found} examples, but the checkpoint "
        f"to resume from has steps of {wanted}{advice}.",
        parameters=("per_device_train_batch_size", "gradient_accumulation_steps"),
    )


def changed_options(stored: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Describe every option that changes what is learned and differs from the checkpoint's."""
    before, now = flatten_learned(stored), flatten_learned(own)
    return [
        f"--{name} {_describe(before[name])} -> {_describe(value)}"
        for name, value in now.items()
        if name in before and _unwrap(before[name]) != _unwrap(value)
    ]


def _unwrap(value: Any) -> Any:
    """Return a list for a tuple, which JSON does not have, and a single value without its list."""
    if not isinstance(value, list | tuple):
        return value
    return value[0] if len(value) == 1 else list(value)


def _describe_lora(lora: LoraSettings) -> dict[str, Any]:
    return {
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "target_modules": sorted(lora.target_modules),
        "expert_ranks": dict(lora.expert_ranks),
        **({"target_weights": sorted(lora.target_weights)} if lora.target_weights else {}),
        **({"router_weights": sorted(lora.router_weights)} if lora.router_weights else {}),
        **({"dropout": lora.dropout} if lora.dropout else {}),
    }


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        # Not `lora_alpha`: a command would show it as the option.
        items = (f"{key.removeprefix('lora_')} {_describe(item)}" for key, item in value.items())
        return ", ".join(items) or "none"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)[:40]
