"""Read an expert's matrix in the bits that it is stored in, where these are of the format wanted.

So nothing is rounded a second time: GPT-OSS's MXFP4, and FP8 in blocks of 128 x 128 as DeepSeek-V3
has it, where gate and up are put together at the end of a block.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from megablocks_utils.checkpoint.expert_trace import ExpertPart, Span
from megablocks_utils.checkpoint.packed_weights import Mxfp4Weight, PackedWeight
from megablocks_utils.checkpoint.slices import SliceReader
from megablocks_utils.moe.expert_spec import ExpertSpec
from megablocks_utils.quantization.format_table import FORMATS
from megablocks_utils.quantization.weight_format import Parts

__all__ = ["find_kept_bits", "read_stored_bits"]


class _StoredRows(NamedTuple):
    """Outputs of an expert that one stored matrix has, from `first` on."""

    first: int
    size: int
    weight: PackedWeight
    item: int | None


def read_stored_bits(
    reader: SliceReader, name: str, expert: int, *, format_name: str, is_transposed: bool
) -> Parts | None:
    """Return the parts of a projection of one expert as they are stored.

    Args:
        reader: of the checkpoint.
        name: of the projection's weights in the transformers model.
        expert: by its number in the model.
        format_name: of `FORMATS`.
        is_transposed: whether the model has the weights as (E, in, out).

    Returns:
        None where the checkpoint has them in another form, and they must be packed.

    Raises:
        CheckpointError: a number is not finite, or a file is not what it was.
    """
    found = _find_rows(reader, name, expert, format_name, is_transposed=is_transposed)
    if found is None:
        return None
    read = [rows.weight.read_parts(rows.item) for rows in found]
    return {part: torch.cat([parts[part] for parts in read]) for part in read[0]}


def find_kept_bits(
    reader: SliceReader, specs: Mapping[str, ExpertSpec], format_name: str
) -> set[str]:
    """Return the projections of which `read_stored_bits` finds every expert; reads no weights.

    Args:
        reader: of the checkpoint.
        specs: of the experts modules, by their names in the transformers model.
        format_name: of `FORMATS`.
    """
    return {
        f"{path}.{projection}"
        for path, spec in specs.items()
        for projection in spec.projections
        if all(
            _find_rows(
                reader,
                f"{path}.{projection}",
                expert,
                format_name,
                is_transposed=spec.is_transposed,
            )
            for expert in range(spec.num_experts)
        )
    }


def _find_rows(
    reader: SliceReader, name: str, expert: int, format_name: str, *, is_transposed: bool
) -> list[_StoredRows] | None:
    """Return the stored matrices that follow each other in an expert, in whole blocks."""
    parts = reader.layout.expert_parts(name, range(expert, expert + 1))
    found = [_find_one(reader, part, format_name, is_transposed=is_transposed) for part in parts]
    rows = sorted((one for one in found if one is not None), key=lambda one: one.first)
    if not rows or len(rows) < len(found):
        return None
    row_block, _ = FORMATS[format_name].block
    place = 0
    for one in rows:
        if one.first != place or place % row_block:
            return None
        place += one.size
    return rows


def _find_one(
    reader: SliceReader, part: ExpertPart, format_name: str, *, is_transposed: bool
) -> _StoredRows | None:
    weight = reader.index.find_packed(part.key)
    if weight is None or not weight.keeps_format(format_name):
        return None
    outputs, inputs = (part.columns, part.rows) if is_transposed else (part.rows, part.columns)
    # What is read of MXFP4 has the outputs as columns.
    has_outputs_first = not isinstance(weight, Mxfp4Weight)
    if (part.is_turned == is_transposed) != has_outputs_first:
        return None
    sizes = weight.shape[-2:] if has_outputs_first else weight.shape[:-3:-1]
    if not (_is_whole(outputs, sizes[0]) and _is_whole(inputs, sizes[1])):
        return None
    return _StoredRows(outputs.memory.start, sizes[0], weight, part.item)


def _is_whole(span: Span, size: int) -> bool:
    """Return whether a span has every stored place of a dim, in order and without gaps."""
    return span.stored == range(size) and span.memory.step == 1
