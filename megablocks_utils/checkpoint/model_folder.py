"""Write a sharded model as a Hugging Face folder, one gathered tensor at a time.

The folder has the names that its base has, which are those that transformers' own
`save_pretrained` writes, so plain transformers loads it with no code of ours. What is stored in the
base and not trained (vision towers, heads for several tokens) is copied byte for byte.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from megablocks_utils.checkpoint.companions import write_companions
from megablocks_utils.checkpoint.layouts import ModelLayout
from megablocks_utils.checkpoint.slices import SliceReader
from megablocks_utils.checkpoint.writer import SafetensorsWriter, TensorSpec, staged_folder
from megablocks_utils.errors import CheckpointError

__all__ = ["MAX_SHARD_BYTES", "WrittenModel", "export_model"]

MAX_SHARD_BYTES = 5 * 1000**3
_Spec = tuple[str, tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class WrittenModel:
    """Say in which form a model is written, and what is written besides what was trained.

    Attributes:
        layout: where its tensors lie in a checkpoint.
        config: its configuration.
        generation_config: written too, if given.
        tokenizer: written too, if given.
        base: the checkpoint that was trained, of which the rest is copied; None where there is
            none, or only a part of its layers is trained.
        files: folder of the config.json and processors to keep; None is that of the base.
    """

    layout: ModelLayout
    config: PreTrainedConfig
    generation_config: GenerationConfig | None
    tokenizer: PreTrainedTokenizerBase | None
    base: SliceReader | None = None
    files: Path | None = None

    @property
    def passed_through(self) -> tuple[str, ...]:
        """Return the tensors that are copied from the base, byte for byte."""
        return () if self.base is None else tuple(self.layout.unused)


def export_model(
    model: WrittenModel,
    specs: Iterable[_Spec],
    tensors: Iterable[tuple[str, Tensor | None]],
    output_dir: str | Path,
    *,
    is_writer: bool,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write weights, configuration and tokenizer to `output_dir`, complete or not at all.

    Tensors are put into the Hub's form as they pass, and tied copies are left out. The last tensor
    is freed before the next one is asked for.

    **Collective:** none here; but `tensors` usually gathers, so every rank must call this with an
    iterator of equal length. If writing fails, the writer still runs its iterator to the end, so
    that the other ranks are not left waiting, and raises then.

    Args:
        model: in which form, and what else is written.
        specs: in-memory name of a parameter or persistent buffer, whole shape and dtype to write,
            in the order of `tensors`.
        tensors: yields each name with its whole tensor, or with None where not `is_writer`.
        output_dir: the folder; other files in it stay, those of an earlier model are replaced.
        is_writer: whether this rank writes.
        max_shard_bytes: largest size of one weight file.

    Raises:
        CheckpointError: the folder cannot be written, for example because the disk is full; or
            files of the base are gone, and then what was trained is written all the same.
    """
    remaining = iter(tensors)
    lost = _find_lost(model) if is_writer else None
    model = model if lost is None else replace(model, base=None)
    try:
        if is_writer:
            named = [TensorSpec(*spec) for spec in specs]
            with staged_folder(Path(output_dir)) as folder:
                _write_weights(model, named, remaining, folder, max_shard_bytes)
                _write_companions(model, named[0].dtype, folder)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"cannot write the model to {output_dir}: {reason}") from error
    finally:
        for _ in remaining:
            pass
    if lost is not None:
        raise CheckpointError(
            f"{lost} is gone, so that tensors of the base that nobody trains could not be copied;"
            f" the trained weights are in {output_dir}, without them"
        )


def _find_lost(model: WrittenModel) -> Path | None:
    """Return a file of the base that is needed and not there any more."""
    if model.base is None:
        return None
    paths = {model.base.index.path(key) for key in model.passed_through}
    return next((path for path in sorted(paths) if not path.is_file()), None)


def _write_weights(
    model: WrittenModel,
    specs: list[TensorSpec],
    tensors: Iterator[tuple[str, Tensor | None]],
    folder: Path,
    max_shard_bytes: int,
) -> None:
    hub_specs = [hub_spec for spec in specs for hub_spec in _hub_specs(model.layout, spec)]
    with SafetensorsWriter(
        folder, [*hub_specs, *_copied_specs(model)], max_shard_bytes=max_shard_bytes
    ) as writer:
        for name, tensor in tensors:
            if tensor is not None:
                _append(writer, model, name, tensor)
            # Else it would still be held while the next one is gathered.
            del tensor
        for key in model.passed_through:
            assert model.base is not None, "nothing is passed through without a base"
            writer.append(key, model.base.index.read(key))


def _append(writer: SafetensorsWriter, model: WrittenModel, name: str, tensor: Tensor) -> None:
    """Write one in-memory tensor, in the order of `_hub_specs`."""
    for key, hub_tensor in model.layout.hub_tensors(name, _complete(model, name, tensor)):
        writer.append(key, hub_tensor)


def _hub_specs(layout: ModelLayout, spec: TensorSpec) -> Iterator[TensorSpec]:
    """Yield what is written for one in-memory tensor."""
    yield from (TensorSpec(key, shape, spec.dtype) for key, shape in layout.hub_shapes(spec.name))


def _copied_specs(model: WrittenModel) -> Iterator[TensorSpec]:
    if model.base is not None:
        index = model.base.index
        yield from (TensorSpec(k, index.shape(k), index.dtype(k)) for k in model.passed_through)


def _complete(model: WrittenModel, name: str, tensor: Tensor) -> Tensor:
    """Add the rows of experts that are stored and never computed with, from the base."""
    shape = model.layout.shapes[name]
    if tensor.shape == shape:
        return tensor
    if model.base is None or not tensor.dim():
        raise CheckpointError(f"{name} is {tuple(tensor.shape)}, but its whole is {shape}")
    rest = tensor.new_empty((shape[0] - len(tensor), *shape[1:]))
    model.base.fill_local(name, rest, (len(tensor), *(0 for _ in shape[1:])))
    return torch.cat([tensor, rest])


def _write_companions(model: WrittenModel, dtype: torch.dtype, folder: Path) -> None:
    base = model.files or (None if model.base is None else model.base.index.folder)
    write_companions(
        model.config, model.generation_config, model.tokenizer, dtype, folder, base=base
    )
