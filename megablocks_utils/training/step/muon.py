"""Muon for the matrices between embedding and head, AdamW for everything else.

Muon orthogonalizes the momentum of a matrix, for which it must be whole. An expert that lies whole
on its rank costs no communication. What is cut is put together on one rank of those that hold its
parts, another one for each matrix, so that they share the work; what comes out is sent to all.
The iteration is `torch.optim.Muon`'s own, which computes in bfloat16: that is what is sent.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz
from transformers import PreTrainedModel

from megablocks_utils.mesh.placement import local_blocks
from megablocks_utils.moe.expert_spec import find_expert_modules, read_parameter_names
from megablocks_utils.training.step.routers import BlockRouter, find_routers
from megablocks_utils.training.step.stochastic_rounding import (
    StochasticRoundingAdamW,
    local_part,
    store,
)

__all__ = ["MUON_STATE", "MuonWithAdamW", "find_matrices"]

MUON_STATE = "momentum_buffer"
_MOMENTUM = 0.95  # this and what follows: defaults of torch.optim.Muon
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS = 5
_EPS = 1e-7


class _Cut(NamedTuple):
    """Say how a parameter's matrices are cut: over which axes of which mesh; over none if whole."""

    parameter: Tensor
    axes: tuple[int, ...]


def find_matrices(model: PreTrainedModel, routers: list[BlockRouter]) -> set[str]:
    """Return the parameters that Muon trains: weights of linear layers, and projections of experts.

    Not embeddings, the head, routers, and what has one row or column. Of adapters, both factors.

    Args:
        model: with its adapters, not wrapped.
        routers: their kinds; none where they are not trained.
    """
    head = model.get_output_embeddings()
    excluded = {
        f"{name.removesuffix(kind.experts)}{parameter}"
        for name, _, kind in (find_routers(model, routers) if routers else ())
        for parameter in kind.parameters
    }
    found = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    for name, module in find_expert_modules(model).items():
        projections = read_parameter_names(module)[:2]
        for key, parameter in module.named_parameters():
            if key.split(".")[0].removesuffix("_lora") in projections:
                found[f"{name}.{key}"] = parameter
    matrices = {name for name, p in found.items() if p.dim() > 1 and min(p.shape[-2:]) > 1}
    return matrices - excluded


class MuonWithAdamW(StochasticRoundingAdamW):
    """Muon, with momentum 0.95 (Nesterov), for groups with `is_muon`, and AdamW for the others.

    A parameter (E, out, in) is E matrices. In float32 an update equals that of `torch.optim.Muon`
    for each of them, as it is stored. The learning rate is scaled as there by default, by
    sqrt(max(1, rows / columns)). Weights and momentum of other dtypes are updated in float32 and
    rounded as those of the base class.

    **Collective:** where matrices are cut, every rank that holds a part of one must step.
    """

    def _update_group(self, group: dict[str, Any]) -> None:
        if not group.get("is_muon"):
            super()._update_group(group)
            return
        trained = [_find_cut(p) for p in group["params"] if p.grad is not None]
        for axes, cut in groupby(trained, lambda one: one.axes):
            parameters = [one.parameter for one in cut]
            if not axes:
                for parameter in parameters:
                    self._apply(parameter, _orthogonalize(self._next_update(parameter)), group)
                continue
            size = _owning_group(parameters[0], axes).size()
            for start in range(0, len(parameters), size):
                self._update_together(parameters[start : start + size], axes, group)

    def _update_together(
        self, wave: Sequence[Tensor], axes: tuple[int, ...], group: dict[str, Any]
    ) -> None:
        """Update one parameter for each rank of the axes' first, which makes it whole."""
        ranks = _owning_group(wave[0], axes)
        own_rank, mine = ranks.rank(), None
        for owner, parameter in enumerate(wave):
            whole = self._spread(parameter, axes)
            for axis in axes[1:]:
                dist.all_reduce(whole, group=_group_of(parameter, axis))
            dist.reduce(whole, group=ranks, group_dst=owner)
            if owner == own_rank:
                mine = whole
        if mine is not None:
            mine = _orthogonalize(mine)
        for owner, parameter in enumerate(wave):
            if owner == own_rank and mine is not None:
                whole = mine
            else:
                whole = torch.empty(
                    _whole_shape(parameter, axes), dtype=torch.bfloat16, device=parameter.device
                )
            dist.broadcast(whole, group=ranks, group_src=owner)
            part = torch.empty_like(local_part(parameter, parameter), dtype=torch.bfloat16)
            for target, source in _own_blocks(parameter, part, whole):
                target.copy_(source)
            self._apply(parameter, part, group)

    def _next_update(self, parameter: Tensor) -> Tensor:
        """Move the momentum; return the update before the iteration, of what lies here."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state[MUON_STATE] = torch.zeros_like(parameter, dtype=self._state_dtype)
        state["step"] += 1
        assert parameter.grad is not None, "only parameters with a gradient are updated"
        momentum = local_part(state[MUON_STATE], parameter)
        gradient32 = local_part(parameter.grad, parameter).float()
        momentum32 = momentum.float()
        momentum32.lerp_(gradient32, 1 - _MOMENTUM)
        update = gradient32.lerp(momentum32, _MOMENTUM)
        store(momentum, momentum32, self._generator(parameter, MUON_STATE))
        return update.bfloat16()

    def _spread(self, parameter: Tensor, axes: tuple[int, ...]) -> Tensor:
        """Return the update at its place in the whole matrices, zero where others have parts."""
        update = self._next_update(parameter)
        whole = update.new_zeros(_whole_shape(parameter, axes))
        for source, target in _own_blocks(parameter, update, whole):
            target.copy_(source)
        return whole

    def _apply(self, parameter: Tensor, update: Tensor, group: dict[str, Any]) -> None:
        """Decay a parameter, and subtract the update of the part that lies here."""
        lr = float(group["lr"])
        weight = local_part(parameter, parameter)
        weight32 = weight.float()
        weight32.mul_(1 - lr * group["weight_decay"])
        weight32.add_(update, alpha=-_adjust_lr(lr, None, parameter.shape[-2:]))
        store(
            weight,
            weight32,
            self._generator(parameter, "weight") if self._stochastic_weights else None,
        )

    def _generator(self, parameter: Tensor, what: str) -> torch.Generator:
        """Return random bits for rounding, equal on the ranks that hold copies."""
        step = int(self.state[parameter]["step"])
        # Other bits for each of the two tensors: numbers of AdamW's are not negative.
        number = -1 - 2 * self._numbers[parameter] - (what == "weight")
        generator = torch.Generator(parameter.device)
        return generator.manual_seed(self._seed_of(step, number, parameter))


def _find_cut(parameter: Tensor) -> _Cut:
    if not isinstance(parameter, DTensor):
        return _Cut(parameter, ())
    num_stacked = parameter.dim() - 2
    axes = tuple(
        axis
        for axis, placement in enumerate(parameter.placements)
        if not placement.is_replicate()
        and getattr(placement, "dim", 0) >= num_stacked
        and parameter.device_mesh.size(axis) > 1
    )
    return _Cut(parameter, axes)


def _group_of(parameter: Tensor, axis: int) -> dist.ProcessGroup:
    assert isinstance(parameter, DTensor), "a plain parameter is not cut"
    return parameter.device_mesh.get_group(axis)


def _owning_group(parameter: Tensor, axes: tuple[int, ...]) -> dist.ProcessGroup:
    return _group_of(parameter, axes[0])


def _whole_shape(parameter: Tensor, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the matrices of which a part lies here: of whole ones, so many."""
    assert axes, "it is cut"
    stacked = local_part(parameter, parameter).shape[:-2]
    return (*stacked, *parameter.shape[-2:])


def _own_blocks(parameter: Tensor, part: Tensor, whole: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each block that lies here its view of this rank's part and of the whole."""
    for block in local_blocks(parameter):
        target = whole
        # Stacked matrices are counted as they lie here.
        places = (*block.starts[:-2], *block.offsets[-2:])
        for dim, (start, size) in enumerate(zip(places, block.sizes, strict=True)):
            target = target.narrow(dim, start, size)
        yield block.of(part), target


def _orthogonalize(update: Tensor) -> Tensor:
    """Return torch's Newton-Schulz iteration of each matrix."""
    if update.dim() == 2:
        return _newton_schulz(update)
    if not len(update):
        return update
    return torch.stack([_newton_schulz(matrix) for matrix in update])


def _newton_schulz(matrix: Tensor) -> Tensor:
    # It divides in place what it is given, where that is bfloat16 already.
    result = _zeropower_via_newtonschulz(matrix.clone(), _COEFFICIENTS, _NUM_ITERATIONS, _EPS)
    return result.contiguous()
