"""Compare how parameters lie on the ranks with the declared plan, before the first step."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from megablocks_utils.errors import PlacementError
from megablocks_utils.fsdp.fsdp1 import strip_wrappers
from megablocks_utils.fsdp.placement_plan import PlacementEntry, PlacementPlan, find_pattern
from megablocks_utils.fsdp.placement_rules import COPIES, SHARD, describe_placement
from megablocks_utils.fsdp.places import find_buffers, flat_handles
from megablocks_utils.mesh.placement import local_tensor
from megablocks_utils.processes.agreement import gather_from_all_ranks

__all__ = ["check_own_parts", "check_sums", "verify_placements"]


def verify_placements(model: nn.Module, plan: PlacementPlan) -> None:
    """Check both ways that a wrapped and filled model lies as declared.

    Every parameter and persistent buffer is in exactly one entry and lies on each axis as that
    says; every entry has the parameters it was made of; and the ranks together hold each element as
    often as it has copies. No values are compared: `--debug` does that of copies.

    **Collective:** one all-gather of a number an entry; every rank of the world must call.

    Raises:
        PlacementError: on every rank, naming the first parameter or entry.
    """
    check_sums(plan, gather_from_all_ranks(lambda: check_own_parts(model, plan)))


def check_sums(plan: PlacementPlan, held: Sequence[Sequence[int]]) -> None:
    """Check that the ranks together hold each element as often as it has copies.

    Args:
        plan: as declared.
        held: of each rank, what `check_own_parts` has returned.

    Raises:
        PlacementError: naming the first entry of which they do not.
    """
    for entry, *counts in zip(plan.entries, *held, strict=True):
        wanted, seen = entry.num_elements * plan.count_copies(entry), sum(counts)
        if seen != wanted:
            raise PlacementError(
                f"the ranks together hold {seen:,} elements of {entry.pattern}, but the placement "
                f"plan says {wanted:,} ({entry.rule.kind})."
            )


@torch.no_grad()
def check_own_parts(model: nn.Module, plan: PlacementPlan) -> Sequence[int]:
    """Check what one rank can see; returns how many elements it holds of each entry.

    Raises:
        PlacementError: naming the first parameter or entry.
    """
    entries: dict[str, list[PlacementEntry]] = {}
    for entry in plan.entries:
        entries.setdefault(entry.pattern, []).append(entry)
    finders: dict[tuple[str, ...], _PlacementFinder] = {}
    num_parameters: Counter[str] = Counter()
    num_elements: Counter[str] = Counter()
    for name, tensor in _held_tensors(model):
        patterns = dict.fromkeys((name, find_pattern(name)))
        matching = [entry for pattern in patterns for entry in entries.get(pattern, ())]
        entry = _only_entry(name, matching)
        sizes = plan.axis_sizes_of(entry)
        if tuple(sizes) not in finders:
            finders[tuple(sizes)] = _PlacementFinder(model, sizes)
        _check_placement(name, entry, finders[tuple(sizes)].find(tensor))
        num_parameters[entry.pattern] += 1
        num_elements[entry.pattern] += local_tensor(tensor).numel()
    for entry in plan.entries:
        if num_parameters[entry.pattern] != entry.num_parameters:
            raise PlacementError(
                f"the placement plan declares {entry.num_parameters} of {entry.pattern} "
                f"({entry.rule.kind}), but the wrapped model has {num_parameters[entry.pattern]}."
            )
    return [num_elements[entry.pattern] for entry in plan.entries]


def _held_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        yield strip_wrappers(name), parameter
    yield from find_buffers(model).items()


def _only_entry(name: str, matching: Sequence[PlacementEntry]) -> PlacementEntry:
    if len(matching) == 1:
        return matching[0]
    found = " and ".join(f"{entry.pattern} ({entry.rule.kind})" for entry in matching)
    raise PlacementError(
        f"{name} is in {f'{len(matching)} entries' if matching else 'no entry'} of the placement "
        f"plan{f', {found}' if found else ''}, but it must be in exactly one."
    )


def _check_placement(name: str, entry: PlacementEntry, found: Mapping[str, str]) -> None:
    wanted = {axis: entry.rule.placements[axis] for axis in found}
    # `SHARD` is what every shard's description begins with.
    if all(found[axis].startswith(placement) for axis, placement in wanted.items()):
        return
    seen = "whole on every rank" if set(found.values()) == {COPIES} else _describe(found)
    raise PlacementError(
        f"{name} is {seen}, but the placement plan says {_describe(wanted)} ({entry.rule.kind})."
    )


def _describe(placements: Mapping[str, str]) -> str:
    return ", ".join(f"{axis}: {placement}" for axis, placement in placements.items())


class _PlacementFinder:
    """Find how a tensor lies along each mesh axis of more than one rank.

    By the ranks among which it is split, never by what a mesh calls its axes: FSDP's have other
    names than the experts', or none, and one of them may be several axes of the plan.
    """

    def __init__(self, model: nn.Module, axis_sizes: Mapping[str, int]) -> None:
        self._flat_ranks = {
            id(parameter): _sharding_ranks(handle.process_group, handle.uses_sharded_strategy)
            for handle in flat_handles(model.modules())
            for parameter in handle.flat_param._params or ()
        }
        self._axes = [axis for axis, size in axis_sizes.items() if size > 1]
        self._axes_of_ranks = _find_axes_of_ranks(axis_sizes, self._axes)
        self._axes_of_meshes: dict[DeviceMesh, list[Sequence[str]]] = {}

    def find(self, tensor: Tensor) -> dict[str, str]:
        """Return how a tensor lies, by axis."""
        found = dict.fromkeys(self._axes, COPIES)
        if isinstance(tensor, DTensor):
            axes_of_dims = self._find_axes_of_mesh(tensor.device_mesh)
            for axes, placement in zip(axes_of_dims, tensor.placements, strict=True):
                found |= dict.fromkeys(axes, describe_placement(placement))
        elif ranks := self._flat_ranks.get(id(tensor)):
            found |= dict.fromkeys(self._find_axes(ranks), SHARD)
        return found

    def _find_axes_of_mesh(self, mesh: DeviceMesh) -> list[Sequence[str]]:
        if mesh not in self._axes_of_meshes:
            here = mesh.get_coordinate()
            assert here is not None, "this rank holds a part of it"
            lines = [_ranks_along(mesh.mesh, here, [dim]) for dim in range(mesh.ndim)]
            self._axes_of_meshes[mesh] = [self._find_axes(line) for line in lines]
        return self._axes_of_meshes[mesh]

    def _find_axes(self, ranks: frozenset[int]) -> Sequence[str]:
        if ranks not in self._axes_of_ranks:
            raise PlacementError(
                f"parameters are sharded over the ranks {sorted(ranks)}, but the placement plan "
                f"has no such ranks along the axes {', '.join(self._axes)}."
            )
        return self._axes_of_ranks[ranks]


def _sharding_ranks(group: dist.ProcessGroup, is_sharded: bool) -> frozenset[int]:
    """Return the ranks among which FSDP1 splits a flat parameter; none where it does not."""
    return frozenset(dist.get_process_group_ranks(group) if is_sharded else ())


def _find_axes_of_ranks(
    axis_sizes: Mapping[str, int], axes: Sequence[str]
) -> dict[frozenset[int], Sequence[str]]:
    """Return which axes the ranks differ along, of each set of ranks with this one in it."""
    grid = torch.arange(dist.get_world_size()).view(*axis_sizes.values())
    here = [int(index) for index in torch.nonzero(grid == dist.get_rank())[0]]
    dims = {axis: dim for dim, axis in enumerate(axis_sizes)}
    choices = [chosen for n in range(len(axes) + 1) for chosen in combinations(axes, n)]
    return {_ranks_along(grid, here, [dims[a] for a in chosen]): chosen for chosen in choices}


def _ranks_along(grid: Tensor, here: Sequence[int], dims: Sequence[int]) -> frozenset[int]:
    """Return the ranks of a grid that differ from one place in it along these dims alone."""
    index = tuple(slice(None) if dim in dims else place for dim, place in enumerate(here))
    return frozenset(grid[index].flatten().tolist())
