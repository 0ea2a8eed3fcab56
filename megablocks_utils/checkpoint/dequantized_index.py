"""Present the quantized weights of a model folder as floating-point tensors under plain names.

Which stored tensors belong together is read off their names, dtypes and shapes, as transformers
pairs them; lists of modules in the configuration are not needed. Only headers are read here (and,
of a few forms of compressed-tensors, the shapes that are stored as tensors).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from megablocks_utils.checkpoint.compressed_schemes import CompressedSchemes
from megablocks_utils.checkpoint.compressed_weights import COMPRESSED_PARTS
from megablocks_utils.checkpoint.packed_weights import (
    Fp8Weight,
    Mxfp4Weight,
    PackedWeight,
    StoredPart,
)
from megablocks_utils.checkpoint.quantization_config import (
    COMPRESSED_TENSORS,
    MXFP4,
    Quantization,
    build_quantizer,
    read_quantization,
)
from megablocks_utils.checkpoint.safetensors_header import StoredTensor, TensorEntry
from megablocks_utils.dtypes import PACKED_DTYPES
from megablocks_utils.errors import CheckpointError
from megablocks_utils.files import MODEL_CONFIG_NAME

__all__ = ["dequantize_entries", "refuse_unscaled"]

_PACKED_DTYPES = tuple(getattr(torch, name) for name in PACKED_DTYPES)
_WEIGHT, _BLOCKS, _SCALES, _SCALE_INV = ".weight", "_blocks", "_scales", "_scale_inv"
# Of the scale of `<name>`, and of that of `<module>.weight` beside it.
_SCALES_OF_KEY = (_SCALE_INV, "_scale")
_SCALES_OF_MODULE = (".scale", ".qscale_weight")
# Beside a quantized weight: of what flows through its module, which no longer is quantized.
_OF_ACTIVATIONS = (
    *("activation_scale", "input_scale", "input_zero_point", "input_global_scale", "qscale_act"),
    *("output_scale", "output_zero_point"),
)

Entries = Mapping[str, TensorEntry]


class _Found(NamedTuple):
    """A quantized weight, the name it is read under, and those of its stored parts."""

    key: str
    weight: PackedWeight
    parts: tuple[str, ...]


def dequantize_entries(
    folder: Path, entries: Entries, dtype: torch.dtype
) -> tuple[dict[str, StoredTensor], list[str]]:
    """Return a folder's tensors with its quantized weights as floating-point ones, and notes.

    Args:
        folder: a model folder.
        entries: what it stores.
        dtype: that quantized weights are read in.

    Raises:
        CheckpointError: quantized in a way that is not read here, or not what is stored.
    """
    quantization = read_quantization(folder)
    if quantization is None:
        refuse_unscaled(entries, f"but {folder / MODEL_CONFIG_NAME} has no quantization_config")
        return dict(entries), []
    found = list(_find_weights(quantization, entries, dtype))
    parts = {part for weight in found for part in weight.parts}
    modules = {weight.key.removesuffix(_WEIGHT) for weight in found}
    dropped = {key for key in entries if _is_of_activations(key, modules)}
    taken = parts | dropped
    by_key = {weight.key: weight.weight for weight in found}
    left = {key: entry for key, entry in entries.items() if key not in taken}
    for key in left.keys() & by_key.keys():
        raise CheckpointError(f"{key} in {left[key].path} is stored a second time, quantized")
    refuse_unscaled(left, "and has no scale")
    _refuse_lone_scales(left)
    return {**left, **by_key}, [_describe(folder, quantization, len(found), len(dropped), dtype)]


def refuse_unscaled(entries: Entries, reason: str) -> None:
    """Refuse 8-bit and 4-bit floats, which mean nothing without the scales they belong to.

    Raises:
        CheckpointError: some are there; `reason` ends its sentence.
    """
    for key, entry in entries.items():
        if entry.dtype in _PACKED_DTYPES:
            raise CheckpointError(
                f"{key} in {entry.path} is stored as {_name(entry.dtype)}, {reason}"
            )


def _describe(
    folder: Path, quantization: Quantization, num_weights: int, num_dropped: int, dtype: torch.dtype
) -> str:
    """Return the line that says what is read as what."""
    if not num_weights:
        return (
            f"{folder}: no weight is quantized, though its configuration says {quantization.method}"
        )
    note = f"{folder}: {num_weights:,} {quantization.method} weights are read as {_name(dtype)}"
    if num_dropped:
        note += f"; scales of activations ({num_dropped:,}) have no use"
    return note


def _find_weights(
    quantization: Quantization, entries: Entries, dtype: torch.dtype
) -> Iterator[_Found]:
    quantizer = build_quantizer(quantization)
    if quantization.method == MXFP4:
        yield from _find_mxfp4(entries, dtype)
    elif quantization.method == COMPRESSED_TENSORS:
        yield from _find_compressed(entries, CompressedSchemes(quantization, quantizer, dtype))
    else:
        assert isinstance(quantizer, FineGrainedFP8HfQuantizer), "of the methods that are left"
        size = quantizer.quantization_config.weight_block_size
        yield from _find_fp8(entries, dtype, None if size is None else (size[0], size[1]))


def _find_mxfp4(entries: Entries, dtype: torch.dtype) -> Iterator[_Found]:
    for blocks in entries:
        key = blocks.removesuffix(_BLOCKS)
        if key == blocks:
            continue
        scales = key + _SCALES
        if scales not in entries:
            raise _lacks(blocks, entries, scales)
        weight = Mxfp4Weight(_part(entries, blocks), _part(entries, scales), dtype)
        yield _Found(key, weight, (blocks, scales))


def _find_fp8(
    entries: Entries, dtype: torch.dtype, block_size: tuple[int, int] | None
) -> Iterator[_Found]:
    for key, entry in entries.items():
        if entry.dtype.itemsize > 1 or not (entry.dtype in _PACKED_DTYPES or _is_int8(entry)):
            continue
        module = key.removesuffix(_WEIGHT)
        names = [key + end for end in _SCALES_OF_KEY]
        names += [module + end for end in _SCALES_OF_MODULE if module != key]
        scale = next((name for name in names if name in entries), None)
        if scale is not None:
            parts = _part(entries, key), _part(entries, scale)
            yield _Found(key, Fp8Weight(*parts, dtype, block_size=block_size), (key, scale))


def _find_compressed(entries: Entries, schemes: CompressedSchemes) -> Iterator[_Found]:
    for key in entries:
        module, _, last = key.rpartition(".")
        is_packed = f"{module}.weight_packed" in entries
        # Where values are packed, it is their turn and not that of their scales.
        if last != ("weight_packed" if is_packed else "weight_scale"):
            continue
        parts = {
            part: _part(entries, name)
            for part in COMPRESSED_PARTS
            if (name := f"{module}.{part}") in entries
        }
        for part in ("weight_scale", "weight_packed" if is_packed else "weight"):
            if part not in parts:
                raise _lacks(key, entries, f"{module}.{part}")
        weight = schemes.build(module, parts)
        yield _Found(module + _WEIGHT, weight, tuple(part.key for part in parts.values()))


def _part(entries: Entries, key: str) -> StoredPart:
    return StoredPart(key, entries[key])


def _is_int8(entry: TensorEntry) -> bool:
    return entry.dtype == torch.int8


def _lacks(key: str, entries: Entries, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"{key} in {entries[key].path} is a part of a quantized weight, but {wanted} is missing"
    )


def _is_of_activations(key: str, modules: set[str]) -> bool:
    module, _, last = key.rpartition(".")
    return last in _OF_ACTIVATIONS and module in modules


def _refuse_lone_scales(left: Entries) -> None:
    """Refuse a scale whose weight is stored unpacked or not at all."""
    for key, entry in left.items():
        if key.endswith(_SCALE_INV):
            raise CheckpointError(
                f"{key} in {entry.path} is the scale of a quantized weight, but"
                f" {key.removesuffix(_SCALE_INV)} is not stored as one"
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
