"""Precision presets: which dtype weights, computation and Adam's states have.

Torch-free: dtypes are names, such as `float32`.
"""

from dataclasses import dataclass
from typing import Annotated

from megablocks_utils.config.option import Option
from megablocks_utils.errors import ConfigurationError

__all__ = [
    "SAVE_DTYPE_OPTION",
    "TRAINING_DTYPES",
    "PrecisionConfig",
    "ResolvedPrecision",
    "check_dtype",
    "resolve_preset",
]

TRAINING_DTYPES = ("float32", "bfloat16")
"""Dtypes a run may store and compute in."""

SAVE_DTYPE_OPTION = Option(
    "dtype of the weights of the model that is written; values beyond its range are never written "
    "as infinite",
    choices=(*TRAINING_DTYPES, "float16"),
)
"""Of each command that writes a model; what it does without it differs."""

_DTYPE_OF_PRESET = {"fp32": "float32", "bf16_sr": "bfloat16", "bf16": "bfloat16"}
_PRESET_OF_DTYPE = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class PrecisionConfig:
    """Hold the precision options as given; None means not given. See `config.resolve_precision`."""

    precision: Annotated[
        str | None,
        Option(
            "fp32: all float32; mixed: float32 weights and Adam states, bfloat16 compute and, with "
            "LoRA, frozen base; bf16_sr: all bfloat16, updates rounded stochastically; bf16: all "
            "bfloat16; what transformers keeps in float32 stays so",
            choices=("fp32", "mixed", "bf16_sr", "bf16"),
            shown_default="fp32 on CPU; on GPU mixed with LoRA, bf16_sr without",
        ),
    ] = None
    dtype: Annotated[
        str | None,
        Option(
            "dtype of weights, gradients and compute; alone, float32 means --precision fp32 and "
            "bfloat16 means --precision bf16",
            choices=TRAINING_DTYPES,
            aliases=("torch_dtype",),
            shown_default="from --precision",
        ),
    ] = None
    optim_dtype: Annotated[
        str | None,
        Option("dtype of Adam's states", choices=TRAINING_DTYPES, shown_default="from --precision"),
    ] = None


@dataclass(frozen=True)
class ResolvedPrecision:
    """Say what a run keeps and computes in which dtype.

    Attributes:
        name: The preset: `fp32`, `mixed`, `bf16_sr` or `bf16`.
        weights: Dtype in which weights are stored; with LoRA, the frozen base's.
        compute: Dtype of forward, backward and gathered weights.
        optim: Dtype of Adam's two states.
        adapter: Dtype in which adapters are stored; without LoRA, the same as `weights`.
        stochastic_rounding: Whether the optimizer rounds its update stochastically.
    """

    name: str
    weights: str
    compute: str
    optim: str
    adapter: str
    stochastic_rounding: bool


def check_dtype(config: PrecisionConfig) -> None:
    """Refuse a `--dtype` that contradicts `--precision`.

    Raises:
        ConfigurationError: naming both options.
    """
    if config.precision is None or config.dtype is None:
        return
    wanted = _DTYPE_OF_PRESET.get(config.precision)
    if wanted is None:
        raise ConfigurationError(
            f"--dtype is {config.dtype}, but --precision {config.precision} stores and computes in "
            "different dtypes; leave --dtype out."
        )
    if config.dtype != wanted:
        raise ConfigurationError(
            f"--dtype is {config.dtype}, but --precision {config.precision} means {wanted}; "
            "leave one of the two out."
        )


def resolve_preset(
    config: PrecisionConfig, *, has_lora: bool, device_type: str
) -> ResolvedPrecision:
    """Return the dtypes of a run on `device_type` ("cpu" or "cuda")."""
    if config.precision is not None:
        name = config.precision
    elif config.dtype is not None:
        name = _PRESET_OF_DTYPE[config.dtype]
    elif device_type == "cpu":
        name = "fp32"
    else:
        name = "mixed" if has_lora else "bf16_sr"
    stored = "float32" if name in ("fp32", "mixed") else "bfloat16"
    return ResolvedPrecision(
        name=name,
        weights="bfloat16" if name == "mixed" and has_lora else stored,
        compute="float32" if name == "fp32" else "bfloat16",
        optim=config.optim_dtype or stored,
        adapter=stored,
        stochastic_rounding=name == "bf16_sr",
    )
