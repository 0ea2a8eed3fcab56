"""Sequence parallelism as an attention implementation of transformers, around any other one.

Each rank runs the model on its part of every row. Attention alone sees whole rows: `ulysses`
exchanges tokens for heads, calls the implementation that it is set around, and exchanges back. What
that one needs of the whole rows travels to the layers, and to their recomputation, in the place of
the mask.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    causal_mask_function,
    chunked_causal_mask_function,
    packed_sequence_compatibility_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megablocks_utils.attention.mask_pattern import MaskPattern, read_pattern
from megablocks_utils.mesh.sequence_exchange import (
    SequenceGroup,
    count_repeats,
    heads_to_tokens,
    tokens_to_heads,
)

__all__ = ["ULYSSES", "RowMask", "WholeRows", "current_rows", "register_ulysses", "whole_rows"]

ULYSSES = "ulysses"
_OF_ROWS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""What attention functions are told of whole rows already."""
_SINKS = "s_aux"


@dataclass(frozen=True)
class WholeRows:
    """Rows of which each rank of a group has a part.

    Attributes:
        position_ids: (B, T) of all tokens.
        attention_mask: (B, T) 0 where padded; None without padding.
        example_numbers: (B, T) which example of its row a token is of; None where each row is one.
    """

    position_ids: Tensor
    attention_mask: Tensor | None = None
    example_numbers: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of a row."""
        return self.position_ids.shape[1]


class RowMask:
    """The mask of whole rows, which stands where transformers has that of the tokens here.

    FSDP1 and Accelerate look into dataclasses and tensors on their way to a layer, and leave this
    as it is.

    Args:
        mask: what the implementation takes that attention is computed by.
        rows: what it is of.
    """

    def __init__(self, mask: object, rows: WholeRows) -> None:
        self.mask = mask
        self.rows = rows


_ROWS: ContextVar[WholeRows | None] = ContextVar("whole_rows", default=None)


@contextmanager
def whole_rows(rows: WholeRows) -> Iterator[None]:
    """Tell the whole rows of a batch to the masks that are made while entered."""
    token = _ROWS.set(rows)
    try:
        yield
    finally:
        _ROWS.reset(token)


def current_rows() -> WholeRows | None:
    """Return the rows of the forward pass that runs here; None where every rank has its own.

    Raises:
        ValueError: a layer is recomputed, where nobody tells the rows any more.
    """
    if _ROWS.get() is None and torch._C._current_graph_task_id() != -1:
        raise ValueError("what depends on whole rows is made inside a layer that is recomputed")
    return _ROWS.get()


def register_ulysses(inner: str, group: SequenceGroup | None) -> None:
    """Make `ulysses` a name that transformers knows.

    Args:
        inner: the implementation that computes attention.
        group: the ranks that share rows; None for a trial in one process, in which each token
            attends to itself alone, so that what else mixes tokens is seen.
    """

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: object,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        tensors = (query, key, value)
        return _attend(_Inner(inner, module), group, tensors, attention_mask, kwargs), None

    AttentionInterface.register(ULYSSES, attend)
    AttentionMaskInterface.register(ULYSSES, _MaskMaker(inner))


class _MaskMaker:
    """Makes masks of whole rows, as the implementation takes them that computes attention."""

    def __init__(self, inner: str) -> None:
        self._inner = inner

    def __call__(
        self, *, mask_function: Callable[..., Any] = causal_mask_function, **told: Any
    ) -> object:
        """Return the mask; where ranks share rows, only which keys a query sees is taken from it.

        Outside `whole_rows` every rank has all tokens, and it is the implementation's own.
        """
        rows = current_rows()
        if rows is None:
            return self._make(mask_function=mask_function, **told)
        pattern = read_pattern(mask_function)
        if pattern is None:
            raise ValueError("the mask is not a causal one, with a window or chunks at most")
        padding = rows.attention_mask
        whole: dict[str, Any] = {
            "mask_function": _whole_function(pattern, rows),
            "q_length": rows.num_tokens,
            "kv_length": rows.num_tokens,
            "attention_mask": None if padding is None else padding.bool(),
            "allow_is_causal_skip": rows.example_numbers is None,
        }
        return RowMask(self._make(**told | whole), rows)

    def _make(self, **told: Any) -> object:
        if self._inner not in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
            return None
        return ALL_MASK_ATTENTION_FUNCTIONS[self._inner](**told)


def _whole_function(pattern: MaskPattern, rows: WholeRows) -> Callable[..., Any]:
    """Return the mask function of whole rows."""
    function = causal_mask_function
    if pattern.window is not None:
        function = sliding_window_causal_mask_function(pattern.window)
    elif pattern.chunk is not None:
        no_padding = rows.position_ids.new_zeros(len(rows.position_ids))
        function = chunked_causal_mask_function(pattern.chunk, no_padding)
    if rows.example_numbers is None:
        return function
    return packed_sequence_compatibility_function(function, rows.position_ids, rows.example_numbers)


_Three = tuple[Tensor, Tensor, Tensor]


def _attend(
    inner: "_Inner",
    group: SequenceGroup | None,
    tensors: _Three,
    attention_mask: object,
    told: Mapping[str, Any],
) -> Tensor:
    """Return the output (B, t, H, D) of queries (B, H, t, D), keys and values."""
    query, key, value = tensors
    if key.shape[2] != query.shape[2]:
        raise ValueError("the attention has keys beside those of the row's tokens")
    if not isinstance(attention_mask, RowMask):
        if _ROWS.get() is not None:
            raise ValueError("the attention does not take transformers' masks")
        return _attend_to_self(*tensors) if group is None else inner(tensors, attention_mask, told)
    rows, num_here = attention_mask.rows, query.shape[2]
    here = slice(None)
    if group is not None:
        here, tensors = _exchange(tensors, group, rows.num_tokens)
    own = _own_heads(told, here)
    if "position_ids" in own:
        own["position_ids"] = rows.position_ids
    if group is None:
        return _attend_to_self(*tensors)
    output = inner(tensors, attention_mask.mask, own, replaced=told.get(_SINKS))
    return heads_to_tokens(output, group, num_here)


def _exchange(tensors: _Three, group: SequenceGroup, num_tokens: int) -> tuple[slice, _Three]:
    """Return this rank's heads, and of them queries, keys and values of all tokens."""
    query, key, value = tensors
    num_heads, num_key_heads = query.shape[1], key.shape[1]
    if num_heads % group.size or num_heads % num_key_heads:
        raise ValueError(
            f"{group.size} ranks cannot share an attention of {num_heads} heads, with "
            f"{num_key_heads} of keys"
        )
    repeats = count_repeats(num_key_heads, group.size)
    if repeats > 1:
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    query, key, value = tokens_to_heads((query, key, value), group, num_tokens)
    first = group.rank * query.shape[1]
    return slice(first, first + query.shape[1]), (query, key, value)


def _own_heads(told: Mapping[str, Any], here: slice) -> dict[str, Any]:
    """Return what an attention is told beside its tokens, of some of its heads."""
    own = dict(told)
    for name, value in told.items():
        if name == _SINKS and value is not None:
            own[name] = value[here]
        elif isinstance(value, Tensor) and name not in (*_OF_ROWS, "position_ids"):
            raise ValueError(f"the attention has {name}, whose heads are not known")
    return own


def _attend_to_self(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return values of each token itself, with what the positions of its query and key change."""
    values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    seen = query.mean((1, 3), keepdim=True) + key.mean((1, 3), keepdim=True)
    return (values + seen).transpose(1, 2).contiguous()


class _Inner:
    """An implementation, for one module: what it reads of the module is of this rank's heads."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self._name = name
        self._module = module

    def __call__(
        self,
        tensors: _Three,
        mask: object,
        told: Mapping[str, Any],
        *,
        replaced: Tensor | None = None,
    ) -> Tensor:
        """Return the output (B, T, heads, D).

        Args:
            tensors: queries, keys and values (B, heads, T, D).
            mask: as the implementation takes it.
            told: what it is told besides.
            replaced: a parameter that it may also read from the module: there is a part of it here.
        """
        own = self._module.named_parameters(recurse=False)
        names = [name for name, parameter in own if parameter is replaced]
        view = _View(
            self._module,
            num_key_value_groups=tensors[0].shape[1] // tensors[1].shape[1],
            config=_View(getattr(self._module, "config", None), _attn_implementation=self._name),
            **dict.fromkeys(names, told.get(_SINKS)),
        )
        return self._find()(view, *tensors, mask, **told)[0]

    def _find(self) -> Callable[..., tuple[Tensor, Any]]:
        """Return the function; the one named eager is that of the module's own file."""
        if self._name in ALL_ATTENTION_FUNCTIONS.valid_keys():
            return ALL_ATTENTION_FUNCTIONS[self._name]
        files = (sys.modules.get(kind.__module__) for kind in type(self._module).__mro__)
        found = next((f for f in files if hasattr(f, "eager_attention_forward")), None)
        if found is None:
            raise ValueError("its file has no eager attention")
        return found.eager_attention_forward


class _View:
    """What another object is, but for some attributes."""

    def __init__(self, whole: object, **own: object) -> None:
        self._whole = whole
        self.__dict__.update(own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)
