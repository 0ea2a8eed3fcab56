"""How PEFT 0.21 stores adapters: the names of tensors, and the order of experts inside them.

PEFT keeps one matrix for all E experts of a projection: A as (E * r, in), the rows of one expert
together, and B as (out, r * E), the *columns of one rank* together (column = rank * E + expert).
Files in which B's columns of one expert are together scramble the experts silently.

Each parameter with adapters has a wrapper around the experts module, that of the first parameter
inside that of the second, so the names of the two differ by `base_layer`.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

__all__ = [
    "AdapterMatrix",
    "Shape",
    "expert_key",
    "linear_key",
    "linear_matrices",
    "pack_lora_a",
    "pack_lora_b",
    "unpack_lora_a",
    "unpack_lora_b",
]

PREFIX = "base_model.model."
_WRAPPER_OF_PROJECTION = {"gate_up_proj": "base_layer.", "down_proj": ""}


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


def expert_key(name: str, side: str) -> str:
    """Return the tensor name of an adapter of all experts.

    Args:
        name: the parameter, `model.layers.0.mlp.experts.gate_up_proj` or `...down_proj`.
        side: "A" or "B".
    """
    module, _, projection = name.rpartition(".")
    return f"{PREFIX}{module}.{_WRAPPER_OF_PROJECTION[projection]}lora_{side}.weight"


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
