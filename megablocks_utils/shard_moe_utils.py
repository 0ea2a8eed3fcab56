"""Give a transformers MoE model expert parallelism: `shard_moe`.

Only the `experts` module of each MoE layer is swapped. Router, shared experts and the auxiliary
loss stay transformers' own.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from megablocks_utils.checkpoint.hub_naming import EXPERT_TENSORS
from megablocks_utils.checkpoint.index import open_checkpoint, resolve_checkpoint_folder
from megablocks_utils.checkpoint.layouts import ModelLayout
from megablocks_utils.checkpoint.load import load_experts
from megablocks_utils.checkpoint.slices import SliceReader
from megablocks_utils.config.values import join_words
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.families import SUPPORTED_MODEL_TYPES, describe_supported
from megablocks_utils.kernels.selection.rank_agreement import ExpertUse, select_for_all_ranks
from megablocks_utils.kernels.shapes import ExpertsModule
from megablocks_utils.mesh.device_mesh import MeshSizes, build_mesh, compute_mesh_sizes
from megablocks_utils.mesh.placement import (
    distribute_experts,
    local_expert_range,
    wrap_local_experts,
)
from megablocks_utils.moe.dropless_experts import DroplessExperts
from megablocks_utils.moe.sharded_moe import ShardedMoE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROJECTIONS = tuple(EXPERT_TENSORS)
"""Names of the concatenated expert weights, in transformers' experts modules and in ours."""

_DEVICE_TYPES, _EXPERT_DP = ("cpu", "cuda"), ("shard", "replicate")


def find_expert_modules(model: "PreTrainedModel") -> dict[str, ExpertsModule]:
    """Find the experts of every MoE layer by their structure: qualified name -> module.

    Raises:
        ConfigurationError: the model has none, or its family is not one that is proven here.
    """
    modules = {name: module for name, module in model.named_modules() if _holds_experts(module)}
    model_type = model.config.model_type
    if not modules or model_type not in SUPPORTED_MODEL_TYPES:
        cause = "is not supported yet" if modules else "has no experts that could be split"
        raise ConfigurationError(
            f"model type {model_type} {cause}; expert parallelism works for {describe_supported()}."
        )
    for name, module in modules.items():
        _refuse_foreign_layout(name, module)
    return modules


def shard_moe(
    model: "PreTrainedModel",
    ep_size: int,
    checkpoint_name_or_path: str | Path | None = None,
    kernel: str = "auto",
    expert_dp: str = "shard",
    device_type: str | None = None,
    compute_dtype: torch.dtype | None = None,
    on_layer: Callable[[int], None] = lambda _: None,
    expert_mode: str = "full",
    tokens_per_rank: int | None = None,
) -> ShardedMoE:
    """Split the experts of a transformers MoE model over the ranks, in place.

    **Collective:** every rank of the world must call; process groups are made, no weights move.

    Args:
        model: with its weights, the same on every rank; or on the meta device, with
            `checkpoint_name_or_path`.
        ep_size: ranks the experts of a layer are split over.
        checkpoint_name_or_path: folder or Hub name the experts are read from, each rank its own
            slices only; None takes them from the model.
        kernel: `auto`, or the name of a backend: `eager`, `grouped_mm`, `triton`, `scattermoe` or
            `megablocks`. All ranks run what rank 0 selects.
        expert_dp: what the dp axis will do with an expert: `shard` it (FSDP2), or `replicate` it
            and sum the gradients of the copies.
        device_type: `cpu` or `cuda`; None takes cuda where there is one.
        compute_dtype: dtype the experts will be computed in; None is that of the weights.
        on_layer: called with 1 after each layer, for a progress bar.
        expert_mode: which expert parameters will be trained: "full" all weights, "frozen" none,
            "lora" adapters. Counts for the selection of the kernel alone.
        tokens_per_rank: about how many tokens a rank will have at a time; `auto` finds measurements
            by it.

    Raises:
        ConfigurationError: no process group, not a supported MoE model, a value that there is not,
            sizes that do not divide, or a kernel that cannot run here.
        MissingKernelError: a kernel that is not installed.
        CheckpointError: expert weights that are missing or mis-shaped.
    """
    if not dist.is_initialized():
        raise ConfigurationError(
            "shard_moe needs torch.distributed to be initialised; launch with torchrun, or call "
            "torch.distributed.init_process_group first."
        )
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_choice("device_type", device_type, _DEVICE_TYPES)
    use = ExpertUse(device_type, compute_dtype, expert_mode, tokens_per_rank)
    sharded = _plan(model, ep_size, kernel, expert_dp, use)
    device = _local_device(device_type)
    source = _ExpertSource(model, checkpoint_name_or_path, sharded.mesh, device)
    for name, module in find_expert_modules(model).items():
        _swap(sharded, name, module, source.take(name, module))
        on_layer(1)
    return sharded


def split_experts_on_meta(
    model: "PreTrainedModel",
    ep_size: int,
    *,
    kernel: str,
    expert_dp: str,
    device_type: str,
    compute_dtype: torch.dtype,
    expert_mode: str = "full",
    tokens_per_rank: int | None = None,
) -> ShardedMoE:
    """Do what `shard_moe` does for a model on meta, and leave it there for `fsdp` to fill.

    **Collective:** every rank of the world must call; process groups are made.

    Raises:
        UserError: as `shard_moe`.
    """
    use = ExpertUse(device_type, compute_dtype, expert_mode, tokens_per_rank)
    sharded = _plan(model, ep_size, kernel, expert_dp, use)
    for name, module in find_expert_modules(model).items():
        num_local = len(local_expert_range(module.num_experts, sharded.mesh))
        parts = {p: getattr(module, p).detach()[:num_local] for p in PROJECTIONS}
        weights = {p: wrap_local_experts(part, sharded.mesh) for p, part in parts.items()}
        _swap(sharded, name, module, weights)
    return sharded


def _plan(
    model: "PreTrainedModel", ep_size: int, kernel: str, expert_dp: str, use: ExpertUse
) -> ShardedMoE:
    """Make the mesh and select the kernel; no experts are swapped yet."""
    _check_choice("expert_dp", expert_dp, _EXPERT_DP)
    modules = find_expert_modules(model)
    mesh = build_mesh(_common_mesh_sizes(modules, ep_size), use.device_type)
    first = next(iter(modules.values()))
    backend = select_for_all_ranks(kernel, use.shapes(model, first, ep_size))
    return ShardedMoE(model, mesh, {}, expert_dp, backend)


def _check_choice(name: str, value: str, wanted: Sequence[str]) -> None:
    if value not in wanted:
        raise ConfigurationError(
            f"{name} is {value}, but it must be {join_words(wanted)}.", parameters=(name,)
        )


def _swap(
    sharded: ShardedMoE, name: str, module: ExpertsModule, weights: dict[str, DTensor]
) -> None:
    experts = DroplessExperts(
        **weights, mesh=sharded.mesh, backend=sharded.kernel.run, activation=module.act_fn
    )
    sharded.expert_modules[name] = experts
    sharded.model.set_submodule(name, experts)


class _ExpertSource:
    """Where the experts' weights come from: the model itself, or slices of a checkpoint."""

    def __init__(
        self,
        model: "PreTrainedModel",
        checkpoint: str | Path | None,
        mesh: DeviceMesh,
        device: torch.device,
    ):
        self.reader: SliceReader | None = None
        if checkpoint is not None:
            folder = resolve_checkpoint_folder(str(checkpoint))
            # Rounded once, to the dtype of each parameter, as transformers does it.
            index = open_checkpoint(folder, dtype=torch.float32)
            self.reader = SliceReader(index, ModelLayout(model, index))
        self.mesh = mesh
        self.device = device

    def take(self, name: str, module: ExpertsModule) -> dict[str, DTensor]:
        """Return the DTensors of one experts module, this rank's part on its device."""
        if self.reader is None:
            return {p: self._split(getattr(module, p).detach(), name) for p in PROJECTIONS}
        mine = local_expert_range(module.num_experts, self.mesh)
        shapes = {f"{name}.{p}": tuple(getattr(module, p).shape) for p in PROJECTIONS}
        weights = load_experts(self.reader, shapes, mine, module.gate_up_proj.dtype)
        return {
            p: wrap_local_experts(weights[f"{name}.{p}"].to(self.device), self.mesh)
            for p in PROJECTIONS
        }

    def _split(self, weights: Tensor, name: str) -> DTensor:
        if weights.is_meta:
            raise ConfigurationError(
                f"{name} has no weights (it is on the meta device); pass checkpoint_name_or_path.",
                parameters=("checkpoint_name_or_path",),
            )
        local = distribute_experts(weights, self.mesh).to_local()
        return wrap_local_experts(local.to(self.device), self.mesh)


def _holds_experts(module: nn.Module) -> TypeGuard[ExpertsModule]:
    weights = [getattr(module, name, None) for name in PROJECTIONS]
    return all(isinstance(w, nn.Parameter) and w.dim() == 3 for w in weights)


def _refuse_foreign_layout(name: str, module: ExpertsModule) -> None:
    """Refuse experts that are not (E, 2 * I, H) gate-then-up and (E, H, I) without bias."""
    flags = {
        "is_transposed": False,
        "has_bias": False,
        "has_gate": True,
        "is_concatenated": True,
        "has_post_expert_norm": False,
    }
    for flag, wanted in flags.items():
        seen = getattr(module, flag, wanted)
        if seen != wanted:
            raise ConfigurationError(
                f"the experts of {name} have {flag}={seen}, but only {wanted} is supported."
            )


def _common_mesh_sizes(modules: dict[str, ExpertsModule], ep_size: int) -> MeshSizes:
    counts = {module.num_experts for module in modules.values()}
    sizes = [compute_mesh_sizes(dist.get_world_size(), ep_size, count) for count in counts]
    return sizes[0]


def _local_device(device_type: str) -> torch.device:
    if device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device_type)
