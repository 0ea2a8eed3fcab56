"""Pack experts that are there whole."""

from torch import Tensor

from megablocks_utils.quantization.packed_experts import PackedExperts

__all__ = ["pack_all"]


def pack_all(format_name: str, weights: Tensor, *, is_transposed: bool) -> PackedExperts:
    """Pack experts one after the other, where they lie.

    Args:
        format_name: of `FORMATS`.
        weights: (L, out, in), or (L, in, out) where transposed.
        is_transposed: see there.
    """
    weights = weights.detach()
    packed = PackedExperts.empty(
        format_name, weights, device=weights.device, is_transposed=is_transposed
    )
    for number, matrix in enumerate(weights):
        packed.pack_expert(number, matrix)
    return packed
