"""The two ways in which adapter files hold the adapters of experts, behind one interface.

Both give what training wants, per projection of a layer's experts: A (n, rank, in) and
B (n, out, rank), in the order of the in-memory weights (gate rows before up rows).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megablocks_utils.checkpoint.index import CheckpointIndex
from megablocks_utils.checkpoint.slices import check_finite
from megablocks_utils.lora.peft_format import (
    AdapterMatrix,
    ExpertPlace,
    linear_key,
    linear_matrices,
    unpack_lora_a,
    unpack_lora_b,
)
from megablocks_utils.lora.single_experts import SingleExpertNames

__all__ = ["ExpertFormat", "FusedExperts", "SeparateExperts", "read_finite"]


class ExpertFormat(ABC):
    """Name, announce and read the adapters of experts in one kind of file.

    `name` is always an in-memory parameter, `model.layers.0.mlp.experts.gate_up_proj`.
    """

    label: str

    @abstractmethod
    def matrices(self, name: str, rank: int) -> Iterator[AdapterMatrix]:
        """Yield every tensor that the adapters of one parameter have in the file.

        Args:
            name: of the parameter.
            rank: that of its adapters in memory.
        """

    @abstractmethod
    def read(self, index: CheckpointIndex, name: str, experts: range) -> tuple[Tensor, Tensor]:
        """Read A (n, rank, in) and B (n, out, rank) of some experts, in the file's dtype."""


class FusedExperts(ExpertFormat):
    """PEFT's own: one A and one B that hold all experts of a parameter."""

    def __init__(self, modules: Mapping[str, str], places: Mapping[str, ExpertPlace]):
        """Take what says how PEFT holds the adapters of each parameter.

        Args:
            modules: parameter -> PEFT's wrapper of it, which depends on what else is targeted.
            places: parameter -> its place.
        """
        self._modules = modules
        self._places = places
        self.label = f"fused ({', '.join(dict.fromkeys(map(_last_name, places)))})"

    def matrices(self, name: str, rank: int) -> Iterator[AdapterMatrix]:
        """See `ExpertFormat`."""
        for side in "AB":
            shape = self._places[name].packed_shape(side, rank)
            yield AdapterMatrix(self._key(name, side), shape, name, _last_name(name), rank)

    def _key(self, name: str, side: str) -> str:
        return linear_key(self._modules[name], side)

    def read(self, index: CheckpointIndex, name: str, experts: range) -> tuple[Tensor, Tensor]:
        """See `ExpertFormat`; of A only the wanted experts' rows are read, of B everything."""
        place = self._places[name]
        key_a, key_b = self._key(name, "A"), self._key(name, "B")
        r = index.shape(key_a)[0] // place.num_stored
        rows = index.read_rows(key_a, experts.start * r, experts.stop * r)
        columns = unpack_lora_b(index.read(key_b), place.num_stored)[experts.start : experts.stop]
        # A copy, or the columns of all experts would stay in memory.
        columns = columns.clone(memory_format=torch.contiguous_format)
        check_finite(rows, f"{key_a} in {index.path(key_a)}")
        check_finite(columns, f"{key_b} in {index.path(key_b)}")
        return place.own_sides(unpack_lora_a(rows, len(experts)), columns)


class SeparateExperts(ExpertFormat):
    """That of transformers 4: one A and one B for each matrix of each expert, by its Hub name."""

    def __init__(self, names: SingleExpertNames, r: int):
        self._names = names
        self._r = r
        self.label = f"per expert ({', '.join(names.last_names)})"

    def matrices(self, name: str, rank: int) -> Iterator[AdapterMatrix]:
        """See `ExpertFormat`; the ranks of gate and up lie side by side in memory."""
        for expert in range(self._names.num_experts(name)):
            for layer in self._names.layers(name, expert):
                for matrix in linear_matrices(layer.name, layer.shape, self._r):
                    yield matrix._replace(name=name, target=_last_name(name))

    def read(self, index: CheckpointIndex, name: str, experts: range) -> tuple[Tensor, Tensor]:
        """See `ExpertFormat`; A is [A_gate; A_up], B has B_gate and B_up on its diagonal."""
        pairs = [self._read_expert(index, name, expert) for expert in experts]
        return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])

    def _read_expert(self, index: CheckpointIndex, name: str, expert: int) -> tuple[Tensor, Tensor]:
        layers = self._names.layers(name, expert)
        lora_a = torch.cat([read_finite(index, linear_key(layer.name, "A")) for layer in layers])
        num_rows = sum(len(layer.rows) for layer in layers)
        lora_b = lora_a.new_zeros(num_rows, len(lora_a))
        for number, layer in enumerate(layers):
            ranks = slice(number * self._r, (number + 1) * self._r)
            rows = slice(layer.rows.start, layer.rows.stop, layer.rows.step)
            lora_b[rows, ranks] = read_finite(index, linear_key(layer.name, "B"))
        return lora_a, lora_b


def read_finite(index: CheckpointIndex, key: str) -> Tensor:
    """Read a whole tensor, and refuse values that are not finite.

    Raises:
        CheckpointError: it holds some, or its file has become shorter.
    """
    tensor = index.read(key)
    check_finite(tensor, f"{key} in {index.path(key)}")
    return tensor


def _last_name(name: str) -> str:
    return name.rpartition(".")[2]
