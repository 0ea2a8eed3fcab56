"""`varlen` as an attention implementation of transformers.

The mask of a model becomes `CausalBlocks`, from the lengths of the examples that `example_lengths`
has told, and travels to the layers, and to their recomputation, where a mask would. Where nothing
is told, each row is one example; what cannot be said in blocks then is a mask as for `sdpa`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from megablocks_utils.attention.causal_blocks import CausalBlocks
from megablocks_utils.attention.mask_pattern import MaskPattern, read_pattern
from megablocks_utils.attention.varlen_attention import attend

__all__ = ["VARLEN", "example_lengths", "register_varlen"]

VARLEN = "varlen"
_SERVED = frozenset(
    ("s_aux", "sliding_window", "is_causal", "position_ids", "seq_idx", "logits_to_keep")
    + ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "use_cache")
    + ("output_attentions", "output_hidden_states", "output_router_logits", "return_dict")
)
"""What attention functions are told that is in the blocks already, or changes nothing here."""
_ROWS: ContextVar[tuple[tuple[int, ...], ...] | None] = ContextVar("rows", default=None)


def register_varlen() -> None:
    """Make `varlen` a name that transformers knows."""
    AttentionInterface.register(VARLEN, _varlen_attention)
    AttentionMaskInterface.register(VARLEN, _varlen_mask)


@contextmanager
def example_lengths(rows: Iterable[Sequence[int]]) -> Iterator[None]:
    """Tell the examples of a batch to the masks that are made while entered.

    Args:
        rows: of each row, the tokens of its examples; padding counts as one more.
    """
    token = _ROWS.set(tuple(tuple(row) for row in rows))
    try:
        yield
    finally:
        _ROWS.reset(token)


def _varlen_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> CausalBlocks | Tensor | None:
    """Return the blocks of a batch, or, outside `example_lengths`, a mask where there are none."""
    pattern, rows = read_pattern(mask_function), _ROWS.get()
    if rows is None:
        _refuse_recomputation()
        has_whole_rows = (
            attention_mask is None
            and pattern is not None
            and not pattern.is_packed
            and q_length == kv_length
        )
        if not has_whole_rows:
            return sdpa_mask(
                batch_size=batch_size,
                q_length=q_length,
                kv_length=kv_length,
                q_offset=q_offset,
                kv_offset=kv_offset,
                mask_function=mask_function,
                attention_mask=attention_mask,
                device=device,
                **kwargs,
            )
        rows = ((q_length,),) * batch_size
    if pattern is None:
        raise ValueError("the mask is not a causal one, with a window or chunks at most")
    if [sum(row) for row in rows] != [q_length] * batch_size or q_length != kv_length:
        raise ValueError(f"the mask is of {batch_size} x {q_length} x {kv_length}, not of the rows")
    return CausalBlocks(_cut(rows, pattern), pattern.window, torch.device(device))


def _cut(rows: tuple[tuple[int, ...], ...], pattern: MaskPattern) -> list[int]:
    """Return the lengths of all examples, cut into chunks where tokens see only their own."""
    lengths = [length for row in rows for length in row]
    if pattern.chunk is None:
        return lengths
    whole, chunk = (divmod(length, pattern.chunk) for length in lengths), pattern.chunk
    return [part for n, rest in whole for part in [chunk] * n + [rest] * (rest > 0)]


def _refuse_recomputation() -> None:
    """Refuse to make a mask in a backward pass, where nobody tells the examples any more."""
    if torch._C._current_graph_task_id() != -1:
        raise ValueError("the mask is made inside a layer that is recomputed")


def _refuse_unknown(told: Mapping[str, Any]) -> None:
    """Refuse an attention that is told more than which tokens see which: sparse, capped, biased."""
    names = (name for name, value in told.items() if value is not None and value is not False)
    unknown = sorted(set(names) - _SERVED)
    if unknown:
        raise ValueError(f"the attention has {unknown[0]}, which varlen does not know")


def _varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: CausalBlocks | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute what transformers' attention functions do."""
    sinks = kwargs.get("s_aux")
    if isinstance(attention_mask, CausalBlocks):
        _refuse_unknown(kwargs)
        if dropout:
            raise ValueError(f"the attention drops out {dropout:g} of its weights")
        if key.shape[2] != query.shape[2]:
            raise ValueError("the attention has keys beside those of the row's tokens")
        output = attend(query, key, value, attention_mask, scale=scaling, sinks=sinks)
        return output, None
    if sinks is not None:
        raise ValueError("the attention has sinks, but no blocks of tokens")
    if _ROWS.get() is not None and attention_mask is None:
        raise ValueError("the attention has no mask")
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )
