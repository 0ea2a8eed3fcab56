"""Build a model without weights, check a checkpoint against it, and read only what is wanted.

The way of a load: `build_model_on_meta`, `open_checkpoint`, `detect_layout`,
`check_against_model` (before any weight is read), then `load_experts` per MoE layer for the
experts that this rank holds, and `load_dense_parameters` (or `read_dense_parameters`, one tensor
at a time) for everything else. No function here communicates.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from megablocks_utils.checkpoint.index import CheckpointIndex
from megablocks_utils.checkpoint.layouts import (
    EXPERT_TENSORS,
    SUPPORTED_MODEL_TYPES,
    TIED_PARAMETERS,
    ExpertPart,
    Layout,
    is_expert_parameter,
)
from megablocks_utils.checkpoint.settings_file import read_settings
from megablocks_utils.errors import CheckpointError

__all__ = [
    "build_model_on_meta",
    "check_against_model",
    "check_finite",
    "load_dense_parameters",
    "load_experts",
    "read_dense_parameters",
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
    _check_model_type(folder, read_settings(folder / "config.json", "model"))
    try:
        config = AutoConfig.from_pretrained(folder)
        if truncate_layers is not None:
            config.num_hidden_layers = min(truncate_layers, config.num_hidden_layers)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the configuration in {folder} cannot be used: {reason}") from error
    return model


def check_against_model(
    model: PreTrainedModel,
    index: CheckpointIndex,
    layout: Layout,
    *,
    truncate_layers: int | None = None,
) -> None:
    """Compare a checkpoint's names and shapes with a model's parameters; read no weight.

    Args:
        model: the model that is to be filled, its experts still whole (or DTensors).
        index: the checkpoint.
        layout: the layout of its experts.
        truncate_layers: as given to `build_model_on_meta`: later layers may then be there.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape.
    """
    wanted = _wanted_shapes(model, index, layout)
    missing = [key for key in wanted if key not in index]
    unexpected = [
        key
        for key in index
        if key not in wanted and not _may_be_left(model, key, layout, truncate_layers)
    ]
    misshaped = [
        f"{key} is {index.shape(key)} instead of {shape}"
        for key, shape in wanted.items()
        if key in index and index.shape(key) != shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    faults = [_describe(kind, items) for kind, items in found.items() if items]
    if faults:
        raise CheckpointError(f"{index.folder} does not fit its config.json: {'; '.join(faults)}")


def load_experts(
    index: CheckpointIndex,
    layout: Layout,
    module_name: str,
    *,
    first: int,
    last: int,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Read experts `first:last` of one MoE layer, and nothing else.

    At no time is more held than the result and one Hub tensor (in the fused layout: one expert's
    rows of it).

    Args:
        index: the checkpoint.
        layout: the layout of its experts.
        module_name: in-memory name of the experts module, `model.layers.0.mlp.experts`.
        first: global index of the first expert wanted.
        last: one past the last expert wanted.
        dtype: what the result is cast to.

    Returns:
        "gate_up_proj" (L, 2I, H) and "down_proj" (L, H, I) on the CPU, L = last - first.

    Raises:
        CheckpointError: a tensor is missing, of another shape than its neighbours, or non-finite.
    """
    experts = range(first, last)
    return {
        tensor: _load_expert_tensor(index, layout, f"{module_name}.{tensor}", experts, dtype)
        for tensor in EXPERT_TENSORS
    }


def read_dense_parameters(
    model: PreTrainedModel, index: CheckpointIndex, layout: Layout, *, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and CPU tensor of every parameter that is not an expert weight, one at a time.

    Tied copies are left out. The order is the model's own, the same on every rank.

    Raises:
        CheckpointError: a tensor is missing, of another shape than the parameter, or non-finite.
    """
    copies = _tied_copies(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if is_expert_parameter(name) or name in copies:
            continue
        key = _stored_key(layout.hub_key(name), index, copies)
        yield name, _read_checked(index, key, tuple(parameter.shape)).to(dtype)


def load_dense_parameters(
    model: PreTrainedModel, index: CheckpointIndex, layout: Layout, *, dtype: torch.dtype
) -> None:
    """Fill every parameter of a model on meta that is not an expert weight, and tie tied ones.

    Afterwards only expert weights are still on meta. `requires_grad` stays as it was.

    Raises:
        CheckpointError: as `read_dense_parameters`.
    """
    for name, tensor in read_dense_parameters(model, index, layout, dtype=dtype):
        module_name, _, parameter_name = name.rpartition(".")
        module = model.get_submodule(module_name)
        requires_grad = module.get_parameter(parameter_name).requires_grad
        parameter = nn.Parameter(tensor, requires_grad=requires_grad)
        module.register_parameter(parameter_name, parameter)
    model.tie_weights()
    model.config.dtype = dtype


def check_finite(tensor: torch.Tensor, source: str) -> None:
    """Refuse a tensor, called `source` in the message, with values that are not finite.

    Raises:
        CheckpointError: it holds some.
    """
    num_bad = tensor.numel() - int(tensor.isfinite().sum())
    if num_bad:
        noun = "value" if num_bad == 1 else "values"
        raise CheckpointError(f"{source} holds {num_bad} non-finite {noun}")


def _check_model_type(folder: Path, config: dict) -> None:
    if "model_type" not in config:
        raise CheckpointError(f"{folder / 'config.json'} names no model_type")
    model_type = config["model_type"]
    if model_type in SUPPORTED_MODEL_TYPES:
        return
    supported = ", ".join(SUPPORTED_MODEL_TYPES)
    has_experts = any("experts" in key for key in config)
    reason = "is not supported" if has_experts else "has no experts"
    raise CheckpointError(
        f"model_type {model_type!r} in {folder / 'config.json'} {reason}: supported are {supported}"
    )


def _tied_copies(model: PreTrainedModel) -> Mapping[str, str]:
    return TIED_PARAMETERS if model.config.tie_word_embeddings else {}


def _stored_key(key: str, index: CheckpointIndex, copies: Mapping[str, str]) -> str:
    """Return `key`, or the tied copy under whose name the checkpoint stores the tensor instead."""
    stored = [copy for copy, source in copies.items() if source == key and copy in index]
    return stored[0] if stored and key not in index else key


def _wanted_shapes(
    model: PreTrainedModel, index: CheckpointIndex, layout: Layout
) -> dict[str, tuple[int, ...]]:
    """Return the Hub names and shapes that a checkpoint of this model must have."""
    shapes: dict[str, tuple[int, ...]] = {}
    copies = _tied_copies(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shape = tuple(parameter.shape)
        if is_expert_parameter(name):
            for part in layout.expert_parts(name, range(shape[0])):
                shapes[part.key] = part.hub_shape(shape)
        elif name not in copies:
            shapes[_stored_key(layout.hub_key(name), index, copies)] = shape
    return shapes


def _may_be_left(
    model: PreTrainedModel, key: str, layout: Layout, truncate_layers: int | None
) -> bool:
    """Return whether a tensor that no parameter takes is one that does no harm."""
    if key.endswith(IGNORED_SUFFIX) or key in _tied_copies(model):
        return True
    _, _, rest = layout.memory_part(key).name.partition(".layers.")
    number = rest.partition(".")[0]
    return truncate_layers is not None and number.isdigit() and int(number) >= truncate_layers


def _describe(kind: str, items: list[str]) -> str:
    noun = "tensor" if len(items) == 1 else "tensors"
    more = ", ..." if len(items) > NUM_NAMED else ""
    return f"{len(items)} {noun} {kind} ({', '.join(items[:NUM_NAMED])}{more})"


def _load_expert_tensor(
    index: CheckpointIndex, layout: Layout, name: str, experts: range, dtype: torch.dtype
) -> torch.Tensor:
    parts = list(layout.expert_parts(name, experts))
    num_rows, num_columns = index.shape(parts[0].key)[-2:]
    num_rows *= parts[0].num_shares
    result = torch.empty((len(experts), num_rows, num_columns), dtype=dtype)
    for part in parts:
        target = result[part.expert - experts.start, part.rows(num_rows)]
        target.copy_(_read_part(index, part, tuple(target.shape)))
    return result


def _read_part(index: CheckpointIndex, part: ExpertPart, shape: tuple[int, ...]) -> torch.Tensor:
    if part.is_fused:
        rows = range(part.expert, part.expert + 1)
        return _read_checked(index, part.key, (1, *shape), rows)[0]
    return _read_checked(index, part.key, shape)


def _read_checked(
    index: CheckpointIndex, key: str, shape: tuple[int, ...], rows: range | None = None
) -> torch.Tensor:
    """Read a tensor, or rows of it, and refuse another shape and values that are not finite."""
    tensor = index.read(key) if rows is None else index.read_rows(key, rows.start, rows.stop)
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{key} in {index.path(key)} has shape {tuple(tensor.shape)}, wanted is {shape}"
        )
    check_finite(tensor, f"{key} in {index.path(key)}")
    return tensor
