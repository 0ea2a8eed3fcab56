"""Build a model without weights, check a checkpoint against it, and read experts from it.

The order of a load: `build_model_on_meta`, `open_checkpoint`, `detect_naming`,
`check_against_model` (before any weight is read), then a `SliceReader` for the parts that this
rank holds. No function here communicates.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from megablocks_utils.checkpoint.index import CheckpointIndex
from megablocks_utils.checkpoint.json_file import read_settings
from megablocks_utils.checkpoint.layouts import (
    EXPERT_TENSORS,
    TIED_PARAMETERS,
    HubNaming,
    is_expert_parameter,
)
from megablocks_utils.checkpoint.slices import SliceReader, stored_key
from megablocks_utils.errors import CheckpointError
from megablocks_utils.families import SUPPORTED_MODEL_TYPES, describe_supported
from megablocks_utils.files import GENERATION_CONFIG_NAME, MODEL_CONFIG_NAME

__all__ = [
    "build_model_on_meta",
    "check_against_model",
    "load_experts",
]

NUM_NAMED = 3
# Old checkpoints store this buffer; every model computes it from its config.
IGNORED_SUFFIX = "rotary_emb.inv_freq"


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
    _check_model_type(folder, read_settings(folder / MODEL_CONFIG_NAME, "model"))
    try:
        config = AutoConfig.from_pretrained(folder)
        if truncate_layers is not None:
            config.num_hidden_layers = min(truncate_layers, config.num_hidden_layers)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config)
        if (folder / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the configuration in {folder} cannot be used: {reason}") from error
    return model


def check_against_model(
    model: PreTrainedModel,
    index: CheckpointIndex,
    naming: HubNaming,
    *,
    truncate_layers: int | None = None,
) -> None:
    """Compare a checkpoint's names and shapes with a model's parameters; read no weight.

    Args:
        model: the model that is to be filled, its experts still whole (or DTensors).
        index: the checkpoint.
        naming: how it names its experts.
        truncate_layers: as given to `build_model_on_meta`: later layers may then be there.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape.
    """
    wanted = _wanted_shapes(model, index, naming)
    missing = [key for key in wanted if key not in index]
    unexpected = [
        key
        for key in index
        if key not in wanted and not _may_be_left(model, key, naming, truncate_layers)
    ]
    misshaped = [
        f"{key} is {index.shape(key)} instead of {shape}"
        for key, shape in wanted.items()
        if key in index and index.shape(key) != shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    faults = [_describe(kind, items) for kind, items in found.items() if items]
    if faults:
        raise CheckpointError(
            f"{index.folder} does not fit its {MODEL_CONFIG_NAME}: {'; '.join(faults)}"
        )


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


def _tied_copies(model: PreTrainedModel) -> Mapping[str, str]:
    return TIED_PARAMETERS if model.config.tie_word_embeddings else {}


def _wanted_shapes(
    model: PreTrainedModel, index: CheckpointIndex, naming: HubNaming
) -> dict[str, tuple[int, ...]]:
    """Return the Hub names and shapes that a checkpoint of this model must have."""
    shapes: dict[str, tuple[int, ...]] = {}
    copies = _tied_copies(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shape = tuple(parameter.shape)
        if is_expert_parameter(name):
            for part in naming.expert_parts(name, range(shape[0])):
                shapes[part.key] = part.hub_shape(shape)
        elif name not in copies:
            shapes[stored_key(naming.hub_key(name), index, copies)] = shape
    return shapes


def _may_be_left(
    model: PreTrainedModel, key: str, naming: HubNaming, truncate_layers: int | None
) -> bool:
    """Return whether a tensor that no parameter takes is one that does no harm."""
    if key.endswith(IGNORED_SUFFIX) or key in _tied_copies(model):
        return True
    _, _, rest = naming.memory_part(key).name.partition(".layers.")
    number = rest.partition(".")[0]
    return truncate_layers is not None and number.isdigit() and int(number) >= truncate_layers


def _describe(kind: str, items: list[str]) -> str:
    noun = "tensor" if len(items) == 1 else "tensors"
    more = ", ..." if len(items) > NUM_NAMED else ""
    return f"{len(items)} {noun} {kind} ({', '.join(items[:NUM_NAMED])}{more})"
