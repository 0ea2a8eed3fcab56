"""Find the nearest of a table of values, and spread two 4-bit codes from each byte."""

from functools import cache

import torch
from torch import Tensor


def find_nearest(values: Tensor, table: Tensor) -> Tensor:
    """Return the index of the nearest entry of a sorted table; the lower one of two as near."""
    upper = torch.bucketize(values, table).clamp_(1, len(table) - 1)
    lower = upper - 1
    is_upper = (table[upper] - values).abs() < (values - table[lower]).abs()
    return torch.where(is_upper, upper, lower).to(torch.uint8)


def pad_columns(values: Tensor, multiple: int) -> Tensor:
    """Append zeros to the last dim up to a multiple; the tensor itself where there is one."""
    missing = -values.shape[-1] % multiple
    return torch.nn.functional.pad(values, (0, missing)) if missing else values


def join_nibbles(codes: Tensor, *, first_is_high: bool) -> Tensor:
    """Put two codes (..., 2n) below 16 into each byte (..., n)."""
    first, second = codes[..., ::2], codes[..., 1::2]
    high, low = (first, second) if first_is_high else (second, first)
    return (high << 4) | low


def look_up_nibbles(packed: Tensor, table: Tensor, *, first_is_high: bool) -> Tensor:
    """Return the fp32 values (..., 2n) of the codes in bytes (..., n), of a table of 16."""
    return look_up(packed, _build_pairs(table, first_is_high)).flatten(-2)


def look_up(codes: Tensor, table: Tensor) -> Tensor:
    """Return the entries (..., n) of a table (256, n) that bytes (...) stand for."""
    # As one number of as many bytes an entry is copied in one piece: 12 times as fast on a CPU.
    kind = torch.float64 if table.shape[1:] == (2,) else table.dtype
    entries = put_beside(codes, table).view(kind).flatten()
    chosen = entries.index_select(0, codes.flatten().int()).view(table.dtype)
    return chosen.view(*codes.shape, *table.shape[1:])


def put_beside(tensor: Tensor, table: Tensor) -> Tensor:
    """Return a table, one of a few that never change, on the device of a tensor.

    Copying it to a GPU makes the CPU wait: there it is kept. What is no plain tensor is of a
    rehearsal, and keeps nothing.
    """
    is_kept = tensor.device.type != "cpu" and type(tensor) is Tensor
    return _keep_on(table, tensor.device) if is_kept else table.to(tensor.device)


@cache
def _keep_on(table: Tensor, device: torch.device) -> Tensor:
    return table.to(device)


@cache
def _build_pairs(table: Tensor, first_is_high: bool) -> Tensor:
    """Return the two values (256, 2) of each byte."""
    codes = torch.arange(256)
    high, low = codes >> 4, codes & 15
    return table[torch.stack((high, low) if first_is_high else (low, high), dim=1)]
