"""Compute attention within blocks of tokens: exactly, and with no mask of all by all.

On CUDA torch's kernel for rows of any length takes all blocks at once; where it does not serve
(fp32, an old device, a wide head), and on a CPU, there is one causal call for each block.

An attention sink is a logit that takes part in a head's softmax and has no value. With the log sum
of the other logits, which kernels return, it is a factor of the output; the kernels' own backward
pass is right with it if output and log sum hold it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.attention.varlen import AuxRequest, varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention

from megablocks_utils.attention.causal_blocks import CausalBlocks, Piece

__all__ = ["attend", "serves_flash"]

_aten = torch.ops.aten
_MULTIPLE, _WIDEST = 8, 256
"""Of the size of a head, as flash attention takes it."""
_FLASH_CAPABILITY = (8, 0)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: CausalBlocks,
    *,
    scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute softmax(scale * query key^T) value within blocks.

    B rows of T tokens; heads of queries are a multiple of those of keys.

    Args:
        query: (B, heads, T, size)
        key: (B, key heads, T, size)
        value: (B, key heads, T, value size)
        blocks: of all B * T tokens.
        scale: of the logits; None: 1 / sqrt(size).
        sinks: (heads,) logit of each head's sink; None without.

    Returns:
        (B, T, heads, value size)
    """
    num_rows, _, num_tokens, size = query.shape
    scale = size**-0.5 if scale is None else scale
    query, key, value = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    if serves_flash(query, value):
        output = _attend_flash(query, key, value, blocks, scale, sinks)
    elif query.device.type == "cpu":
        output = _PieceAttention.apply(query, key, value, sinks, blocks, scale)
    else:
        output = _attend_plainly(query, key, value, blocks, scale, sinks)
    return output.unflatten(0, (num_rows, num_tokens))


def serves_flash(query: Tensor, value: Tensor) -> bool:
    """Say whether torch's kernel for rows of any length takes these tensors."""
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    is_new = torch.cuda.get_device_capability(query.device) >= _FLASH_CAPABILITY
    return is_new and max(query.shape[-1], value.shape[-1]) <= _WIDEST


def _widen(tensor: Tensor, width: int) -> Tensor:
    """Return a tensor with zeros at the end of its last dim: kernels want heads of one size."""
    return pad(tensor, (0, width - tensor.shape[-1])) if tensor.shape[-1] < width else tensor


def _add_sinks(output: Tensor, log_sum: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Let sinks (heads,) take their share of output (N, heads, size) and log sum (heads, N)."""
    if sinks is None:
        return output, log_sum
    total = torch.logaddexp(log_sum, sinks.to(log_sum.dtype)[:, None])
    share = (log_sum - total).exp().T[..., None]
    return (output * share).to(output.dtype), total


def _sinks_gradient(
    sinks: Tensor | None, grad_output: Tensor, output: Tensor, log_sum: Tensor
) -> Tensor | None:
    """Return the gradient of sinks: what their growth takes from the outputs."""
    if sinks is None:
        return None
    towards = (grad_output.to(log_sum.dtype) * output.to(log_sum.dtype)).sum(-1)
    share = (sinks.to(log_sum.dtype) - log_sum.T).exp()
    return -(share * towards).sum(0).to(sinks.dtype)


class _PieceAttention(torch.autograd.Function):
    """Attention on a CPU: a call of torch's flash attention for each piece, into one output."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        blocks: CausalBlocks,
        scale: float,
    ) -> Tensor:
        output = query.new_empty((*query.shape[:2], value.shape[-1]))
        wide = torch.promote_types(query.dtype, torch.float32)
        log_sum = query.new_empty((query.shape[1], query.shape[0]), dtype=wide)
        for piece in blocks.pieces(query.dtype):
            taken = _take(piece, query, key, value)
            found = _aten._scaled_dot_product_flash_attention_for_cpu(
                *taken, 0.0, piece.mask is None, attn_mask=piece.mask, scale=scale
            )
            output[piece.queries] = found[0][0].transpose(0, 1)[..., : value.shape[-1]]
            log_sum[:, piece.queries] = found[1][0]
        output, log_sum = _add_sinks(output, log_sum, sinks)
        ctx.save_for_backward(query, key, value, sinks, output, log_sum)
        ctx.blocks, ctx.scale = blocks, scale  # type: ignore[attr-defined]  # a context holds any
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, output, log_sum = ctx.saved_tensors
        grad_output, width = grad_outputs[0], max(query.shape[-1], value.shape[-1])
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        for piece in ctx.blocks.pieces(query.dtype):
            found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _heads_first(_widen(grad_output[piece.queries], width)),
                *_take(piece, query, key, value),
                _heads_first(_widen(output[piece.queries], width)),
                log_sum[None, :, piece.queries].contiguous(),
                0.0,
                piece.mask is None,
                attn_mask=piece.mask,
                scale=ctx.scale,
            )
            parts = [part[0].transpose(0, 1) for part in found]
            grad_query[piece.queries] = parts[0][..., : query.shape[-1]]
            grad_key[piece.keys] += parts[1][..., : key.shape[-1]]
            grad_value[piece.keys] += parts[2][..., : value.shape[-1]]
        grad_sinks = _sinks_gradient(sinks, grad_output, output, log_sum)
        return grad_query, grad_key, grad_value, grad_sinks, None, None


_Three = tuple[Tensor, Tensor, Tensor]


def _take(piece: Piece, query: Tensor, key: Tensor, value: Tensor) -> _Three:
    """Return what a piece is computed from, as (1, heads, N, size) with heads of one size."""
    width = max(query.shape[-1], value.shape[-1])
    return (
        _heads_first(_widen(query[piece.queries], width)),
        _heads_first(_widen(key[piece.keys], width)),
        _heads_first(_widen(value[piece.keys], width)),
    )


def _heads_first(tokens: Tensor) -> Tensor:
    """Return (N, heads, size) as (1, heads, N, size)."""
    return tokens.transpose(0, 1)[None]


def _attend_plainly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: CausalBlocks,
    scale: float,
    sinks: Tensor | None,
) -> Tensor:
    """Attend piece by piece with what torch has on every device."""
    num_groups = query.shape[1] // key.shape[1]
    found = []
    for piece in blocks.pieces(query.dtype):
        queries, keys, values = _take(piece, query, key, value)
        keys = keys.repeat_interleave(num_groups, dim=1)
        values = values.repeat_interleave(num_groups, dim=1)
        if sinks is None:
            output = scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=piece.mask,
                is_causal=piece.mask is None,
                scale=scale,
            )
        else:
            output = _softmax_with_sinks(queries, keys, values, piece.mask, scale, sinks)
        found.append(output[0].transpose(0, 1)[..., : value.shape[-1]])
    return torch.cat(found)


def _softmax_with_sinks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    sinks: Tensor,
) -> Tensor:
    """Compute attention by its formula; the logits of all heads are there at once."""
    logits = query @ key.transpose(-1, -2) * scale
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if mask is None:
        above = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(above, float("-inf"))
    else:
        logits = logits + mask
    sink = sinks.to(logits.dtype)[None, :, None, None].expand(*logits.shape[:-1], 1)
    share = torch.cat((logits, sink), dim=-1).softmax(-1)[..., :-1]
    return share.to(value.dtype) @ value


class _FlashArguments(NamedTuple):
    """What torch's kernel takes beside queries, keys and values."""

    starts: Tensor
    longest: int
    window: tuple[int, int]
    scale: float


def _attend_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: CausalBlocks,
    scale: float,
    sinks: Tensor | None,
) -> Tensor:
    window = -1 if blocks.window is None else blocks.window - 1
    arguments = _FlashArguments(blocks.starts_on_device, blocks.longest, (window, 0), scale)
    value_size = value.shape[-1]
    width = -(-max(query.shape[-1], value_size) // _MULTIPLE) * _MULTIPLE
    query, key, value = (_widen(tensor, width) for tensor in (query, key, value))
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
        ctx: FunctionCtx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor,
        arguments: _FlashArguments,
    ) -> Tensor:
        output, log_sum = _add_sinks(*_call_flash(query, key, value, arguments), sinks)
        ctx.save_for_backward(query, key, value, sinks, output, log_sum)
        ctx.arguments = arguments  # type: ignore[attr-defined]  # a context holds any
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
        grad_sinks = _sinks_gradient(sinks, grad_outputs[0], output, log_sum)
        return (*grads, grad_sinks, None)
