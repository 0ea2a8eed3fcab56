"""Check the selected backend on the user's own weights, on every rank, before the first step."""

import time
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from megablocks_utils.errors import ConfigurationError
from megablocks_utils.kernels.backends.backend import ExpertBackend
from megablocks_utils.kernels.fused.unpermute import (
    find_combine_kernels,
    fused_unpermute_and_combine,
)
from megablocks_utils.kernels.permute import ExpertOrder, permute_tokens
from megablocks_utils.kernels.probing.probe import (
    TOLERANCE,
    Deviation,
    find_unprobed_reason,
    probe_backend,
)
from megablocks_utils.kernels.probing.probe_sample import MAX_EXPERTS
from megablocks_utils.kernels.selection.backend_selection import BackendSelection, load_backend
from megablocks_utils.kernels.weights import ExpertWeights
from megablocks_utils.mesh.device_mesh import EP_AXIS, EXPERT_TP_AXIS, axis_size
from megablocks_utils.moe.dropless_experts import DroplessExperts
from megablocks_utils.moe.sharded_moe import ShardedMoE
from megablocks_utils.processes.agreement import gather_from_all_ranks, raise_on_all_ranks
from megablocks_utils.quantization.packed_experts import PackedExperts

__all__ = ["KernelCheck", "verify_kernel"]


@dataclass(frozen=True)
class KernelCheck:
    """Say what comparing the backend with `eager` found.

    Attributes:
        tensor: what was farthest off on any rank; None if nothing was compared.
        worst: by how much, in units of what rounding explains; above 2 nothing is trained.
        seconds: that it took, on the slowest rank.
        skipped: why nothing was compared; None if it was.
        replaced: which backend `auto` has taken instead of one that failed, and how that one did;
            None if it did not.
    """

    tensor: str | None = None
    worst: float | None = None
    seconds: float | None = None
    skipped: str | None = None
    replaced: str | None = None

    def as_record(self) -> dict[str, Any]:
        """Return what `run.json` holds."""
        return asdict(self)

    def describe(self) -> str:
        """Say it in a line."""
        if self.skipped is not None:
            return f"not compared with eager: {self.skipped}"
        return (
            f"compared with eager before the first step ({self.seconds:.2f} s): at most "
            f"{self.worst:.2f} times as far off as rounding explains ({self.tensor}; "
            f"{TOLERANCE:g} is allowed)"
        )


def verify_kernel(sharded: ShardedMoE, compute_dtype: torch.dtype | None = None) -> KernelCheck:
    """Compare the backend with `eager` on the user's own experts; see `kernels.probing`.

    Of layers whose experts are alike, the first is taken.

    Call it once the experts have their weights, and FSDP, if there is any, has wrapped them.
    Where `auto` selected the backend, and knows another fast one, that takes the place of one that
    fails. Experts that FSDP2 shards over `dp` are gathered for it, and freed again. Weights,
    gradients and the state of every random generator stay as they are. `shard_moe` leaves it to the
    caller, since the weights may come later; the training scripts call it unless `--verify_kernel`
    is False.

    **Collective:** every rank of the world must call.

    Args:
        sharded: what `shard_moe` returned.
        compute_dtype: in which the experts are computed; None is the dtype of their weights.

    Raises:
        ConfigurationError: on every rank, if the backend is off by more than rounding explains on
            any.
        CheckpointError: on every rank, for weights that are not finite.
    """
    try:
        return _verify(sharded, compute_dtype)
    except ConfigurationError as error:
        name = sharded.kernel.alternative
        if name is None:
            raise
        failed, failure = sharded.kernel.name, str(error).partition(";")[0]
    sharded.use_kernel(load_backend(BackendSelection(name, f"auto: {failed} failed its check")))
    replaced = f"{failure}; the experts run on {name} instead."
    return replace(_verify(sharded, compute_dtype), replaced=replaced)


def _verify(sharded: ShardedMoE, compute_dtype: torch.dtype | None) -> KernelCheck:
    modules = _first_of_each_kind(sharded.expert_modules.values())
    weights = modules[0].get_parameter("down_proj")
    name, dtype = sharded.kernel.name, compute_dtype or weights.dtype
    reason = find_unprobed_reason(name, dtype)
    if reason is not None:
        return KernelCheck(skipped=reason)
    started_s = time.perf_counter()
    found = [raise_on_all_ranks(partial(_probe, name, module, dtype)) for module in modules]
    if weights.device.type == "cuda":
        torch.cuda.empty_cache()  # nothing of the run has these sizes
    worst = max(found, key=lambda deviation: deviation.ratio)
    return _join(worst, time.perf_counter() - started_s)


def _first_of_each_kind(modules: Iterable[DroplessExperts]) -> list[DroplessExperts]:
    firsts: dict[Hashable, DroplessExperts] = {}
    for module in modules:
        firsts.setdefault(module.spec.kind, module)
    return list(firsts.values())


def _probe(name: str, module: DroplessExperts, dtype: torch.dtype) -> Deviation:
    is_alone = all(axis_size(module.mesh, axis) == 1 for axis in (EP_AXIS, EXPERT_TP_AXIS))
    has_own_routing = is_alone and module.post_expert_norm is None
    with _gathered(module):
        stored = module.stored_weights()
        weights = stored.map_tensors(_take_plain)
        backend = module.backend
        if module.weight_format is not None:
            backend = partial(_run_packed_ones, backend, stored)
        found = probe_backend(name, backend, weights, dtype, is_weighted=has_own_routing)
        if has_own_routing or find_combine_kernels(weights.down_proj.device, dtype) is None:
            return found
        # What sums rows that came back is a kernel of its own, which no backend calls.
        run = partial(_run_and_combine, backend)
        combined = probe_backend(
            f"{name} (or the sum of its rows)", run, weights, dtype, is_weighted=True
        )
    return max(found, combined, key=lambda deviation: deviation.ratio)


def _take_plain(tensor: Tensor) -> Tensor:
    """Return a tensor; of packed weights the dequantized ones of as many experts as are probed."""
    if not isinstance(tensor, PackedExperts):
        return tensor
    return tensor.dequantize_some(0, min(MAX_EXPERTS, len(tensor)))


def _run_packed_ones(
    backend: ExpertBackend,
    packed: ExpertWeights,
    tokens: Tensor,
    order: ExpertOrder,
    top_k_weights: Tensor | None,
    experts: ExpertWeights,
) -> Tensor:
    """Run the packed weights in the place of those that they stand for."""

    def take(projection: Tensor) -> Tensor:
        assert isinstance(projection, PackedExperts), projection
        return projection.first(len(experts.down_proj)).in_dtype(tokens.dtype)

    gate_up, down = take(packed.gate_up_proj), take(packed.down_proj)
    experts = replace(experts, gate_up_proj=gate_up, down_proj=down)
    return backend(tokens, order, top_k_weights, experts)


def _run_and_combine(
    backend: ExpertBackend,
    tokens: Tensor,
    order: ExpertOrder,
    top_k_weights: Tensor | None,
    experts: ExpertWeights,
) -> Tensor:
    """Run tokens as if their rows had come from another rank, and sum what has come back."""
    rows = backend(permute_tokens(tokens, order), order.of_sorted_rows(), None, experts)
    return fused_unpermute_and_combine(rows, top_k_weights, order)


@contextmanager
def _gathered(module: DroplessExperts) -> Iterator[None]:
    """Give a module that FSDP2 shards over `dp` its whole weights for a while."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def _join(found: Deviation, seconds: float) -> KernelCheck:
    """Return the worst of all ranks, on every rank."""
    answers = gather_from_all_ranks(lambda: (found.ratio, found.tensor, seconds))
    worst, tensor, _ = max(answers)
    return KernelCheck(tensor, worst, max(seconds for *_, seconds in answers))
