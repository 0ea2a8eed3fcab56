"""Attention within blocks on torch's CUDA kernel for rows of any length."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from megablocks_utils.attention.causal_blocks import CausalBlocks
from megablocks_utils.attention.sinks import add_sinks, sinks_gradient, widen

__all__ = ["attend_flash", "serves_flash"]

_MULTIPLE, _WIDEST = 8, 256
"""Of the size of a head, as flash attention takes it."""
_FLASH_CAPABILITY = (8, 0)


def serves_flash(query: Tensor, value: Tensor) -> bool:
    """Say whether torch's kernel for rows of any length takes these tensors."""
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    is_new = torch.cuda.get_device_capability(query.device) >= _FLASH_CAPABILITY
    return is_new and max(query.shape[-1], value.shape[-1]) <= _WIDEST


class _FlashArguments(NamedTuple):
    """What torch's kernel takes beside queries, keys and values."""

    starts: Tensor
    longest: int
    window: tuple[int, int]
    scale: float


def attend_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: CausalBlocks,
    scale: float,
    sinks: Tensor | None,
) -> Tensor:
    """Attend as `varlen_attention.attend` does, on (N, heads, size) of all tokens."""
    window = -1 if blocks.window is None else blocks.window - 1
    arguments = _FlashArguments(blocks.starts_on_device, blocks.longest, (window, 0), scale)
    value_size = value.shape[-1]
    width = -(-max(query.shape[-1], value_size) // _MULTIPLE) * _MULTIPLE
    query, key, value = (widen(tensor, width) for tensor in (query, key, value))
    if sinks is None:
        output, _ = _call_flash(query, key, value, arguments)
    else:
        output = _FlashWithSinks.apply(query, key, value, sinks, arguments)
    return output[..., :value_size]


def _call_flash(
    query: Tensor, key: Tensor, value: Tensor, arguments: _FlashArguments
) -> tuple[Tensor, Tensor]:
    starts, longest, window, scale = arguments
    output, log_sum = varlen_attn(
        query,
        key,
        value,
        starts,
        starts,
        longest,
        longest,
        return_aux=AuxRequest(lse=True),
        scale=scale,
        window_size=window,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output, log_sum


class _FlashWithSinks(torch.autograd.Function):
    """torch's kernel for rows of any length, with sinks."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor,
        arguments: _FlashArguments,
    ) -> Tensor:
        output, log_sum = add_sinks(*_call_flash(query, key, value, arguments), sinks)
        ctx.save_for_backward(query, key, value, sinks, output, log_sum)
        ctx.arguments = arguments
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, output, log_sum = ctx.saved_tensors
        starts, longest, window, scale = ctx.arguments
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)
        grads = torch.ops.torch_attn._varlen_attn_backward(
            grad_outputs[0],
            query,
            key,
            value,
            output,
            log_sum,
            starts,
            starts,
            longest,
            longest,
            window == (-1, 0),
            no_dropout,
            scale,
            list(window),
        )
        grad_sinks = sinks_gradient(sinks, grad_outputs[0], output, log_sum)
        return (*grads, grad_sinks, None)
