"""How an expert joins a gate and an up value; and how to recognise that in a model's own code."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

Gate = Callable[[Tensor, Tensor], Tensor]
"""(R, I) of gate and up, (R, I) each; differentiable."""


@dataclass(frozen=True)
class SwiGlu:
    """`silu(gate) * up`, or GPT-OSS's clamped form where there is a limit.

    With a limit, gates are at most `limit`, ups lie within -`limit` and `limit`, and the result is
    `(up + 1) * gate * sigmoid(alpha * gate)`. The fused kernels know this class and no other gate.
    """

    alpha: float = 1.0
    limit: float | None = None

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Apply it."""
        if self.limit is None:
            return silu(gate) * up
        gate = gate.clamp(max=self.limit)
        up = up.clamp(min=-self.limit, max=self.limit)
        return (up + 1) * (gate * torch.sigmoid(self.alpha * gate))


@dataclass(frozen=True)
class ActivationGate:
    """`activation(gate) * up` for any activation."""

    activation: Callable[[Tensor], Tensor]

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Apply it."""
        return self.activation(gate) * up


def build_gate(activation: Callable[[Tensor], Tensor]) -> Gate:
    """Return the gate that a model's activation makes; recognised by its values, not its name."""
    gate = ActivationGate(activation)
    return SwiGlu() if gates_agree(gate, SwiGlu()) else gate


def gates_agree(one: Gate, other: Gate, device: torch.device | str = "cpu") -> bool:
    """Say whether two gates are the same function, as far as 1764 pairs of values in fp64 tell.

    The values lie from -12 to 12, beyond the limits that clamped gates have in practice, and some
    far out, beyond any limit.

    Args:
        one: a gate.
        other: what it may be.
        device: where they are computed, for a gate with tensors of its own.
    """
    far = [20.0, 50.0, 200.0, 1e3, 1e5]
    near = torch.linspace(-12, 12, 32, dtype=torch.float64).tolist()
    values = torch.tensor([*near, *far, *(-x for x in far)], dtype=torch.float64, device=device)
    gate, up = (grid.reshape(1, -1) for grid in torch.meshgrid(values, values, indexing="ij"))
    return torch.allclose(one(gate, up), other(gate, up), rtol=1e-12, atol=1e-12)
