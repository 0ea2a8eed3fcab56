"""Tensor parallelism of what is not experts, by transformers' own layers.

Every rank of a tp group computes the loss of the same rows, so that a parameter that is not split
has its whole gradient on each of them: FSDP sums it over its own axis alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel
from transformers.integrations.tensor_parallel import apply_tensor_parallelism

from megablocks_utils.fsdp.tp_plan import TensorParallelPlan, choose_tp_plan
from megablocks_utils.fsdp.tp_styles import BY_WIDTH, GRADIENT_SUM
from megablocks_utils.mesh.dense_mesh import TP_AXIS
from megablocks_utils.mesh.token_split import TokenSplit, sum_gradient_over
from megablocks_utils.moe.sharded_moe import ShardedMoE

__all__ = ["gather_split_linear", "split_dense_layers"]


def split_dense_layers(
    model: PreTrainedModel, sharded: ShardedMoE, mesh: DeviceMesh
) -> TensorParallelPlan:
    """Split the dense layers of a model over the tp axis, in place; experts take tokens once.

    No communication. Weights on meta stay there; adapters keep this rank's part.

    Args:
        model: on meta, adapters attached, not wrapped.
        sharded: how its experts are split.
        mesh: of the dense parameters, with a tp axis.

    Raises:
        ConfigurationError: heads that do not divide evenly, or nothing that could be split.
    """
    tp_mesh = mesh[TP_AXIS]
    split = _build_token_split(tp_mesh)
    plan = choose_tp_plan(model, split.size)
    styles = {name: s for name, s in plan.styles.items() if s != GRADIENT_SUM}
    modules = dict(model.named_modules())
    apply_tensor_parallelism(model, tp_mesh, styles)
    for name, style in plan.styles.items():
        if style == GRADIENT_SUM:
            _sum_gradients(model.get_submodule(name), split.group)
        elif style == BY_WIDTH and name in modules:
            _copy_output(modules[name])
    for experts in sharded.expert_modules.values():
        experts.token_split = split
    return plan


def _copy_output(module: nn.Module) -> None:
    """Let an FSDP unit return no view: models change embeddings in place, and hooks would go."""
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs).clone()


def gather_split_linear(
    linear: nn.Linear,
) -> tuple[TokenSplit | None, torch.Tensor, torch.Tensor | None]:
    """Return a layer's whole weight and bias, for rows that each rank of its tp group takes once.

    Their gradients are summed over the group, each rank getting its part.

    **Collective:** where the layer is split, an all-gather over the group and a reduce-scatter in
    backward.

    Returns:
        Whose rows are whose, weight and bias; None and both as they are where it is not split.
    """
    if not isinstance(linear.weight, DTensor):
        return None, linear.weight, linear.bias
    split = _build_token_split(linear.weight.device_mesh)
    bias = linear.bias
    return split, _gather(linear.weight), _gather(bias) if isinstance(bias, DTensor) else bias


def _gather(parameter: DTensor) -> torch.Tensor:
    return parameter.full_tensor(grad_placements=[Partial()])


def _build_token_split(tp_mesh: DeviceMesh) -> TokenSplit:
    return TokenSplit(tp_mesh.get_group(), tp_mesh.get_local_rank(), tp_mesh.size())


def _sum_gradients(module: nn.Module, group: ProcessGroup) -> None:
    """Let a module that sees the heads of one rank have the gradient of all of them.

    Not by transformers' own style: its hook sums what has been accumulated, so that it counts the
    micro-batches before the last one again.
    """
    module.forward = _with_summed_gradients(module, module.forward, group)


def _with_summed_gradients(
    module: nn.Module, forward: Callable[..., Any], group: ProcessGroup
) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        own = dict(module._parameters)
        summed: dict[str, torch.Tensor | None] = {
            name: None if p is None else sum_gradient_over(p, group) for name, p in own.items()
        }
        vars(module)["_parameters"] = summed
        try:
            return forward(*args, **kwargs)
        finally:
            vars(module)["_parameters"] = own

    return run
