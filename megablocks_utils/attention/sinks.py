"""What all kernels share: heads of one size, and attention sinks.

An attention sink is a logit that takes part in a head's softmax and has no value. With the log sum
of the other logits, which kernels return, it is a factor of the output; the kernels' own backward
pass is right with it if output and log sum hold it.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["add_sinks", "sinks_gradient", "widen"]


def widen(tensor: Tensor, width: int) -> Tensor:
    """Return a tensor with zeros at the end of its last dim: kernels want heads of one size."""
    return pad(tensor, (0, width - tensor.shape[-1])) if tensor.shape[-1] < width else tensor


def add_sinks(output: Tensor, log_sum: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Let sinks (heads,) take their share of output (N, heads, size) and log sum (heads, N)."""
    if sinks is None:
        return output, log_sum
    total = torch.logaddexp(log_sum, sinks.to(log_sum.dtype)[:, None])
    share = (log_sum - total).exp().T[..., None]
    return (output * share).to(output.dtype), total


def sinks_gradient(
    sinks: Tensor | None, grad_output: Tensor, output: Tensor, log_sum: Tensor
) -> Tensor | None:
    """Return the gradient of sinks: what their growth takes from the outputs."""
    if sinks is None:
        return None
    towards = (grad_output.to(log_sum.dtype) * output.to(log_sum.dtype)).sum(-1)
    share = (sinks.to(log_sum.dtype) - log_sum.T).exp()
    return -(share * towards).sum(0).to(sinks.dtype)
