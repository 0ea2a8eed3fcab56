"""The experts of one layer as a dropless MoE (dMoE) over concatenated, sharded weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from megablocks_utils.kernels.backends.backend import ExpertBackend
from megablocks_utils.kernels.gate import build_gate
from megablocks_utils.kernels.permute import (
    ExpertOrder,
    permute_tokens,
    sort_by_expert,
    unpermute_and_combine,
)
from megablocks_utils.kernels.weights import ExpertWeights, LowRank
from megablocks_utils.mesh.device_mesh import EP_AXIS, axis_size
from megablocks_utils.mesh.placement import local_tensor
from megablocks_utils.mesh.token_exchange import (
    ExchangeCounts,
    combine_rows,
    dispatch_rows,
    exchange_counts,
    plan_dispatch,
)
from megablocks_utils.moe.expert_lora import ExpertLora


class DroplessExperts(nn.Module):
    """Send each token to its experts wherever they are, run them, and bring the results back.

    Takes the place of a transformers `experts` module and has its call:
    `(hidden_states (T, H), top_k_index (T, K), top_k_weights (T, K)) -> (T, H)`.

    Attributes:
        gate_up_proj: (E, 2 * I, H) DTensor, Shard(0) on `ep`; gate rows first, then up.
        down_proj: (E, H, I) DTensor, Shard(0) on `ep`.
        gate_up_proj_lora: adapters of the first; None without.
        down_proj_lora: adapters of the second; None without.
        exchange_counts: finds out who sends how many rows to whom; a run that is only rehearsed
            assumes it instead (see `rehearsal`).
    """

    gate_up_proj_lora: ExpertLora | None
    down_proj_lora: ExpertLora | None

    def __init__(
        self,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        *,
        mesh: DeviceMesh,
        backend: ExpertBackend,
        activation: Callable[[Tensor], Tensor],
    ) -> None:
        """Take the weights as they are: DTensors on the `ep` axis of `mesh`."""
        super().__init__()
        self.gate_up_proj = nn.Parameter(gate_up_proj)
        self.down_proj = nn.Parameter(down_proj)
        self.register_module("gate_up_proj_lora", None)
        self.register_module("down_proj_lora", None)
        self.num_experts = gate_up_proj.shape[0]
        self.mesh = mesh
        self.exchange_counts: ExchangeCounts = exchange_counts
        self.backend = backend
        self.gate = build_gate(activation)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Apply the experts to this rank's tokens.

        The weights are cast to the dtype of the tokens, which is the dtype of compute: a no-op
        where FSDP gathered them in that dtype already.

        **Collective:** three all-to-alls on the `ep` axis (counts, rows out, rows back) and two in
        backward, none where it has one rank; every rank of the axis must call, also with no token.
        """
        # Not `mesh[EP_AXIS]`, which makes a new mesh each time.
        group, ep_size = self.mesh.get_group(EP_AXIS), axis_size(self.mesh, EP_AXIS)
        # A copy of its own, which selective checkpointing keeps: what is recomputed in backward
        # must be routed as the rows were that other ranks hold.
        order = sort_by_expert(top_k_index.clone(), self.num_experts)
        experts = self.local_weights(hidden_states.dtype)
        if ep_size == 1:
            return self.backend(hidden_states, order, top_k_weights, experts)
        plan = plan_dispatch(self.exchange_counts(order.tokens_per_expert, group, ep_size))
        rows = dispatch_rows(permute_tokens(hidden_states, order), plan, group)
        received = ExpertOrder(plan.expert_major, plan.rank_major, plan.tokens_per_expert, top_k=1)
        rows = self.backend(rows, received, None, experts)
        return unpermute_and_combine(combine_rows(rows, plan, group), top_k_weights, order)

    def local_weights(self, dtype: torch.dtype) -> ExpertWeights:
        """Return the experts that this rank computes with, cast to the dtype of compute."""
        return self.stored_weights().map_tensors(lambda tensor: tensor.to(dtype))

    def stored_weights(self) -> ExpertWeights:
        """Return the experts that this rank computes with, as they are: nothing is copied."""
        return ExpertWeights(
            local_tensor(self.gate_up_proj),
            local_tensor(self.down_proj),
            self.gate,
            gate_up_lora=_local_lora(self.gate_up_proj_lora),
            down_lora=_local_lora(self.down_proj_lora),
        )

    def extra_repr(self) -> str:
        """Show sizes and the mesh in the printed model."""
        num_experts, twice_intermediate, hidden_size = self.gate_up_proj.shape
        return (
            f"num_experts={num_experts}, hidden_size={hidden_size}, "
            f"intermediate_size={twice_intermediate // 2}, ep_size={axis_size(self.mesh, EP_AXIS)}"
        )


def _local_lora(lora: ExpertLora | None) -> LowRank | None:
    return None if lora is None else lora.local()
