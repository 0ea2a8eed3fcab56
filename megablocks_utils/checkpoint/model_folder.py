"""Write a sharded model as a Hugging Face folder, one gathered tensor at a time.

The folder has the keys that transformers' own `save_pretrained` writes, so plain
`AutoModelForCausalLM.from_pretrained` loads it with no code of ours.
"""

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from megablocks_utils.checkpoint.layouts import (
    TIED_PARAMETERS,
    HubNaming,
    is_expert_parameter,
    naming_of_family,
)
from megablocks_utils.checkpoint.library_errors import DiskErrorsAsOSErrors
from megablocks_utils.checkpoint.writer import SafetensorsWriter, TensorSpec, staged_folder
from megablocks_utils.errors import CheckpointError
from megablocks_utils.files import GENERATION_CONFIG_NAME

__all__ = ["MAX_SHARD_BYTES", "export_model", "write_companions"]

MAX_SHARD_BYTES = 5 * 1000**3


def export_model(
    model_config: PreTrainedConfig,
    generation_config: GenerationConfig | None,
    tokenizer: PreTrainedTokenizerBase | None,
    specs: Iterable[tuple[str, tuple[int, ...], torch.dtype]],
    tensors: Iterable[tuple[str, torch.Tensor | None]],
    output_dir: str | Path,
    *,
    is_writer: bool,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write weights, configuration and tokenizer to `output_dir`, complete or not at all.

    Expert tensors are split into the Hub's keys as they pass, and a tied `lm_head` is left out.
    The last tensor is freed before the next one is asked for.

    **Collective:** none here; but `tensors` usually gathers, so every rank must call this with an
    iterator of equal length. If writing fails, the writer still runs its iterator to the end, so
    that the other ranks are not left waiting, and raises then.

    Args:
        model_config: the model's config, of a supported `model_type`.
        generation_config: written too, if given.
        tokenizer: written too, if given.
        specs: in-memory parameter name, whole shape and dtype to write, in the order of `tensors`.
        tensors: yields each name with its whole tensor, or with None where not `is_writer`.
        output_dir: the folder; other files in it stay, those of an earlier model are replaced.
        is_writer: whether this rank writes.
        max_shard_bytes: largest size of one weight file.

    Raises:
        CheckpointError: the folder cannot be written, for example because the disk is full.
    """
    remaining = iter(tensors)
    try:
        if is_writer:
            named = [TensorSpec(*spec) for spec in specs]
            with staged_folder(Path(output_dir)) as folder:
                _write_weights(model_config, named, remaining, folder, max_shard_bytes)
                write_companions(model_config, generation_config, tokenizer, named[0].dtype, folder)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"cannot write the model to {output_dir}: {reason}") from error
    finally:
        for _ in remaining:
            pass


def _write_weights(
    config: PreTrainedConfig,
    specs: list[TensorSpec],
    tensors: Iterator[tuple[str, torch.Tensor | None]],
    folder: Path,
    max_shard_bytes: int,
) -> None:
    naming = naming_of_family(config.model_type)
    copies = TIED_PARAMETERS if config.tie_word_embeddings else {}
    hub_specs = [
        hub_spec
        for spec in specs
        if spec.name not in copies
        for hub_spec in _split_spec(naming, spec)
    ]
    with SafetensorsWriter(folder, hub_specs, max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in tensors:
            if name not in copies and tensor is not None:
                _append(writer, naming, name, tensor)
            # Else it would still be held while the next one is gathered.
            del tensor


def _split_spec(naming: HubNaming, spec: TensorSpec) -> Iterator[TensorSpec]:
    """Yield what is written for one in-memory parameter."""
    if not is_expert_parameter(spec.name):
        yield spec._replace(name=naming.hub_key(spec.name))
        return
    for part in naming.expert_parts(spec.name, range(spec.shape[0])):
        yield TensorSpec(part.key, part.hub_shape(spec.shape), spec.dtype)


def _append(writer: SafetensorsWriter, naming: HubNaming, name: str, tensor: torch.Tensor) -> None:
    """Write one in-memory parameter, in the order of `_split_spec`."""
    if not is_expert_parameter(name):
        writer.append(naming.hub_key(name), tensor)
        return
    num_experts, num_rows, _ = tensor.shape
    for part in naming.expert_parts(name, range(num_experts)):
        writer.append(part.key, tensor[part.expert, part.rows(num_rows)])


def write_companions(
    config: PreTrainedConfig,
    generation_config: GenerationConfig | None,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype,
    folder: Path,
) -> None:
    """Write the other files of a model whose weights have a dtype: configuration and tokenizer."""
    config = copy.deepcopy(config)
    config.dtype = dtype
    config.save_pretrained(folder)
    if generation_config is not None:
        # `save_pretrained` refuses settings that many published models carry.
        generation_config.to_json_file(folder / GENERATION_CONFIG_NAME)
    if tokenizer is not None:
        with DiskErrorsAsOSErrors():
            tokenizer.save_pretrained(folder)
