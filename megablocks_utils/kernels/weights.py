"""What a backend computes with: the weights of this rank's experts, as they are stored."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from megablocks_utils.kernels.gate import Gate


@dataclass(frozen=True)
class LowRank:
    """Add `scaling * lora_b[e] @ lora_a[e]` to the weight of each local expert e of a projection.

    No backend computes that product: rows pass the two factors one after the other.

    Attributes:
        lora_a: (L, r, in).
        lora_b: (L, out, r).
        scaling: lora_alpha / r.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> "LowRank":
        """Return the same adapter with both factors changed."""
        return replace(self, lora_a=change(self.lora_a), lora_b=change(self.lora_b))


@dataclass(frozen=True)
class ExpertWeights:
    """The L experts of a rank, in the dtype of compute; what needs a gradient may be any of them.

    The first projection has F outputs: 2 * I with a gate, I without.

    Attributes:
        gate_up_proj: (L, F, H); (L, H, F) where `is_transposed`.
        down_proj: (L, H, I); (L, I, H) where `is_transposed`.
        gate: makes (R, I) of gate and up, (R, I) each; of up alone without a gate.
        gate_up_lora: adapter of the first projection, in the order of its outputs; or None.
        down_lora: adapter of the second; or None.
        gate_up_bias: (L, F) or None.
        down_bias: (L, H) or None.
        is_transposed: whether the weights are stored (in, out), as GPT-OSS does.
        is_interleaved: whether outputs of the first projection are gate, up, gate, up, ... instead
            of all gates, then all ups.
        has_gate: whether the first projection has a gate beside up.
    """

    gate_up_proj: Tensor
    down_proj: Tensor
    gate: Gate
    gate_up_lora: LowRank | None = None
    down_lora: LowRank | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    is_transposed: bool = False
    is_interleaved: bool = False
    has_gate: bool = True

    @property
    def first_projection(self) -> str:
        """The first projection's name, as transformers has it."""
        return "gate_up_proj" if self.has_gate else "up_proj"

    @property
    def projections(self) -> tuple[Tensor, Tensor]:
        """Both weights as (L, out, in), whatever way they are stored."""
        if self.is_transposed:
            return self.gate_up_proj.transpose(1, 2), self.down_proj.transpose(1, 2)
        return self.gate_up_proj, self.down_proj

    @property
    def has_adapters(self) -> bool:
        """Whether a projection has an adapter."""
        return self.gate_up_lora is not None or self.down_lora is not None

    @property
    def has_biases(self) -> bool:
        """Whether a projection has a bias."""
        return self.gate_up_bias is not None or self.down_bias is not None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything that may have a gradient, by the name a person would call it."""
        first = self.first_projection
        named = {
            first: self.gate_up_proj,
            "down_proj": self.down_proj,
            f"{first}_bias": self.gate_up_bias,
            "down_proj_bias": self.down_bias,
        }
        for name, lora in ((first, self.gate_up_lora), ("down_proj", self.down_lora)):
            if lora is not None:
                named |= {f"{name}.lora_A": lora.lora_a, f"{name}.lora_B": lora.lora_b}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> "ExpertWeights":
        """Return the same experts with each of `tensors` changed."""
        return replace(
            self,
            gate_up_proj=change(self.gate_up_proj),
            down_proj=change(self.down_proj),
            gate_up_lora=self.gate_up_lora and self.gate_up_lora.map_tensors(change),
            down_lora=self.down_lora and self.down_lora.map_tensors(change),
            gate_up_bias=None if self.gate_up_bias is None else change(self.gate_up_bias),
            down_bias=None if self.down_bias is None else change(self.down_bias),
        )

    def apply_gate(self, gate_up: Tensor) -> Tensor:
        """Apply the gate to outputs (R, F) of the first projection: (R, I)."""
        if not self.has_gate:
            return self.gate(gate_up)
        if self.is_interleaved:
            return self.gate(gate_up[..., ::2], gate_up[..., 1::2])
        return self.gate(*gate_up.chunk(2, dim=-1))
