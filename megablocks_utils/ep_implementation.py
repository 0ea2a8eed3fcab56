"""Run this project's exchange and kernels inside transformers' own expert parallelism.

transformers splits the experts and loads them, as `DistributedConfig(ep_size=...)` says, and hands
each experts module to the class that its `ep_implementation` names.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from megablocks_utils.config.backends import AUTO
from megablocks_utils.ep_workarounds import mend_transformers
from megablocks_utils.kernels.backends.backend import ExpertBackend
from megablocks_utils.kernels.backends.backend_table import BACKENDS
from megablocks_utils.kernels.fused.unpermute import fused_unpermute_and_combine
from megablocks_utils.kernels.permute import (
    count_by_expert,
    sort_counted_rows,
)
from megablocks_utils.kernels.selection.backend_selection import select_and_load_backend
from megablocks_utils.mesh.recomputation import keep
from megablocks_utils.mesh.token_exchange import exchange_counts
from megablocks_utils.moe.dropless_experts import run_where_experts_are
from megablocks_utils.moe.expert_spec import ExpertSpec, read_expert_spec
from megablocks_utils.moe.expert_use import ExpertUse

__all__ = ["register_ep_implementation"]

_NAME = "megablocks_utils"


def register_ep_implementation() -> None:
    """Let every transformers script take this project's expert parallelism.

    After it, `DistributedConfig(ep_size=..., ep_implementation="megablocks_utils")` is valid in
    `from_pretrained`, for every model whose plan splits whole experts. Calling it again changes
    nothing.

    The kernel is the one that `experts_implementation` names where that is one of this project's
    or of its names (`grouped_mm`, `eager`), else what `auto` selects on this machine.

    PEFT 0.21 cannot adapt the experts of such a model: it stops with torch's RuntimeError about
    mixed tensors before anything of this module runs. Its `ParamWrapper` would have to make the
    factors DTensors that are split over the experts as the weight is, with their gradients reduced.

    Two faults of transformers' loading are mended by it: see `ep_workarounds`.
    """
    EPImplementationInterface.register(_NAME, DroplessEP)
    mend_transformers(_NAME)


class DroplessEP(EPImplementation):
    """Bring tokens to their experts by two all-to-alls and run these on this project's kernels.

    As `DroplessExperts` does it. Ranks of a tp group hold the same tokens: each sends its share.
    """

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        """Take a module whose experts are split over `ep_mesh`, or will be."""
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts = experts
        self.spec: ExpertSpec | None = None
        self.backends: dict[torch.dtype, ExpertBackend] = {}

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Apply the experts to this rank's tokens: (T, H), (T, K), (T, K) -> (T, H).

        **Collective:** three all-to-alls on the ep group and two in backward; with tensor
        parallelism an all-gather on the tp group.
        """
        if self.tp_mesh.size() == 1:
            return self._run(hidden_states, top_k_index, top_k_weights)
        inputs = (hidden_states, top_k_index, top_k_weights)
        output = self._run(*(self._take_share(tensor) for tensor in inputs))
        shape = hidden_states.shape
        stride = (shape[1], 1)
        shard = [Shard(0)]
        joined = DTensor.from_local(
            output.contiguous(), self.tp_mesh, shard, shape=shape, stride=stride
        )
        return joined.full_tensor()

    def _take_share(self, tensor: Tensor) -> Tensor:
        """Return this rank's rows of what every rank of the tp group holds."""
        whole = DTensor.from_local(tensor, self.tp_mesh, [Replicate()], run_check=False)
        return whole.redistribute(self.tp_mesh, [Shard(0)]).to_local()

    def _run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        device_type, dtype = hidden_states.device.type, hidden_states.dtype
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            spec = self._read_spec()
            tensors = {name: getattr(self.experts, name) for name in spec.parameter_names}
            experts = spec.build_weights(tensors).map_tensors(lambda tensor: tensor.to(dtype))
            group, ep_size = self.ep_mesh.get_group(), self.ep_mesh.size()
            # Kept as by `DroplessExperts`, under this project's checkpointing.
            top_k_index = keep(top_k_index.contiguous)
            tokens_per_expert = count_by_expert(top_k_index, spec.num_experts * ep_size)
            counts = keep(lambda: exchange_counts(tokens_per_expert, None, group, ep_size))
            order = sort_counted_rows(top_k_index, tokens_per_expert)
            tokens = hidden_states.to(dtype)
            backend = self._find_backend(spec, dtype, device_type)
            rows = run_where_experts_are(tokens, order, counts, group, backend, experts)
            if spec.has_post_norm:
                rows = self.experts.get_submodule("post_expert_norm")(rows)
            return fused_unpermute_and_combine(rows, top_k_weights, order).to(hidden_states.dtype)

    def _read_spec(self) -> ExpertSpec:
        """Return what this rank's experts are; at the first call, when they are all there."""
        if self.spec is None:
            self.spec = read_expert_spec(self.experts)
        return self.spec

    def _find_backend(
        self, spec: ExpertSpec, dtype: torch.dtype, device_type: str
    ) -> ExpertBackend:
        if dtype not in self.backends:
            config: Any = getattr(self.experts, "config", None)
            named = str(getattr(config, "_experts_implementation", "")).removeprefix(f"{_NAME}_")
            shapes = ExpertUse(device_type, None, "full", None).shapes(spec, dtype, None, 1)
            kernel = named if named in BACKENDS else AUTO
            self.backends[dtype] = select_and_load_backend(kernel, shapes).run
        return self.backends[dtype]
