"""Run all local experts in two grouped matrix products of torch."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

_ALIGNMENT_BYTES = 16


def find_grouped_mm_obstacle(
    hidden_size: int, intermediate_size: int, dtype: torch.dtype, device_type: str
) -> str | None:
    """Say in a clause why `grouped_mm` cannot run experts of these sizes, or return None.

    The rows of every operand must begin at multiples of 16 bytes; fp64 has no kernel; on CUDA only
    bf16 has a fast one (other dtypes take torch's own loop).
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"torch's grouped_mm does not take {str(dtype).removeprefix('torch.')}"
    multiple = _ALIGNMENT_BYTES // dtype.itemsize
    for name, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
        if size % multiple:
            return (
                f"torch's grouped_mm needs {name} ({size}) to be a multiple of {multiple} in "
                f"{str(dtype).removeprefix('torch.')}"
            )
    if device_type == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        return "torch's grouped_mm needs compute capability 8.0 or newer"
    return None


def run_experts_grouped_mm(
    rows: Tensor,
    tokens_per_expert: list[int],
    gate_up_proj: Tensor,
    down_proj: Tensor,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """Multiply every expert's rows in one call per projection; see `ExpertBackend`.

    The offsets end exactly at the last row: grouped_mm leaves rows past them uninitialised
    (pytorch#154557), so there must be none.
    """
    counts = torch.tensor(tokens_per_expert, dtype=torch.int32)
    offsets = counts.cumsum(0, dtype=torch.int32).to(rows.device, non_blocking=True)
    gate_up = grouped_mm(rows, gate_up_proj.transpose(1, 2), offs=offsets)
    gate, up = gate_up.chunk(2, dim=-1)
    return grouped_mm(activation(gate) * up, down_proj.transpose(1, 2), offs=offsets)
