"""How PEFT 0.21 stores adapters: the names of tensors, and the order of experts inside them.

PEFT keeps one matrix for all E experts of a projection: A as (E * r, in), the rows of one expert
together, and B as (out, r * E), the *columns of one rank* together (column = rank * E + expert).
Files in which B's columns of one expert are together scramble the experts silently.

Each parameter with adapters has a wrapper around the experts module, that of one parameter inside
that of another: PEFT is asked for their names (`peft_targets`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.functional import pad

from megablocks_utils.moe.expert_spec import (
    find_expert_modules,
    read_expert_spec,
    read_parameter_names,
)

__all__ = [
    "AdapterMatrix",
    "ExpertPlace",
    "Shape",
    "find_expert_places",
    "linear_key",
    "linear_matrices",
    "pack_lora_a",
    "pack_lora_b",
    "unpack_lora_a",
    "unpack_lora_b",
]

PREFIX = "base_model.model."


Shape = tuple[int, ...]


class AdapterMatrix(NamedTuple):
    """Announce one tensor, A or B, of an adapter file.

    Attributes:
        key: the tensor's name.
        shape: the shape it must have.
        name: the linear layer or the parameter of experts that is adapted.
        target: last name of what is adapted, the same in all layers.
        rank: the rank of which `shape` speaks.
    """

    key: str
    shape: Shape
    name: str
    target: str
    rank: int


def linear_matrices(name: str, shape: Shape, rank: int) -> Iterator[AdapterMatrix]:
    """Yield A (rank, in) and B (out, rank) of a linear layer with a weight (out, in)."""
    num_rows, num_columns = shape
    target = name.rpartition(".")[2]
    yield AdapterMatrix(linear_key(name, "A"), (rank, num_columns), name, target, rank)
    yield AdapterMatrix(linear_key(name, "B"), (num_rows, rank), name, target, rank)


def linear_key(name: str, side: str) -> str:
    """Return the tensor name of an adapter of a linear layer.

    Args:
        name: the layer, `model.layers.0.self_attn.q_proj`.
        side: "A" or "B".
    """
    return f"{PREFIX}{name}.lora_{side}.weight"


@dataclass(frozen=True)
class ExpertPlace:
    """Say what adapters a parameter of experts can have, and how PEFT holds them.

    Attributes:
        shape: (E, out, in) of the projections, however the parameter is stored.
        num_stored: experts that PEFT counts: E, or more where the parameter has rows for experts
            that compute nothing.
        is_transposed: whether the parameter is stored (E, in, out).
        is_turned: whether PEFT takes the projection's input for its output, since the weight is
            stored (in, out) and does not say so. Its A is then our B, and the other way round.
    """

    shape: Shape
    num_stored: int
    is_transposed: bool = False
    is_turned: bool = False

    def packed_shape(self, side: str, rank: int) -> Shape:
        """Return the shape of A or B as PEFT stores it."""
        _, num_out, num_in = self.shape
        packed_rank = rank * self.num_stored
        if side == "A":
            return packed_rank, num_out if self.is_turned else num_in
        return num_in if self.is_turned else num_out, packed_rank

    def pack(self, side: str, factor: Tensor) -> tuple[str, Tensor]:
        """Turn one of our factors into what PEFT stores, and say on which side.

        Args:
            side: "A" for (E, r, in), "B" for (E, out, r).
            factor: of all experts.
        """
        if self.is_turned:
            side, factor = "B" if side == "A" else "A", factor.mT
        factor = pad(factor, (0, 0, 0, 0, 0, self.num_stored - len(factor)))
        packed = pack_lora_a(factor) if side == "A" else pack_lora_b(factor)
        return side, packed.contiguous()

    def own_sides(self, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
        """Return PEFT's factors, unpacked, as ours: A (n, r, in) and B (n, out, r)."""
        return (lora_b.mT, lora_a.mT) if self.is_turned else (lora_a, lora_b)


def find_expert_places(model: nn.Module) -> dict[str, ExpertPlace]:
    """Return where the experts of a model can have adapters, by the parameter's name.

    Args:
        model: as transformers builds it, on meta or not.
    """
    places = {}
    is_transposed: dict[type, bool] = {}  # a spec finds the gate too, which costs
    for name, module in find_expert_modules(model).items():
        kind = type(module)
        if kind not in is_transposed:
            is_transposed[kind] = read_expert_spec(module).is_transposed
        is_turned = is_transposed[kind] and not getattr(module, "is_transposed", False)
        for projection in read_parameter_names(module)[:2]:
            weight = module.get_parameter(projection)
            sizes = tuple(weight.shape[1:])[:: -1 if is_transposed[kind] else 1]
            shape = (len(module.get_parameter("down_proj")), *sizes)
            places[f"{name}.{projection}"] = ExpertPlace(
                shape, len(weight), is_transposed[kind], is_turned
            )
    return places


def pack_lora_a(lora_a: Tensor) -> Tensor:
    """Turn (E, r, in) into what PEFT stores, (E * r, in)."""
    return lora_a.flatten(0, 1)


def pack_lora_b(lora_b: Tensor) -> Tensor:
    """Turn (E, out, r) into what PEFT stores, (out, r * E) with the expert running fastest."""
    return lora_b.permute(1, 2, 0).flatten(1)


def unpack_lora_a(packed: Tensor, num_experts: int) -> Tensor:
    """Turn (E * r, in) as PEFT stores it into (E, r, in)."""
    return packed.unflatten(0, (num_experts, -1))


def unpack_lora_b(packed: Tensor, num_experts: int) -> Tensor:
    """Turn (out, r * E) as PEFT stores it into (E, out, r)."""
    return packed.unflatten(1, (-1, num_experts)).permute(2, 0, 1)
