"""Compare what a checkpoint stores with the model that its config.json describes; read no weight.

Every stored tensor must have its place in the model and every place its tensor: one that nobody
reads would be lost without a word. What transformers itself ignores is ignored, and said.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from megablocks_utils.checkpoint.index import CheckpointIndex
from megablocks_utils.checkpoint.layouts import ModelLayout
from megablocks_utils.checkpoint.load import find_other_parts
from megablocks_utils.errors import CheckpointError
from megablocks_utils.files import MODEL_CONFIG_NAME
from megablocks_utils.moe.model_facts import text_config

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
    layout: ModelLayout,
    *,
    truncate_layers: int | None = None,
) -> list[str]:
    """Compare a checkpoint's names and shapes with a model's parameters and persistent buffers.

    Args:
        model: the model that is to be filled, its experts still whole (or DTensors).
        index: the checkpoint.
        layout: where the model lies in it.
        truncate_layers: as given to `build_model_on_meta`: later layers may then be there.

    Returns:
        Names of stored tensors that the model has no use for and transformers ignores too.

    Raises:
        CheckpointError: tensors are missing, unexpected, of another shape or of another kind of
            numbers, or an output layer is stored that `tie_word_embeddings` would drop.
    """
    ignored = {key: None for key in layout.unused if _is_ignored(model, layout, key)}
    unexpected = [
        key
        for key, name in layout.unused.items()
        if key not in ignored and not _is_cut_off(name, truncate_layers)
    ]
    if unexpected:
        others = find_other_parts(index.folder, unexpected)
        ignored |= {key: None for key in unexpected if key in others}
        unexpected = [key for key in unexpected if key not in others]
    faults = _Faults(unexpected=unexpected)
    for name in layout.shapes:
        _compare(name, model, index, layout, faults)
    if faults.broken:
        _explain(faults, model, index, layout)
    clauses = faults.describe()
    if clauses:
        clauses += _name_settings(model, index, layout, faults, truncate_layers)
        raise CheckpointError(
            f"{index.folder} does not fit its {MODEL_CONFIG_NAME}: {'; '.join(clauses)}"
        )
    _check_tied_copies(index, layout)
    return list(ignored)


@dataclass
class _Faults:
    """Collect what is wrong, by kind; `broken` maps names to why they cannot be made."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)
    other_numbers: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    def describe(self) -> list[str]:
        """Return a clause for each kind that there is."""
        found = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": self.misshaped,
            "of other numbers": self.other_numbers,
        }
        return [_describe(kind, items) for kind, items in found.items() if items] + self.reasons


def _compare(
    name: str, model: PreTrainedModel, index: CheckpointIndex, layout: ModelLayout, faults: _Faults
) -> None:
    """Note what is wrong with one parameter or buffer."""
    if name in layout.missing:
        may_miss = model._keys_to_ignore_on_load_missing or ()
        if not any(re.search(pattern, name) for pattern in may_miss):
            faults.broken[name] = f"nothing is stored of {name}"
        return
    sources = layout.sources(name)
    is_float = _is_float(model, name)
    for key in sources:
        if index.dtype(key).is_floating_point != is_float:
            kind = str(index.dtype(key)).removeprefix("torch.")
            faults.other_numbers.append(f"{key} is {kind}")
    if layout.is_plain(name):
        if (seen := index.shape(sources[0])) != layout.shapes[name]:
            faults.misshaped.append(f"{sources[0]} is {seen} instead of {layout.shapes[name]}")
        return
    try:
        layout.check(name)
    except CheckpointError as error:
        faults.broken[name] = str(error)


def _is_float(model: PreTrainedModel, name: str) -> bool:
    owner, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(owner), attribute).is_floating_point()


def _explain(
    faults: _Faults, model: PreTrainedModel, index: CheckpointIndex, layout: ModelLayout
) -> None:
    """Say of what cannot be made which stored tensors are the cause, as transformers names them."""
    expected = ModelLayout.of_saved(model)
    for name, reason in faults.broken.items():
        shapes = expected.stored_shapes(name)
        missing = [key for key in shapes if key not in index]
        misshaped = [
            f"{key} is {index.shape(key)} instead of {shape}"
            for key, shape in shapes.items()
            if key in index and index.shape(key) != shape
        ]
        unexpected = [key for key in layout.sources(name) if shapes and key not in shapes]
        if not missing and not misshaped and not unexpected:
            faults.reasons.append(reason)
        faults.missing += missing
        faults.misshaped += misshaped
        faults.unexpected += unexpected
    for keys in (faults.missing, faults.unexpected):
        keys.sort(key=dot_natural_key)


def _is_ignored(model: PreTrainedModel, layout: ModelLayout, key: str) -> bool:
    patterns = (*_IGNORED_EVERYWHERE, *(model._keys_to_ignore_on_load_unexpected or ()))
    names = (key, layout.unused[key])
    return any(re.search(pattern, name) for pattern in patterns for name in names)


def _is_cut_off(name: str, truncate_layers: int | None) -> bool:
    """Return whether a tensor is of a layer that `truncate_layers` leaves out."""
    layer = _LAYER.search(name)
    return truncate_layers is not None and layer is not None and int(layer[1]) >= truncate_layers


def _describe(kind: str, items: list[str]) -> str:
    noun = "tensor" if len(items) == 1 else "tensors"
    more = ", ..." if len(items) > _NUM_NAMED else ""
    return f"{len(items)} {noun} {kind} ({', '.join(items[:_NUM_NAMED])}{more})"


def _name_settings(
    model: PreTrainedModel,
    index: CheckpointIndex,
    layout: ModelLayout,
    faults: _Faults,
    truncate_layers: int | None,
) -> Iterator[str]:
    """Yield the settings that contradict what is stored, as clauses."""
    config = text_config(model)
    for pattern, name in _SWITCHES:
        keys = [*faults.missing, *faults.unexpected]
        if hasattr(config, name) and any(re.search(pattern, key) for key in keys):
            yield f"{name} is {getattr(config, name)}"
    layers = {int(match[1]) for key in index if (match := _LAYER.search(key))}
    num_layers = getattr(config, "num_hidden_layers", None)
    if layers and num_layers not in (None, len(layers)) and truncate_layers is None:
        yield f"num_hidden_layers is {num_layers}, stored are {len(layers)}"
    for name, shape in layout.shapes.items():
        num_stored = layout.count_stored_experts(name) if layout.is_expert(name) else shape[:1]
        if layout.is_expert(name) and num_stored not in (0, shape[0]):
            yield f"{_name_of_count(config, shape[0])} is {shape[0]}, stored are {num_stored}"
            return


def _name_of_count(config: PreTrainedConfig, num_experts: int) -> str:
    """Return what a config calls the number of experts."""
    names = [
        name
        for name, value in vars(config).items()
        if "experts" in name and "per_tok" not in name and value == num_experts
    ]
    return min(names, key=len, default="the number of experts")


def _check_tied_copies(index: CheckpointIndex, layout: ModelLayout) -> None:
    """Refuse an output layer of its own that tying would replace by the embedding."""
    for copy, source in layout.tied_pairs():
        if not _are_equal(index, copy, source):
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
