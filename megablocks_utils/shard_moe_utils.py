"""Give a transformers MoE model expert parallelism: `shard_moe`.

Only the `experts` module of each MoE layer is swapped. Router, shared experts and the auxiliary
loss stay transformers' own.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from megablocks_utils.checkpoint.expert_source import ExpertSource
from megablocks_utils.config.dispatch_cost import DISPATCH_CHOICES, DispatchChoice
from megablocks_utils.config.values import join_words
from megablocks_utils.errors import ConfigurationError
from megablocks_utils.kernels.selection.rank_agreement import select_for_all_ranks
from megablocks_utils.mesh.device_mesh import (
    EP_AXIS,
    EXPERT_TP_AXIS,
    MeshSizes,
    axis_size,
    build_mesh,
    compute_mesh_sizes,
)
from megablocks_utils.mesh.placement import (
    distribute_experts,
)
from megablocks_utils.moe.dropless_experts import DroplessExperts
from megablocks_utils.moe.expert_spec import ExpertSpec, find_expert_modules, read_expert_specs
from megablocks_utils.moe.expert_use import ExpertUse
from megablocks_utils.moe.model_facts import find_top_k
from megablocks_utils.moe.once_per_rank import choose_layer_dispatch
from megablocks_utils.moe.sharded_moe import ShardedMoE
from megablocks_utils.moe.weighted_before import route_before_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DEVICE_TYPES, _EXPERT_DP = ("cpu", "cuda"), ("shard", "replicate")

# How transformers calls the classes of experts and of their blocks.
_EXPERT_CLASS = re.compile(r"(Experts?|Mo[Ee](Block|Layer|MLP)?|SparseMLP)$")


class _Grid(NamedTuple):
    """Sizes of the mesh that a caller gives; the dp axis has what they leave."""

    ep_size: int
    dp_replicate_size: int
    expert_tp_size: int


def require_experts(model: "PreTrainedModel") -> dict[str, ExpertSpec]:
    """Return what the experts of every MoE layer are: qualified name of the module -> spec.

    Raises:
        ConfigurationError: the model has no experts, or none that can be split.
    """
    modules = find_expert_modules(model)
    if modules:
        return read_expert_specs(modules)
    classes = sorted({type(module).__name__ for module in model.modules()})
    foreign = [name for name in classes if _EXPERT_CLASS.search(name)]
    model_type = model.config.model_type
    if foreign:
        raise ConfigurationError(
            f"the experts of model type {model_type} ({foreign[0]}) do not follow transformers' "
            "experts interface, and expert parallelism splits only those that do."
        )
    raise ConfigurationError(f"model type {model_type} has no experts that could be split.")


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
    dp_replicate_size: int = 1,
    token_dispatch: str = "auto",
    expert_tp_size: int = 1,
) -> ShardedMoE:
    """Split the experts of a transformers MoE model over the ranks, in place.

    **Collective:** every rank must call; process groups are made, no weights move.

    Args:
        model: with its weights, the same on every rank; or on the meta device, with
            `checkpoint_name_or_path`.
        ep_size: ranks the experts of a layer are split over.
        checkpoint_name_or_path: folder or Hub name of which each rank reads its own experts; None
            takes them from the model.
        kernel: `auto`, or the name of a backend: `eager`, `grouped_mm`, `triton`, `scattermoe` or
            `megablocks`. All ranks run what rank 0 selects.
        expert_dp: what the dp axis does with an expert: `shard` it (FSDP2) or `replicate` it.
        device_type: `cpu` or `cuda`; None takes cuda where there is one.
        compute_dtype: dtype the experts will be computed in; None is that of the weights.
        on_layer: called with 1 after each layer, for a progress bar.
        expert_mode: for the selection of the kernel, which parameters of experts are trained:
            "full" all weights, "frozen" none, "lora" adapters.
        tokens_per_rank: about how many tokens a rank has at a time; for measurements of kernels.
        dp_replicate_size: groups of ranks that each hold all experts: a first mesh axis.
        token_dispatch: `rows` sends a token once for each expert, `tokens` once for each rank that
            has experts of its; `auto` takes what is fewer bytes.
        expert_tp_size: ranks that each expert is split over.

    Raises:
        UserError: no process group, an unsupported model, value or kernel, sizes that do not
            divide, or expert weights that are missing or mis-shaped.
    """
    if not dist.is_initialized():
        raise ConfigurationError(
            "shard_moe needs torch.distributed to be initialised; launch with torchrun, or call "
            "torch.distributed.init_process_group first."
        )
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_choice("device_type", device_type, _DEVICE_TYPES)
    use = ExpertUse(device_type, compute_dtype, expert_mode, tokens_per_rank)
    sizes = ep_size, dp_replicate_size, expert_tp_size
    sharded = _plan(model, _Grid(*sizes), kernel, expert_dp, use)
    choose = _dispatch_chooser(model, token_dispatch, sharded.mesh, compute_dtype)
    where = sharded.mesh, _local_device(device_type)
    source = ExpertSource(model, checkpoint_name_or_path, *where)
    for name, spec in require_experts(model).items():
        _swap(sharded, name, spec, source.take(name, model.get_submodule(name), spec), choose(spec))
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
    dp_replicate_size: int = 1,
    token_dispatch: str = "auto",
    expert_tp_size: int = 1,
    weight_format: str | None = None,
) -> ShardedMoE:
    """Do what `shard_moe` does for a model on meta, and leave it there for `fsdp` to fill.

    **Collective:** every rank of the world must call; process groups are made.

    Args are those of `shard_moe`, and `weight_format`: what the projections are packed in when they
    are filled, or None.

    Raises:
        UserError: as `shard_moe`.
    """
    use = ExpertUse(device_type, compute_dtype, expert_mode, tokens_per_rank, weight_format)
    grid = _Grid(ep_size, dp_replicate_size, expert_tp_size)
    specs = require_experts(model)
    for spec in specs.values():
        spec.check_slices(expert_tp_size, weight_format)
    sharded = _plan(model, grid, kernel, expert_dp, use)
    choose = _dispatch_chooser(model, token_dispatch, sharded.mesh, compute_dtype)
    for name, spec in specs.items():
        module = model.get_submodule(name)
        weights = {
            p: distribute_experts(
                module.get_parameter(p).detach()[: spec.num_experts],
                sharded.mesh,
                spec.find_split(p),
            )
            for p in spec.parameter_names
        }
        _swap(sharded, name, spec, weights, choose(spec), weight_format)
    return sharded


def _plan(
    model: "PreTrainedModel", grid: _Grid, kernel: str, expert_dp: str, use: ExpertUse
) -> ShardedMoE:
    """Make the mesh and select the kernel; no experts are swapped yet."""
    _check_choice("expert_dp", expert_dp, _EXPERT_DP)
    specs = require_experts(model)
    mesh = build_mesh(_common_mesh_sizes(specs.values(), grid), use.device_type)
    first = next(iter(specs))
    dtype = model.get_submodule(first).get_parameter("down_proj").dtype
    kinds = {spec.kind: spec for spec in reversed(specs.values())}
    top_k = find_top_k(model)
    sizes = grid.ep_size, grid.expert_tp_size
    shapes, *others = (use.shapes(spec, dtype, top_k, *sizes) for spec in reversed(kinds.values()))
    backend = select_for_all_ranks(kernel, shapes, others)
    return ShardedMoE(model, mesh, {}, expert_dp, backend)


def _check_choice(name: str, value: str, wanted: Sequence[str]) -> None:
    if value not in wanted:
        raise ConfigurationError(
            f"{name} is {value}, but it must be {join_words(wanted)}.", parameters=(name,)
        )


def _dispatch_chooser(
    model: "PreTrainedModel", wanted: str, mesh: DeviceMesh, compute_dtype: torch.dtype | None
) -> Callable[[ExpertSpec], DispatchChoice]:
    """Return what chooses how the tokens of a layer travel."""
    _check_choice("token_dispatch", wanted, DISPATCH_CHOICES)
    top_k, ep_size = find_top_k(model), axis_size(mesh, EP_AXIS)
    first = next(iter(find_expert_modules(model).values()))
    dtype = compute_dtype or first.get_parameter("down_proj").dtype
    return lambda spec: choose_layer_dispatch(
        wanted,
        spec,
        top_k=top_k,
        ep_size=ep_size,
        dtype=dtype,
        expert_tp_size=axis_size(mesh, EXPERT_TP_AXIS),
    )


def _swap(
    sharded: ShardedMoE,
    name: str,
    spec: ExpertSpec,
    weights: dict[str, DTensor],
    dispatch: DispatchChoice,
    weight_format: str | None = None,
) -> None:
    """Put ours in the place of transformers' module of experts."""
    module = sharded.model.get_submodule(name)
    experts = DroplessExperts(
        spec,
        weights,
        mesh=sharded.mesh,
        backend=sharded.kernel.run_for(weight_format),
        post_expert_norm=module.get_submodule("post_expert_norm") if spec.has_post_norm else None,
        dispatch=dispatch,
        weight_format=weight_format,
    )
    for parameter_name in spec.parameter_names:
        is_trained = module.get_parameter(parameter_name).requires_grad
        experts.get_parameter(parameter_name).requires_grad_(is_trained)
    sharded.expert_modules[name] = experts
    sharded.model.set_submodule(name, experts)
    if spec.is_weighted_before:
        route_before_experts(sharded.model.get_submodule(name.rpartition(".")[0]))


def _common_mesh_sizes(specs: Iterable[ExpertSpec], grid: _Grid) -> MeshSizes:
    world_size, counts = dist.get_world_size(), dict[int, None]()
    for spec in specs:
        spec.check_slices(grid.expert_tp_size)
        counts[spec.num_experts] = None
    sizes = [
        compute_mesh_sizes(
            world_size, grid.ep_size, num_experts, grid.dp_replicate_size, grid.expert_tp_size
        )
        for num_experts in counts
    ]
    return sizes[0]


def _local_device(device_type: str) -> torch.device:
    if device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device_type)
