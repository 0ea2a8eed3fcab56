"""What decides which backends can run, and which measurement of them counts."""

from dataclasses import dataclass

import torch

from megablocks_utils.config.adapter import EXPERT_MODE_OF
from megablocks_utils.kernels.gate import SWIGLU, Clamp, Gate, KnownActivation, KnownGate

__all__ = ["EXPERT_MODES", "ExpertShapes", "find_dtype", "name_dtype"]

EXPERT_MODES = tuple(dict.fromkeys(EXPERT_MODE_OF.values()))
"""Which expert parameters are trained: all weights, none, or adapters beside frozen weights."""


@dataclass(frozen=True)
class ExpertShapes:
    """Describe the experts of a layer on one rank, and the rows that they get.

    Attributes:
        hidden_size: H.
        intermediate_size: I.
        dtype: of compute.
        device_type: `cpu` or `cuda`.
        mode: one of `EXPERT_MODES`.
        gate: what makes one value of a gate and an up value, or of up alone.
        num_local_experts: L; None where it is not known, and so no measurement can be looked up.
        top_k: K of what the backend is given: 1 where rows come from other ranks; or None.
        num_rows: about how many routed rows there are, N; or None.
        has_gate: whether the first projection has a gate beside up.
        has_bias: whether both projections have a bias.
        is_transposed: whether weights are stored (in, out).
        is_interleaved: whether outputs of the first projection are gate, up, gate, up, ...
        weight_format: what both projections are packed in; None: they are not.
    """

    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype
    device_type: str
    mode: str = "full"
    gate: Gate = SWIGLU
    num_local_experts: int | None = None
    top_k: int | None = None
    num_rows: int | None = None
    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = False
    is_interleaved: bool = False
    weight_format: str | None = None

    @property
    def has_adapters(self) -> bool:
        """Whether a projection has an adapter."""
        return self.mode == "lora"

    @property
    def form(self) -> str:
        """What decides the speed besides sizes: the gate's operations, and how weights lie."""
        gate, words = self.gate, ["own"]
        if isinstance(gate, KnownGate | KnownActivation):
            words = [gate.activation.value]
        if isinstance(gate, KnownGate) and gate.clamp is not Clamp.NONE:
            words.append(f"clamp {gate.clamp}")
        flags = {
            "no gate": not self.has_gate,
            "bias": self.has_bias,
            "transposed": self.is_transposed,
            "interleaved": self.is_interleaved,
            f"in {self.weight_format}": self.weight_format is not None,
        }
        return ", ".join([*words, *(name for name, is_so in flags.items() if is_so)])

    @property
    def counts(self) -> tuple[int, int, int]:
        """L, K and N, where all three are known."""
        assert self.num_local_experts is not None, self
        assert self.top_k is not None and self.num_rows is not None, self
        return self.num_local_experts, self.top_k, self.num_rows


def find_dtype(name: str) -> torch.dtype:
    """Return the dtype that options call by this name, such as bfloat16."""
    return getattr(torch, name)


def name_dtype(dtype: torch.dtype) -> str:
    """Return the name that options have for a dtype."""
    return str(dtype).removeprefix("torch.")
