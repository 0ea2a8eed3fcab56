"""The slow, obvious experts layer that every fast or parallel path is compared with."""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import linear


def experts_reference(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """Compute every expert on every token and weight the results; no sorting, no skipping.

    Args:
        hidden_states: (T, H).
        top_k_index: (T, K) experts of each token.
        top_k_weights: (T, K).
        gate_up_proj: (E, 2 * I, H), gate rows first.
        down_proj: (E, H, I).
        activation: of the gate.

    Returns:
        (T, H).
    """
    output = hidden_states.new_zeros(hidden_states.shape)
    for expert in range(gate_up_proj.shape[0]):
        gate, up = linear(hidden_states, gate_up_proj[expert]).chunk(2, dim=-1)
        result = linear(activation(gate) * up, down_proj[expert])
        weight = (top_k_weights * (top_k_index == expert)).sum(dim=1, keepdim=True)
        output = output + weight * result
    return output
