"""Build a model without weights, and read experts from a checkpoint.

The order of a load: `build_model_on_meta`, `open_checkpoint`, `detect_naming`,
`check_against_model` of `model_check` (before any weight is read), then a `SliceReader` for the
parts that this rank holds. No function here communicates.
"""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from megablocks_utils.checkpoint.foreign_code import ForeignCode
from megablocks_utils.checkpoint.index import CheckpointIndex
from megablocks_utils.checkpoint.json_file import MAX_WHOLE_NUMBER, read_settings, show_value
from megablocks_utils.checkpoint.layouts import (
    EXPERT_TENSORS,
    HubNaming,
)
from megablocks_utils.checkpoint.quantization_config import drop_quantization, read_quantization
from megablocks_utils.checkpoint.slices import SliceReader
from megablocks_utils.errors import CheckpointError
from megablocks_utils.families import SUPPORTED_MODEL_TYPES, describe_supported
from megablocks_utils.files import GENERATION_CONFIG_NAME, MODEL_CONFIG_NAME

__all__ = [
    "build_model_on_meta",
    "load_experts",
]

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
_RATE_NAMES = ("dropout", "_pdrop", "jitter_noise")


def build_model_on_meta(
    folder: str | Path, *, truncate_layers: int | None = None
) -> PreTrainedModel:
    """Build the causal language model of a folder with its parameters on the meta device.

    Buffers (rotary frequencies) are real, as `from_pretrained` leaves them; no weight is read.

    Args:
        folder: local model folder.
        truncate_layers: keep only that many first layers (`--truncate_model_for_debug`).

    Raises:
        CheckpointError: no usable config.json, or not a model whose experts can be read.
    """
    folder = Path(folder)
    settings = read_settings(folder / MODEL_CONFIG_NAME, "model")
    _check_model_type(folder, settings)
    _check_numbers(folder, settings)
    _check_top_k(folder, settings)
    read_quantization(folder)  # refuses what is not read here, before names look wrong
    with ForeignCode(lambda reason: _unusable(folder, reason)):
        config = AutoConfig.from_pretrained(folder)
        drop_quantization(config)  # the model has floating-point weights, and is saved with them
        if truncate_layers is not None:
            config.num_hidden_layers = min(truncate_layers, config.num_hidden_layers)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config)
        # As `save_pretrained` does; a config may come without.
        model.config.architectures = [type(model).__name__]
        if (folder / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def load_experts(
    index: CheckpointIndex,
    naming: HubNaming,
    module_name: str,
    *,
    first: int,
    last: int,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Read experts `first:last` of one MoE layer, and nothing else.

    At no time is more held than the result and one Hub tensor (with fused experts: one expert's
    rows of it).

    Args:
        index: the checkpoint.
        naming: how it names its experts.
        module_name: in-memory name of the experts module, `model.layers.0.mlp.experts`.
        first: global index of the first expert wanted.
        last: one past the last expert wanted.
        dtype: what the result is cast to.

    Returns:
        "gate_up_proj" (L, 2I, H) and "down_proj" (L, H, I) on the CPU, L = last - first.

    Raises:
        CheckpointError: a tensor is missing, of another shape than its neighbours, or non-finite.
    """
    reader, loaded = SliceReader(index, naming), {}
    for tensor in EXPERT_TENSORS:
        name = f"{module_name}.{tensor}"
        loaded[tensor] = torch.empty(
            (last - first, *reader.expert_matrix_shape(name, first)), dtype=dtype
        )
        reader.fill_local(name, loaded[tensor], (first, 0, 0))
    return loaded


def _unusable(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"the configuration in {folder} cannot be used: {reason}")


def _check_numbers(folder: Path, config: dict) -> None:
    """Refuse numbers that the first forward pass would fail on."""
    for name, value in config.items():
        if isinstance(value, int) and abs(value) > MAX_WHOLE_NUMBER:
            raise CheckpointError(
                f"{name} is {show_value(value)} in {folder / MODEL_CONFIG_NAME}, but it must be at "
                f"most {MAX_WHOLE_NUMBER}"
            )
        if value is None or not name.endswith(_RATE_NAMES):
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= 1:
            raise CheckpointError(
                f"{name} is {show_value(value)} in {folder / MODEL_CONFIG_NAME}, but it must be a "
                "number from 0 to 1"
            )


def _check_top_k(folder: Path, config: dict) -> None:
    """Refuse more experts a token than there are."""
    top_k = config.get("num_experts_per_tok")
    for name in _EXPERT_COUNTS:
        num_experts = config.get(name)
        if isinstance(top_k, int) and isinstance(num_experts, int) and top_k > num_experts:
            raise CheckpointError(
                f"num_experts_per_tok is {top_k} in {folder / MODEL_CONFIG_NAME}, but it must be "
                f"at most {name}, which is {num_experts}"
            )


def _check_model_type(folder: Path, config: dict) -> None:
    if "model_type" not in config:
        raise CheckpointError(f"{folder / MODEL_CONFIG_NAME} names no model_type")
    model_type = config["model_type"]
    if model_type in SUPPORTED_MODEL_TYPES:
        return
    has_experts = any("experts" in key for key in config)
    reason = "is not supported" if has_experts else "has no experts"
    raise CheckpointError(
        f"model_type {model_type!r} in {folder / MODEL_CONFIG_NAME} {reason}: supported are"
        f" {describe_supported()}"
    )
