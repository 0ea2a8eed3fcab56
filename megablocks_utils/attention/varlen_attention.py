"""Compute attention within blocks of tokens: exactly, and with no mask of all by all.

On CUDA torch's kernel for rows of any length takes all blocks at once; where it does not serve
(fp32, an old device, a wide head), and on a CPU, there is one causal call for each block.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megablocks_utils.attention.causal_blocks import CausalBlocks, Piece
from megablocks_utils.attention.flash_varlen import attend_flash, serves_flash
from megablocks_utils.attention.sinks import add_sinks, sinks_gradient, widen

__all__ = ["attend", "find_flash_fault"]

_FLASH_ERROR = 3e-2
"""Relative: bf16 against fp32."""

_aten = torch.ops.aten


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
        output = attend_flash(query, key, value, blocks, scale, sinks)
    elif query.device.type == "cpu":
        output = _PieceAttention.apply(query, key, value, sinks, blocks, scale)
    else:
        output = _attend_plainly(query, key, value, blocks, scale, sinks)
    return output.unflatten(0, (num_rows, num_tokens))


def find_flash_fault(device: torch.device) -> str:
    """Return what is wrong with torch's CUDA kernel on this device; empty where it is not used.

    Values and gradients, with windows, sinks and groups of heads, are compared with fp32.
    """
    sample = torch.empty((1, 1, 1, 64), dtype=torch.bfloat16, device=device)
    if not serves_flash(sample, sample):
        return ""
    generator = torch.Generator().manual_seed(0)
    heads = (4, 2, 2)
    rows = [torch.randn((128, n, 64), generator=generator).to(sample) for n in heads]
    sinks = torch.randn(4, generator=generator).to(device)
    for window in (None, 16):
        blocks = CausalBlocks((5, 90, 33), window, device)
        for sink in (None, sinks):
            flash = _values_and_gradients(attend_flash, rows, blocks, sink)
            wide = [row.float() for row in rows]
            plain = _values_and_gradients(_attend_plainly, wide, blocks, sink)
            pairs = zip(flash, plain, strict=True)
            error = max(float((a.float() - b).norm() / b.norm()) for a, b in pairs)
            if not error < _FLASH_ERROR:
                return f"torch's kernel differs by {error:.1e} on this device"
    return ""


def _values_and_gradients(
    function: Callable[..., Tensor],
    rows: Sequence[Tensor],
    blocks: CausalBlocks,
    sinks: Tensor | None,
) -> list[Tensor]:
    inputs = [row.detach().clone().requires_grad_() for row in rows]
    leaves = inputs
    if sinks is not None:
        sinks = sinks.detach().clone().requires_grad_()
        leaves = [*inputs, sinks]
    output = function(*inputs, blocks, 0.125, sinks)
    return [output.detach(), *torch.autograd.grad(output.sum(), leaves)]


class _PieceAttention(torch.autograd.Function):
    """Attention on a CPU: a call of torch's flash attention for each piece, into one output."""

    @staticmethod
    def forward(
        ctx: Any,
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
        output, log_sum = add_sinks(output, log_sum, sinks)
        ctx.save_for_backward(query, key, value, sinks, output, log_sum)
        ctx.blocks, ctx.scale = blocks, scale
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, output, log_sum = ctx.saved_tensors
        grad_output, width = grad_outputs[0], max(query.shape[-1], value.shape[-1])
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        for piece in ctx.blocks.pieces(query.dtype):
            found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _heads_first(widen(grad_output[piece.queries], width)),
                *_take(piece, query, key, value),
                _heads_first(widen(output[piece.queries], width)),
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
        grad_sinks = sinks_gradient(sinks, grad_output, output, log_sum)
        return grad_query, grad_key, grad_value, grad_sinks, None, None


_Three = tuple[Tensor, Tensor, Tensor]


def _take(piece: Piece, query: Tensor, key: Tensor, value: Tensor) -> _Three:
    """Return what a piece is computed from, as (1, heads, N, size) with heads of one size."""
    width = max(query.shape[-1], value.shape[-1])
    return (
        _heads_first(widen(query[piece.queries], width)),
        _heads_first(widen(key[piece.keys], width)),
        _heads_first(widen(value[piece.keys], width)),
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
