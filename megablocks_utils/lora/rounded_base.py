"""Read a base checkpoint with its experts as a format of few bits keeps them."""

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megablocks_utils.checkpoint.expert_trace import ExpertPart
from megablocks_utils.checkpoint.index import CheckpointIndex
from megablocks_utils.checkpoint.layouts import ModelLayout
from megablocks_utils.checkpoint.slices import SliceReader
from megablocks_utils.checkpoint.stored_parts import find_kept_bits
from megablocks_utils.moe.expert_spec import find_expert_modules, read_expert_specs
from megablocks_utils.quantization.format_table import FORMATS, round_to_format

__all__ = ["RoundedBase"]


class RoundedBase:
    """Read the tensors of a checkpoint as a run with `--expert_quantization` computes with them.

    A block of a format may go over several stored tensors, such as gate and up: an expert's matrix
    is put together, rounded, and the part that was asked for is kept. What is stored in the format
    has been rounded already, and is left as it is.

    Args:
        index: the checkpoint.
        layout: where the model's weights lie in it.
        model: whose experts, on meta or not.
        weight_format: of `FORMATS`.
    """

    def __init__(
        self,
        index: CheckpointIndex,
        layout: ModelLayout,
        model: PreTrainedModel,
        weight_format: str,
    ) -> None:
        self._index, self._layout = index, layout
        self._format = FORMATS[weight_format]
        specs = read_expert_specs(find_expert_modules(model))
        kept = find_kept_bits(SliceReader(index, layout), specs, weight_format)
        self._specs = {
            f"{name}.{p}": spec
            for name, spec in specs.items()
            for p in spec.projections
            if f"{name}.{p}" not in kept
        }
        self._squares = torch.zeros(2, dtype=torch.float64)

    @property
    def error(self) -> float:
        """Relative error of all experts that were read and rounded so far."""
        off, all_ = self._squares.tolist()
        return (off / all_) ** 0.5 if all_ else 0.0

    @property
    def is_exact(self) -> bool:
        """Whether all experts are stored in the format, so that none is rounded."""
        return not self._specs

    def __iter__(self) -> Iterator[str]:
        """Yield the names of the stored tensors."""
        return iter(self._index)

    def is_rounded(self, key: str) -> bool:
        """Return whether a stored tensor has weights of experts."""
        return any(name in self._specs for name in self._layout.names(key))

    def read(self, key: str) -> Tensor:
        """Read a stored tensor; of experts, what the format keeps, in the dtype that is stored."""
        tensor = self._index.read(key)
        for name in self._layout.names(key):
            if name in self._specs:
                self._round(key, name, tensor)
        return tensor

    def _round(self, key: str, name: str, tensor: Tensor) -> None:
        spec = self._specs[name]
        parts = self._layout.expert_parts(name, range(spec.num_experts))
        for _, of_expert in groupby(parts, key=lambda part: part.expert):
            wanted = list(of_expert)
            own = [part for part in wanted if part.key == key]
            if not own:
                continue
            matrix = self._assemble(name, wanted, key, tensor)
            stored = matrix.T if spec.is_transposed else matrix
            stored.copy_(round_to_format(stored.contiguous(), self._format))
            for part in own:
                place, rounded = _take(part, tensor), part.memory_block(matrix)
                off = torch.stack([(rounded - place).double().norm(), place.double().norm()])
                self._squares += off.square()
                place.copy_(rounded)

    def _assemble(self, name: str, parts: list[ExpertPart], key: str, tensor: Tensor) -> Tensor:
        """Return an expert's matrix as it is in memory, in fp32."""
        matrix = torch.empty(self._layout.shapes[name][1:])
        for part in parts:
            source = tensor if part.key == key else self._index.read(part.key)
            part.memory_block(matrix).copy_(_take(part, source))
        return matrix


def _take(part: ExpertPart, tensor: Tensor) -> Tensor:
    return part.stored_block(tensor if part.item is None else tensor[part.item])
