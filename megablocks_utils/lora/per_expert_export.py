"""Write an adapter once more as servers load it, and prove it by turning the file back."""

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel

from megablocks_utils.checkpoint.companions import find_companions
from megablocks_utils.checkpoint.index import (
    CheckpointIndex,
    open_safetensors_file,
    resolve_checkpoint_folder,
)
from megablocks_utils.checkpoint.json_file import read_settings
from megablocks_utils.checkpoint.library_errors import DiskErrorsAsOSErrors
from megablocks_utils.checkpoint.load import build_model_on_meta
from megablocks_utils.checkpoint.writer import SafetensorsWriter, TensorSpec, staged_folder
from megablocks_utils.errors import CheckpointError, ConfigurationError
from megablocks_utils.files import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    MODEL_CONFIG_NAME,
    MODEL_WEIGHTS_NAME,
)
from megablocks_utils.lora.adapter_reader import (
    find_base_name,
    open_adapter,
    resolve_adapter_folder,
)
from megablocks_utils.lora.file_check import AdapterCheckError
from megablocks_utils.lora.peft_format import linear_key
from megablocks_utils.lora.peft_targets import split_by_reach
from megablocks_utils.lora.per_expert_layout import PerExpertLayout, plan_per_expert

__all__ = ["export_per_expert"]

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def export_per_expert(
    adapter: str, output: Path, *, base_name_or_path: str | None, show_progress: Progress
) -> tuple[int, int]:
    """Write the folder, complete or not at all; return how many pairs it holds, and their rank.

    Args:
        adapter: local folder or Hub name.
        output: the folder.
        base_name_or_path: the base; None is what the adapter's configuration names.
        show_progress: shows what has been written of so many bytes.

    Raises:
        AdapterCheckError: the file turned back is not the adapter.
        ConfigurationError: no base, or an adapter that no server would apply.
        CheckpointError: an adapter or base that cannot be read, or the folder cannot be written.
    """
    source = resolve_adapter_folder(adapter)
    base_name = find_base_name(base_name_or_path, source)
    base = resolve_checkpoint_folder(base_name, patterns=(MODEL_CONFIG_NAME,))
    model = build_model_on_meta(base)
    model.tie_weights()
    _check_is_whole_model(base, model)
    layout = plan_per_expert(open_adapter(source, model), model, base)
    config = _build_config(layout, model, base_name)
    specs = list(layout.specs())
    try:
        with staged_folder(output, last=ADAPTER_CONFIG_NAME) as folder:
            with show_progress("exporting", sum(spec.num_bytes for spec in specs)) as advance:
                _write_weights(folder, layout, specs, advance)
            _check_turned_back(open_safetensors_file(folder / ADAPTER_WEIGHTS_NAME), layout)
            with DiskErrorsAsOSErrors():
                config.save_pretrained(str(folder))
            for path in find_companions(source):
                shutil.copyfile(path, folder / path.name)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"cannot write the adapter to {output}: {reason}") from error
    return len(specs) // 2, layout.rank


def _check_is_whole_model(base: Path, model: PreTrainedModel) -> None:
    """Refuse an adapter of the text part of a larger model, whose layers a server names otherwise.

    Raises:
        ConfigurationError: naming both.
    """
    whole = read_settings(base / MODEL_CONFIG_NAME, "model").get("architectures")
    names = [str(name) for name in whole] if isinstance(whole, list) else []
    own = type(model).__name__
    if own not in names and any(name.endswith("ForConditionalGeneration") for name in names):
        raise ConfigurationError(
            f"adapter_layout is per-expert, but the adapter is of {own}, and servers load {base} as"
            f" {names[0]}, with other names; serve the model that megablocks_utils.merge makes of"
            " it instead.",
            parameters=("adapter_layout",),
        )


def _write_weights(
    folder: Path,
    layout: PerExpertLayout,
    specs: Sequence[TensorSpec],
    advance: Callable[[int], None],
) -> None:
    with SafetensorsWriter(folder, specs, max_shard_bytes=sys.maxsize) as writer:
        for key, tensor in layout.tensors():
            writer.append(key, tensor)
            advance(tensor.numel() * tensor.itemsize)
    (folder / MODEL_WEIGHTS_NAME).rename(folder / ADAPTER_WEIGHTS_NAME)


def _build_config(
    layout: PerExpertLayout, model: PreTrainedModel, base_model_name: str
) -> LoraConfig:
    """Return what `adapter_config.json` holds: what PEFT and the servers find the layers by."""
    modules, by_weight = split_by_reach(model, list(layout.linears))
    of_experts = layout.names.last_names if layout.experts else ()
    lasts = {tuple(n.rpartition(".")[2] for n in names) for names in layout.linears.items()}
    renamed = {stored for own, stored in lasts if stored != own}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model_name,
        inference_mode=True,
        r=layout.rank,
        lora_alpha=layout.lora_alpha,  # type: ignore[arg-type]  # PEFT divides it, whatever it is
        lora_dropout=0.0,
        target_parameters=[f"{end}.weight" for end in by_weight] or None,
    )
    # PEFT would keep a set, whose order in the file changes from run to run.
    config.target_modules = sorted({*modules, *of_experts, *renamed})
    return config


def _check_turned_back(written: CheckpointIndex, layout: PerExpertLayout) -> None:
    """Turn the file back into what PEFT holds, and compare every bit with the adapter."""
    for key, turned_back in _turn_back(written, layout):
        if not torch.equal(turned_back, layout.reader.index.read(key).to(layout.dtype)):
            raise AdapterCheckError(f"{key} turned back differs from {layout.reader.index.folder}")


def _turn_back(written: CheckpointIndex, layout: PerExpertLayout) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of the adapter by its name, made of the written file alone."""
    for name, stored in layout.linears.items():
        lora_a, lora_b = _read_pair(written, stored, layout.reader.linears[name].rank)
        yield linear_key(name, "A"), lora_a
        yield linear_key(name, "B"), lora_b
    expert_format = layout.reader.found.expert_format
    for name, adapter in layout.reader.expert_parameters.items():
        if expert_format is None:
            continue
        keys = [matrix.key for matrix in expert_format.matrices(name, adapter.rank)]
        place = layout.experts[name]
        pairs = [_join_layers(written, layout, name, expert) for expert in range(place.num_stored)]
        for side, factors in zip("AB", zip(*pairs, strict=True), strict=True):
            stored_side, packed = place.pack(side, torch.stack(factors))
            yield keys["AB".index(stored_side)], packed


def _join_layers(
    written: CheckpointIndex, layout: PerExpertLayout, name: str, expert: int
) -> tuple[Tensor, Tensor]:
    """Return A (r, in), which gate and up must share, and B (out, r) of one expert."""
    rank = layout.reader.expert_parameters[name].rank
    layers = layout.names.layers(name, expert)
    pairs = [_read_pair(written, layer.name, rank) for layer in layers]
    shared = pairs[0][0]
    joined = torch.full((sum(len(b) for _, b in pairs), rank), torch.nan, dtype=layout.dtype)
    for layer, (lora_a, lora_b) in zip(layers, pairs, strict=True):
        if not torch.equal(lora_a, shared):
            raise AdapterCheckError(f"lora_A of {layer.name} differs from {layers[0].name}'s")
        joined[layer.rows.start : layer.rows.stop : layer.rows.step] = lora_b
    return shared, joined


def _read_pair(written: CheckpointIndex, name: str, rank: int) -> tuple[Tensor, Tensor]:
    """Return a pair without the ranks that only fill it up, which must be zero."""
    lora_a, lora_b = (written.read(linear_key(name, side)) for side in "AB")
    if lora_a[rank:].any() or lora_b[:, rank:].any():
        raise AdapterCheckError(f"{name} has a rank above {rank} that is not zero")
    return lora_a[:rank], lora_b[:, :rank]
