"""Words for the table: what the experts of a family are."""

from megablocks_utils.kernels.gate import KnownActivation, KnownGate
from megablocks_utils.moe.expert_spec import ExpertSpec

__all__ = ["describe_experts"]


def describe_experts(spec: ExpertSpec) -> str:
    """Say what is special about experts: their gate, and how their weights are stored."""
    words = [_describe_gate(spec)]
    words += ["bias"] * spec.has_bias + ["transposed"] * spec.is_transposed
    words += ["interleaved"] * spec.is_interleaved + ["post-norm"] * spec.has_post_norm
    words += ["zero experts"] * bool(spec.num_zero_experts)
    words += ["weighted before"] * spec.is_weighted_before
    return ", ".join(words)


def _describe_gate(spec: ExpertSpec) -> str:
    gate = spec.gate
    if isinstance(gate, KnownActivation):
        return f"{gate.activation} without gate"
    if not isinstance(gate, KnownGate):
        return "own gate"
    clamp = "" if gate.clamp == "none" else f", clamp {gate.clamp}"
    return f"{gate.activation}{clamp}"
