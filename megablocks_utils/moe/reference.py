"""The slow, obvious experts layer that every fast or parallel path is compared with."""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import linear

from megablocks_utils.kernels.weights import ExpertWeights


def experts_reference(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    experts: ExpertWeights,
    *,
    post_norm: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> Tensor:
    """Compute every expert on every token and weight the results; no sorting, no skipping.

    Args:
        hidden_states: (T, H).
        top_k_index: (T, K) experts of each token; numbers from E on return the token itself.
        top_k_weights: (T, K).
        experts: all E of them, without adapters.
        post_norm: of each expert's results.

    Returns:
        (T, H).
    """
    first, second = experts.projections
    biases = experts.gate_up_bias, experts.down_bias
    output = hidden_states.new_zeros(hidden_states.shape)
    for expert in range(len(first)):
        first_bias, second_bias = (None if bias is None else bias[expert] for bias in biases)
        activations = experts.apply_gate(linear(hidden_states, first[expert], first_bias))
        result = post_norm(linear(activations, second[expert], second_bias))
        weight = (top_k_weights * (top_k_index == expert)).sum(dim=1, keepdim=True)
        output = output + weight * result
    kept = (top_k_weights * (top_k_index >= len(first))).sum(dim=1, keepdim=True)
    return output + kept * hidden_states
