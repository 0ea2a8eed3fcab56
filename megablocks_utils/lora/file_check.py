"""Check a written adapter against what the ranks hold: nothing lost, no expert in another's place.

Saved adapters of other trainers hold one rank's part and zeros, or experts out of order, and nobody
notices: the file loads. Here every rank measures its own part of every expert's adapter before
anything is gathered, and the file must have the same norms, expert by expert.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from megablocks_utils.lora.adapter_reader import open_adapter
from megablocks_utils.lora.expert_adapters import lora_name
from megablocks_utils.lora.settings import LoraSettings
from megablocks_utils.mesh.device_mesh import DP_AXIS
from megablocks_utils.mesh.placement import count_replicas, local_expert_range, local_tensor
from megablocks_utils.moe.sharded_moe import ShardedMoE

# The same numbers, added up in fp64 in another order.
_BOUND = 1e-9


class AdapterCheckError(RuntimeError):
    """Report a written adapter that is not what was trained: a defect of ours, exit code 1."""


@dataclass(frozen=True)
class ExpertNorms:
    """Hold what the ranks together have of one projection's adapters.

    Attributes:
        lora_a: (E,) fp64, squared norm of each expert's A.
        lora_b: (E,) likewise of B.
        has_moved: (E,) bool, whether the optimizer has seen a gradient of the expert's B.
    """

    lora_a: Tensor
    lora_b: Tensor
    has_moved: Tensor


def measure_experts(
    sharded: ShardedMoE, settings: LoraSettings, states: Mapping[Tensor, Mapping[str, Tensor]]
) -> dict[str, ExpertNorms]:
    """Measure every expert's adapters where they lie: `model.layers.0.mlp.experts.down_proj` -> ...

    **Collective:** one all-reduce a projection over the world; every rank must call.

    Args:
        sharded: what `shard_moe` returned.
        settings: of its adapters.
        states: the optimizer's states: Adam's `exp_avg_sq`, or Muon's momentum, is not zero where a
            gradient has been.
    """
    found = {}
    for name, module in sharded.expert_modules.items():
        for projection in module.spec.projections if settings.expert_ranks else ():
            lora = getattr(module, lora_name(projection))
            state = states.get(lora.lora_B, {})
            moment = state.get("exp_avg_sq", state.get("momentum_buffer"))
            parts = [
                _square_norms(lora.lora_A, lora.lora_A, sharded),
                _square_norms(lora.lora_B, lora.lora_B, sharded),
                _square_norms(moment, lora.lora_B, sharded),
            ]
            norms = torch.stack(parts)
            dist.all_reduce(norms)
            if module.slots is not None:
                norms = module.slots.to_model_order(norms.T).T
            lora_a, lora_b, moved = norms.cpu()
            found[f"{name}.{projection}"] = ExpertNorms(lora_a, lora_b, moved > 0)
    return found


def check_files(
    folder: Path, base_model: PreTrainedModel, measured: Mapping[str, ExpertNorms]
) -> None:
    """Compare the files with the model's structure and with what was measured.

    Args:
        folder: the adapter's.
        base_model: the plain model, on meta: it says which tensors of which shapes there must be.
        measured: from `measure_experts`, with `has_moved` False where nothing could move.

    Raises:
        AdapterCheckError: an expert's adapter is not the one that was trained, or zero though it
            was trained.
        CheckpointError: tensors are missing, too many or of another shape.
    """
    reader = open_adapter(folder, base_model)
    for name, norms in measured.items():
        lora_a, lora_b = reader.experts(name, range(len(norms.lora_a)))
        for side, written, wanted in (("A", lora_a, norms.lora_a), ("B", lora_b, norms.lora_b)):
            found = written.double().square().sum((1, 2))
            _refuse(
                _differing(found, wanted), f"differs from what was trained in lora_{side}", name
            )
        is_zero = ~lora_b.flatten(1).any(1)
        _refuse(norms.has_moved & is_zero, "was trained but is zero in lora_B", name)


def count_trained(measured: Mapping[str, ExpertNorms]) -> tuple[int, int]:
    """Count the adapters of single experts that got gradients, and all of them."""
    return (
        sum(int(norms.has_moved.sum()) for norms in measured.values()),
        sum(len(norms.has_moved) for norms in measured.values()),
    )


def _square_norms(values: Tensor | None, parameter: nn.Parameter, sharded: ShardedMoE) -> Tensor:
    """Return (E,) squared norms of this rank's part; the sum over the world is that of the whole.

    Args:
        values: a tensor laid out as `parameter`; None counts as zero.
        parameter: the adapter.
        sharded: the mesh.
    """
    norms = torch.zeros(parameter.shape[0], dtype=torch.float64, device=parameter.device)
    if values is None:
        return norms
    local = local_tensor(values.detach())
    mine = local_expert_range(parameter.shape[0], sharded.mesh)
    first = mine.start
    if len(local) < len(mine):  # whole experts over dp
        num_chunk = -(-len(mine) // sharded.mesh[DP_AXIS].size())
        first += sharded.mesh.get_local_rank(DP_AXIS) * num_chunk
    own = local.double().square().flatten(1).sum(1) / count_replicas(
        parameter, dist.get_world_size()
    )
    norms[first : first + len(own)] = own
    return norms


def _differing(found: Tensor, wanted: Tensor) -> Tensor:
    return (found - wanted).abs() > _BOUND * wanted


def _refuse(is_bad: Tensor, what: str, name: str) -> None:
    experts = list(_numbers(is_bad))
    if experts:
        which = ", ".join(map(str, experts[:8])) + (", ..." if len(experts) > 8 else "")
        noun = "expert" if len(experts) == 1 else "experts"
        raise AdapterCheckError(f"the adapter of {name}, {noun} {which}, {what}")


def _numbers(mask: Tensor) -> Iterator[int]:
    yield from mask.nonzero().flatten().tolist()
