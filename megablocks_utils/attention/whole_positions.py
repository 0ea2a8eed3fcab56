"""Rotary embeddings that change with the longest position, where ranks share rows.

transformers' "dynamic" and "longrope" kinds choose frequencies by the largest position they are
given. A rank gives them those of its part of a row, and here one more: the largest of the whole.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megablocks_utils.attention.ulysses import current_rows

__all__ = ["show_longest_positions"]

_KINDS = ("dynamic", "longrope")


def show_longest_positions(model: nn.Module) -> None:
    """Let a model's rotary embeddings see the largest position of the whole rows."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", "")
        found = list(kinds.values()) if isinstance(kinds, dict) else [kinds]
        if any(kind in str(one) for kind in _KINDS for one in found):
            module.register_forward_pre_hook(_add_longest, with_kwargs=True)
            module.register_forward_hook(_drop_longest)


def _add_longest(
    _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    rows = current_rows()
    if rows is None:
        return None
    longest = rows.position_ids.max()
    if "position_ids" in kwargs:
        return args, kwargs | {"position_ids": _with_longest(kwargs["position_ids"], longest)}
    return (args[0], _with_longest(args[1], longest), *args[2:]), kwargs


def _with_longest(position_ids: Tensor, longest: Tensor) -> Tensor:
    return torch.cat((position_ids, longest.expand(*position_ids.shape[:-1], 1)), dim=-1)


def _drop_longest(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
    if current_rows() is None:
        return None
    if isinstance(output, Tensor):
        return output[..., :-1, :]
    return tuple(part[..., :-1, :] for part in output)
