"""How far apart two results are, as one relative number."""

from torch import Tensor


def relative_error(seen: Tensor, wanted: Tensor) -> float:
    """Return ||seen - wanted|| / ||wanted|| in fp64 (the absolute norm where `wanted` is zero)."""
    seen, wanted = seen.double(), wanted.double()
    scale = wanted.norm().item()
    return (seen - wanted).norm().item() / (scale or 1.0)
