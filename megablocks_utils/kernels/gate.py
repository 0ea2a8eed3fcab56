"""What an expert does between its projections; and how to recognise that in a model's own code.

Most experts join a gate and an up value to one, some have an activation alone. What the kernels
know of both is a record; anything else is called as a function.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

__all__ = [
    "SWIGLU",
    "Activation",
    "ActivationGate",
    "Clamp",
    "Gate",
    "KnownActivation",
    "KnownFunction",
    "KnownGate",
    "list_activations",
    "list_gates",
    "recognise_gate",
]

Gate = Callable[..., Tensor]
"""(R, I) of gate and up, (R, I) each, or of up alone without a gate; differentiable."""

# Far below what rounding does in fp32, far above what formulas of the same function differ by.
_TOLERANCE = 1e-9
# The same for functions that compute in fp32 whatever they are given.
_FP32_TOLERANCE = 1e-5


class Activation(StrEnum):
    """The activations that the kernels know."""

    SILU = "silu"
    GELU_TANH = "gelu_tanh"
    RELU_SQUARED = "relu_squared"

    def __call__(self, x: Tensor) -> Tensor:
        """Apply it to each number."""
        match self:
            case Activation.SILU:
                return silu(x)
            case Activation.GELU_TANH:
                return gelu(x, approximate="tanh")
            case Activation.RELU_SQUARED:
                return relu(x).square()


class Clamp(StrEnum):
    """Where a gate limits its values.

    `BEFORE` and `AFTER` the activation: gates are at most the limit, ups lie within -limit and
    limit. `GPT_OSS` clamps before, too, but joins the two in its own way.
    """

    NONE = "none"
    BEFORE = "before"
    AFTER = "after"
    GPT_OSS = "gpt_oss"


@dataclass(frozen=True)
class KnownGate:
    """`activation(gate) * up`, perhaps clamped; the fused kernels know this and no other gate.

    GPT-OSS's is `(up + 1) * gate * sigmoid(alpha * gate)` of clamped values.

    Attributes:
        activation: of the gate; SiLU in GPT-OSS's form.
        clamp: whether and where values are limited.
        limit: finite where there is a clamp.
        alpha: in GPT-OSS's form; else 1.
        in_fp32: whether it computes in fp32 and rounds its result, whatever dtype it is given. The
            fused kernels always do.
    """

    activation: Activation = Activation.SILU
    clamp: Clamp = Clamp.NONE
    limit: float = math.inf
    alpha: float = 1.0
    in_fp32: bool = False

    def __post_init__(self) -> None:
        """Refuse what the kernels would not compute as it reads."""
        if math.isfinite(self.limit) == (self.clamp is Clamp.NONE):
            raise ValueError(f"clamp is {self.clamp}, but limit is {self.limit}")
        if self.clamp is Clamp.GPT_OSS and self.activation is not Activation.SILU:
            raise ValueError(f"clamp is {self.clamp}, but activation is {self.activation}")
        if self.clamp is not Clamp.GPT_OSS and self.alpha != 1:
            raise ValueError(f"clamp is {self.clamp}, but alpha is {self.alpha}")

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Apply it."""
        if self.in_fp32:
            return self._apply(gate.float(), up.float()).to(gate.dtype)
        return self._apply(gate, up)

    def _apply(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.clamp is Clamp.NONE:
            return self.activation(gate) * up
        up = up.clamp(min=-self.limit, max=self.limit)
        if self.clamp is Clamp.AFTER:
            return self.activation(gate).clamp(max=self.limit) * up
        gate = gate.clamp(max=self.limit)
        if self.clamp is Clamp.BEFORE:
            return self.activation(gate) * up
        return (up + 1) * (gate * torch.sigmoid(self.alpha * gate))


SWIGLU = KnownGate()
"""`silu(gate) * up`, of most models."""


@dataclass(frozen=True)
class KnownActivation:
    """`activation(up)`, of experts without a gate.

    Attributes:
        activation: of the first projection's outputs.
        in_fp32: as in `KnownGate`.
    """

    activation: Activation
    in_fp32: bool = False

    def __call__(self, up: Tensor) -> Tensor:
        """Apply it."""
        if self.in_fp32:
            return self.activation(up.float()).to(up.dtype)
        return self.activation(up)


@dataclass(frozen=True)
class ActivationGate:
    """`activation(gate) * up` for any activation."""

    activation: Callable[[Tensor], Tensor]

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Apply it."""
        return self.activation(gate) * up


KnownFunction = KnownGate | KnownActivation


def list_gates(numbers: Iterable[float] = ()) -> Iterator[KnownGate]:
    """Yield every gate that the kernels know whose limit and alpha are among some numbers.

    Args:
        numbers: all that a module has, whatever they are called; what they are not is seen when
            gates are compared.
    """
    yield from (KnownGate(activation) for activation in Activation)
    positive = sorted({float(number) for number in numbers if 0 < number < math.inf})
    for limit, activation, clamp in product(positive, Activation, (Clamp.BEFORE, Clamp.AFTER)):
        yield KnownGate(activation, clamp, limit)
    for limit, alpha in product(positive, positive):
        yield KnownGate(clamp=Clamp.GPT_OSS, limit=limit, alpha=alpha)


def list_activations() -> Iterator[KnownActivation]:
    """Yield every activation that the kernels know of experts without a gate."""
    yield from map(KnownActivation, Activation)


def recognise_gate(
    own: Gate, candidates: Iterable[KnownFunction], device: torch.device | str = "cpu"
) -> Gate:
    """Return the candidate that is the same function as a model's own gate, or the own one.

    As far as two thousand pairs of values in fp64 tell, and the gradients there: those that a clamp
    stops are part of what a gate is. The values lie from -12 to 12, at the candidates' limits, and
    some far out, beyond any limit. A gate that computes in fp32 all the same is compared as such.

    Args:
        own: of the model: of two tensors, or of one where candidates are `KnownActivation`.
        candidates: what it may be, from `list_gates` or `list_activations`.
        device: where they are computed, for a gate with tensors of its own.
    """
    candidates = list(candidates)
    if not candidates:
        return own
    with torch.inference_mode(mode=False), torch.enable_grad():
        inputs = _draw_inputs(candidates, device)
        wanted = _sample(own, inputs)
        # A function that rounds to fp32 gives nothing else, and a precise one nearly never.
        in_fp32 = bool((wanted[0] == wanted[0].float()).all())
        tolerance = _FP32_TOLERANCE if in_fp32 else _TOLERANCE
        for candidate in candidates:
            known = replace(candidate, in_fp32=in_fp32)
            # Most are another function already by their values, which take half as long.
            if _are_close([known(*inputs)], wanted[:1], tolerance) and _are_close(
                _sample(known, inputs), wanted, tolerance
            ):
                return known
    return own


def _draw_inputs(
    candidates: Sequence[KnownFunction], device: torch.device | str
) -> tuple[Tensor, ...]:
    """Return gate and up (1, pairs of values) in fp64; up (1, values) alone without a gate."""
    far = [20.0, 50.0, 200.0, 1e3, 1e5]
    near = torch.linspace(-12, 12, 32, dtype=torch.float64, device="cpu").tolist()
    limits = {known.limit for known in candidates if isinstance(known, KnownGate)} - {math.inf}
    values = [*near, *far, *limits, *(-x for x in (*far, *limits))]
    grid = torch.tensor(values, dtype=torch.float64, device=device)
    if isinstance(candidates[0], KnownActivation):
        return (grid.unsqueeze(0).requires_grad_(),)
    pairs = torch.meshgrid(grid, grid, indexing="ij")
    return tuple(side.reshape(1, -1).requires_grad_() for side in pairs)


def _sample(function: Gate, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the values of an elementwise function, and its derivatives where it has them all."""
    values = function(*inputs)
    if not values.requires_grad:
        return [values]
    grads = torch.autograd.grad(values, inputs, torch.ones_like(values), materialize_grads=True)
    return [values.detach(), *grads]


def _are_close(seen: list[Tensor], wanted: list[Tensor], tolerance: float) -> bool:
    return len(seen) == len(wanted) and all(
        ours.dtype == theirs.dtype and torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)
        for ours, theirs in zip(seen, wanted, strict=True)
    )
