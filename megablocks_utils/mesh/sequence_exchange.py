"""Exchange tokens for heads around attention, and back (Ulysses sequence parallelism).

The S ranks of a group share rows: each holds a contiguous part of every row's tokens, with all
heads. Attention needs all tokens of a head, so one all-to-all hands every rank all tokens of H/S
heads, and one brings the results back. Parts may differ by a token. Where there are fewer key heads
than ranks, they are repeated first; autograd sums their gradients.

Shapes: B rows, T tokens of a row and t here, H heads of queries and K of keys, S ranks, D sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from megablocks_utils.mesh.token_exchange import SplitSizes, combine_rows, dispatch_rows

SP_AXIS = "sp"


@dataclass(frozen=True)
class SequenceGroup:
    """Ranks that share rows.

    Attributes:
        group: their process group.
        rank: this one's place, which is that of its part of a row.
        size: how many there are.
    """

    group: dist.ProcessGroup
    rank: int
    size: int


def build_sequence_group(device_type: str, tp_size: int, sp_size: int) -> SequenceGroup:
    """Build the group of this rank: tp is innermost, then sp.

    A group of its own also where it has all ranks: NCCL runs one collective of a group at a time.

    **Collective:** every rank of the world must call (process groups are created).
    """
    world_size = dist.get_world_size()
    mesh = init_device_mesh(
        device_type,
        (world_size // (tp_size * sp_size), sp_size, tp_size),
        mesh_dim_names=("rows", SP_AXIS, "tp"),
        backend_override={SP_AXIS: dist.get_backend()} if sp_size == world_size else None,
    )
    return SequenceGroup(mesh.get_group(SP_AXIS), mesh.get_local_rank(SP_AXIS), sp_size)


def part_sizes(num_tokens: int, num_parts: int) -> list[int]:
    """Return the tokens of each part of a row: the first ones have one more where needed."""
    small, num_larger = divmod(num_tokens, num_parts)
    return [small + (part < num_larger) for part in range(num_parts)]


def part_columns(num_tokens: int, num_parts: int, part: int) -> slice:
    """Return which tokens of a row a part has."""
    sizes = part_sizes(num_tokens, num_parts)
    start = sum(sizes[:part])
    return slice(start, start + sizes[part])


def count_repeats(num_key_heads: int, size: int) -> int:
    """Return how many times each key head is repeated, so that ranks can share them evenly."""
    return size // gcd(num_key_heads, size)


def tokens_to_heads(
    tensors: Sequence[Tensor], group: SequenceGroup, num_tokens: int
) -> list[Tensor]:
    """Return tensors (B, heads, t, D) as (B, heads / S, T, D): all tokens of this rank's heads.

    **Collective:** one all-to-all on the group, and one more in backward; every rank must call.

    Args:
        tensors: such as queries, keys and values; S divides the heads of each.
        group: the ranks that share the rows.
        num_tokens: T.
    """
    num_rows, _, num_here, _ = tensors[0].shape
    shapes = [(tensor.shape[1] // group.size, tensor.shape[3]) for tensor in tensors]
    # (S, t, B, heads / S, D): what goes to one rank lies together.
    by_rank = [t.unflatten(1, (group.size, -1)).permute(1, 3, 0, 2, 4) for t in tensors]
    if len({size for _, size in shapes}) > 1:
        by_rank = [tensor.flatten(3) for tensor in by_rank]  # a copy, which one size spares
    sent = torch.cat(by_rank, dim=3).flatten(0, 1).flatten(1)
    received = dispatch_rows(sent, _splits(num_tokens, num_here, group), group.group)
    parts = received.unflatten(1, (num_rows, -1)).split([prod(s) for s in shapes], dim=2)
    pairs = zip(parts, shapes, strict=True)
    return [part.unflatten(2, shape).permute(1, 2, 0, 3) for part, shape in pairs]


def heads_to_tokens(output: Tensor, group: SequenceGroup, num_here: int) -> Tensor:
    """Return an output (B, T, H / S, D) as (B, t, H, D): all heads of this rank's tokens.

    **Collective:** as `tokens_to_heads`.

    Args:
        output: of attention over all tokens.
        group: the ranks that share the rows.
        num_here: t.
    """
    num_rows, num_tokens, num_heads, size = output.shape
    sent = output.transpose(0, 1).flatten(1)
    received = combine_rows(sent, _splits(num_tokens, num_here, group), group.group)
    by_rank = received.view(group.size, num_here, num_rows, num_heads, size)
    return by_rank.permute(2, 1, 0, 3, 4).flatten(2, 3).contiguous()


def _splits(num_tokens: int, num_here: int, group: SequenceGroup) -> SplitSizes:
    """Return the tokens sent to and received from each rank on the way to heads."""
    sizes = part_sizes(num_tokens, group.size)
    assert sizes[group.rank] == num_here, (sizes, num_here)
    return SplitSizes([num_here] * group.size, sizes)
