"""What `shard_moe` returns: a model whose experts are split, and what others must know of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from megablocks_utils.kernels.selection.backend_selection import LoadedBackend
from megablocks_utils.moe.dropless_experts import DroplessExperts
from megablocks_utils.moe.expert_slots import ExpertSlots

__all__ = ["ShardedMoE", "find_slots"]


@dataclass
class ShardedMoE:
    """A model whose experts are split over the mesh, and what FSDP must know of it.

    Attributes:
        model: the model given, with its experts swapped in place.
        mesh: axes ("dp", "ep"), ep innermost.
        expert_modules: qualified name -> module; what FSDP1 ignores and FSDP2 wraps on "dp".
        expert_dp: what the dp axis does with an expert, "shard" or "replicate".
        kernel: the backend that runs the experts, and why.
    """

    model: nn.Module
    mesh: DeviceMesh
    expert_modules: dict[str, DroplessExperts]
    expert_dp: str
    kernel: LoadedBackend

    def use_kernel(self, kernel: LoadedBackend) -> None:
        """Run the experts on another backend from now on."""
        self.kernel = kernel
        for module in self.expert_modules.values():
            module.backend = kernel.run_for(module.weight_format)

    def place_experts(self, placed: Mapping[str, Sequence[int]]) -> None:
        """Say which expert each slot holds, before any weight or adapter is there.

        Args:
            placed: by name of the module, the experts rank by rank; the same on every rank.
        """
        device = torch.device(self.mesh.device_type)
        for name, experts in placed.items():
            module = self.expert_modules[name]
            assert len(experts) == module.num_experts, (name, experts)
            module.slots = ExpertSlots.build(experts, device)

    def describe_dispatch(self) -> str:
        """Say how tokens travel, and why; in layers that differ, each way once."""
        choices = dict.fromkeys(module.dispatch for module in self.expert_modules.values())
        return "; ".join(f"{choice.name}: {choice.reason}" for choice in choices)

    @property
    def expert_parameters(self) -> dict[str, DTensor]:
        """The experts' weights and adapters as they are now: name -> DTensor, Shard(0) on "ep".

        A norm behind the experts is not among them: see `post_expert_norms`. FSDP2 replaces the
        parameters it shards, so this looks them up each time.
        """
        parameters: dict[str, DTensor] = {}
        for name, module in self.expert_modules.items():
            norm = module.post_expert_norm
            dense = set() if norm is None else set(norm.parameters())
            for parameter_name, parameter in module.named_parameters():
                if parameter in dense:
                    continue
                assert isinstance(parameter, DTensor), f"{name}.{parameter_name}"
                parameters[f"{name}.{parameter_name}"] = parameter
        return parameters

    @property
    def post_expert_norms(self) -> dict[str, nn.Module]:
        """The norms behind experts, by qualified name: dense modules inside `expert_modules`.

        Few models have them. FSDP must shard them before it is told to leave the experts alone.
        """
        return {
            f"{name}.post_expert_norm": module.post_expert_norm
            for name, module in self.expert_modules.items()
            if module.post_expert_norm is not None
        }


def find_slots(model: nn.Module) -> dict[nn.Parameter, ExpertSlots]:
    """Return where the experts lie of each parameter whose dim 0 is not in the model's order.

    By the parameters as they are now: FSDP2 replaces those it shards.
    """
    return {
        parameter: module.slots
        for module in model.modules()
        if isinstance(module, DroplessExperts) and module.slots is not None
        for name, parameter in module.named_parameters()
        if not name.startswith("post_expert_norm.")
    }
