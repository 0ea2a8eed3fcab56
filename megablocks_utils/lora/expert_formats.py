"""The two ways in which adapter files hold the adapters of experts, behind one interface.

Both give what training wants, per projection of a layer's experts: A (n, rank, in) and
B (n, out, rank), in the order of the in-memory weights (gate rows before up rows).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megablocks_utils.checkpoint.hub_naming import ExpertPart, HubNaming
from megablocks_utils.checkpoint.index import CheckpointIndex
from megablocks_utils.checkpoint.slices import check_finite
from megablocks_utils.lora.peft_format import (
    AdapterMatrix,
    Shape,
    linear_key,
    linear_matrices,
    unpack_lora_a,
    unpack_lora_b,
)

__all__ = ["ExpertFormat", "FusedExperts", "SeparateExperts", "read_finite"]


class ExpertFormat(ABC):
    """Name, announce and read the adapters of experts in one kind of file.

    `name` is always an in-memory parameter, `model.layers.0.mlp.experts.gate_up_proj`, and `shape`
    its (E, out, in).
    """

    label: str

    @abstractmethod
    def matrices(self, name: str, shape: Shape, rank: int) -> Iterator[AdapterMatrix]:
        """Yield every tensor that the adapters of one parameter have in the file.

        Args:
            name: of the parameter.
            shape: its (E, out, in).
            rank: that of its adapters in memory.
        """

    @abstractmethod
    def read(
        self, index: CheckpointIndex, name: str, shape: Shape, experts: range
    ) -> tuple[Tensor, Tensor]:
        """Read A (n, rank, in) and B (n, out, rank) of some experts, in the file's dtype."""


class FusedExperts(ExpertFormat):
    """PEFT's own: one A and one B that hold all experts of a parameter."""

    label = "fused (gate_up_proj, down_proj)"

    def __init__(self, modules: Mapping[str, str]):
        """`modules`: parameter -> PEFT's wrapper of it, which depends on what else is targeted."""
        self._modules = modules

    def matrices(self, name: str, shape: Shape, rank: int) -> Iterator[AdapterMatrix]:
        """See `ExpertFormat`."""
        num_experts, num_rows, num_columns = shape
        shapes = (num_experts * rank, num_columns), (num_rows, rank * num_experts)
        target = name.rpartition(".")[2]
        for side, wanted in zip("AB", shapes, strict=True):
            yield AdapterMatrix(self._key(name, side), wanted, name, target, rank)

    def _key(self, name: str, side: str) -> str:
        return linear_key(self._modules[name], side)

    def read(
        self, index: CheckpointIndex, name: str, shape: Shape, experts: range
    ) -> tuple[Tensor, Tensor]:
        """See `ExpertFormat`; of A only the wanted experts' rows are read, of B everything."""
        num_experts = shape[0]
        key_a, key_b = self._key(name, "A"), self._key(name, "B")
        r = index.shape(key_a)[0] // num_experts
        rows = index.read_rows(key_a, experts.start * r, experts.stop * r)
        columns = unpack_lora_b(index.read(key_b), num_experts)[experts.start : experts.stop]
        # A copy, or the columns of all experts would stay in memory.
        columns = columns.clone(memory_format=torch.contiguous_format)
        check_finite(rows, f"{key_a} in {index.path(key_a)}")
        check_finite(columns, f"{key_b} in {index.path(key_b)}")
        return unpack_lora_a(rows, len(experts)), columns


class SeparateExperts(ExpertFormat):
    """That of transformers 4: one A and one B for each matrix of each expert, by its Hub name."""

    def __init__(self, naming: HubNaming, r: int):
        self._naming = naming
        self._r = r
        self.label = f"per expert ({', '.join(naming.projections.values())})"

    def matrices(self, name: str, shape: Shape, rank: int) -> Iterator[AdapterMatrix]:
        """See `ExpertFormat`; the ranks of gate and up lie side by side in memory."""
        for part in self._naming.expert_parts(name, range(shape[0])):
            module = _module(part)
            for matrix in linear_matrices(module, part.hub_shape(shape), self._r):
                yield matrix._replace(name=name, target=name.rpartition(".")[2])

    def read(
        self, index: CheckpointIndex, name: str, shape: Shape, experts: range
    ) -> tuple[Tensor, Tensor]:
        """See `ExpertFormat`; A is [A_gate; A_up], B has B_gate and B_up on its diagonal."""
        pairs = [self._read_expert(index, name, expert) for expert in experts]
        return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])

    def _read_expert(self, index: CheckpointIndex, name: str, expert: int) -> tuple[Tensor, Tensor]:
        modules = [_module(part) for part in self._naming.expert_parts(name, [expert])]
        lora_a = torch.cat([read_finite(index, linear_key(module, "A")) for module in modules])
        lora_b = [read_finite(index, linear_key(module, "B")) for module in modules]
        return lora_a, torch.block_diag(*lora_b)


def read_finite(index: CheckpointIndex, key: str) -> Tensor:
    """Read a whole tensor, and refuse values that are not finite.

    Raises:
        CheckpointError: it holds some, or its file has become shorter.
    """
    tensor = index.read(key)
    check_finite(tensor, f"{key} in {index.path(key)}")
    return tensor


def _module(part: ExpertPart) -> str:
    """Return the linear layer of transformers 4 whose weight this part is."""
    return part.key.removesuffix(".weight")
