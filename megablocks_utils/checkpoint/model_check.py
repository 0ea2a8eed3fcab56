"""Compare what a checkpoint stores with the model that its config.json describes; read no weight.

Every stored tensor must have its place in the model and every place its tensor: one that nobody
reads would be lost without a word. What transformers itself ignores is ignored, and said.
"""

import math
import re
from collections.abc import Iterator, Mapping

import torch
from transformers import PreTrainedModel

from megablocks_utils.checkpoint.index import CheckpointIndex
from megablocks_utils.checkpoint.layouts import TIED_PARAMETERS, HubNaming, is_expert_parameter
from megablocks_utils.checkpoint.slices import stored_key
from megablocks_utils.errors import CheckpointError
from megablocks_utils.files import MODEL_CONFIG_NAME

__all__ = ["check_against_model"]

_NUM_NAMED = 3
# Old checkpoints store this buffer; every model computes it from its config.
_IGNORED_EVERYWHERE = (r"rotary_emb\.inv_freq$",)
# Names of tensors that settings switch on or off.
_SWITCHES = (
    (r"\.self_attn\..*\.bias$", "attention_bias"),
    (r"\.mlp\..*\.bias$", "mlp_bias"),
    (r"^lm_head\.", "tie_word_embeddings"),
)
_LAYER = re.compile(r"\.layers\.(\d+)\.")
# Copies up to this size are compared whole, larger ones in blocks that are spread over them.
_COMPARED_BYTES = 256 * 1024**2
_NUM_BLOCKS = 256


def check_against_model(
    model: PreTrainedModel,
    index: CheckpointIndex,
    naming: HubNaming,
    *,
    truncate_layers: int | None = None,
) -> list[str]:
    """Compare a checkpoint's names and shapes with a model's parameters.

    Args:
        model: the model that is to be filled, its experts still whole (or DTensors).
        index: the checkpoint.
        naming: how it names its experts.
        truncate_layers: as given to `build_model_on_meta`: later layers may then be there.

    Returns:
        Names of stored tensors that the model has no use for and transformers ignores too.

    Raises:
        CheckpointError: tensors are missing, unexpected, of another shape or no floating-point
            numbers, or an output layer is stored that `tie_word_embeddings` would drop.
    """
    wanted = _wanted_shapes(model, index, naming)
    missing = [key for key in wanted if key not in index]
    left = [key for key in index if key not in wanted and key not in _tied_copies(model)]
    ignored = [key for key in left if _is_ignored(model, key)]
    unexpected = [
        key
        for key in left
        if not _is_ignored(model, key) and not _is_cut_off(key, naming, truncate_layers)
    ]
    misshaped = [
        f"{key} is {index.shape(key)} instead of {shape}"
        for key, shape in wanted.items()
        if key in index and index.shape(key) != shape
    ]
    no_floats = [
        f"{key} is {str(index.dtype(key)).removeprefix('torch.')}"
        for key in wanted
        if key in index and not index.dtype(key).is_floating_point
    ]
    found = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": misshaped,
        "of whole numbers": no_floats,
    }
    faults = [_describe(kind, items) for kind, items in found.items() if items]
    if faults:
        faults += _name_settings(model, index, naming, [*missing, *unexpected], truncate_layers)
        raise CheckpointError(
            f"{index.folder} does not fit its {MODEL_CONFIG_NAME}: {'; '.join(faults)}"
        )
    _check_tied_copies(model, index)
    return ignored


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


def _is_ignored(model: PreTrainedModel, key: str) -> bool:
    patterns = (*_IGNORED_EVERYWHERE, *(model._keys_to_ignore_on_load_unexpected or ()))
    return any(re.search(pattern, key) for pattern in patterns)


def _is_cut_off(key: str, naming: HubNaming, truncate_layers: int | None) -> bool:
    """Return whether a tensor is of a layer that `truncate_layers` leaves out."""
    layer = _LAYER.search(naming.memory_part(key).name)
    return truncate_layers is not None and layer is not None and int(layer[1]) >= truncate_layers


def _describe(kind: str, items: list[str]) -> str:
    noun = "tensor" if len(items) == 1 else "tensors"
    more = ", ..." if len(items) > _NUM_NAMED else ""
    return f"{len(items)} {noun} {kind} ({', '.join(items[:_NUM_NAMED])}{more})"


def _name_settings(
    model: PreTrainedModel,
    index: CheckpointIndex,
    naming: HubNaming,
    keys: list[str],
    truncate_layers: int | None,
) -> Iterator[str]:
    """Yield the settings that contradict what is stored, as clauses."""
    for pattern, name in _SWITCHES:
        if hasattr(model.config, name) and any(re.search(pattern, key) for key in keys):
            yield f"{name} is {getattr(model.config, name)}"
    layers = {int(match[1]) for key in index if (match := _LAYER.search(key))}
    num_layers = model.config.num_hidden_layers
    if layers and len(layers) != num_layers and truncate_layers is None:
        yield f"num_hidden_layers is {num_layers}, stored are {len(layers)}"
    num_experts = max(
        (p.shape[0] for name, p in model.named_parameters() if is_expert_parameter(name)), default=0
    )
    num_stored = _count_stored_experts(index, naming)
    if num_experts not in (0, num_stored):
        name = "num_local_experts" if "num_local_experts" in vars(model.config) else "num_experts"
        yield f"{name} is {num_experts}, stored are {num_stored}"


def _count_stored_experts(index: CheckpointIndex, naming: HubNaming) -> int:
    numbers = [naming.memory_part(key).expert for key in index if naming.matches(key)]
    if naming.is_fused:
        return max(index.shape(key)[0] for key in index if naming.matches(key))
    return 1 + max(number for number in numbers if number is not None)


def _check_tied_copies(model: PreTrainedModel, index: CheckpointIndex) -> None:
    """Refuse an output layer of its own that tying would replace by the embedding."""
    for copy, source in _tied_copies(model).items():
        if copy in index and source in index and not _are_equal(index, copy, source):
            raise CheckpointError(
                f"{index.folder} stores {copy} with other values than {source}, but its"
                f" {MODEL_CONFIG_NAME} has tie_word_embeddings true, which would drop it: set that"
                " to false, or remove the tensor"
            )


def _are_equal(index: CheckpointIndex, first: str, second: str) -> bool:
    """Return whether two tensors are equal, element by element in the dtype of the second."""
    if index.shape(first) != index.shape(second):
        return False
    num_rows = index.shape(first)[0]
    row_bytes = max(1, index.num_bytes(second) // max(1, num_rows))
    block = max(1, _COMPARED_BYTES // _NUM_BLOCKS // row_bytes)
    num_blocks = math.ceil(num_rows / block)
    chosen = {place * (num_blocks - 1) // max(1, _NUM_BLOCKS - 1) for place in range(_NUM_BLOCKS)}
    for number in sorted(chosen):
        rows = number * block, min((number + 1) * block, num_rows)
        one, other = index.read_rows(first, *rows), index.read_rows(second, *rows)
        if not torch.equal(one.to(other.dtype), other):
            return False
    return True
