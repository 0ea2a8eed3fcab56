"""Read from transformers' mask functions which keys a query sees.

transformers composes the mask of a model from functions of indices. The few that say "causal",
"the last W" and "of the same chunk" are known here by the function that made them; everything else
is not, and has no pattern.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["MaskPattern", "read_pattern"]


@dataclass(frozen=True)
class MaskPattern:
    """Say which keys a query sees of those at or before it in its example.

    Attributes:
        window: the last so many; None for all.
        chunk: those of the same chunk of so many; None for all.
        is_packed: whether the mask itself keeps examples apart.
    """

    window: int | None = None
    chunk: int | None = None
    is_packed: bool = False


def read_pattern(mask_function: Callable[..., Any]) -> MaskPattern | None:
    """Return the pattern of a mask function; None for one that is not causal, or not known."""
    found: dict[str, Any] = {}
    is_causal = False
    for maker, values in _parts(mask_function):
        if maker == "causal_mask_function":
            is_causal = True
        elif maker == "sliding_window_overlay":
            found["window"] = values["sliding_window"]
        elif maker == "chunked_overlay":
            found["chunk"] = values["chunk_size"]
        elif maker == "packed_sequence_mask_function":
            found["is_packed"] = True
        else:
            return None
    return MaskPattern(**found) if is_causal else None


def _parts(mask_function: Callable[..., Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield who made each function whose intersection this one is, and what of."""
    maker = getattr(mask_function, "__qualname__", "").partition(".")[0]
    if getattr(mask_function, "__module__", "") != "transformers.masking_utils":
        maker = "somebody else"
    names = getattr(getattr(mask_function, "__code__", None), "co_freevars", ())
    cells = getattr(mask_function, "__closure__", None) or ()
    values = {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
    if maker == "and_masks":
        for part in values["mask_functions"]:
            yield from _parts(part)
    elif maker == "remap_positions_for_packed_sequence":
        yield from _parts(values["mask_function"])
    else:
        yield maker, values
