"""The output head and the cross entropy as one operation that never holds all logits.

Forward goes through blocks of rows and takes the hidden states' gradient with it. Backward goes
through blocks of the vocabulary, if the head is trained: each row of its gradient is written once,
rounded as often as without blocks. A head that is not trained costs nothing more than all logits
at once; one that is, one product of four more.

torch's own (2.13) returns the sum in the dtype of the hidden states and has no cap; Liger's also
rounds the head's gradient in every block, or holds it in fp32.

Legend: P rows, H hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from megablocks_utils.planning.memory.loss_blocks import block_length

__all__ = ["LogitsMap", "linear_cross_entropy", "takes_blocks"]


@dataclass(frozen=True)
class LogitsMap:
    """What a model does to what its output head returns: ``cap * tanh(scale * x / cap)``.

    Attributes:
        scale: factor.
        cap: what the results stay below; None: the factor is all.
        num_tokens: first columns that are kept; None: all.
    """

    scale: float = 1.0
    cap: float | None = None
    num_tokens: int | None = None

    def apply(self, logits: Tensor) -> Tensor:
        """Return the results in fp32, or in fp64 of fp64; may change what it is given."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.cap is not None:
            return logits.mul_(self.scale / self.cap).tanh_().mul_(self.cap)
        return logits if self.scale == 1.0 else logits.mul_(self.scale)

    def slopes(self, results: Tensor) -> Tensor | None:
        """Return the derivative at these results without `scale`; None where it is 1."""
        if self.cap is None:
            return None
        return (results / self.cap).square_().neg_().add_(1.0)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, logits_map: LogitsMap
) -> tuple[Tensor, Tensor]:
    """Return the sum of the cross entropies of ``logits_map(hidden @ weight.T + bias)``.

    Sums are in fp32. Without rows it is a zero that can still be differentiated.

    Args:
        hidden: (P, H).
        weight: (V, H), in the dtype of `hidden`.
        bias: (V,) or None.
        targets: (P,) tokens.
        logits_map: what the model does to the logits.

    Returns:
        The sum, a scalar, and (1, 0, V) logits of no row. Whatever a model makes of the latter
        comes before this operation in backward, like all that is made of real logits.
    """
    if logits_map.num_tokens is not None:
        weight = weight[: logits_map.num_tokens]
        bias = None if bias is None else bias[: logits_map.num_tokens]
    loss_sum, no_logits = _LinearCrossEntropy.apply(
        hidden, weight, bias, targets, logits_map, torch.is_grad_enabled()
    )
    return loss_sum, no_logits


def takes_blocks(head: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Say whether a head computes what `nn.Linear` does; FSDP2 gives its class another name."""
    return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward


class _Context(FunctionCtx):
    """What forward keeps for backward."""

    logits_map: LogitsMap
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        logits_map: LogitsMap,
        has_backward: bool,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, *needs_head = (needed and has_backward for needed in ctx.needs_input_grad[:3])
        ctx.set_materialize_grads(False)
        sum_dtype = torch.promote_types(hidden.dtype, torch.float32)
        chosen = torch.empty(len(targets), dtype=sum_dtype, device=hidden.device)
        losses = torch.empty_like(chosen)
        grad_hidden = torch.empty_like(hidden if needs_hidden else hidden[:0])
        for rows in _blocks(len(targets), len(weight)):
            index = targets[rows, None]
            logits = logits_map.apply(F.linear(hidden[rows], weight, bias))
            chosen[rows] = logits.gather(1, index)[:, 0]
            slopes = logits_map.slopes(logits) if needs_hidden else None
            logits = logits.log_softmax(-1)
            losses[rows] = -logits.gather(1, index)[:, 0]
            if needs_hidden:
                grads = logits.exp_().scatter_add_(1, index, -torch.ones_like(logits[:, :1]))
                if slopes is not None:
                    grads.mul_(slopes)
                torch.mm(grads.to(weight.dtype), weight, out=grad_hidden[rows])
                del grads
            del logits, slopes
        ctx.logits_map = logits_map
        head = (hidden, weight, targets, chosen + losses) if any(needs_head) else ()
        ctx.save_for_backward(grad_hidden, *head, *([] if bias is None else [bias]))
        return losses.sum(), hidden.new_empty((1, 0, len(weight)))

    @staticmethod
    @once_differentiable
    def backward(
        ctx: _Context, grad_loss: Tensor | None, _no_grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 6
        factor = grad_loss * ctx.logits_map.scale
        # Not on the context itself: that would outlive the pass.
        grad_hidden, *head = ctx.saved_tensors
        scaled = grad_hidden * factor if ctx.needs_input_grad[0] else None
        grad_weight = grad_bias = None
        if any(ctx.needs_input_grad[1:3]):
            grad_weight, grad_bias = _head_gradients(head, ctx.logits_map, factor)
        return scaled, grad_weight, grad_bias, None, None, None


def _head_gradients(
    head: Sequence[Tensor], logits_map: LogitsMap, factor: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of weight and bias, times a factor, by blocks of the vocabulary."""
    hidden, weight, targets, log_sums, *biases = head
    bias = biases[0] if biases else None
    grad_weight = torch.empty_like(weight)
    grad_bias = None if bias is None else torch.empty_like(bias)
    for columns in _blocks(len(weight), len(targets)):
        part = weight[columns]
        logits = logits_map.apply(F.linear(hidden, part, None if bias is None else bias[columns]))
        slopes = logits_map.slopes(logits)
        grads = logits.sub_(log_sums[:, None]).exp_()
        # A target elsewhere takes nothing from where it is put: no shape depends on values.
        index = targets - columns.start
        is_here = (index >= 0) & (index < len(part))
        index = index.clamp_(0, len(part) - 1)
        grads.scatter_add_(1, index[:, None], -is_here.to(grads.dtype)[:, None])
        if slopes is not None:
            grads.mul_(slopes)
        if grad_bias is not None:
            grad_bias[columns] = grads.sum(0) * factor
        scaled = torch.mul(grads, factor, out=torch.empty_like(grads, dtype=weight.dtype))
        torch.mm(scaled.t(), hidden, out=grad_weight[columns])
        del logits, slopes, grads, scaled
    return grad_weight, grad_bias


def _blocks(length: int, width: int) -> Iterator[slice]:
    """Yield the slices of the blocks that `length` is cut into."""
    step = block_length(length, width)
    return (slice(start, start + step) for start in range(0, length, max(1, step)))
