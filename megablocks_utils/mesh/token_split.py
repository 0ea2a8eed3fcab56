"""Share the work on rows that all ranks of a group hold alike: each rank takes its own part.

Under tensor parallelism the ranks of a tp group hold the same tokens, and each of them the whole
gradient of what they hold. Experts and the loss take a token once: `take` gives this rank its part,
`join` and `total` give all ranks the whole result. In backward each is the other's way round, so
that whole gradients stay whole, and no rank counts a token twice.

Legend: N rows, the same number on all ranks of the group.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed import ProcessGroup

# Of torch 2.13; the other is its name before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

__all__ = ["TokenSplit", "sum_gradient_over"]


@dataclass(frozen=True)
class TokenSplit:
    """Split rows over the ranks of a group, in their order; the last parts may be smaller.

    Attributes:
        group: the ranks that hold the same rows.
        rank: this one's number in it.
        size: of the group.
    """

    group: ProcessGroup
    rank: int
    size: int

    def own_rows(self, num_rows: int) -> slice:
        """Return which of N rows this rank takes."""
        length = self._longest(num_rows)
        first = min(self.rank * length, num_rows)
        return slice(first, min(first + length, num_rows))

    def take(self, rows: Tensor) -> Tensor:
        """Return this rank's part of rows (N, ...).

        **Collective:** in backward, where they have a gradient: an all-gather over the group.
        """
        if not rows.is_floating_point():
            return rows[self.own_rows(len(rows))]
        part = _Take.apply(rows, self)
        assert isinstance(part, Tensor)
        return part

    def join(self, part: Tensor, num_rows: int) -> Tensor:
        """Return all N rows, of which each rank gives its part.

        **Collective:** an all-gather over the group; every rank must call, also without rows.
        """
        rows = _Join.apply(part, num_rows, self)
        assert isinstance(rows, Tensor)
        return rows

    def total(self, value: Tensor) -> Tensor:
        """Return the sum over the ranks of what each has for its own rows.

        **Collective:** an all-reduce over the group.
        """
        result = _Total.apply(value, self.group)
        assert isinstance(result, Tensor)
        return result

    def gather(self, part: Tensor, num_rows: int) -> Tensor:
        """Return all N rows, without a gradient."""
        if num_rows == 0:
            return part
        length = self._longest(num_rows)
        padded = part.new_zeros(length, *part.shape[1:])
        padded[: len(part)] = part
        whole = part.new_empty(self.size * length, *part.shape[1:])
        _all_gather(whole, padded, group=self.group)
        # No view: FSDP's hooks on what a module returns would go if it were changed in place.
        return whole if len(whole) == num_rows else whole[:num_rows].clone()

    def _longest(self, num_rows: int) -> int:
        return -(-num_rows // self.size)


def sum_gradient_over(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Return the tensor; its gradient is the sum of those that the ranks of the group have.

    **Collective:** in backward, an all-reduce over the group.
    """
    if not (torch.is_grad_enabled() and tensor.requires_grad):
        return tensor
    same = _SumGradient.apply(tensor, group)
    assert isinstance(same, Tensor)
    return same


class _Context(FunctionCtx):
    """What forward keeps for backward."""

    split: TokenSplit
    group: ProcessGroup
    num_rows: int


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, rows: Tensor, split: TokenSplit) -> Tensor:
        ctx.split, ctx.num_rows = split, len(rows)
        return rows[split.own_rows(len(rows))].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.split.gather(grad, ctx.num_rows), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, part: Tensor, num_rows: int, split: TokenSplit) -> Tensor:
        ctx.split, ctx.num_rows = split, num_rows
        return split.gather(part, num_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.split.own_rows(ctx.num_rows)].contiguous(), None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, value: Tensor, group: ProcessGroup) -> Tensor:
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
