"""Every option of a run as frozen dataclasses, checked once at the door.

Torch-free, so that `--help` and bad options answer at once. Names, defaults and ranges come from
the table in `options`; this module groups them and checks what several options mean together.
Built directly (`RunConfig()`), a config holds the table's defaults; a None there is described at
its field, and the parsers replace those that only depend on other options.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from megablocks_utils.config.contradictions import check_together
from megablocks_utils.config.options import OPTIONS, default_of
from megablocks_utils.config.precision import (
    PrecisionConfig,
    ResolvedPrecision,
    check_dtype,
    resolve_preset,
)
from megablocks_utils.config.reader import check_no_dtype_flags, join_words, read_arguments
from megablocks_utils.config.saving import SavingConfig
from megablocks_utils.errors import ConfigurationError

__all__ = [
    "AdapterConfig",
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "ResolvedPrecision",
    "RunConfig",
    "SavingConfig",
    "check_world",
    "parse_args",
    "parse_known_args",
    "resolve_precision",
]

_CHECKPOINTING = {"True": "full", "False": "none", "selective": "selective"}
_LORA_DEFAULT = 16
_Section = TypeVar("_Section")


@dataclass(frozen=True)
class ModelConfig:
    """Say which model is fine-tuned."""

    model_name_or_path: str = default_of("model_name_or_path")
    truncate_model_for_debug: bool = default_of("truncate_model_for_debug")


@dataclass(frozen=True)
class DataConfig:
    """Say which examples are learned, and in which order."""

    data_path: str = default_of("data_path")
    max_seq_length: int = default_of("max_seq_length")
    shuffle: bool = default_of("shuffle")


@dataclass(frozen=True)
class ParallelConfig:
    """Say how experts are spread and run.

    Attributes:
        use_megablocks_sharding: Whether expert parallelism is on.
        ep_size: Ranks that one copy of the experts is split over; None: the world size.
        expert_dp: "shard" or "replicate"; the parsers fill in the entry point's own (see
            `RunConfig.entry_point`), None only in a config built directly.
        kernel: Backend that runs the experts, or "auto".
        verify_kernel: Whether it is compared with "eager" before the first step.
    """

    use_megablocks_sharding: bool = default_of("use_megablocks_sharding")
    ep_size: int | None = default_of("ep_size")
    expert_dp: str | None = default_of("expert_dp")
    kernel: str = default_of("kernel")
    verify_kernel: bool = default_of("verify_kernel")


@dataclass(frozen=True)
class AdapterConfig:
    """Say which modules get low-rank adapters; `use_lora` "none" trains all weights.

    Attributes:
        use_lora: "none", "attn-only", "mlp-only" (experts) or "all" (both).
        lora_r: Rank; the parsers fill in 16, or leave None for that of `resume_adapter`.
        lora_alpha: Strength over the rank; likewise.
        resume_adapter: PEFT adapter to go on from.
        verify_adapter: "auto", "True" or "False".
    """

    use_lora: str = default_of("use_lora")
    lora_r: int | None = default_of("lora_r")
    lora_alpha: int | None = default_of("lora_alpha")
    resume_adapter: str | None = default_of("resume_adapter")
    verify_adapter: str = default_of("verify_adapter")

    @property
    def has_lora(self) -> bool:
        """Whether adapters are trained instead of all weights."""
        return self.use_lora != "none"

    @property
    def trains_attention(self) -> bool:
        """Whether the attention's linear layers have adapters."""
        return self.use_lora in ("attn-only", "all")

    @property
    def trains_experts(self) -> bool:
        """Whether the experts have adapters."""
        return self.use_lora in ("mlp-only", "all")

    @property
    def expert_mode(self) -> str:
        """What of the experts is trained: "full", "frozen" or "lora"."""
        if self.trains_experts:
            return "lora"
        return "frozen" if self.has_lora else "full"


@dataclass(frozen=True)
class OptimConfig:
    """Say how a step is made and how many there are; names and meanings are Hugging Face's.

    Attributes:
        learning_rate: Peak of the schedule.
        lr_scheduler_type: Name for `transformers.get_scheduler`.
        warmup_steps: Whole steps, or below 1 the share of all steps.
        weight_decay: AdamW's, not applied to biases and norms.
        max_grad_norm: Global norm to clip to; 0 means no clipping.
        num_train_epochs: Passes over the data where `max_steps` is -1.
        max_steps: Optimizer steps, or -1.
        per_device_train_batch_size: Examples of a micro-batch of one rank.
        gradient_accumulation_steps: Micro-batches of a step.
        sync_each_batch: Whether gradients are reduced after every micro-batch; the parsers fill in
            True without LoRA and False with it, None only in a config built directly.
    """

    learning_rate: float = default_of("learning_rate")
    lr_scheduler_type: str = default_of("lr_scheduler_type")
    warmup_steps: float = default_of("warmup_steps")
    weight_decay: float = default_of("weight_decay")
    max_grad_norm: float = default_of("max_grad_norm")
    num_train_epochs: float = default_of("num_train_epochs")
    max_steps: int = default_of("max_steps")
    per_device_train_batch_size: int = default_of("per_device_train_batch_size")
    gradient_accumulation_steps: int = default_of("gradient_accumulation_steps")
    sync_each_batch: bool | None = default_of("sync_each_batch")


@dataclass(frozen=True)
class RunConfig:
    """Hold all options of a run; no rank, device or world size in it.

    Attributes:
        entry_point: "fsdp2" or "fsdp1".
        model: Which model.
        data: Which examples.
        parallel: How experts are spread and run.
        adapter: Which adapters.
        precision: The precision options as given; `resolve_precision` says what they mean.
        optim: How a step is made.
        saving: When checkpoints are written, and which one the run goes on from.
        output_dir: Folder for everything the run leaves.
        overwrite_output_dir: Whether a finished run there may be overwritten.
        ignore_plan: Whether a run starts that the plan says cannot fit.
        gradient_checkpointing: "full", "none" or "selective".
        router_aux_loss_coef: Weight of the load-balancing loss; None: as the model's config says.
        seed: Seed of data order and random numbers.
        logging_steps: Steps between two log lines.
        report_to: Trackers; empty for none.
        debug: Whether placements are printed and replicas checked in every step.
    """

    entry_point: str = "fsdp2"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    adapter: AdapterConfig = AdapterConfig()
    precision: PrecisionConfig = PrecisionConfig()
    optim: OptimConfig = OptimConfig()
    saving: SavingConfig = SavingConfig()
    output_dir: str = default_of("output_dir")
    overwrite_output_dir: bool = default_of("overwrite_output_dir")
    ignore_plan: bool = default_of("ignore_plan")
    gradient_checkpointing: str = _CHECKPOINTING[default_of("gradient_checkpointing")]
    router_aux_loss_coef: float | None = default_of("router_aux_loss_coef")
    seed: int = default_of("seed")
    logging_steps: int = default_of("logging_steps")
    report_to: tuple[str, ...] = ()
    debug: bool = default_of("debug")


def parse_args(argv: Sequence[str], *, entry_point: str) -> RunConfig:
    """Read all options of a run; an unknown one is an error that names the nearest known one.

    Args:
        argv: The words after the script's name.
        entry_point: "fsdp2" or "fsdp1".

    Raises:
        ConfigurationError: for an option, value or combination that cannot work.
        cli.HelpRequested: for `--help`.
    """
    given, _ = read_arguments(argv, entry_point, keep_unknown=False)
    return _build_config(given, entry_point)


def parse_known_args(argv: Sequence[str], *, entry_point: str) -> tuple[RunConfig, list[str]]:
    """Read the options of a run and return the words that are left for TrainingArguments.

    The caller passes those to `config.reader.check_leftovers` with TrainingArguments' field names,
    so that a misspelt option is still named.

    Raises:
        ConfigurationError: for an option, value or combination that cannot work.
        cli.HelpRequested: for `--help`.
    """
    given, leftovers = read_arguments(argv, entry_point, keep_unknown=True)
    check_no_dtype_flags(leftovers)
    return _build_config(given, entry_point), leftovers


def resolve_precision(config: RunConfig, device_type: str) -> ResolvedPrecision:
    """Return the dtypes of this run on `device_type` ("cpu" or "cuda").

    `--precision` decides; else `--dtype`; else the device and the method: fp32 on CPU, on GPU mixed
    with LoRA and bf16_sr without. `--optim_dtype` replaces the preset's dtype of Adam's states.
    """
    return resolve_preset(
        config.precision, has_lora=config.adapter.has_lora, device_type=device_type
    )


def check_world(config: RunConfig, world_size: int, num_experts: int | None = None) -> None:
    """Refuse an ep_size that does not fit the number of processes or of experts.

    Args:
        config: The run.
        world_size: Processes of the run.
        num_experts: Experts of a layer of the model; None while it is not known yet.

    Raises:
        ConfigurationError: with the numbers, and the ep sizes that would work.
    """
    if not config.parallel.use_megablocks_sharding:
        return
    given = config.parallel.ep_size
    ep_size = world_size if given is None else given
    seen = f"--ep_size is {ep_size}" + (" (the number of processes)" if given is None else "")
    sizes = [size for size in range(1, world_size + 1) if world_size % size == 0]
    sizes = [size for size in sizes if num_experts is None or num_experts % size == 0]
    would = f"{join_words(sizes, 'and')} would work"
    if world_size % ep_size:
        processes = "process" if world_size == 1 else "processes"
        raise ConfigurationError(
            f"{seen}, but it must divide the {world_size} {processes} of this run; {would}."
        )
    if num_experts is not None and num_experts % ep_size:
        raise ConfigurationError(
            f"{seen}, but it must divide the {num_experts} experts of this model; {would}."
        )


def _build_config(given: dict[str, Any], entry_point: str) -> RunConfig:
    values = {option.name: option.default for option in OPTIONS} | given
    check_together(values, entry_point)
    if values["use_scattermoe"]:
        values["kernel"] = "scattermoe"
    own_expert_dp = "shard" if entry_point == "fsdp2" else "replicate"
    values["expert_dp"] = values["expert_dp"] or own_expert_dp
    if values["sync_each_batch"] is None:
        values["sync_each_batch"] = values["use_lora"] == "none"
    if values["resume_adapter"] is None:
        for name in ("lora_r", "lora_alpha"):
            values[name] = values[name] or _LORA_DEFAULT
    values["gradient_checkpointing"] = _CHECKPOINTING[values["gradient_checkpointing"]]
    values["report_to"] = tuple(word for word in values["report_to"] if word != "none")
    sections = {
        "model": _pick(ModelConfig, values),
        "data": _pick(DataConfig, values),
        "parallel": _pick(ParallelConfig, values),
        "adapter": _pick(AdapterConfig, values),
        "precision": _pick(PrecisionConfig, values),
        "optim": _pick(OptimConfig, values),
        "saving": _pick(SavingConfig, values),
    }
    check_dtype(sections["precision"])
    rest = {name: value for name, value in values.items() if name != "precision"}
    return replace(_pick(RunConfig, rest), entry_point=entry_point, **sections)


def _pick(section: type[_Section], values: dict[str, Any]) -> _Section:
    names = [field.name for field in fields(section) if field.name in values]
    return section(**{name: values[name] for name in names})
