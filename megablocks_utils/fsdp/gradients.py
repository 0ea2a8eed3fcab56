"""Gradients over two meshes: summed over an expert's replicas, one global norm, one clip factor.

Convention of this project: the loss of a micro-batch is already divided by the label tokens of the
whole global batch, so every reduction of gradients is a plain *sum* over ranks and nothing is
rescaled afterwards. Dense parameters are summed over the world by FSDP, those that it leaves alone
by `sum_replicated_gradients`; an expert's gradient arrives summed over its ep group through the
all-to-all, and what is left is the sum over the dp axis. What `expert_tp` does not cut is summed
over it, too: each rank of it has the part of its own slice.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from megablocks_utils.mesh.device_mesh import EXPERT_TP_AXIS, axis_size, copy_axes
from megablocks_utils.mesh.placement import (
    count_replicas,
    is_cut_into_slices,
    is_replicated,
    local_tensor,
)


def sum_replica_gradients(parameters: Iterable[Tensor], mesh: DeviceMesh) -> None:
    """Sum the gradients of experts whose copies FSDP does not know, in place.

    An expert without tokens has a gradient of zeros. Without a gradient are those of a module that
    is not called on any rank: it is not for text.

    **Collective:** one all-reduce a parameter on each of the axes `dp` and `dp_replicate` (none if
    its size is 1), in the order given, which must be the same on every rank.
    """
    grads = _local_grads(p for p in parameters if p.requires_grad)
    for axis in copy_axes(mesh):
        group = mesh.get_group(axis)
        pending = [dist.all_reduce(grad, group=group, async_op=True) for grad in grads]
        for work in pending:
            work.wait()


def sum_peer_gradients(parameters: Iterable[Tensor], mesh: DeviceMesh) -> None:
    """Sum over `expert_tp` the gradients of what its ranks hold whole, in place.

    Biases of the second projection, and the factors of adapters that see no slice of an expert.

    **Collective:** one all-reduce over the axis (none if its size is 1), if any such parameter has
    a gradient: as on every rank.

    Args:
        parameters: of the experts, in the same order on every rank.
        mesh: of the experts.
    """
    if axis_size(mesh, EXPERT_TP_AXIS) == 1:
        return
    whole = (p for p in parameters if p.requires_grad and not is_cut_into_slices(p))
    alike: dict[torch.dtype, list[Tensor]] = {}
    for grad in _local_grads(whole):
        alike.setdefault(grad.dtype, []).append(grad)
    for grads in alike.values():
        # Offloaded gradients lie in host memory, where the axis cannot reduce.
        flat = torch.cat([grad.reshape(-1) for grad in grads]).to(mesh.device_type)
        dist.all_reduce(flat, group=mesh.get_group(EXPERT_TP_AXIS))
        for grad, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(total.view_as(grad))


def sum_replicated_gradients(parameters: Iterable[Tensor], tp_size: int = 1) -> None:
    """Sum over the world the gradients of float32 parameters that every rank holds whole.

    One that no rank has a gradient of keeps none, as in one process.

    **Collective:** one all-reduce over the world, if any such parameter is trained.

    Args:
        parameters: in the same order on every rank; those not marked as replicated are left out.
        tp_size: ranks that have the same gradient, which counts once.
    """
    replicated = [p for p in parameters if is_replicated(p) and p.requires_grad]
    if not replicated:
        return
    here = torch.tensor([float(p.grad is not None) for p in replicated])
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in replicated]
    flat = torch.cat([*(grad.reshape(-1) for grad in grads), here.to(grads[0])])
    dist.all_reduce(flat)
    *sums, counts = flat.split([*(p.numel() for p in replicated), len(replicated)])
    for number, (parameter, total) in enumerate(zip(replicated, sums, strict=True)):
        # The device is waited for only where this rank had no gradient.
        if parameter.grad is not None or counts[number].item() > 0:
            parameter.grad = (total if tp_size == 1 else total / tp_size).view(parameter.shape)


def clip_gradients(
    parameters: Iterable[Tensor], max_norm: float, norms: Tensor | None = None
) -> Tensor:
    """Scale all gradients so that their global norm is at most `max_norm`; 0 leaves them.

    **Collective:** see `global_grad_norm`.

    Args:
        parameters: those that are trained.
        max_norm: of the whole gradient.
        norms: what `shard_grad_norms` has given for them, if it is known.

    Returns:
        The norm before clipping, a scalar fp64 tensor, the same on every rank.
    """
    parameters = list(parameters)
    norm = global_grad_norm(parameters, norms)
    if max_norm > 0:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # torch's and transformers' formula
        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for grad in _local_grads(parameters):
            alike.setdefault((grad.device, grad.dtype), []).append(grad)
        # Not one factor in the first one's dtype: under FSDP1 that differs between ranks, and
        # copies would part.
        for (device, dtype), grads in alike.items():
            torch._foreach_mul_(grads, factor.to(device, dtype))
    return norm


def shard_grad_norms(parameters: Iterable[Tensor]) -> Tensor:
    """Return the L2 norm of this rank's shard of every gradient there is, (G,) fp32."""
    return map_by_device(
        _local_grads(parameters),
        lambda grads: torch.stack(tuple(torch._foreach_norm(grads, 2, dtype=torch.float32))),
    )


def map_by_device(tensors: Sequence[Tensor], compute: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """Compute a number for each tensor, (N,) fp32, where the tensors lie.

    Args:
        tensors: on one device, or on a GPU and, offloaded, in host memory; the results are then
            all on the GPU, which is not waited for.
        compute: the numbers of tensors on one device.
    """
    numbers: dict[torch.device, list[int]] = {}
    for number, tensor in enumerate(tensors):
        numbers.setdefault(tensor.device, []).append(number)
    if not numbers:
        return torch.zeros(0)
    parts = [compute([tensors[n] for n in own]) for own in numbers.values()]
    if len(parts) == 1:
        return parts[0]
    device = next(device for device in numbers if device.type != "cpu")
    joined = torch.cat([part.to(device, non_blocking=True) for part in parts])
    order = torch.tensor([n for own in numbers.values() for n in own])
    return joined[order.argsort().to(device, non_blocking=True)]


def global_grad_norm(parameters: Iterable[Tensor], norms: Tensor | None = None) -> Tensor:
    """Compute the L2 norm of the whole gradient, every parameter counted once.

    Each rank adds the squares of the shards it holds, a shard that R ranks hold with weight 1/R.
    Plain tensors are taken as this rank's own shard (FSDP1); a gradient that is None as zero.

    **Collective:** one all-reduce of one number over the world.

    Args:
        parameters: those that are trained.
        norms: what `shard_grad_norms` has given for them, if it is known.
    """
    parameters = list(parameters)
    world_size = dist.get_world_size()
    devices = [p.device for p in parameters] or [torch.device("cpu")]
    # A GPU's, where there is one: ranks without gradients there must reduce on the same one.
    device = next((d for d in devices if d.type != "cpu"), devices[0])
    parameters = [p for p in parameters if p.grad is not None]
    total = torch.zeros((), dtype=torch.float64, device=device)
    if parameters:
        norms = shard_grad_norms(parameters) if norms is None else norms
        replicas = [count_replicas(p, world_size) for p in parameters]
        squares = norms.double().square()
        total += (squares / torch.tensor(replicas, device=norms.device)).sum().to(device)
    dist.all_reduce(total)
    return total.sqrt()


def _local_grads(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [local_tensor(p.grad) for p in parameters if p.grad is not None]
