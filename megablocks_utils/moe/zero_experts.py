"""Zero experts: numbers behind the last expert that return a token as it is, weighted."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RoutedTokens", "split_zero_experts"]


@dataclass(frozen=True)
class RoutedTokens:
    """What goes to experts, and what stays at home.

    Attributes:
        index: (T, K) experts, each below E.
        weights: (T, K), zero where a slot stays at home.
        kept: (T, 1) sum of the weights of each token's zero experts.
    """

    index: Tensor
    weights: Tensor
    kept: Tensor


def split_zero_experts(
    top_k_index: Tensor, top_k_weights: Tensor, num_experts: int
) -> RoutedTokens:
    """Take the zero experts out of a routing, without reading anything back to the host.

    Their slots go to all experts in turn with weight zero, so that none gets more than others.

    Args:
        top_k_index: (T, K); from E on they are zero experts.
        top_k_weights: (T, K).
        num_experts: E.
    """
    is_zero = top_k_index >= num_experts
    slots = torch.arange(top_k_index.numel(), device=top_k_index.device).view_as(top_k_index)
    return RoutedTokens(
        torch.where(is_zero, slots % num_experts, top_k_index),
        top_k_weights.masked_fill(is_zero, 0.0),
        (top_k_weights * is_zero).sum(dim=-1, keepdim=True),
    )
